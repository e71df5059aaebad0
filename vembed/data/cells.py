"""What a cell stands for: the one place where a value of a file and a modality become an Item.

The modality decides, never the look of the value: a text with a "/" in it is a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vembed.data.problems import RowProblem, describe
from vembed.image_urls import find_url
from vembed.images import (
    ImageBytes,
    ImageError,
    ImageFolder,
    ImageInTar,
    ImageLimits,
    ImageSource,
    is_url,
)
from vembed.modes import IMAGE, TEXT, Item


class CellReader:
    """Cells of one source to items.

    - `t`: a text.
    - `i`: a path under the image folder; a URL of a host that the limits allow; the image's
      bytes; or `{"bytes": ..., "path": ...}`, as `datasets` has images.
    - `m`: an object `{"text": ..., "image": ...}` of the two; both are needed.
    """

    def __init__(
        self, folder: ImageFolder | None = None, limits: ImageLimits | None = None
    ) -> None:
        """Assign.

        Args:
            folder: Where paths lead; None refuses them.
            limits: What images of bytes are held to; None takes those of the folder, or the
                defaults.
        """
        self._folder = folder
        self._limits = limits or (ImageLimits() if folder is None else folder.limits)

    def item(self, modality: str, cell: Any, *, field: str, place: str) -> Item:
        """What a cell of that modality stands for.

        Args:
            modality: `t`, `i` or `m`.
            cell: The value as the file has it.
            field: What it is for, such as `query`.
            place: The cell as the file names it: column, position in a list.

        Raises:
            RowProblem: if it cannot be that.
        """
        if modality == TEXT:
            return Item(text=read_text(cell, field=field, place=place))
        if modality == IMAGE:
            return Item(image=self.image(cell, field=field, place=place))
        if not isinstance(cell, Mapping) or not {"text", "image"} <= cell.keys():
            raise RowProblem(
                field,
                "an object with text and image is expected",
                describe(cell),
                place=place,
                advice=f'Write {{"text": ..., "image": ...}}, or two columns: {field}_text and '
                f"{field}_image.",
            )
        return self.pair(
            cell["text"],
            cell["image"],
            field=field,
            places=(f"{place}.text", f"{place}.image"),
        )

    def pair(self, text: Any, image: Any, *, field: str, places: tuple[str, str]) -> Item:
        """An item of text and image, each from a cell of its own.

        Raises:
            RowProblem: if one of them is not what it should be.
        """
        return Item(
            text=read_text(text, field=field, place=places[0]),
            image=self.image(image, field=field, place=places[1]),
        )

    def image(self, cell: Any, *, field: str, place: str) -> ImageSource:
        """The image that a cell names or holds; it is not looked at yet.

        Raises:
            RowProblem: if it names none.
        """
        name = ""
        if isinstance(cell, Mapping) and {"bytes", "path"} & cell.keys():
            name = cell.get("path") or ""
            cell = name if cell.get("bytes") is None else cell["bytes"]
        if isinstance(cell, ImageInTar):
            prefix = "" if self._folder is None else self._folder.prefix
            return replace(cell, prefix=prefix, limits=self._limits)
        if isinstance(cell, bytes):
            return ImageBytes(cell, str(name), limits=self._limits)
        if not isinstance(cell, str):
            rule = "an image is expected: a path, or bytes"
            raise RowProblem(field, rule, describe(cell), place=place)
        check_characters(cell, field=field, place=place)
        try:
            return self._find(cell)
        except ImageError as error:
            raise image_problem(error, field=field, place=place) from None

    def _find(self, path: str) -> ImageSource:
        if is_url(path):
            return find_url(path, limits=self._limits)
        if self._folder is None:
            raise ImageError(
                "an image path needs a folder that it is relative to",
                describe(path),
                "Set image_root.",
            )
        return self._folder.find(path)


def read_text(cell: Any, *, field: str, place: str) -> str:
    """A text that has something in it.

    Raises:
        RowProblem: if it is none.
    """
    if not isinstance(cell, str):
        raise RowProblem(field, "a text is expected", describe(cell), place=place)
    if not cell.strip():
        raise RowProblem(
            field,
            "must not be empty",
            describe(cell),
            place=place,
            advice="Fill it in, or remove the row.",
        )
    check_characters(cell, field=field, place=place)
    return cell


def image_problem(error: ImageError, *, field: str, place: str) -> RowProblem:
    """What is wrong with an image, as a problem of the row that names it."""
    return RowProblem(field, error.rule, error.received, place=place, advice=error.advice)


def check_characters(text: str, *, field: str, place: str) -> None:
    """Raise RowProblem if a text cannot be stored: NUL, half of a surrogate pair."""
    if "\0" in text:
        raise RowProblem(field, "must not contain NUL characters", describe(text), place=place)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            field,
            "must be valid Unicode",
            f"half of a surrogate pair at character {error.start} of {describe(text)}",
            place=place,
        ) from None
