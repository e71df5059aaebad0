"""One backbone whose token vectors are pooled to one: texts, images, or both in one sequence.

# Shapes: B items, T tokens (words or patches), H hidden size of the backbone, D embedding size
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vembed.models.checkpoint_format import OWN_POOLING, CheckpointSettings, write_settings
from vembed.models.pooling import pool
from vembed.models.projection import Projection, apply_projections, save_projections
from vembed.models.protocol import Encoder
from vembed.models.weights import save_backbone, take_off_pooler


class PooledEncoder(Encoder):
    """An item to one vector, through one transformers model."""

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
            projections: Linear layers after pooling.
            origins: Where each setting came from, for `describe`.
            image_modules: Parts of the backbone that only images go through, by attribute name.
            add_inputs: Makes inputs that the backbone needs beside those of the processor.
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
        self._settings = settings
        self._origins = dict(origins or {})
        self._image_modules = tuple(image_modules)
        self._add_inputs = add_inputs

    def forward(self, *, normalize: bool | None = None, **inputs: Tensor) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider.

        Args:
            normalize: Unit length or not; None takes the encoder's own.
            inputs: What the processor makes. Without `attention_mask` `[B, T]` every token counts.
        """
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(_weight_type(self.backbone))
        added = self._add_inputs(inputs) if self._add_inputs is not None else {}
        output = self.backbone(**inputs, **added)
        if self.pooling_method == OWN_POOLING:
            embedding_BD = output.pooler_output
        else:
            hidden_BTH = output.last_hidden_state
            mask_BT = inputs.get("attention_mask")
            if mask_BT is None:
                mask_BT = torch.ones(hidden_BTH.shape[:2], device=hidden_BTH.device)
            embedding_BD = pool(self.pooling_method, hidden_BTH, mask_BT)
        embedding_BD = apply_projections(self.projections, embedding_BD)
        unit = self.normalize if normalize is None else normalize
        return F.normalize(embedding_BD, dim=-1) if unit else embedding_BD

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
