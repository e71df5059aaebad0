"""Which column of a file stands for which field of a row; the retrieval mode has a say in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

from vembed.data.problems import list_names
from vembed.errors import ConfigError
from vembed.modes import IMAGE, MULTIMODAL, TEXT, RetrievalMode
from vembed.registry import did_you_mean

_ITEMS = {
    "query": ("query", "anchor"),
    "positive": ("positive", "pos"),
    "negative": ("negative", "neg"),
}
"""Columns of an item as a whole: a text, an image, or an object of both, as the mode says."""

_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "query": {"text": ("query_text", "text1", "sentence1"), "image": ("query_image", "image1")},
    "positive": {
        "text": ("positive_text", "text2", "sentence2"),
        "image": ("positive_image", "image2"),
    },
    "negative": {"text": ("negative_text",), "image": ("negative_image",)},
}
"""Columns of one part of an item."""

_BARE = {"text": ("text", "caption"), "image": ("image",)}
"""Columns that belong to the query if it has such a part, otherwise to the positive."""

_FACTS = {
    "label": ("label",),
    "score": ("score",),
    "teacher_scores": ("teacher_scores",),
    "positive_scores": ("positive_scores", "pos_scores"),
    "negative_scores": ("negative_scores", "neg_scores"),
}

_NUMBERED = re.compile(r"(?P<name>(?:positive|negative)(?:_text|_image)?|pos|neg)(?:s|_\d+)")


@cache
def field_columns(mode: RetrievalMode) -> dict[str, tuple[str, ...]]:
    """Column names that are understood without a column_mapping; the first one present is taken.

    A field of modality m has three entries: the item as a whole (`query`), its text (`query_text`)
    and its image (`query_image`). Where a row can have several positives or negatives, `positive`
    also stands for `positives`, `positive_1`, `positive_2` ...: all of them are taken, in the order
    of the columns.
    """
    columns: dict[str, tuple[str, ...]] = {}
    modalities = {"query": mode.query, "positive": mode.document, "negative": mode.document}
    for field, modality in modalities.items():
        parts = {part: (*_PARTS[field][part], *_bare_columns(field, part, mode)) for part in _BARE}
        if modality == MULTIMODAL:
            columns[field] = _ITEMS[field]
            columns |= {f"{field}_{part}": names for part, names in parts.items()}
        else:
            own, *others = parts["text" if modality == TEXT else "image"]
            columns[field] = (own, *_ITEMS[field], *others)
    return columns | _FACTS


def _bare_columns(field: str, part: str, mode: RetrievalMode) -> tuple[str, ...]:
    letters = (MULTIMODAL, TEXT if part == "text" else IMAGE)
    owner = "query" if mode.query in letters else "positive"
    return _BARE[part] if field == owner else ()


def is_several(field: str) -> bool:
    """Whether a row may have several values of a field."""
    return field.startswith(("positive", "negative")) and not field.endswith("scores")


def field_of(name: object, mode: RetrievalMode) -> str | None:
    """The field that a built-in column name stands for."""
    if not isinstance(name, str):
        return None
    numbered = _NUMBERED.fullmatch(name)
    name = numbered["name"] if numbered else name
    return next((field for field, names in field_columns(mode).items() if name in names), None)


def built_in_columns(columns: Sequence[str], field: str, mode: RetrievalMode) -> list[str]:
    """Those of `columns` that stand for a field by their name."""
    for name in field_columns(mode)[field]:
        found = [column for column in columns if column == name or _is_numbered(column, name)]
        if found:
            return found
    return []


def _is_numbered(column: str, name: str) -> bool:
    match = _NUMBERED.fullmatch(column)
    return match is not None and match["name"] == name


def normalise_mapping(
    column_mapping: Mapping[str, str] | None, mode: RetrievalMode
) -> dict[str, list[str]]:
    """A column_mapping as field -> columns; `text1` and `positives` are other words for fields.

    Raises:
        ConfigError: if a key is no field of ours, or a value no column name.
    """
    mapping: dict[str, list[str]] = {}
    for key, column in (column_mapping or {}).items():
        field = field_of(key, mode)
        if field is None:
            known = field_columns(mode)
            raise ConfigError(
                f"column_mapping: {key!r} is no field of vembed{did_you_mean(key, known)}. "
                f"Write {{our field: your column}}; fields in {mode}: {', '.join(known)}"
            )
        if not isinstance(column, str) or not column:
            raise ConfigError(
                f"column_mapping: {key}: expected the name of a column. Received: {column!r}"
            )
        mapping.setdefault(field, []).append(column)
        if not is_several(field) and len(mapping[field]) > 1:
            raise ConfigError(
                f"column_mapping: {field} can come from one column only. "
                f"Received: {list_names(mapping[field])}"
            )
    return mapping
