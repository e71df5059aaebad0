"""Images: where their bytes are, what makes two the same, and how bytes become pixels.

A source is small and travels to the loader's workers; the bytes are read and decoded there, by
`load_image`. Whatever is wrong with an image is an `ImageError` that says what and where.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from vembed.errors import DataError, quote_path, shorten

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded; of a GIF or WebP animation, the first frame.

Everything else that Pillow could open is refused: EPS starts Ghostscript, TIFF holds pages and
samples of any kind. The content decides, whatever the name ends in.
"""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""How the names of image files end, in lower case; what is in a file is another question."""

MOST_PIXELS = 178_956_970
"""The highest `max_pixels` there is: Pillow itself refuses larger images."""

_SPELLINGS = {".jpg": (".jpeg", ".JPEG"), ".jpeg": (".jpg", ".JPG")}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|(data|file|https?|ftp|s3|gs|hf):", re.IGNORECASE)
_TAIL_BYTES = 4096

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation to the name of the transposition that undoes it."""


class ImageError(DataError):
    """An image that cannot be used.

    Attributes:
        rule: What it should have been; the same words for all images of one kind of trouble.
        received: Which image, and what it is instead.
        advice: What to do; may be empty.
        where: `file:line: field` that names the image; may be empty.
    """

    def __init__(self, rule: str, received: str, advice: str = "", where: str = "") -> None:
        super().__init__(rule, received, advice, where)
        self.rule, self.received, self.advice, self.where = rule, received, advice, where

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{where}{self.rule}. Received: {self.received}.{advice}"


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before it is decoded.

    Attributes:
        max_pixels: Most pixels, width times height; at most `MOST_PIXELS`. A picture of a few
            kilobytes can claim any number, and three bytes of memory are needed for each.
        max_bytes: Most bytes of the file.
        hosts: Hosts that images may be fetched from, each as `name` or `name:port`.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 256 * 2**20
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where the bytes of one image are: small, hashable, and picklable unless it holds the image.

    Sources are equal when they are the same place, whatever limits they have and whoever names
    them. Subclass it for places that vembed does not know: `identity` and `open` are needed.

    Attributes:
        limits: What `load_image` refuses.
        where: `file:line: field` that names the image, for messages; may be empty.
    """

    limits: ImageLimits = field(default=ImageLimits(), compare=False, repr=False)
    where: str = field(default="", compare=False, repr=False)

    @property
    def identity(self) -> str:
        """What two images have in common that count as one, on every machine."""
        raise NotImplementedError

    def stamp(self) -> str:
        """What changes when the image does; not the same on every machine.

        Raises:
            ImageError: as `open` does.
        """
        return _digest(self.read())

    def open(self) -> BinaryIO:
        """A file of the image's bytes, to be closed by the caller.

        Raises:
            ImageError: if there is none, or it is too large.
        """
        raise NotImplementedError

    def read(self) -> bytes:
        """The image's bytes, not decoded.

        Raises:
            ImageError: if there are none, or too many.
        """
        with self.open() as file:
            return file.read()

    def error(self, rule: str, detail: str = "", advice: str = "") -> ImageError:
        """What is wrong with this image."""
        received = f"{self}, {detail}" if detail else str(self)
        return ImageError(rule, received, advice, self.where)

    def check_size(self, size: int) -> None:
        """Raise ImageError unless that many bytes can be an image within the limits."""
        if size == 0:
            raise self.error("an image must not be empty", "of 0 bytes")
        if size > self.limits.max_bytes:
            raise self.error(
                f"an image must not be larger than {self.limits.max_bytes / 2**20:,.0f} MB",
                f"of {size / 2**20:,.0f} MB",
            )


@dataclass(frozen=True)
class ImageFile(ImageSource):
    """A file under a folder; made by `ImageFolder.find`, which checks the path.

    Attributes:
        path: Relative to `root`, parts joined by "/".
        root: The folder that the file must not lead out of, not even by a symbolic link.
        prefix: Put before the path in `identity`, where several folders could have the same path.
    """

    path: str
    root: str
    prefix: str = ""

    def __str__(self) -> str:
        return quote_path(self._location if self._is_own else self.path)

    @property
    def _location(self) -> str:
        return os.path.join(self.root, self.path)

    @property
    def _is_own(self) -> bool:
        """Whether a program named it, and no data: its folder is then all of the disk."""
        return os.path.dirname(self.root) == self.root

    @property
    def identity(self) -> str:
        """The path: files are read when they are needed, not to compare them."""
        return f"{self.prefix}{self.path}"

    def stamp(self) -> str:
        """The file's place, size and time: it is not read.

        Raises:
            ImageError: as `open` does.
        """
        with self.open() as file:
            return stamp_file(file)

    def open(self) -> BinaryIO:
        """The open file.

        Raises:
            ImageError: if it is missing, not a regular file, empty, too large, or outside the root.
        """
        try:
            file = open(self._resolved(), "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            raise self._missing() from None
        except OSError as error:
            raise self.error("an image file must be readable", f"{error.strerror}") from None
        try:
            self.check_size(os.fstat(file.fileno()).st_size)
        except ImageError:
            file.close()
            raise
        return file

    def _missing(self) -> ImageError:
        advice = "Paths are relative to image_root; without it, to the folder of the data file."
        if "\\" in self.path:
            path = self.path.replace("\\", "/")
            advice = f"Write '/' between folders: {quote_path(path)}."
        elif other := self._other_ending():
            advice = f"Did you mean {quote_path(other)}?"
        elif self._is_own:
            advice = ""
        detail = "" if self._is_own else f"looked for in {self.root!r}"
        return self.error("there is no such image file", detail, advice)

    def _other_ending(self) -> str | None:
        """The path with its ending in other letters (`.JPG` for `.jpg`), if there is that file."""
        name, ending = os.path.splitext(self.path)
        others = [ending.lower(), ending.upper(), *(_SPELLINGS.get(ending.lower(), ()))]
        existing = (other for other in others if os.path.isfile(f"{self.root}/{name}{other}"))
        return next((f"{name}{other}" for other in existing), None)

    def _is_plain_file(self) -> bool:
        """Whether it is a regular file, and no link leads from the root to it: so it lies there.

        Looks at the parts below the root only; to follow all links takes longer than to open it.
        """
        parts = self.path.split("/")
        if not {"", ".", ".."}.isdisjoint(parts):
            return False
        place, mode = self.root, 0
        try:
            for part in parts:
                place = os.path.join(place, part)
                mode = os.lstat(place).st_mode
                if stat.S_ISLNK(mode):
                    return False
        except OSError:
            return False
        return stat.S_ISREG(mode)

    def _resolved(self) -> str:
        """A path to it, once it is known to be a file under the root."""
        if "\0" in self.path:
            raise self.error("an image path must not contain NUL characters")
        if self._is_plain_file():
            return self._location
        root = os.path.realpath(self.root)
        path = os.path.realpath(os.path.join(root, self.path))
        if os.path.commonpath([root, path]) != root:
            raise self.error(
                "an image must lie under the image folder",
                f"which leads to {quote_path(path)}; the folder is {root!r}",
                "Copy the file there, or set image_root to a folder that holds both.",
            )
        # Asked before it is opened: opening a named pipe would wait for a writer.
        if os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
            raise self.error("an image must be a regular file", f"which is {kind}")
        return path


@dataclass(frozen=True)
class ImageInTar(ImageSource):
    """A member of an uncompressed tar file.

    Attributes:
        shard: Path of the tar file.
        member: Name in it.
        offset: Where the member's bytes begin in the file.
        size: Number of its bytes.
        prefix: As in `ImageFile`.
    """

    shard: str
    member: str
    offset: int
    size: int
    prefix: str = ""

    def __str__(self) -> str:
        return f"{quote_path(self.member)} in {os.path.basename(self.shard)!r}"

    @property
    def identity(self) -> str:
        """The names of shard and member: shards are indexed without reading the members."""
        return f"{self.prefix}{os.path.basename(self.shard)}/{self.member}"

    def stamp(self) -> str:
        """The shard's place, size and time, and where the member is in it: it is not read.

        Raises:
            ImageError: if the tar file is gone, or the member is empty or too large.
        """
        self.check_size(self.size)
        try:
            with open(self.shard, "rb") as shard:
                return f"{stamp_file(shard)}:{self.offset}+{self.size}"
        except OSError as error:
            raise self.error("a shard must be readable", str(error.strerror or error)) from None

    def open(self) -> BinaryIO:
        """The member's bytes as a file.

        Raises:
            ImageError: if the tar file is gone or too short, or the member is empty or too large.
        """
        self.check_size(self.size)
        try:
            with open(self.shard, "rb") as shard:
                shard.seek(self.offset)
                data = shard.read(self.size)
        except OSError as error:
            raise self.error("a shard must be readable", str(error.strerror or error)) from None
        if len(data) < self.size:
            raise self.error("a shard must be whole", f"{len(data)} of {self.size} bytes")
        return io.BytesIO(data)


@dataclass(frozen=True)
class ImageBytes(ImageSource):
    """Bytes at hand, as in a column of a Parquet file.

    Attributes:
        data: The encoded image.
        name: What to call it; may be empty.
    """

    data: bytes = field(compare=False, repr=False)
    name: str = field(default="", compare=False)
    _digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_digest", _digest(self.data))

    def __str__(self) -> str:
        size = f"{len(self.data):,} bytes"
        return f"{quote_path(self.name)} ({size})" if self.name else size

    @property
    def identity(self) -> str:
        """A hash of the bytes."""
        return self._digest

    def stamp(self) -> str:
        """A hash of the bytes.

        Raises:
            ImageError: if there are none, or too many.
        """
        self.check_size(len(self.data))
        return self._digest

    def open(self) -> BinaryIO:
        """The bytes as a file.

        Raises:
            ImageError: if there are none, or too many.
        """
        self.check_size(len(self.data))
        return io.BytesIO(self.data)


@dataclass(frozen=True, eq=False)
class ImageInMemory(ImageSource):
    """An image that a Python program has opened already; it must not change afterwards."""

    image: Image = field(repr=False)

    def __str__(self) -> str:
        return f"an image of {self.image.width} x {self.image.height}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageInMemory) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    @cached_property
    def _pixels(self) -> str:
        image = self.image
        palette = image.getpalette() if image.mode == "P" else None
        known = repr((image.mode, image.size, palette, image.info.get("transparency"))).encode()
        return _digest(known + image.tobytes())

    @property
    def identity(self) -> str:
        """A hash of the pixels.

        Raises:
            ImageError: if they are too many, or cannot be decoded.
        """
        _check_pixels(self, self.image)
        _decode(self, self.image)
        return self._pixels

    def stamp(self) -> str:
        """A hash of the pixels, and how they are turned.

        Raises:
            ImageError: as `identity` does.
        """
        return f"{self.identity}:{_orientation(self.image)}"

    def open(self) -> BinaryIO:
        """The image as a PNG file."""
        file = io.BytesIO()
        _to_rgb(self, self.image).save(file, "PNG")
        file.seek(0)
        return file


@dataclass(frozen=True)
class ImageFolder:
    """A folder that image paths are relative to, and may not leave.

    Attributes:
        root: Absolute path.
        prefix: As in `ImageFile`.
        limits: What its images are held to.
    """

    root: str
    prefix: str = ""
    limits: ImageLimits = ImageLimits()

    def find(self, path: str, *, where: str = "") -> ImageFile:
        """The image that a path stands for; whether there is such a file shows when it is read.

        Args:
            path: As a row has it: relative to the folder, or absolute and inside it.
            where: `file:line: field` for messages.

        Raises:
            ImageError: if it is empty, a URL, holds `..` or NUL, or is outside the folder.
        """

        def refuse(rule: str, advice: str) -> ImageError:
            return ImageError(rule, quote_path(path), advice, where)

        if is_url(path):
            raise refuse("an image path must be a file, not a URL", "Name a file.")
        if not path.strip():
            raise refuse("an image path must not be empty", "Fill it in, or remove the row.")
        if "\0" in path:
            raise refuse("an image path must not contain NUL characters", "Correct the path.")
        given = PurePath(path)
        if ".." in given.parts:
            raise refuse(
                "an image path must not contain '..'",
                "Write it relative to image_root, and set image_root to a folder that holds all.",
            )
        if given.is_absolute():
            for root in (self.root, os.path.realpath(self.root)):
                if given.is_relative_to(root):
                    given = given.relative_to(root)
                    break
            else:
                raise refuse(
                    "an image must lie under the image folder",
                    f"The folder is {self.root!r}: write the path relative to it, or set "
                    "image_root to a folder that holds the file.",
                )
        name = given.as_posix()
        return ImageFile(name, self.root, self.prefix, limits=self.limits, where=where)


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image without decoding it; sizes in pixels, as stored."""

    width: int
    height: int
    format: str


