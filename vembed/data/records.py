"""Rows as files have them, in many forms, become rows as vembed has them, in one form."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vembed.data.problems import RowProblem, describe, list_names
from vembed.errors import ConfigError, DataError
from vembed.modes import Item
from vembed.registry import did_you_mean

FIELDS = frozenset({"query", "positive", "negative", "label", "score", "teacher_scores"})
"""What a record can have; `query` it always has."""

FIELD_COLUMNS: dict[str, tuple[str, ...]] = {
    "query": ("query", "anchor", "text1", "sentence1", "text"),
    "positive": ("positive", "pos", "text2", "sentence2"),
    "negative": ("negative", "neg"),
    "label": ("label",),
    "score": ("score",),
    "teacher_scores": ("teacher_scores",),
    "positive_scores": ("positive_scores", "pos_scores"),
    "negative_scores": ("negative_scores", "neg_scores"),
}
"""Column names that are understood without a column_mapping; the first one present is taken.

Where a row can have several positives or negatives, `positive` also stands for `positives`,
`positive_1`, `positive_2` ...: all of them are taken, in the order of the columns.
"""

_SEVERAL = frozenset({"positive", "negative"})
_NUMBERED = re.compile(r"(?P<name>positive|negative|pos|neg)(?:s|_\d+)")


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
    """A checked row in the one form that is stored: plain texts and numbers."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    label: str | None
    score: float | None
    teacher_scores: tuple[float, ...] | None

    def content_hash(self) -> int:
        """A 63-bit hash of everything in the row, the same in every process and run."""
        parts = (self.query, self.positives, self.negatives)
        content = repr((*parts, self.label, self.score, self.teacher_scores)).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def normalise_mapping(column_mapping: Mapping[str, str] | None) -> dict[str, list[str]]:
    """A column_mapping as field -> columns; `text1` and `positives` are other words for fields.

    Raises:
        ConfigError: if a key is no field of ours, or a value no column name.
    """
    mapping: dict[str, list[str]] = {}
    for key, column in (column_mapping or {}).items():
        field = _field_of(key)
        if field is None:
            raise ConfigError(
                f"column_mapping: {key!r} is no field of vembed{did_you_mean(key, FIELD_COLUMNS)}. "
                f"Write {{our field: your column}}; fields: {', '.join(FIELD_COLUMNS)}"
            )
        if not isinstance(column, str) or not column:
            raise ConfigError(
                f"column_mapping: {key}: expected the name of a column. Received: {column!r}"
            )
        mapping.setdefault(field, []).append(column)
        if field not in _SEVERAL and len(mapping[field]) > 1:
            raise ConfigError(
                f"column_mapping: {field} can come from one column only. "
                f"Received: {list_names(mapping[field])}"
            )
    return mapping


