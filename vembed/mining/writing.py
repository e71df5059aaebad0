"""The rows as they came, with more negatives, as JSON Lines that `vembed train` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vembed.data.columns import built_in_columns, field_columns, normalise_mapping
from vembed.data.problems import describe
from vembed.errors import DataError, shorten
from vembed.image_urls import ImageUrl
from vembed.images import ImageFile
from vembed.modes import MULTIMODAL, Item, RetrievalMode

_SCORES = ("teacher_scores", "positive_scores", "negative_scores")
_NEW_COLUMN = "negatives"


class RowWriter:
    """Adds negatives to a row of the file, in the column that has those of its own, if it has one.

    The other columns stay as they are; what a file of texts (CSV) writes for a missing value, a
    number or an object becomes that.
    """

    def __init__(
        self,
        column_mapping: Mapping[str, str] | None,
        mode: RetrievalMode,
        *,
        text_cells: bool = False,
    ) -> None:
        """Assign; the arguments are those of `RowParser`."""
        self._mode = mode
        self._mapping = normalise_mapping(column_mapping, mode)
        self._taken = {column for columns in self._mapping.values() for column in columns}
        self._text_cells = text_cells

    def line(
        self,
        values: Mapping[str, Any],
        negatives: Sequence[Item],
        scores: Sequence[float] | None,
        where: str,
    ) -> str:
        """A line of JSON.

        Args:
            values: The row as its file has it.
            negatives: More negatives.
            scores: Of all positives and then all negatives, in the place of scores that it has.
            where: `file:line` of the row.

        Raises:
            DataError: if a value has no form in JSON, such as the bytes of an image.
        """
        row = self._typed(values) if self._text_cells else dict(values)
        if negatives:
            self._add(row, negatives, where)
        if scores is not None:
            for field in _SCORES:
                for column in self._columns(field, row):
                    del row[column]
            row[self._mapping.get(_SCORES[0], [_SCORES[0]])[0]] = [round(s, 6) for s in scores]
        try:
            return json.dumps(row, ensure_ascii=False) + "\n"
        except TypeError:
            column = next(name for name, value in row.items() if not _is_json(value))
            raise DataError(
                f"{where}: {column}: has no form in JSON Lines, which is what mining writes. "
                f"Received: {describe(row[column])}. Leave the column out, or name image files"
            ) from None

    def _columns(self, field: str, row: Mapping[str, Any]) -> list[str]:
        """The columns of a row that stand for a field."""
        if field in self._mapping:
            return [column for column in self._mapping[field] if column in row]
        if field not in field_columns(self._mode):
            return []
        free = [column for column in row if column not in self._taken]
        return built_in_columns(free, field, self._mode)

    def _add(self, row: dict[str, Any], negatives: Sequence[Item], where: str) -> None:
        whole = self._columns("negative", row)
        if self._mode.document == MULTIMODAL:
            texts, images = (self._columns(f"negative_{part}", row) for part in ("text", "image"))
            if images or "negative_image" in self._mapping:
                texts = texts or whole or self._named("negative_text")
                images = images or self._named("negative_image")
                _extend(row, texts[-1], [item.text for item in negatives])
                _extend(row, images[-1], [_path(item, where) for item in negatives])
                return
        cells = [_cell(item, where) for item in negatives]
        _extend(row, (whole or self._mapping.get("negative") or [_NEW_COLUMN])[-1], cells)

    def _named(self, field: str) -> list[str]:
        return self._mapping.get(field) or [field]

    def _typed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row of texts with its numbers, lists and objects as JSON has them."""
        row = {column: cell for column, cell in values.items() if cell != ""}
        for column in (c for field in _SCORES for c in self._columns(field, row)):
            row[column] = json.loads(row[column])
        for column in self._columns("score", row):
            row[column] = float(row[column])
        for field in ("query", "positive", "negative"):
            modality = self._mode.query if field == "query" else self._mode.document
            for column in self._columns(field, row) if modality == MULTIMODAL else ():
                if row[column].lstrip().startswith("{"):
                    row[column] = json.loads(row[column])
        return row


def _extend(row: dict[str, Any], column: str, cells: Sequence[Any]) -> None:
    there = row.get(column)
    if there is None:
        there = []
    row[column] = [*(there if isinstance(there, list | tuple) else [there]), *cells]


def _cell(item: Item, where: str) -> Any:
    if item.image is None:
        return item.text
    path = _path(item, where)
    return path if item.text is None else {"text": item.text, "image": path}


def _path(item: Item, where: str) -> str:
    if isinstance(item.image, ImageFile):
        return item.image.path
    if isinstance(item.image, ImageUrl):
        return item.image.url
    raise DataError(
        f"{where}: a mined negative is an image that lies in a file of data: "
        f"{shorten(str(item.image))}. JSON Lines, which mining writes, hold paths of images. Write "
        "the images to files, and name these in the rows"
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