def is_url(path: str) -> bool:
    """Whether a path is a URL of any kind, `file:` and `data:` among them."""
    return _URL.match(path) is not None


def stamp_file(file: BinaryIO) -> str:
    """Place, size and time of an open file: what `ImageSource.stamp` says of it."""
    status = os.fstat(file.fileno())
    return f"{os.path.realpath(file.name)}:{status.st_size}:{status.st_mtime_ns}"


def as_image_source(image: str | os.PathLike[str] | bytes | Image | ImageSource) -> ImageSource:
    """The source of an image that a Python program names: a path, bytes, or an open Pillow image.

    The path is the program's own and may lie anywhere; for paths that come with data, use
    `ImageFolder`.

    Raises:
        ImageError: if the path is a URL.
        TypeError: if it is none of these.
    """
    from PIL.Image import Image as OpenImage

    if isinstance(image, ImageSource):
        return image
    if isinstance(image, bytes):
        return ImageBytes(image)
    if isinstance(image, OpenImage):
        return ImageInMemory(image)
    if isinstance(image, str | os.PathLike):
        if is_url(os.fspath(image)):
            raise ImageError(
                "an image path must be a file, not a URL",
                quote_path(os.fspath(image)),
                "Download it, and give the path of its file, or its bytes.",
            )
        path = Path(os.path.abspath(image))
        return ImageFile(path.relative_to(path.anchor).as_posix(), path.anchor)
    raise TypeError(
        "an image is expected: a path, bytes, a PIL image or an ImageSource. "
        f"Received: {type(image).__name__}"
    )