class RowParser:
    """Checks rows and brings them into the one form."""

    def __init__(
        self, column_mapping: Mapping[str, str] | None = None, *, text_cells: bool = False
    ) -> None:
        """Assign and check.

        Args:
            column_mapping: Our field to the file's column; other fields go by `FIELD_COLUMNS`.
            text_cells: Whether the file knows only text (CSV, TSV): numbers are then read from
                text, and an empty cell is a missing value.

        Raises:
            ConfigError: if the mapping cannot be meant.
        """
        self._mapping = normalise_mapping(column_mapping)
        self._text_cells = text_cells
        self._unseen = {column for columns in self._mapping.values() for column in columns}
        self._columns: tuple[str, ...] | None = None
        self._layout: dict[str, list[str]] = {}

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
        query = self._query(row)
        positives = self._texts(row, "positive")
        negatives = self._texts(row, "negative")
        label = self._label(row)
        if not positives and label is None:
            raise self._missing(row, "positive")
        score = self._number(row, "score")
        teacher_scores = self._teacher_scores(row, len(positives), len(negatives))
        return ParsedRow(query, positives, negatives, label, score, teacher_scores)

    def _look_at_columns(self, row: Mapping[str, Any]) -> None:
        columns = tuple(row)
        if columns != self._columns:  # rows of one file almost always have the same columns
            self._columns = columns
            self._layout = {field: self._columns_of(field, columns) for field in FIELD_COLUMNS}
            self._unseen.difference_update(columns)

    def _columns_of(self, field: str, columns: Sequence[str]) -> list[str]:
        if field in self._mapping:
            return [column for column in self._mapping[field] if column in columns]
        taken = {column for named in self._mapping.values() for column in named}
        return _built_in_columns([column for column in columns if column not in taken], field)

    def _field_mapped_to(self, column: str) -> tuple[str, str]:
        return next(field for field, named in self._mapping.items() if column in named), column

    def _values(self, row: Mapping[str, Any], field: str) -> Iterator[tuple[str, Any]]:
        """The values of a field that are there, each with its place as the file names it."""
        for column in self._layout[field]:
            value = row[column]
            if value is None or (self._text_cells and value == ""):
                continue
            place = column if _field_of(column) == field else f"{field} (column {column!r})"
            if field in _SEVERAL and isinstance(value, list | tuple):
                yield from ((f"{place}[{i}]", element) for i, element in enumerate(value))
            else:
                yield place, value

    def _query(self, row: Mapping[str, Any]) -> str:
        for place, value in self._values(row, "query"):
            return _check_text("query", place, value)
        raise self._missing(row, "query")

    def _texts(self, row: Mapping[str, Any], field: str) -> tuple[str, ...]:
        return tuple(_check_text(field, place, value) for place, value in self._values(row, field))

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
            return _check_text("label", place, value)
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
            values = self._list_in_cell(value) if self._text_cells else value
            if not isinstance(values, list | tuple):
                values = [values]
            return tuple(
                self._check_number("teacher_scores", f"{place}[{i}]", element)
                for i, element in enumerate(values)
            )
        return None

    def _list_in_cell(self, cell: str) -> Any:
        """A cell of a CSV file that may hold a JSON list of numbers."""
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
        if self._layout[field]:
            column = self._layout[field][0]
            received = "an empty cell" if self._text_cells else describe(row[column])
            advice = "Fill it in, or remove the row."
            return RowProblem(field, "must not be empty", received, place=column, advice=advice)
        if field in self._mapping:
            column = self._mapping[field][0]
            return RowProblem(
                field,
                f"column_mapping names column {column!r}, which the row does not have",
                f"columns {list_names(columns)}",
                advice=_nearest(column, columns),
            )
        return RowProblem(
            field,
            "no column for it" + (", and none for label" if field == "positive" else ""),
            f"columns {list_names(columns)}",
            advice=f"Name yours with column_mapping: {{{field}: your_column}}"
            f"{did_you_mean(field, columns)}.",
        )


def _field_of(name: str) -> str | None:
    """The field that a built-in column name stands for."""
    if not isinstance(name, str):
        return None
    numbered = _NUMBERED.fullmatch(name)
    name = numbered["name"] if numbered else name
    return next((field for field, names in FIELD_COLUMNS.items() if name in names), None)


def _built_in_columns(columns: Sequence[str], field: str) -> list[str]:
    for name in FIELD_COLUMNS[field]:
        found = [column for column in columns if column == name or _is_numbered(column, name)]
        if found:
            return found
    return []


def _is_numbered(column: str, name: str) -> bool:
    match = _NUMBERED.fullmatch(column)
    return match is not None and match["name"] == name


def _check_text(field: str, place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowProblem(field, "a text is expected", describe(value), place=place)
    if not value.strip():
        raise RowProblem(
            field,
            "must not be empty",
            describe(value),
            place=place,
            advice="Fill it in, or remove the row.",
        )
    if "\0" in value:
        raise RowProblem(field, "must not contain NUL characters", describe(value), place=place)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            field,
            "must be valid Unicode",
            f"half of a surrogate pair at character {error.start} of {describe(value)}",
            place=place,
        ) from None
    return value


def _no_such_column(path: str, mapped: tuple[str, str], columns: Sequence[str]) -> str:
    field, column = mapped
    return (
        f"{path}: column_mapping: {field} is mapped to {column!r}, and there is no such column. "
        f"Columns: {list_names(columns)}. {_nearest(column, columns)}"
    ).rstrip()


def _nearest(column: str, columns: Sequence[str]) -> str:
    nearest = did_you_mean(column, list(columns)).strip(" ()").removeprefix("did you mean ")
    return f"Did you mean {nearest}" if nearest else "Correct the mapping."
