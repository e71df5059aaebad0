"""Rows and a corpus to numbered queries and documents, each content once.

# Shapes: R rows, Q distinct queries, N distinct documents, P pairs of a row and its positive
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vembed.data import ImageRules, Record, RecordDataset, load_dataset_records
from vembed.data.checking import RowRules
from vembed.data.problems import RowProblem, list_names
from vembed.data.sources import BeirCorpusSource, Source, find_source
from vembed.data.storage import Origin, ShareOfProgress, store_rows
from vembed.errors import DataError, did_you_mean
from vembed.mining.pairs import Pairs
from vembed.modes import IMAGE, MULTIMODAL, TEXT, Item, RetrievalMode

Ints = NDArray[np.int64]

_FIELDS = ("query", "positive", "negative")


@dataclass(frozen=True)
class Places:
    """Where each of n items stands first.

    Attributes:
        rows: Row of it.
        fields: Field of that row, as a position in `_FIELDS`.
        positions: Which item of that field.
    """

    rows: Ints
    fields: Ints
    positions: Ints

    def __getitem__(self, numbers: Ints) -> Places:
        return Places(self.rows[numbers], self.fields[numbers], self.positions[numbers])


@dataclass(frozen=True)
class RowItems:
    """Items of rows, read from disk when asked for.

    Attributes:
        sets: The sets of rows.
        set_of: Of each item, which set it is in.
        places: Where in that set.
    """

    sets: Sequence[RecordDataset]
    set_of: Ints
    places: Places

    def __len__(self) -> int:
        return len(self.set_of)

    def read(self, numbers: Sequence[int]) -> list[Item]:
        """The items with these numbers."""
        wanted = np.asarray(numbers, dtype=np.int64)
        found: list[Item | None] = [None] * len(wanted)
        for number, rows in enumerate(self.sets):
            here = np.flatnonzero(self.set_of[wanted] == number)
            places = self.places[wanted[here]]
            listed, which = np.unique(places.rows, return_inverse=True)
            records = rows.__getitems__(listed.tolist())
            each = zip(here, which, places.fields, places.positions, strict=True)
            for slot, row, field, position in each:
                found[slot] = _items_of(records[row], int(field))[position]
        return [item for item in found if item is not None]


@dataclass(frozen=True)
class Ragged:
    """Some numbers for each row.

    Attributes:
        values: Of all rows, row after row.
        ends_R: Where those of each row end.
    """

    values: Ints
    ends_R: Ints

    def __getitem__(self, row: int) -> Ints:
        return self.values[self.ends_R[row - 1] if row else 0 : self.ends_R[row]]


@dataclass(frozen=True)
class Pool:
    """What is searched, and what is known.

    Attributes:
        rows: R rows.
        queries: Q queries.
        documents: N documents, of which the first `candidates` may be negatives.
        candidates: How many.
        query_R: Query number of each row.
        positives_R: Document numbers of each row's positives.
        negatives_R: Likewise, of the negatives that it has; none unless asked for.
        positives: Each query with each of its positives, of whatever row.
        known: Each query with each candidate that is no negative of it.
        first_row_Q: The first row of each query.
        source_N: Of each document, its row in the corpus, or, without one, in the rows; -1 where a
            positive is not in the corpus.
    """

    rows: RecordDataset
    queries: RowItems
    documents: RowItems
    candidates: int
    query_R: Ints
    positives_R: Ragged
    negatives_R: Ragged
    positives: Pairs
    known: Pairs
    first_row_Q: Ints
    source_N: Ints


def load_rows(
    data: str,
    *,
    mode: RetrievalMode,
    column_mapping: Mapping[str, str] | None,
    images: ImageRules,
    split: str,
) -> RecordDataset:
    """The rows, all checked.

    Raises:
        DataError: if one cannot be used, or has no positive.
    """
    rows = load_dataset_records(
        data, retrieval_mode=mode, column_mapping=column_mapping, images=images, split=split
    )
    if "positive" not in rows.fields:
        lacking = rows.gaps.get("positive", f"all {len(rows):,} rows")
        raise DataError(
            f"{data}: mining needs a positive in every row. Without one: {lacking}. Remove these "
            "rows, or name the column with column_mapping"
        )
    return rows


def load_corpus(
    path: str,
    *,
    modality: str,
    column: str,
    image_column: str,
    images: ImageRules,
    split: str,
) -> RecordDataset:
    """The documents of a corpus file as rows that have a query only; all are checked.

    Args:
        path: Any file of rows, or a BEIR folder, whose documents are a title and a text.
        modality: `t`, `i` or `m`.
        column: Column of the text.
        image_column: Column of the image.
        images: Where images are, and what they are held to.
        split: Of a data set with splits.

    Raises:
        DataError: about the rows that cannot be used.
    """
    source = _corpus_source(path, split)
    mode = RetrievalMode(modality, modality)
    mapping = {
        TEXT: {"query": column},
        IMAGE: {"query": image_column},
        MULTIMODAL: {"query_image": image_column, "query_text": column},
    }[modality]
    _check_columns(source, mapping.values())
    folder = images.folder(source.image_root) if mode.has_images else None
    rules = RowRules(
        mode=mode,
        column_mapping=tuple(mapping.items()),
        folder=folder,
        limits=images.limits,
        image_check=images.check if mode.has_images else None,
        items_only=True,
    )
    origin = Origin(source.files, mode, folder=folder, limits=images.limits)
    return RecordDataset([store_rows(source, rules, origin, ShareOfProgress())])


def _corpus_source(path: str, split: str) -> Source:
    if Path(path, "corpus.jsonl").is_file():
        return BeirCorpusSource.of(path)
    return find_source(path, split=split, own_split=False, streaming=False)


def _check_columns(source: Source, wanted: Iterable[str]) -> None:
    """Raise DataError if the first row has not these columns."""
    for row in islice(source.read(), 1):
        columns = list(wanted if isinstance(row.values, RowProblem) else row.values)
        for missing in (column for column in wanted if column not in columns):
            raise DataError(
                f"{source.files[row.file]}:{row.line}: no column {missing!r}"
                f"{did_you_mean(missing, columns)}. Columns: {list_names(columns)}. Name one with "
                "corpus_column (images: corpus_image_column)"
            )


def number_items(
    rows: RecordDataset, corpus: RecordDataset | None, *, with_negatives: bool
) -> Pool:
    """Give every distinct query and document a number, in the order in which they come.

    Args:
        rows: The rows.
        corpus: The candidates; None makes all positives the candidates.
        with_negatives: Whether negatives that the rows have become documents too, which are no
            candidates.
    """
    query_ids = rows.query_ids
    query_R, first_row_Q = _number(query_ids)
    each = _Listed(query_ids, np.arange(1, len(rows) + 1))
    positives = _Listed(rows.pair_ids.positives, np.cumsum(rows.positive_counts))
    negatives = _negatives_of(rows)
    documents = [_Placed(rows, "positive", positives)]
    if corpus is not None:
        items = _Listed(corpus.query_ids, np.arange(1, len(corpus) + 1))
        documents.insert(0, _Placed(corpus, "query", items))
    if with_negatives:
        documents.append(_Placed(rows, "negative", negatives))
    ids = np.concatenate([placed.items.ids for placed in documents])
    numbers, first_N = _number(ids)
    ends = np.cumsum([len(placed.items.ids) for placed in documents])
    of_parts = dict(zip((p.field for p in documents), np.split(numbers, ends[:-1]), strict=True))
    candidates = int(numbers[: ends[0]].max()) + 1
    positive_P = of_parts["positive"]
    asked_P = np.repeat(query_R, positives.counts_R)
    others = _other_known(query_R, query_ids[first_row_Q], ids[first_N], negatives)
    known = Pairs.of(
        np.concatenate([asked_P, others.queries]), np.concatenate([positive_P, others.documents])
    )
    listed = _row_items(documents, first_N)
    none_R = Ragged(positive_P[:0], np.zeros(len(rows), dtype=np.int64))
    return Pool(
        rows=rows,
        queries=_row_items([_Placed(rows, "query", each)], first_row_Q),
        documents=listed,
        candidates=candidates,
        query_R=query_R,
        positives_R=Ragged(positive_P, positives.ends_R),
        negatives_R=Ragged(of_parts["negative"], negatives.ends_R) if with_negatives else none_R,
        positives=Pairs.of(asked_P, positive_P),
        known=known.below(candidates),
        first_row_Q=first_row_Q,
        source_N=np.where(listed.set_of == 0, listed.places.rows, -1),
    )


@dataclass(frozen=True)
class _Listed:
    """Content ids of one field of all rows, row after row, and where those of each row end."""

    ids: Ints
    ends_R: Ints

    @property
    def counts_R(self) -> Ints:
        return np.diff(self.ends_R, prepend=0)


@dataclass(frozen=True)
class _Placed:
    """The items of a field of some rows."""

    rows: RecordDataset
    field: str
    items: _Listed

    def places(self) -> Places:
        counts_R = self.items.counts_R
        rows = np.repeat(np.arange(len(counts_R)), counts_R)
        positions = np.arange(len(rows)) - np.repeat(self.items.ends_R - counts_R, counts_R)
        return Places(rows, np.full(len(rows), _FIELDS.index(self.field)), positions)


def _row_items(placed: Sequence[_Placed], first_N: Ints) -> RowItems:
    """Items of several fields, one field after the other, of which some are wanted."""
    places = [each.places() for each in placed]
    joined = [np.concatenate(part) for part in zip(*map(_columns, places), strict=True)]
    sizes = [len(each.items.ids) for each in placed]
    set_of = np.repeat(np.arange(len(placed)), sizes)
    return RowItems([each.rows for each in placed], set_of[first_N], Places(*joined)[first_N])


def _columns(places: Places) -> tuple[Ints, Ints, Ints]:
    return places.rows, places.fields, places.positions


def _negatives_of(rows: RecordDataset) -> _Listed:
    if "negative" not in rows.fields and "negative" not in rows.gaps:
        return _Listed(np.empty(0, dtype=np.int64), np.zeros(len(rows), dtype=np.int64))
    contents = rows.contents  # of each row: its query, positives, negatives
    counts_R = np.diff(contents.ends, prepend=0) - 1 - rows.positive_counts
    ends_R = np.cumsum(counts_R)
    shift_R = contents.ends - ends_R  # from a place among the negatives to one among all
    return _Listed(contents.ids[np.arange(ends_R[-1]) + np.repeat(shift_R, counts_R)], ends_R)


def _other_known(query_R: Ints, query_ids_Q: Ints, ids_N: Ints, negatives: _Listed) -> Pairs:
    """Queries with documents that their rows have as negatives, or that are the query itself."""
    order = np.argsort(ids_N)
    queries = np.concatenate([np.repeat(query_R, negatives.counts_R), np.arange(len(query_ids_Q))])
    ids = np.concatenate([negatives.ids, query_ids_Q])
    places = np.minimum(np.searchsorted(ids_N[order], ids), len(ids_N) - 1)
    documents = order[places]
    is_there = ids_N[documents] == ids
    return Pairs(queries[is_there], documents[is_there])


def _number(ids: Ints) -> tuple[Ints, Ints]:
    """Of each id its number, and of each number the position where it comes first."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[inverse], first[order]


def _items_of(record: Record, field: int) -> Sequence[Item]:
    return ((record.query,), record.positives, record.negatives)[field]