def load_image(source: ImageSource, *, limits: ImageLimits | None = None) -> Image:
    """Decode an image: upright by its EXIF orientation, RGB, transparent parts on white.

    Grey images of 16 bits keep their upper 8.

    Args:
        source: Where its bytes are.
        limits: What is refused before decoding; None takes the source's own.

    Raises:
        ImageError: if it is missing, of no format in `FORMATS`, too large, or damaged.
    """
    with _opened(source if limits is None else replace(source, limits=limits)) as image:
        _decode(source, image)
        return _to_rgb(source, _upright(image))


def probe_image(source: ImageSource, *, decode: bool = False) -> ImageFacts:
    """Look at an image without keeping it.

    Args:
        source: Where its bytes are.
        decode: Decode every pixel too. Otherwise header and end are looked at, which finds missing,
            foreign, oversized and truncated files, but not damage in the middle.

    Raises:
        ImageError: as `load_image` does.
    """
    with _opened(source) as image:
        facts = ImageFacts(image.width, image.height, image.format or "")
        # Of the other formats, the end is not known from the header.
        if decode or image.format not in _END:
            _decode(source, image)
            _to_rgb(source, image)
        return facts


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image]:
    """An image whose header is read and whose end is there, within the limits; not decoded."""
    if isinstance(source, ImageInMemory):
        _check_pixels(source, source.image)
        yield source.image
        return
    with source.open() as file:
        image = _read_header(source, file)
        _check_pixels(source, image)
        _check_end(source, file, image.format or "")
        yield image


