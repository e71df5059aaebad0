"""Tiny pictures, made by Pillow, and rows about them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

COLORS = {
    "red": (220, 20, 20),
    "green": (20, 160, 30),
    "blue": (20, 40, 210),
    "yellow": (230, 220, 20),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "orange": (250, 140, 10),
    "brown": (120, 70, 20),
}


def picture(
    color: Any = "red", size: tuple[int, int] = (24, 16), format: str = "PNG", **save
) -> bytes:  # noqa: E501
    """The bytes of a picture of one colour."""
    return encode(plain(color, size), format, **save)


def plain(color: Any = "red", size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Any:
    from PIL import Image

    return Image.new(mode, size, COLORS.get(color, color) if isinstance(color, str) else color)


def noise(size: tuple[int, int] = (96, 64), seed: int = 0) -> Any:
    """A picture that does not compress, so that cutting the file cuts the picture."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Any, format: str = "PNG", **save) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **save)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims a size, without the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b"")


def flipped_png(**kwargs: Any) -> bytes:
    """A whole PNG with a bit flipped in its pixels: only decoding finds it."""
    data = bytearray(encode(noise(**kwargs)))
    data[len(data) // 2] ^= 1
    return bytes(data)


def write_pictures(folder: str | Path, *, format: str = "PNG") -> Path:
    """One picture for each of `COLORS`, as `NAME.png`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COLORS:
        (folder / f"{name}.{format.lower()}").write_bytes(picture(name, format=format))
    return folder


def cell(modality: str, color: str, *, folder: str = "") -> Any:
    """What a row file has for a colour: a text, the path of its picture, or both."""
    text, image = f"the {color} one", f"{folder}{color}.png"
    return {"t": text, "i": image, "m": {"text": text, "image": image}}[modality]


def mode_rows(mode: str, *, negatives: tuple[int, ...] = (1, 0, 2, 1, 0, 3, 1, 0)) -> list[dict]:
    """A row for each colour, with uneven counts of negatives and two positives in the first."""
    query, document = mode.split("2")
    names = list(COLORS)
    rows = []
    for number, name in enumerate(names):
        others = [names[(number + k + 1) % len(names)] for k in range(negatives[number])]
        positives = [name, names[-1]] if number == 0 else [name]
        rows.append(
            {
                "query": cell(query, name),
                "positives": [cell(document, one) for one in positives],
                "negatives": [cell(document, other) for other in others],
            }
        )
    return rows
