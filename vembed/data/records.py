"""Rows as files have them, in many forms, become rows as vembed has them, in one form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vembed.data.cells import CellReader, read_text
from vembed.data.columns import (
    built_in_columns,
    field_columns,
    field_of,
    is_several,
    normalise_mapping,
)
from vembed.data.file_names import is_image_name
from vembed.data.problems import RowProblem, describe, list_names
from vembed.errors import DataError
from vembed.modes import MULTIMODAL, TEXT, Item, RetrievalMode
from vembed.registry import did_you_mean

_IMAGE_COLUMNS = ("image", "query_image", "positive_image", "image1", "image2")

FIELDS = frozenset({"query", "positive", "negative", "label", "score", "teacher_scores"})
"""What a record can have; `query` it always has."""


@dataclass(frozen=True)
class Record:
    """One training row.

    Attributes:
        query: What is searched with; a labelled row's only item; a graded pair's first text.
        positives: What should be found, at least one unless the row has a label.
        negatives: What should not be found.
        label: Class number: the position in `RecordDataset.label_names`. In a stream, whose labels
            are not known in advance, a stable 63-bit hash of the label.
        score: How similar query and positive are, on the data set's own scale.
        teacher_scores: A teacher's score of every positive, then of every negative.
        query_prompt: Text to put before the query; None leaves it to the model.
        document_prompt: Text to put before positives and negatives; None leaves it to the model.
        where: `file:line` that the row came from.
        row_index: Position in the data set that gave the record.
    """

    query: Item
    positives: tuple[Item, ...] = ()
    negatives: tuple[Item, ...] = ()
    label: int | None = None
    score: float | None = None
    teacher_scores: tuple[float, ...] | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    where: str = ""
    row_index: int = 0

    @property
    def fields(self) -> frozenset[str]:
        """Which of `FIELDS` this row has."""
        present = {
            "query": True,
            "positive": bool(self.positives),
            "negative": bool(self.negatives),
            "label": self.label is not None,
            "score": self.score is not None,
            "teacher_scores": self.teacher_scores is not None,
        }
        return frozenset(name for name, is_present in present.items() if is_present)


@dataclass(frozen=True)
class ParsedRow:
    """A checked row: what is stored of it."""

    query: Item
    positives: tuple[Item, ...] = ()
    negatives: tuple[Item, ...] = ()
    label: str | None = None
    score: float | None = None
    teacher_scores: tuple[float, ...] | None = None

    def content_hash(self) -> int:
        """A 63-bit hash of everything in the row, the same in every process and run."""
        parts = (
            _content(self.query),
            tuple(_content(item) for item in self.positives),
            tuple(_content(item) for item in self.negatives),
        )
        content = repr((*parts, self.label, self.score, self.teacher_scores))
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def items(self) -> Iterator[tuple[str, str, Item]]:
        """Every item, with its field and its place in the row."""
        for field, items in (
            ("query", (self.query,)),
            ("positive", self.positives),
            ("negative", self.negatives),
        ):
            for number, item in enumerate(items):
                yield field, place_of(field, number), item

    def located(self, where: str) -> ParsedRow:
        """The same row, whose images know where they are named.

        Args:
            where: `file:line` of the row.
        """

        def locate(field: str, items: tuple[Item, ...]) -> tuple[Item, ...]:
            return tuple(
                item.located(f"{where}: {place_of(field, number)}")
                for number, item in enumerate(items)
            )

        (query,) = locate("query", (self.query,))
        positives, negatives = (
            locate(field, items)
            for field, items in (("positive", self.positives), ("negative", self.negatives))
        )
        return replace(self, query=query, positives=positives, negatives=negatives)


def place_of(field: str, number: int) -> str:
    """An item's place in its row, such as `positive[1]`."""
    return field if field == "query" else f"{field}[{number}]"


def _content(item: Item) -> Any:
    return item.text if item.image is None else item.content


