"""Texts that are the names of image files: somebody meant the images, and did not say so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice

from vembed.images import IMAGE_ENDINGS
from vembed.modes import IMAGE, Item, RetrievalMode

_SAMPLE = 1000


def is_image_name(text: object) -> bool:
    """Whether a cell looks like the name of an image file, by its ending."""
    return isinstance(text, str) and text.strip().lower().endswith(IMAGE_ENDINGS)


def data_folder(path: str) -> str:
    """The folder that image paths of a data path are relative to, unless the user names one."""
    return path if os.path.isdir(path) else os.path.dirname(path)


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


def file_name_warning(
    name: str, mode: RetrievalMode, sides: Mapping[str, Iterable[Item]], folder: str = ""
) -> str | None:
    """What to tell somebody most of whose texts name image files; None where they do not.

    Args:
        name: The data set.
        mode: How its rows were read.
        sides: The items of each side, `queries` first; those of images are passed over.
        folder: As in `names_image_file`.
    """
    letters = [mode.query, mode.document]
    found = {}
    for number, (side, items) in enumerate(sides.items()):
        texts = (item.text for item in items if item.image is None)
        if example := image_file_among(texts, folder):
            letters[number] = IMAGE
            found[side] = example
    if not found:
        return None
    (example, *_), names = found.values(), " and ".join(found)
    return (
        f"{name}: most of the {names} are names of image files, such as {example!r}, and are taken "
        f"for texts. If the images are meant, set retrieval_mode: {letters[0]}2{letters[1]}"
    )