def _read_header(source: ImageSource, file: BinaryIO) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        raise source.error(
            f"an image must be one of {', '.join(FORMATS)}",
            _foreign(file.read(16)),
            "Convert it, or remove the row.",
        ) from None
    except Image.DecompressionBombError as error:
        raise _too_large(source, str(error)) from None
    except MemoryError:
        raise
    except Exception as error:
        # A damaged header: Pillow's decoders raise whatever happens to them.
        raise _damaged(source, error) from None


_FOREIGN = {
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"PK\x03\x04": "a ZIP",
}
"""First bytes of what people take for images, and its name."""


def _foreign(start: bytes) -> str:
    """What a file is, by its first 16 bytes."""
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("ascii", "replace").strip().upper()
        return f"which is of the kind {brand!r}"
    kind = next((name for mark, name in _FOREIGN.items() if start.startswith(mark)), None)
    return f"which begins with {start!r}" if kind is None else f"which is {kind}"


def _check_pixels(source: ImageSource, image: Image) -> None:
    if image.width * image.height > source.limits.max_pixels:
        raise _too_large(source, f"of {image.width:,} x {image.height:,}")


def _too_large(source: ImageSource, detail: str) -> ImageError:
    return source.error(
        f"an image must not have more than {source.limits.max_pixels:,} pixels",
        detail,
        "Scale it down, or set max_image_pixels higher.",
    )


