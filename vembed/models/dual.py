"""Dual towers: CLIP, SigLIP, SigLIP 2, which embed texts and images into one space.

# Shapes: B items, D embedding size
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vembed.errors import CheckpointError, ConfigError, DataError
from vembed.models.checkpoint_format import (
    OWN_POOLING,
    CheckpointSettings,
    read_settings,
    write_settings,
)
from vembed.models.fusion import fuse, split_inputs
from vembed.models.image_processor import ImageProcessor, load_image_processor
from vembed.models.options import choose, origins_of, values_of
from vembed.models.pooled import describe_weights
from vembed.models.processor import TextProcessor
from vembed.models.projection import (
    Projection,
    apply_projections,
    load_projections,
    save_projections,
)
from vembed.models.protocol import Encoder, Role
from vembed.models.tokenizing import (
    choose_text_options,
    load_tokenizer,
    pad_where_positions_allow,
)
from vembed.models.towers import check_towers, freeze_modules
from vembed.models.weights import load_backbone, save_backbone
from vembed.modes import Item

_FIXED_LENGTH = frozenset({"siglip", "siglip2"})
"""Families whose text tower reads the last position, padding or not, and attends to padding."""

_TOWERS = {
    "text": ("text_model", "text_projection"),
    "image": ("vision_model", "visual_projection"),
}
_CALLS = {"text": "get_text_features", "image": "get_image_features"}


class DualEncoder(Encoder):
    """A text or an image to one vector; a text with an image to the mean of their unit vectors.

    Pooling is the model's own: the end token and the class token in CLIP, the last position and
    attention pooling in SigLIP. Its `logit_scale` and `logit_bias` take no part: temperature is the
    loss's. They can be read and set here, so that a loss can start from them and leave what it
    learned in the saved model.
    """

    modalities = frozenset("tim")
    pooling_method = OWN_POOLING

    def __init__(
        self,
        backbone: Any,
        processor: DualProcessor,
        *,
        settings: CheckpointSettings,
        projections: Sequence[Projection] = (),
        origins: Mapping[str, str] | None = None,
    ) -> None:
        """Assemble an encoder; `load_dual_encoder` does it from a folder.

        Args:
            backbone: A model with `get_text_features` and `get_image_features`.
            processor: Makes the backbone's inputs.
            settings: As resolved: normalize is set.
            projections: Linear layers after both towers.
            origins: Where each setting came from, for `describe`.
        """
        super().__init__()
        for parameter in _logit_parameters(backbone).values():
            parameter.requires_grad_(False)
        self.backbone = backbone
        self.projections = nn.ModuleList(projections)
        self.processor = processor
        self.model_type = backbone.config.model_type
        self.tower_dim: int = _output_size(backbone.config)
        self.embedding_dim = projections[-1].out_features if projections else self.tower_dim
        self.normalize = bool(settings.normalize)
        self._settings = settings
        self._origins = dict(origins or {})

    def forward(self, *, normalize: bool | None = None, **inputs: Tensor) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider.

        Args:
            normalize: Unit length or not; None takes the encoder's own.
            inputs: What the processor makes: of texts, images, or both.
        """
        text, image = split_inputs(inputs)
        text_BD = self._project(self.backbone.get_text_features(**text)) if text else None
        image_BD = self._project(self.backbone.get_image_features(**image)) if image else None
        return fuse(text_BD, image_BD, normalize=self.normalize if normalize is None else normalize)

    @property
    def logits(self) -> dict[str, float]:
        """`logit_scale`, and `logit_bias` where there is one, as the checkpoint has them."""
        return {name: float(p) for name, p in _logit_parameters(self.backbone).items()}

    @torch.no_grad()
    def set_logits(self, **values: Tensor) -> None:
        """Replace those of `logits` that are given; what the model has no place for is left out."""
        own = _logit_parameters(self.backbone)
        for name in own.keys() & values.keys():
            own[name].copy_(values[name].detach().reshape(own[name].shape))

    def restrict_to(self, modalities: Collection[str]) -> None:
        """Freeze the tower of which none of `modalities` has a part."""
        for tower, letters in (("text", {"t", "m"}), ("image", {"i", "m"})):
            if not letters & set(modalities):
                self.freeze(tower)

    def freeze(self, tower: str) -> None:
        """Stop training a tower and its projection: `"text"` or `"image"`."""
        freeze_modules(self.backbone, _TOWERS[tower])

    def describe(self) -> dict[str, str | int]:
        """What it is and where each setting came from, for the log."""
        shown = {
            "normalize": "yes" if self.normalize else "no",
            **self.processor.describe(),
            **{name: f"{value:.4g}" for name, value in self.logits.items()},
        }
        return {
            **describe_weights(self, self.backbone),
            **{
                name: f"{text} ({self._origins[name]})" if name in self._origins else text
                for name, text in shown.items()
            },
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that sentence-transformers, transformers and vembed read alike."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_backbone(self.backbone, folder, {})
        self.processor.save_pretrained(folder)
        settings = replace(
            self.processor.complete(self._settings),
            backbone_folder=folder,
            pooling_method=OWN_POOLING,
            normalize=self.normalize,
            dense_folders=save_projections(self.projections, folder, pooling_method=OWN_POOLING),
            calls=_CALLS,
            processing=self._processing(),
        )
        write_settings(folder, settings, hidden_size=self.tower_dim)

    def _processing(self) -> dict[str, dict[str, Any]]:
        """What sentence-transformers must be told, which else takes the defaults of its processors.

        Those pad to the longest text; SigLIP 2's also has lengths and patches of its own.
        """
        processing: dict[str, dict[str, Any]] = {}
        if self.model_type in _FIXED_LENGTH:
            length = self.processor.max_seq_length
            processing["text"] = {"padding": "max_length", "max_length": length}
        images = self.processor.image.image_processor
        if hasattr(images, "max_num_patches"):
            patches = {"max_num_patches": images.max_num_patches, "patch_size": images.patch_size}
            processing["image"] = patches
        return processing

    def _project(self, output: Any) -> Tensor:
        return apply_projections(self.projections, output.pooler_output)


class DualProcessor:
    """Texts, images, or both, to the inputs of two towers.

    Attributes:
        text: Makes the text tower's inputs.
        image: Makes the image tower's inputs.
    """

    def __init__(self, text: TextProcessor, image: ImageProcessor) -> None:
        self.text = text
        self.image = image

    @property
    def tokenizer(self) -> Any:
        """The text tower's."""
        return self.text.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a text, special tokens included."""
        return self.text.max_seq_length

    def prompt_for(self, role: Role | None) -> str:
        """The text put before a text of this role."""
        return self.text.prompt_for(role)

    def describe(self) -> dict[str, str]:
        """Its settings, for the log."""
        return {**self.text.describe(), **self.image.describe()}

    def complete(self, settings: CheckpointSettings) -> CheckpointSettings:
        """The settings of a checkpoint with this processor's own in place of what was read."""
        return self.text.complete(settings)

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Role | None,
        prompts: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """Token ids of the texts and pixels of the images; prompts go before texts only.

        Args:
            items: B items, all texts, all images, or all both.
            role: Decides the prompt of texts.
            prompts: One per item, instead of the role's.

        Raises:
            DataError: if items differ in what they have, have nothing, or cannot be read.
        """
        kinds = {(item.text is not None, item.image is not None) for item in items}
        if len(kinds) != 1:
            raise DataError(
                "items of one batch must all be texts, all images, or all both. Received: "
                f"{' and '.join(sorted(_name_kind(*kind) for kind in kinds)) or 'no items'}"
            )
        has_text, has_image = kinds.pop()
        inputs: dict[str, Tensor] = {}
        if has_text or not has_image:
            texts = [Item(text=item.text) for item in items]
            inputs |= self.text(texts, role=role, prompts=prompts)
        if has_image:
            inputs |= self.image.pixels(items)
        return inputs

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer and preprocessor_config.json."""
        self.text.save_pretrained(path)
        self.image.save_pretrained(path)


def load_dual_encoder(
    path: str,
    *,
    pooling_method: str | None = None,
    normalize: bool | None = None,
    projection_dim: int | None = None,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    freeze_towers: Collection[str] = (),
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> DualEncoder:
    """Load an encoder with two towers from a local folder; arguments as in `load_encoder`.

    Raises:
        ConfigError: if an option does not fit the model.
        CheckpointError: if the folder is incomplete or has parts that vembed does not read.
    """
    check_towers(freeze_towers)
    if pooling_method not in (None, OWN_POOLING):
        raise ConfigError(
            f"pooling_method: a model with two towers pools by itself ({OWN_POOLING}). "
            f"Received: {pooling_method!r}. Leave it unset"
        )
    stored = read_settings(path)
    folder = stored.backbone_folder
    if stored.pooling_method not in (None, OWN_POOLING):
        raise CheckpointError(f"{path}: a Pooling module does not go with two towers")
    backbone = load_backbone(
        folder,
        torch_dtype=torch_dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    tokenizer = load_tokenizer(
        folder, do_lower_case=stored.do_lower_case, trust_remote_code=trust_remote_code
    )
    pad_where_positions_allow(tokenizer, backbone.text_model)
    fixed_length = backbone.config.model_type in _FIXED_LENGTH
    if fixed_length:
        tokenizer.model_input_names = ["input_ids"]
    chosen_normalize = choose(normalize, stored.normalize, True)
    text_options = choose_text_options(
        stored,
        tokenizer=tokenizer,
        text_model=backbone.text_model,
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    text_processor = TextProcessor(
        tokenizer,
        **values_of(text_options),
        default_prompt=stored.prompts.get(stored.default_prompt_name or "", ""),
        fixed_length=fixed_length,
    )
    image_processor = load_image_processor(folder, trust_remote_code=trust_remote_code)
    encoder = DualEncoder(
        backbone,
        DualProcessor(text_processor, ImageProcessor(image_processor)),
        settings=replace(stored, normalize=chosen_normalize.value),
        projections=load_projections(
            stored.dense_folders,
            input_size=_output_size(backbone.config),
            projection_dim=projection_dim,
            dtype=backbone.dtype,
        ),
        origins=origins_of({"normalize": chosen_normalize, **text_options}),
    )
    for tower in freeze_towers:
        encoder.freeze(tower)
    return encoder.eval()


def _logit_parameters(backbone: Any) -> dict[str, nn.Parameter]:
    found = {name: getattr(backbone, name, None) for name in ("logit_scale", "logit_bias")}
    return {name: p for name, p in found.items() if isinstance(p, nn.Parameter)}


def _output_size(config: Any) -> int:
    """Columns of both towers' outputs."""
    size = getattr(config, "projection_dim", None) or config.text_config.projection_size
    return int(size)


def _name_kind(has_text: bool, has_image: bool) -> str:
    names = {(True, False): "texts", (False, True): "images", (True, True): "texts with images"}
    return names.get((has_text, has_image), "items with neither")
