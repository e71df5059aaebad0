"""Images as a model's processor resizes and crops them, on disk: later epochs decode nothing.

What is left of an image then is bytes, a few per pixel of the model's own size; the floats that
the model reads are looked up by byte in a table for each channel. Each image is a file by itself,
written under another name and renamed, so that any number of workers and processes fill and read
one folder without a lock; a checksum tells a file that a loss of power has left half written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vembed.errors import ConfigError
from vembed.images import ImageSource, load_image

logger = logging.getLogger(__name__)

_FORMAT = 1
_SUM_BYTES = 4
_RESERVED_BYTES = 2**30
"""What a cache leaves free on its disk, which may be that of the checkpoints."""
_SHAPING = ("do_resize", "do_center_crop", "do_pad")
_SCALING = ("do_rescale", "do_normalize")

Bytes = NDArray[np.uint8]


class PixelCache:
    """Makes `pixel_values` as an image processor does, bit by bit, and remembers their bytes.

    An image is known by `ImageSource.stamp`, its limits, and the settings of the processor.

    Attributes:
        folder: Of this processor's images; nothing is ever removed from it.
        shape: Of an image: channels, height, width.
    """

    def __init__(self, folder: str | Path, image_processor: Any) -> None:
        """Make the folder, and see that the processor can be replaced by a table.

        Args:
            folder: Of all processors' images; each has a folder of its own in there.
            image_processor: Of transformers.

        Raises:
            ConfigError: if what it makes of an image is not a table's view of bytes of one shape,
                or the folder cannot be written.
        """
        self._image_processor = image_processor
        self._table, self.shape = _require_table(image_processor)
        self.folder = Path(folder) / _key_of(image_processor)
        self._may_write = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError("no permission to write")
        except OSError as error:
            raise ConfigError(
                f"image_cache: a folder that can be written is expected. Received: "
                f"{str(folder)!r} ({error.strerror or error})"
            ) from None

    @property
    def image_bytes(self) -> int:
        """What an image takes on disk."""
        return int(np.prod(self.shape)) + _SUM_BYTES

    def pixel_values(self, sources: Sequence[ImageSource]) -> Tensor:
        """The model's input for some images `[B, C, H, W]`; those not yet known are decoded.

        Raises:
            ImageError: if an image cannot be read.
        """
        pixels = np.empty((len(sources), *self.shape), np.uint8)
        paths = [self._path_of(source) for source in sources]
        missing = [n for n, path in enumerate(paths) if not _read(path, into=pixels[n])]
        if missing:
            images = [load_image(sources[number]) for number in missing]
            pixels[missing] = _shaped(self._image_processor, images)
            for number in missing:
                self._write(paths[number], pixels[number])
        return torch.from_numpy(_look_up(self._table, pixels))

    def _path_of(self, source: ImageSource) -> Path:
        limits = source.limits
        parts = [source.stamp(), limits.max_pixels, limits.max_bytes]
        name = _hash(parts)
        return self.folder / name[:2] / name[2:]

    def _write(self, path: Path, pixels: Bytes) -> None:
        """Store an image; where the disk takes no more, say so once and store none."""
        if not self._may_write:
            return
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            if shutil.disk_usage(self.folder).free < _RESERVED_BYTES:
                raise OSError("less than 1 GiB is free")
            path.parent.mkdir(exist_ok=True)
            data = pixels.tobytes()
            try:
                part.write_bytes(data + _sum(data))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            self._may_write = False
            logger.warning(
                "image_cache: %s takes no more images (%s); others are decoded each time",
                self.folder,
                error.strerror or error,
            )


def _read(path: Path, *, into: Bytes) -> bool:
    """Read a stored image; False if there is none, or it is damaged."""
    try:
        with path.open("rb", buffering=0) as file:
            size = file.readinto(into.data)
            # One more byte than expected, to see a file that is too long.
            return size == into.nbytes and file.read(_SUM_BYTES + 1) == _sum(into.data)
    except OSError:
        return False


def _sum(data: bytes | memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(_SUM_BYTES, "little")


def _look_up(table: Any, pixels: Bytes) -> Any:
    """For bytes `[B, C, H, W]`, the floats that `table` `[C, 256]` has for them."""
    found = np.empty(pixels.shape, table.dtype)
    # One channel of one image at a time stays in the processor's cache.
    for image, of_image in zip(pixels, found, strict=True):
        for values, channel, of_channel in zip(table, image, of_image, strict=True):
            np.take(values, channel, out=of_channel, mode="clip")
    return found


def _shaped(image_processor: Any, images: Sequence[Any]) -> Any:
    """What the processor resizes and crops, still bytes."""
    off = dict.fromkeys(_SCALING, False)
    return image_processor(images=images, return_tensors="pt", **off)["pixel_values"].numpy()


def _require_table(image_processor: Any) -> tuple[Any, tuple[int, ...]]:
    """The float of each byte `[C, 256]`, and the shape of an image.

    Tried on images of several shapes: whatever the kind of processor, what counts is that it does
    the same in two steps as in one.

    Raises:
        ConfigError: if it does not.
    """
    refusal = ConfigError(
        "image_cache: works with image processors of transformers that make every image the same "
        f"size. Received: {type(image_processor).__name__}, which does not. Set image_cache: null"
    )
    # The code of another one may change while its settings stay.
    if not type(image_processor).__module__.startswith("transformers."):
        raise refusal
    images = _trial_images()
    try:
        expected = image_processor(images=images, return_tensors="pt")
        pixels = _shaped(image_processor, images)
        table = _table_of(image_processor)
        is_same = (
            set(expected) == {"pixel_values"}
            and pixels.dtype == np.uint8
            and pixels.ndim == 4
            and table.dtype == expected["pixel_values"].numpy().dtype
            and np.array_equal(_look_up(table, pixels), expected["pixel_values"].numpy())
        )
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
        raise refusal from error
    if not is_same:
        raise refusal
    return table, pixels.shape[1:]


def _table_of(image_processor: Any) -> Any:
    """What the processor makes of each byte, by channel: of an image with all of them."""
    from PIL import Image

    settings = image_processor.to_dict()
    off = {name: False for name in _SHAPING if name in settings}
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    inputs = image_processor(images=[Image.fromarray(ramp)], return_tensors="pt", **off)
    return inputs["pixel_values"].numpy().reshape(3, 256)


def _trial_images() -> list[Any]:
    """Noise, and black beside white, which overshoot where an image is resized."""
    from PIL import Image

    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((61, 97), (130, 70))]
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 40:] = 255
    return [Image.fromarray(pixels) for pixels in (*noise, halves)]


def _key_of(image_processor: Any) -> str:
    kind = f"{type(image_processor).__module__}.{type(image_processor).__qualname__}"
    # Of torchvision only some processors make use.
    libraries = [_version(name) for name in ("transformers", "pillow", "torchvision")]
    # All settings: which of them shape an image is the processor's own affair.
    settings = sorted((name, repr(value)) for name, value in image_processor.to_dict().items())
    return _hash([_FORMAT, kind, libraries, settings])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hash(parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