_END = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}
"""Formats whose end is checked, with the mark that it has; a WebP says how long it is."""

_AGAIN = "Copy or download it again, or remove the row."


def _check_end(source: ImageSource, file: BinaryIO, image_format: str) -> None:
    """Refuse a file that breaks off; damage in the middle shows when it is decoded."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    is_whole = True
    if image_format == "WEBP":
        file.seek(4)
        is_whole = size >= struct.unpack("<I", file.read(4))[0] + 8
    elif image_format in _END:
        # Most files end with the mark; phones put whole films behind it.
        tail = max(position, size - _TAIL_BYTES)
        is_whole = any(_has_after(file, start, _END[image_format]) for start in (tail, position))
    file.seek(position)
    if not is_whole:
        raise source.error(
            "an image must be whole",
            f"a {image_format} that breaks off after {size:,} bytes",
            _AGAIN,
        )


def _has_after(file: BinaryIO, position: int, mark: bytes) -> bool:
    file.seek(position)
    return mark in file.read()


def _decode(source: ImageSource, image: Image) -> None:
    """Decode in place."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(source, error) from None


def _damaged(source: ImageSource, error: Exception) -> ImageError:
    reason = shorten(str(error)) or type(error).__name__
    return source.error("an image must be whole", reason, _AGAIN)


def _orientation(image: Image) -> object:
    """What EXIF says of it; where that is broken, nothing: as in browsers, it stays as stored."""
    try:
        return image.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, EOFError, struct.error):
        return None


def _upright(image: Image) -> Image:
    from PIL import Image

    orientation = _orientation(image)
    if not isinstance(orientation, int) or orientation not in _UPRIGHT:
        return image
    return image.transpose(Image.Transpose[_UPRIGHT[orientation]])


def _to_rgb(source: ImageSource, image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        # convert() alone would clip everything above 255 to white.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode in ("I", "F"):
        raise source.error(
            "an image must have 8 or 16 bits per channel",
            f"of mode {image.mode!r}, 32 bits",
            "Scale its values to 8 bits.",
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB")


def _digest(data: bytes) -> str:
    return "blake2b:" + hashlib.blake2b(data, digest_size=16).hexdigest()
