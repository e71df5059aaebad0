"""Images to model inputs, by the image processor that comes with the model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor

from vembed.errors import CheckpointError, ConfigError, DataError
from vembed.images import ImageSource, load_image
from vembed.models.checkpoint_format import CheckpointSettings
from vembed.models.pixel_cache import PixelCache
from vembed.models.protocol import Role
from vembed.modes import Item


class ImageProcessor:
    """Decodes and resizes images for one model.

    Attributes:
        image_processor: The model's own, of transformers.
        cache: Where it keeps what it has made of an image; None where it makes it anew.
        max_seq_length: None: images have no length to cut.
    """

    max_seq_length = None

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.cache: PixelCache | None = None

    def describe(self) -> dict[str, str]:
        """Its settings, for the log."""
        return {"image_size": _name_size(self.image_processor)}

    def complete(self, settings: CheckpointSettings) -> CheckpointSettings:
        """The settings of a checkpoint, which say nothing about images: they stay."""
        return settings

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Role | None,
        prompts: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """`pixel_values` and what goes with them.

        Args:
            items: B images.
            role: Makes no difference, and neither do prompts: images have none.
            prompts: See `role`.

        Raises:
            DataError: if an item has no image, has a text, or its image cannot be read.
        """
        for item in items:
            if item.text is not None:
                raise DataError(f"this model embeds images only. Received a text: {item.text!r}")
        return self.pixels(items)

    def pixels(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Model inputs of the images of `items`, whatever else these have.

        Raises:
            DataError: if an image cannot be read, or images do not come out alike.
        """
        if self.cache is not None:
            return {"pixel_values": self.cache.pixel_values(image_sources(items))}
        images = load_images(items)
        try:
            return dict(self.image_processor(images=images, return_tensors="pt"))
        except ValueError as error:
            shapes = ", ".join(sorted({f"{i.width} x {i.height}" for i in images}))
            raise DataError(
                f"the model's image processor cannot make one batch of images of {shapes} pixels "
                f"({error}). Does preprocessor_config.json resize or crop them to one size?"
            ) from error

    def save_pretrained(self, path: str | Path) -> None:
        """Write preprocessor_config.json."""
        self.image_processor.save_pretrained(path)


def _name_size(image_processor: Any) -> str:
    """How large images are made, in pixels."""
    crop = getattr(image_processor, "crop_size", None)
    size = dict(crop or getattr(image_processor, "size", None) or {})
    if size.get("height") and size.get("width"):
        return f"{size['height']} x {size['width']}"
    most = getattr(image_processor, "max_num_patches", None)
    if most is not None:
        return (
            f"at most {most} patches of {image_processor.patch_size} x {image_processor.patch_size}"
        )
    return ", ".join(f"{name} {edge}" for name, edge in size.items() if edge) or "as it is"


def load_images(items: Sequence[Item]) -> list[Any]:
    """The decoded image of each item, in RGB.

    Raises:
        DataError: if an item has none, or it cannot be read.
    """
    return [load_image(source) for source in image_sources(items)]


def image_sources(items: Sequence[Item]) -> list[ImageSource]:
    """Where the image of each item is.

    Raises:
        DataError: if an item has none.
    """
    sources = []
    for item in items:
        if item.image is None or isinstance(item.image, str):
            raise DataError(
                f"an image is expected. Received: image {item.image}, text {item.text!r}"
            )
        sources.append(item.image)
    return sources


def load_image_processor(folder: Path, *, trust_remote_code: bool) -> Any:
    """The image processor in `folder`.

    Raises:
        CheckpointError: if there is none.
        ConfigError: if it cannot run here.
    """
    try:
        return AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no image processor (preprocessor_config.json): {error}"
        ) from error
    except (ImportError, ValueError) as error:
        if importlib.util.find_spec("torchvision") is None and "torchvision" in str(error).lower():
            raise ConfigError(
                f"{folder}: its image processor has no version for Pillow alone, it needs "
                f"torchvision, which is not installed. Install the torchvision that goes with your "
                f"torch, or name one that needs Pillow only in preprocessor_config.json, such as "
                f"image_processor_type: ViTImageProcessor"
            ) from error
        raise ConfigError(f"{folder}: the image processor cannot be loaded ({error})") from error
