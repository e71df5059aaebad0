"""Any text encoder with any image encoder, brought into one space by a projection behind each.

# Shapes: B items, D embedding size
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from vembed.errors import CheckpointError, ConfigError
from vembed.models import load_encoder
from vembed.models.checkpoint_format import NO_POOLING, read_router, write_router
from vembed.models.dual import DualEncoder, DualProcessor
from vembed.models.fusion import fuse, split_inputs
from vembed.models.image_processor import ImageProcessor
from vembed.models.options import Choice, choose
from vembed.models.processor import TextProcessor
from vembed.models.projection import Projection, apply_projections, new_projection
from vembed.models.protocol import Encoder
from vembed.models.towers import TOWERS, check_towers


class ComposedEncoder(Encoder):
    """A text or an image to one vector; a text with an image to the mean of their unit vectors.

    Each tower gives its pooled vector as it is, without bringing it to unit length first.
    """

    modalities = frozenset("tim")
    pooling_method = "each tower's own"

    def __init__(
        self,
        text: Encoder,
        image: Encoder,
        projections: dict[str, Projection],
        *,
        normalize: Choice,
    ) -> None:
        """Assemble an encoder; `load_composed_encoder` and `compose` do it from folders.

        Args:
            text: Embeds texts.
            image: Embeds images.
            projections: For `text` and `image`, to the same size.
            normalize: Whether vectors have unit length.

        Raises:
            ConfigError: if a tower does not embed what it is for, or gives token vectors.
        """
        super().__init__()
        self.text = text
        self.image = image
        self.projections = nn.ModuleDict(projections)
        self.processor = DualProcessor(_text_processor(text), _image_processor(image))
        self.model_type = f"{text.model_type} + {image.model_type}"
        self.embedding_dim = projections["text"].out_features
        self.normalize = bool(normalize.value)
        self._normalize_origin = normalize.origin
        for tower in (text, image):
            if tower.pooling_method == NO_POOLING:
                raise ConfigError(
                    f"a composed encoder is made of models that give one vector. Received: a "
                    f"{tower.model_type} that gives one for each token (pooling_method none)"
                )
        text.restrict_to({"t"})
        image.restrict_to({"i"})

    def forward(self, *, normalize: bool | None = None, **inputs: Tensor) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider.

        Args:
            normalize: Unit length or not; None takes the encoder's own.
            inputs: What the processor makes: of texts, images, or both.
        """
        text, image = split_inputs(inputs)
        return fuse(
            self._embed("text", text) if text else None,
            self._embed("image", image) if image else None,
            normalize=self.normalize if normalize is None else normalize,
        )

    @property
    def towers(self) -> tuple[Encoder, Encoder]:
        """The text encoder and the image encoder."""
        return self.text, self.image

    def restrict_to(self, modalities: Collection[str]) -> None:
        """Freeze the tower of which none of `modalities` has a part, and its projection."""
        for tower, letters in (("text", {"t", "m"}), ("image", {"i", "m"})):
            if not letters & set(modalities):
                self.freeze(tower)
                self.projections[tower].requires_grad_(False)

    def freeze(self, tower: str) -> None:
        """Stop training a tower, `"text"` or `"image"`, but not its projection (LiT).

        Zhai et al., 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning".
        """
        self._tower(tower).requires_grad_(False)

    def describe(self) -> dict[str, str | int]:
        """What it is and where each setting came from, for the log."""
        return {
            "model_type": self.model_type,
            "parameters": sum(p.numel() for p in self.parameters()),
            "embedding_dim": self.embedding_dim,
            "normalize": f"{'yes' if self.normalize else 'no'} ({self._normalize_origin})",
            **{
                f"{name} {fact}": value
                for name in TOWERS
                for fact, value in self._tower(name).describe().items()
                if fact not in ("model_type", "normalize")
            },
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that sentence-transformers and vembed read alike.

        Each tower is in a folder of its own, `text` and `image`, as a model that can be loaded
        alone; what puts them together is sentence-transformers' Router.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOWERS:
            self._tower(name).save_pretrained(folder / name)
            self.projections[name].save(folder / _projection_folder(name))  # type: ignore[operator]
        write_router(
            folder,
            routes={name: _projection_folder(name) for name in TOWERS},
            normalize=self.normalize,
            prompts={
                "query": self.processor.text.query_prompt,
                "document": self.processor.text.document_prompt,
            },
        )

    def _tower(self, name: str) -> Encoder:
        return self.text if name == "text" else self.image

    def _embed(self, name: str, inputs: dict[str, Tensor]) -> Tensor:
        embedding_BD = self._tower(name)(normalize=False, **inputs)
        return apply_projections([self.projections[name]], embedding_BD)


def compose(
    text: Encoder,
    image: Encoder,
    *,
    projection_dim: int | None = None,
    normalize: bool | None = None,
    freeze_towers: Collection[str] = (),
) -> ComposedEncoder:
    """Put two encoders together, with new projections, which have to be trained.

    Args:
        text: Embeds texts.
        image: Embeds images.
        projection_dim: Size of the vectors; None for the smaller of the towers' sizes.
        normalize: Whether vectors have unit length; None for yes.
        freeze_towers: Towers not to train; their projections train all the same.

    Raises:
        ConfigError: if a tower does not embed what it is for.
    """
    check_towers(freeze_towers)
    size = projection_dim or min(text.embedding_dim, image.embedding_dim)
    projections = {
        name: new_projection(tower.embedding_dim, size).to(_weight_type(tower))
        for name, tower in (("text", text), ("image", image))
    }
    encoder = ComposedEncoder(text, image, projections, normalize=choose(normalize, None, True))
    for name in freeze_towers:
        encoder.freeze(name)
    return encoder.eval()


def load_composed_encoder(
    path: str,
    *,
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
) -> ComposedEncoder:
    """Load what `save_pretrained` wrote: both towers as they were trained, and their projections.

    Raises:
        ConfigError: if an option does not fit a tower.
        CheckpointError: if the folder is incomplete.
    """
    check_towers(freeze_towers)
    root = Path(path)
    stored = read_router(root)
    weights = {
        "torch_dtype": torch_dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "quantization": quantization,
    }
    text = load_encoder(
        str(root / "text"),
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        **weights,  # type: ignore[arg-type]
    )
    image = load_encoder(str(root / "image"), **weights)  # type: ignore[arg-type]
    projections = {
        name: Projection.load(root / _projection_folder(name)).to(_weight_type(tower))
        for name, tower in (("text", text), ("image", image))
    }
    sizes = {projection.out_features for projection in projections.values()}
    if len(sizes) > 1:
        raise CheckpointError(f"{path}: the projections give vectors of sizes {sorted(sizes)}")
    if projection_dim is not None and {projection_dim} != sizes:
        raise ConfigError(
            f"projection_dim: this composed model gives vectors of size {sizes.pop()}. "
            f"Received: {projection_dim}. Compose it anew, or leave it unset"
        )
    encoder = ComposedEncoder(
        text, image, projections, normalize=choose(normalize, stored.normalize, True)
    )
    for name in freeze_towers:
        encoder.freeze(name)
    return encoder.eval()


def _weight_type(tower: Encoder) -> torch.dtype:
    """Of weights that are not quantized."""
    return next(p.dtype for p in tower.parameters() if p.is_floating_point())


def _projection_folder(tower: str) -> str:
    return f"{tower}_projection"


def _text_processor(text: Encoder) -> TextProcessor:
    processor = text.processor.text if isinstance(text, DualEncoder) else text.processor
    if not isinstance(processor, TextProcessor):
        raise ConfigError(
            f"text_model_name: a text encoder is expected. Received: model_type {text.model_type}"
        )
    return processor


def _image_processor(image: Encoder) -> ImageProcessor:
    processor = image.processor.image if isinstance(image, DualEncoder) else image.processor
    if not isinstance(processor, ImageProcessor):
        raise ConfigError(
            f"image_model_name: an image encoder is expected, or one with two towers. "
            f"Received: model_type {image.model_type}"
        )
    return processor
