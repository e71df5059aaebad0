"""One backbone whose token vectors are pooled, or kept: texts, images, or both in one sequence.

# Shapes: B items, T tokens (words or patches), H hidden size of the backbone, D embedding size
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vembed.errors import CheckpointError, ConfigError
from vembed.models.checkpoint_format import (
    NO_POOLING,
    OWN_POOLING,
    CheckpointSettings,
    write_settings,
)
from vembed.models.layers import LayerTap, check_layer_counts
from vembed.models.options import GIVEN, Choice
from vembed.models.pooling import keep_tokens, pool
from vembed.models.projection import Projection, apply_projections, save_projections
from vembed.models.protocol import Encoder
from vembed.models.weights import save_backbone, take_off_pooler

logger = logging.getLogger(__name__)


class PooledEncoder(Encoder):
    """An item to one vector, or to one for each token, through one transformers model."""

    def __init__(
        self,
        backbone: Any,
        processor: Any,
        *,
        modalities: Collection[str],
        settings: CheckpointSettings,
        projections: Sequence[Projection] = (),
        origins: Mapping[str, str] | None = None,
        image_modules: Sequence[str] = (),
        add_inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        """Assemble an encoder; the loaders do it from a folder.

        Args:
            backbone: A model that returns `last_hidden_state` `[B, T, H]`. Its pooler is taken off
                unless it does the pooling.
            processor: Makes the backbone's inputs.
            modalities: Letters of what it embeds.
            settings: As resolved: pooling_method and normalize are set.
            projections: Linear layers after pooling, or on each token.
            origins: Where each setting came from, for `describe`.
            image_modules: Parts of the backbone that only images go through, by attribute name.
            add_inputs: Makes inputs that the backbone needs beside those of the processor.

        Raises:
            ConfigError: if token vectors are not to have length one.
        """
        super().__init__()
        self.pooling_method = str(settings.pooling_method)
        # Otherwise no embedding uses the pooler: left in place, its parameters would get no
        # gradient, which data parallelism takes for a bug.
        pools_itself = self.pooling_method == OWN_POOLING
        self._pooler = {} if pools_itself else take_off_pooler(backbone)
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.processor = processor
        self.modalities = frozenset(modalities)
        self.model_type = backbone.config.model_type
        self.hidden_size: int = backbone.config.get_text_config().hidden_size
        self.embedding_dim = projections[-1].out_features if projections else self.hidden_size
        self.normalize = bool(settings.normalize)
        self._unit_length(None)
        self._settings = settings
        self._origins = dict(origins or {})
        self._image_modules = tuple(image_modules)
        self._add_inputs = add_inputs

    def forward(  # type: ignore[override] # no input of a model is called `layers`
        self,
        *,
        normalize: bool | None = None,
        layers: Sequence[int] = (),
        **inputs: Tensor,
    ) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider; with pooling `none`, token vectors `[B, T, D]`.

        Every real token is kept: words, special tokens, prompts and chat templates, patches.

        Args:
            normalize: Unit length or not; None takes the encoder's own.
            layers: Numbers of layers: the result is `[B, L + 1, D]`, what a model of the first so
                many would give, then the embedding. See `check_layers`.
            inputs: What the processor makes. Without `attention_mask` `[B, T]` every token counts.

        Raises:
            ConfigError: if `normalize` is False and tokens are kept: a token of length zero is
                padding, and late interaction compares cosines.
        """
        unit = self._unit_length(normalize)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(_weight_type(self.backbone))
        added = self._add_inputs(inputs) if self._add_inputs is not None else {}
        if layers:
            return self._embed_layers(inputs | added, layers, unit)
        output = self.backbone(**inputs, **added)
        if self.pooling_method == OWN_POOLING:
            return self._finish(output.pooler_output, unit)
        hidden_BTH = output.last_hidden_state
        mask_BT = _mask_of(inputs, hidden_BTH)
        if self.pooling_method == NO_POOLING:
            return keep_tokens(self._finish(hidden_BTH, unit), mask_BT)
        return self._finish(pool(self.pooling_method, hidden_BTH, mask_BT), unit)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ConfigError unless `forward` can give what fewer layers would."""
        if self.pooling_method in (NO_POOLING, OWN_POOLING) or len(self.modalities) > 1:
            raise ConfigError(
                "mrl_layers: needs a model of texts or of images whose tokens are pooled to one "
                f"vector. Received: one of {'/'.join(sorted(self.modalities))} with "
                f"pooling_method {self.pooling_method}"
            )
        check_layer_counts(self.backbone, layers)

    def _embed_layers(self, inputs: dict[str, Tensor], layers: Sequence[int], unit: bool) -> Tensor:
        tap = LayerTap(self.backbone, layers)
        with tap.attached():
            last_BTH = self.backbone(**inputs).last_hidden_state
        mask_BT = _mask_of(inputs, last_BTH)
        states = [*(tap.hidden(count, last_BTH) for count in layers), last_BTH]
        pooled = [self._finish(pool(self.pooling_method, s, mask_BT), unit) for s in states]
        return torch.stack(pooled, dim=1)

    def _finish(self, vectors: Tensor, unit: bool) -> Tensor:
        projected = apply_projections(self.projections, vectors)
        return F.normalize(projected, dim=-1) if unit else projected

    def _unit_length(self, normalize: bool | None) -> bool:
        unit = self.normalize if normalize is None else normalize
        if not unit and self.pooling_method == NO_POOLING:
            raise ConfigError(
                "normalize_embeddings: token vectors (pooling_method none) have unit length, "
                "because late interaction compares cosines. Received: false. Leave it unset"
            )
        return unit

    def restrict_to(self, modalities: Collection[str]) -> None:
        """Freeze the parts that only images go through, when none of `modalities` has images."""
        if not set(modalities) & {"i", "m"}:
            self.freeze("image")

    def freeze(self, tower: str) -> None:
        """Stop training one half of a backbone with an image half: `"image"`, or `"text"`."""
        images = [p for name in self._image_modules for p in self._part(name).parameters()]
        own = {id(parameter) for parameter in images}
        for parameter in self.backbone.parameters():
            if (id(parameter) in own) == (tower == "image"):
                parameter.requires_grad_(False)

    def describe(self) -> dict[str, str | int]:
        """What it is and where each setting came from, for the log."""
        shown = {
            "pooling_method": self.pooling_method,
            "normalize": "yes" if self.normalize else "no",
            **self.processor.describe(),
        }
        return {
            **describe_weights(self, self.backbone),
            **{
                name: f"{text} ({self._origins[name]})" if name in self._origins else text
                for name, text in shown.items()
            },
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that sentence-transformers, transformers and vembed read alike.

        LoRA adapters are merged into a copy on the CPU; this encoder's own weights stay as they
        are.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_backbone(self.backbone, folder, self._pooler)
        self.processor.save_pretrained(folder)
        settings = replace(
            self.processor.complete(self._settings),
            backbone_folder=folder,
            pooling_method=self.pooling_method,
            normalize=self.normalize,
            dense_folders=save_projections(
                self.projections, folder, pooling_method=self.pooling_method
            ),
        )
        write_settings(folder, settings, hidden_size=self.hidden_size)

    def _part(self, name: str) -> nn.Module:
        part: nn.Module = getattr(self.backbone, name)
        return part


def check_token_rules(pooling: Choice, stored: CheckpointSettings) -> None:
    """See that a late-interaction model is not taken for one that it is not.

    Raises:
        CheckpointError: if the checkpoint says of more than padding that it does not count, or adds
            tokens that do, and the caller has not asked for pooling `none`.
    """
    if pooling.value != NO_POOLING or not stored.token_rules:
        return
    rules = ", ".join(stored.token_rules)
    where = stored.backbone_folder
    if pooling.origin != GIVEN:
        raise CheckpointError(
            f"{where}: the model follows rules about tokens that vembed has not: {rules}. Set "
            f"pooling_method: none to use it without them, with all tokens of every text"
        )
    logger.warning("%s: not followed by vembed: %s; all tokens count", where, rules)


def _mask_of(inputs: Mapping[str, Tensor], hidden_BTH: Tensor) -> Tensor:
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None:
        return torch.ones(hidden_BTH.shape[:2], device=hidden_BTH.device)
    return mask_BT


def _weight_type(backbone: nn.Module) -> torch.dtype:
    return next(backbone.parameters()).dtype


def describe_weights(encoder: Encoder, backbone: Any) -> dict[str, str | int]:
    """The facts about an encoder's weights that `describe` starts with."""
    return {
        "model_type": encoder.model_type,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "embedding_dim": encoder.embedding_dim,
        "dtype": str(_weight_type(backbone)).removeprefix("torch."),
        "attention": str(backbone.config._attn_implementation),
    }
