"""Texts that are the names of image files: somebody meant the images, and did not say so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice

from vembed.images import IMAGE_ENDINGS

_SAMPLE = 1000


def is_image_name(text: object) -> bool:
    """Whether a cell looks like the name of an image file, by its ending."""
    return isinstance(text, str) and text.strip().lower().endswith(IMAGE_ENDINGS)


def names_image_file(text: str, folder: str = "") -> bool:
    """Whether a text is the path of an image file that exists.

    Args:
        text: Any text; only one that ends like an image is looked for.
        folder: What the path is relative to; empty for the working directory.
    """
    # A NUL would raise, and a name is never longer.
    if not is_image_name(text) or "\0" in text or len(text) > 4096:
        return False
    return os.path.isfile(os.path.join(folder, text.strip()))


def image_file_among(texts: Iterable[str | None], folder: str = "") -> str | None:
    """The first text that names an existing image file, if most do; None if most do not.

    Args:
        texts: Looked at are the first thousand.
        folder: As in `names_image_file`.
    """
    listed = [text for text in islice(texts, _SAMPLE) if text is not None]
    named = [text for text in listed if names_image_file(text, folder)]
    return named[0] if len(named) * 2 > len(listed) else None