class RowParser:
    """Checks rows and brings them into the one form."""

    def __init__(
        self,
        column_mapping: Mapping[str, str] | None = None,
        *,
        mode: RetrievalMode = RetrievalMode(TEXT, TEXT),  # noqa: B008 - frozen
        cells: CellReader | None = None,
        text_cells: bool = False,
        items_only: bool = False,
    ) -> None:
        """Assign and check.

        Args:
            column_mapping: Our field to the file's column; other fields go by `field_columns`.
            mode: Modality of queries and documents.
            cells: Reads images; None reads those of bytes only.
            text_cells: Whether the file knows only text (CSV, TSV): numbers and objects are then
                read from text, and an empty cell is a missing value.
            items_only: Whether rows are documents, whose field is `query`; no other is read.

        Raises:
            ConfigError: if the mapping cannot be meant.
        """
        self._mode = mode
        self._cells = cells or CellReader()
        self._mapping = normalise_mapping(column_mapping, mode)
        self._text_cells = text_cells
        self._items_only = items_only
        self._unseen = {column for columns in self._mapping.values() for column in columns}
        self._columns: tuple[str, ...] | None = None
        self._layout: dict[str, list[str]] = {}
        self._places: dict[tuple[str, str], str] = {}

    def check_columns(self, path: str, columns: Sequence[str]) -> None:
        """Raise DataError if a mapped column is not among `columns`, which are all there are."""
        missing = [c for named in self._mapping.values() for c in named if c not in columns]
        if missing:
            raise DataError(_no_such_column(path, self._field_mapped_to(missing[0]), columns))

    def check_seen(self, path: str) -> None:
        """Raise DataError if no row so far had a column that the mapping names."""
        if self._unseen:
            column = min(self._unseen)
            raise DataError(
                _no_such_column(path, self._field_mapped_to(column), self._columns or ())
            )

    def parse(self, row: Mapping[str, Any]) -> ParsedRow:
        """Check one row.

        Raises:
            RowProblem: about the first thing that is wrong in it.
        """
        self._look_at_columns(row)
        queries = self._items(row, "query")
        if not queries:
            raise self._missing(row, "query")
        if self._items_only:
            return ParsedRow(queries[0])
        positives = self._items(row, "positive")
        negatives = self._items(row, "negative")
        label = self._label(row)
        if not positives and label is None:
            has_column = any(
                self._layout.get(f"positive{part}") for part in ("", "_text", "_image")
            )
            is_labelled = self._layout["label"] and not has_column
            raise self._missing(row, "label" if is_labelled else "positive")
        score = self._number(row, "score")
        teacher_scores = self._teacher_scores(row, len(positives), len(negatives))
        return ParsedRow(queries[0], positives, negatives, label, score, teacher_scores)

    def _look_at_columns(self, row: Mapping[str, Any]) -> None:
        columns = tuple(row)
        if columns != self._columns:  # rows of one file almost always have the same columns
            self._columns = columns
            known = field_columns(self._mode)
            self._layout = {field: self._columns_of(field, columns) for field in known}
            self._places = {
                (field, column): self._place(field, column)
                for field, named in self._layout.items()
                for column in named
            }
            self._unseen.difference_update(columns)

    def _place(self, field: str, column: str) -> str:
        """A column as messages name it."""
        is_ours = field_of(column, self._mode) == field
        return column if is_ours else f"{field} (column {column!r})"

    def _columns_of(self, field: str, columns: Sequence[str]) -> list[str]:
        if field in self._mapping:
            return [column for column in self._mapping[field] if column in columns]
        taken = {column for named in self._mapping.values() for column in named}
        free = [column for column in columns if column not in taken]
        return built_in_columns(free, field, self._mode)

    def _field_mapped_to(self, column: str) -> tuple[str, str]:
        return next(field for field, named in self._mapping.items() if column in named), column

    def _values(self, row: Mapping[str, Any], field: str) -> Iterator[tuple[str, Any]]:
        """The values of a field that are there, each with its place as the file names it."""
        for column in self._layout[field]:
            value = row[column]
            if value is None or (self._text_cells and value == ""):
                continue
            place = self._places[field, column]
            if is_several(field) and isinstance(value, list | tuple):
                yield from ((f"{place}[{i}]", element) for i, element in enumerate(value))
            else:
                yield place, value

    def _items(self, row: Mapping[str, Any], field: str) -> tuple[Item, ...]:
        """The items of a field, none where it is absent."""
        modality = self._mode.query if field == "query" else self._mode.document
        if modality == MULTIMODAL:
            return self._items_of_both(row, field)
        values = self._values(row, field)
        return tuple(self._cells.item(modality, v, field=field, place=p) for p, v in values)

    def _items_of_both(self, row: Mapping[str, Any], field: str) -> tuple[Item, ...]:
        """Items of text and image: objects in one column, or the parts in two."""
        whole = list(self._objects(row, field))
        texts, images = (list(self._values(row, f"{field}_{part}")) for part in ("text", "image"))
        # A column such as `query` holds the text where the image has a column of its own.
        texts = texts or whole
        has_objects = any(isinstance(value, Mapping) for _, value in whole)
        if has_objects or (whole and not self._layout[f"{field}_image"]):
            return tuple(self._cells.item(MULTIMODAL, v, field=field, place=p) for p, v in whole)
        if len(texts) != len(images):
            raise RowProblem(
                field,
                "as many texts as images are expected",
                f"{len(texts)} texts and {len(images)} images",
                advice="Both are needed for every item.",
            )
        return tuple(
            self._cells.pair(text, image, field=field, places=(text_place, image_place))
            for (text_place, text), (image_place, image) in zip(texts, images, strict=True)
        )

    def _objects(self, row: Mapping[str, Any], field: str) -> Iterator[tuple[str, Any]]:
        """The values of a column of items; in CSV, objects are written as JSON."""
        for place, value in self._values(row, field):
            if self._text_cells and value.lstrip().startswith("{"):
                yield place, self._json_in_cell(value)
            else:
                yield place, value

    def _label(self, row: Mapping[str, Any]) -> str | None:
        for place, value in self._values(row, "label"):
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if not isinstance(value, str):
                raise RowProblem(
                    "label",
                    "a text or a whole number is expected",
                    describe(value),
                    place=place,
                    advice="A similarity is a score: column_mapping {score: label}.",
                )
            return read_text(value, field="label", place=place)
        return None

    def _number(self, row: Mapping[str, Any], field: str) -> float | None:
        for place, value in self._values(row, field):
            return self._check_number(field, place, value)
        return None

    def _check_number(self, field: str, place: str, value: Any) -> float:
        rule = "a finite number is expected"
        if isinstance(value, bool) or not isinstance(
            value, int | float | str if self._text_cells else int | float
        ):
            raise RowProblem(field, rule, describe(value), place=place)
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise RowProblem(field, rule, describe(value), place=place) from None
        if not math.isfinite(number):
            raise RowProblem(field, rule, describe(value), place=place)
        return number

    def _numbers(self, row: Mapping[str, Any], field: str) -> tuple[float, ...] | None:
        """The numbers of a field that holds a list of them; None where there is no such field."""
        for place, value in self._values(row, field):
            values = self._json_in_cell(value) if self._text_cells else value
            if not isinstance(values, list | tuple):
                values = [values]
            return tuple(
                self._check_number("teacher_scores", f"{place}[{i}]", element)
                for i, element in enumerate(values)
            )
        return None

    def _json_in_cell(self, cell: str) -> Any:
        """A cell of a CSV file that may hold JSON."""
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell

    def _teacher_scores(
        self, row: Mapping[str, Any], positives: int, negatives: int
    ) -> tuple[float, ...] | None:
        scores = self._numbers(row, "teacher_scores")
        if scores is None:
            of_positives = self._numbers(row, "positive_scores")
            of_negatives = self._numbers(row, "negative_scores")
            if of_positives is None and of_negatives is None:
                return None
            self._check_count("positive_scores", of_positives or (), positives)
            self._check_count("negative_scores", of_negatives or (), negatives)
            return (*(of_positives or ()), *(of_negatives or ()))
        self._check_count("teacher_scores", scores, positives + negatives)
        return scores

    def _check_count(self, field: str, scores: tuple[float, ...], expected: int) -> None:
        if len(scores) != expected:
            what = {
                "positive_scores": "positives",
                "negative_scores": "negatives",
            }.get(field, "positives and negatives together")
            raise RowProblem(
                "teacher_scores",
                "one score for each positive, then one for each negative, is expected",
                f"{len(scores)} scores for {expected} {what}",
                place=field,
            )

    def _missing(self, row: Mapping[str, Any], field: str) -> RowProblem:
        columns = list(row)
        parts = [
            name for name in (field, f"{field}_text", f"{field}_image") if name in self._layout
        ]
        found = [column for part in parts for column in self._layout[part]]
        if found:
            received = "an empty cell" if self._text_cells else describe(row[found[0]])
            advice = "Fill it in, or remove the row."
            return RowProblem(field, "must not be empty", received, place=found[0], advice=advice)
        mapped = [column for part in parts for column in self._mapping.get(part, ())]
        if mapped:
            return RowProblem(
                field,
                f"column_mapping names column {mapped[0]!r}, which the row does not have",
                f"columns {list_names(columns)}",
                advice=_nearest(mapped[0], columns),
            )
        return RowProblem(
            field,
            "no column for it" + (", and none for label" if field == "positive" else ""),
            f"columns {list_names(columns)}",
            advice=self._advice_for(field, parts, row),
            about_columns=True,
        )

    def _advice_for(self, field: str, parts: Sequence[str], row: Mapping[str, Any]) -> str:
        """What to do about a field that no column stands for."""
        advice = []
        image = None if self._mode.has_images else _image_column(row)
        if image is not None:
            known = image.strip().lower() in _IMAGE_COLUMNS
            mapping = "" if known else f" and column_mapping: {{positive: {image!r}}}"
            advice.append(
                f"Column {image!r} is for images: if they are meant, set retrieval_mode: t2i"
                f"{mapping} (t text, i image, m both)."
            )
        near = next((c for c in row if field_of(c.strip().lower(), self._mode) in parts), None)
        if near is not None:
            advice.append(
                f"Did you mean {near.strip().lower()!r}? The file has {near!r}: rename the column, "
                f"or set column_mapping: {{{field}: {near!r}}}."
            )
        others = [c for c in row if c != image and field_of(c, self._mode) is None]
        if not advice or (near is None and others):
            example = ", ".join(f"{part}: your_column" for part in parts[1:] or parts)
            nearest = did_you_mean(field, list(row))
            advice.append(f"Name yours with column_mapping: {{{example}}}{nearest}.")
        return " ".join(advice)


def _image_column(row: Mapping[str, Any]) -> str | None:
    """The first column that is called image, or whose cell names an image file."""
    for column, cell in row.items():
        if column.strip().lower() in _IMAGE_COLUMNS or is_image_name(cell):
            return column
    return None


def _no_such_column(path: str, mapped: tuple[str, str], columns: Sequence[str]) -> str:
    field, column = mapped
    return (
        f"{path}: column_mapping: {field} is mapped to {column!r}, and there is no such column. "
        f"Columns: {list_names(columns)}. {_nearest(column, columns)}"
    ).rstrip()


def _nearest(column: str, columns: Sequence[str]) -> str:
    nearest = did_you_mean(column, list(columns)).strip(" ()").removeprefix("did you mean ")
    return f"Did you mean {nearest}" if nearest else "Correct the mapping."
