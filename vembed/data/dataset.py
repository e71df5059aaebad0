"""Training rows: checked on loading, kept in memory-mapped Arrow files, or streamed."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
import torch.utils.data
from pydantic import ValidationError

from vembed.config import DatasetSpec
from vembed.data.checking import OnProgress, RowRules, checked_rows
from vembed.data.columns import normalise_mapping
from vembed.data.problems import RowProblem
from vembed.data.quarantine import Quarantine, Tally
from vembed.data.records import FIELDS, Record
from vembed.data.rules import ImageRules
from vembed.data.sources import Source, find_source
from vembed.data.storage import Origin, ShareOfProgress, StoredRows, store_rows
from vembed.errors import ConfigError, DataError
from vembed.images import ImageFolder
from vembed.modes import Item, RetrievalMode

DataChoice = str | PathLike[str] | DatasetSpec | Mapping[str, Any]

_READ_ROWS = 1000
_ID_RANGE = 2.0**63


class PairIds(NamedTuple):
    """Content ids of the positive pairs of rows: `[pairs]` int64 each, a query and its positive."""

    queries: np.ndarray
    positives: np.ndarray


class RecordDataset(torch.utils.data.Dataset[Record]):
    """Rows that are all checked, can be indexed, and are read from disk when asked for.

    Images are not read with their rows: `vembed.images.load_image` does it in the loader's workers.

    Attributes:
        fields: Those of query, positive, negative, label, score, teacher_scores that every row has.
        label_names: The labels, in the order of their class numbers; empty without labels.
    """

    def __init__(self, parts: Sequence[StoredRows], indices: np.ndarray | None = None) -> None:
        """Assign; see `load_dataset_records` for building one from files.

        Args:
            parts: Rows of each source.
            indices: Which rows of all parts, in this order; None for all that can be used.
        """
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
        if indices is None:
            starts = zip(self._parts, self._starts, strict=False)
            indices = np.concatenate([part.good + start for part, start in starts])
        self._indices = indices
        self.fields = frozenset(
            name for name in FIELDS if all(part.has_in_every_row(name) for part in parts)
        )
        self.label_names = _label_names(parts)
        self._label_numbers = {name: number for number, name in enumerate(self.label_names)}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _READ_ROWS):
            yield from self.__getitems__(range(start, min(start + _READ_ROWS, len(self))))

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several records at once, as DataLoader asks for them: one read for each part."""
        places = [self._place(index) for index in indices]
        records: list[Record | None] = [None] * len(places)
        for part_number in sorted({part_number for part_number, _ in places}):
            slots = [i for i, place in enumerate(places) if place[0] == part_number]
            numbers = [places[i][1] for i in slots]
            row_indices = [range(len(self))[indices[slot]] for slot in slots]
            found = self._parts[part_number].read(numbers, row_indices, self._label_numbers)
            for slot, record in zip(slots, found, strict=True):
                records[slot] = record
        return [record for record in records if record is not None]

    def select(self, indices: Sequence[int] | np.ndarray) -> RecordDataset:
        """The rows at these positions, in this order."""
        chosen = RecordDataset(self._parts, self._indices[np.asarray(indices, dtype=np.int64)])
        chosen.label_names, chosen._label_numbers = self.label_names, self._label_numbers
        return chosen

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the rows, their order and their prompts, wherever the files lie."""
        digest = hashlib.blake2b(self.content_hashes.astype("<i8").tobytes(), digest_size=16)
        digest.update(self.source_numbers.astype("<i8").tobytes())
        prompts = [(p.origin.query_prompt, p.origin.document_prompt) for p in self._parts]
        digest.update(repr(prompts).encode())
        return digest.hexdigest()

    @property
    def query_ids(self) -> np.ndarray:
        """`[rows]` int64, the content id of each row's query."""
        return self._numbers("query_id")

    @property
    def pair_ids(self) -> PairIds:
        """Content ids of each row's query with each of its positives; no row is read for it."""
        chunks = [c for part in self._parts for c in part.column("positive_ids").chunks]
        lists = pyarrow.chunked_array(chunks).take(pyarrow.array(self._indices)).combine_chunks()
        rows = pyarrow.compute.list_parent_indices(lists).to_numpy()
        positives = pyarrow.compute.list_flatten(lists).to_numpy(zero_copy_only=False)
        return PairIds(self.query_ids[rows], positives)

    @property
    def image_folders(self) -> list[ImageFolder]:
        """What the image paths of its rows are relative to."""
        return [part.origin.folder for part in self._parts if part.origin.folder is not None]

    @property
    def content_hashes(self) -> np.ndarray:
        """`[rows]` int64, a hash of everything in each row but its prompts."""
        return self._numbers("content_hash")

    @property
    def row_hashes(self) -> np.ndarray:
        """`[rows]` int64, a hash of everything in each row and of its prompts."""
        prompts = [(p.origin.query_prompt, p.origin.document_prompt) for p in self._parts]
        digests = [hashlib.blake2b(repr(p).encode(), digest_size=8).digest() for p in prompts]
        of_part = np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
        return np.asarray(self.content_hashes ^ of_part[self.source_numbers])

    @property
    def source_numbers(self) -> np.ndarray:
        """`[rows]` int64, which of the data sets each row comes from."""
        return np.asarray(np.searchsorted(self._starts, self._indices, side="right") - 1)

    @property
    def labels(self) -> np.ndarray:
        """`[rows]` int64, the class number of each row, as in `Record`; all must have one."""
        columns = [part.column("label").to_pylist() for part in self._parts]
        numbers = [self._label_numbers.get(name, -1) for column in columns for name in column]
        return np.asarray(np.asarray(numbers, dtype=np.int64)[self._indices])

    @property
    def prompt_numbers(self) -> np.ndarray:
        """`[rows]` int64, equal where both prompts of the rows are."""
        seen: dict[tuple[str | None, str | None], int] = {}
        prompts = [(p.origin.query_prompt, p.origin.document_prompt) for p in self._parts]
        of_parts = [seen.setdefault(pair, len(seen)) for pair in prompts]
        return np.asarray(np.asarray(of_parts, dtype=np.int64)[self.source_numbers])

    @property
    def positive_counts(self) -> np.ndarray:
        """`[rows]` int64, how many positives each row has."""
        return self._numbers("positive_ids", pyarrow.compute.list_value_length).astype(np.int64)

    @property
    def scores(self) -> np.ndarray | None:
        """`[rows]` float64, NaN where a row has none; None if no row has one."""
        scores = self._numbers("score").astype(np.float64)
        return None if np.isnan(scores).all() else scores

    @property
    def teacher_scores(self) -> Sequence[Sequence[float] | None] | None:
        """By row, what the teacher said, or None; None if it said nothing of any row."""
        columns = [part.column("teacher_scores") for part in self._parts]
        if all(column.null_count == len(column) for column in columns):
            return None
        every = [scores for column in columns for scores in column.to_pylist()]
        return [every[index] for index in self._indices.tolist()]

    @property
    def score_bounds(self) -> ScoreBounds:
        """The lowest and the highest score; all rows must have one."""
        scores = self._numbers("score")
        return ScoreBounds(float(scores.min()), float(scores.max()))

    @property
    def contents(self) -> RowContents:
        """What is in each row."""
        of_parts = [part.contents() for part in self._parts]
        rows = [ids for of_part in of_parts for ids in of_part]
        chosen = [rows[index] for index in self._indices.tolist()]
        ends = np.cumsum([len(ids) for ids in chosen], dtype=np.int64)
        return RowContents(np.concatenate([*chosen, np.zeros(0, dtype=np.int64)]), ends)

    def with_labels_of(self, other: RecordDataset) -> RecordDataset:
        """The same rows, whose labels have the class numbers that they have in `other`.

        Raises:
            DataError: if a label does not occur there.
        """
        unknown = sorted(set(self.label_names) - set(other.label_names))
        if unknown:
            raise DataError(
                f"{self._parts[0].origin.files[0]}: label {unknown[0]!r} is not among the labels "
                f"of the training rows, of which there are {len(other.label_names)}"
            )
        copy = RecordDataset(self._parts, self._indices)
        copy.label_names, copy._label_numbers = other.label_names, other._label_numbers
        return copy

    def _numbers(
        self, name: str, compute: Callable[[Any], Any] = lambda column: column
    ) -> np.ndarray:
        columns = [compute(part.column(name)).to_numpy() for part in self._parts]
        return np.asarray(np.concatenate(columns)[self._indices])

    def _place(self, index: int) -> tuple[int, int]:
        """Which part a row lies in, and where there."""
        row = int(self._indices[index])
        part = bisect_right(self._starts, row) - 1
        return part, row - self._starts[part]


class StreamingRecordDataset(torch.utils.data.IterableDataset[Record]):
    """Rows that are read and checked as they come, from the first to the last.

    Attributes:
        fields: What the first row of every source has. Every further row must have it too, but for
            negatives, of which rows may have any number.
    """

    def __init__(self, streams: Sequence[_Stream], quarantine: Quarantine | None = None) -> None:
        """Read the first row of every source; see `load_dataset_records`.

        Args:
            streams: The sources.
            quarantine: Takes bad rows; None ends the reading at the first one.

        Raises:
            DataError: if a first row cannot be used.
        """
        self._streams = list(streams)
        self._quarantine = quarantine
        self.fields = frozenset.intersection(*(stream.first_fields() for stream in streams))

    def __iter__(self) -> Iterator[Record]:
        row_index = 0
        for stream, tally in zip(self._streams, self._tallies(), strict=True):
            for record in stream.records(self.fields - {"negative"}, tally):
                yield replace(record, row_index=row_index)
                row_index += 1

    def _tallies(self) -> Sequence[Tally | None]:
        """For one pass, what counts the bad rows of each source."""
        if self._quarantine is None:
            return [None] * len(self._streams)
        worker = torch.utils.data.get_worker_info()
        in_first_worker = worker is None or worker.id == 0
        self._quarantine.begin_pass(in_first_worker=in_first_worker)
        paths = [stream.source.path for stream in self._streams]
        return [self._quarantine.tally(path, in_first_worker=in_first_worker) for path in paths]

    def shuffled(self, *, seed: int, epoch: int, buffer_size: int) -> Iterator[Record]:
        """All rows, each drawn from a buffer of rows read ahead: a pure function of the arguments.

        Args:
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            buffer_size: Rows to draw among; also what is held in memory.
        """
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        buffer: list[Record] = []
        for record in self:
            if len(buffer) < buffer_size:
                buffer.append(record)
                continue
            slot = int(random.integers(buffer_size))
            yield buffer[slot]
            buffer[slot] = record
        random.shuffle(buffer)
        yield from buffer


class ScoreBounds(NamedTuple):
    """The range of the scores of some rows."""

    lowest: float
    highest: float


class RowContents(NamedTuple):
    """The contents of rows, by their ids: query, positives and negatives.

    Attributes:
        ids: `[contents of all rows]` int64, row after row.
        ends: `[rows]` int64, where each row's contents end.
    """

    ids: np.ndarray
    ends: np.ndarray


class HoldoutSplit(NamedTuple):
    """The two sides of `split_holdout`."""

    train: RecordDataset
    holdout: RecordDataset


@overload
def load_dataset_records(
    data: DataChoice | Sequence[DataChoice],
    *,
    retrieval_mode: str | RetrievalMode = ...,
    column_mapping: Mapping[str, str] | None = ...,
    images: ImageRules = ...,
    quarantine: Quarantine | None = ...,
    streaming: Literal[False] = ...,
    split: str = ...,
    on_progress: OnProgress | None = ...,
) -> RecordDataset: ...
@overload
def load_dataset_records(
    data: DataChoice | Sequence[DataChoice],
    *,
    retrieval_mode: str | RetrievalMode = ...,
    column_mapping: Mapping[str, str] | None = ...,
    images: ImageRules = ...,
    quarantine: Quarantine | None = ...,
    streaming: bool,
    split: str = ...,
    on_progress: OnProgress | None = ...,
) -> RecordDataset | StreamingRecordDataset: ...
def load_dataset_records(
    data: DataChoice | Sequence[DataChoice],
    *,
    retrieval_mode: str | RetrievalMode = "t2t",
    column_mapping: Mapping[str, str] | None = None,
    images: ImageRules = ImageRules(),  # noqa: B008 - frozen
    quarantine: Quarantine | None = None,
    streaming: bool = False,
    split: str = "train",
    on_progress: OnProgress | None = None,
) -> RecordDataset | StreamingRecordDataset:
    """Read and check training rows.

    All rows are checked before this returns, and stored as Arrow files in the cache of `datasets`
    (`HF_DATASETS_CACHE`), where the next run and other processes find them; an edited file is read
    again. Several processes may call this at once.

    Args:
        data: A JSONL (also .gz), CSV, TSV or Parquet file, tar shards (`shards-*.tar`), an Arrow
            folder, a BEIR folder, a hub id (`owner/name`, `owner/name:config`), or a DatasetSpec
            (or such a mapping) of one of them with prompts, split, column_mapping and image_root of
            its own; or a list of these.
        retrieval_mode: Modality of queries and documents.
        column_mapping: Our field to your column, where a DatasetSpec has none of its own.
        images: Where images are, and what they are held to. Of a stream, images are looked at
            before they are needed only where bad rows are to be found, or `check` is `decode`.
        quarantine: Takes the rows that cannot be used; None ends the reading instead.
        streaming: Check rows when they are needed rather than before, and store nothing.
        split: Rows of a folder or hub data set, where a DatasetSpec does not say.
        on_progress: Told the share of all sources that is read.

    Raises:
        DataError: about the first row that cannot be used, and how many more there are.
        ConfigError: if an argument cannot be meant.
    """
    mode = RetrievalMode.parse(retrieval_mode)
    specs = _to_specs(data)
    sources = [_source_of(spec, split, streaming) for spec in specs]
    mappings = [column_mapping if s.column_mapping is None else s.column_mapping for s in specs]
    for mapping in mappings:
        normalise_mapping(mapping, mode)
    folders = _image_folders(specs, sources, mode, images)
    is_checked = mode.has_images and (not streaming or quarantine or images.check == "decode")
    rules = [
        RowRules(
            mode=mode,
            column_mapping=tuple(sorted((mapping or {}).items())),
            folder=folder,
            limits=images.limits,
            image_check=images.check if is_checked else None,
            tolerant=quarantine is not None,
        )
        for mapping, folder in zip(mappings, folders, strict=True)
    ]
    origins = [
        Origin(source.files, mode, spec.query_prompt, spec.document_prompt, folder, images.limits)
        for source, spec, folder in zip(sources, specs, folders, strict=True)
    ]
    each = list(zip(sources, rules, origins, strict=True))
    if streaming:
        return StreamingRecordDataset([_Stream(*one) for one in each], quarantine)
    parts = []
    for number, (source, rule, origin) in enumerate(each):
        progress = ShareOfProgress(on_progress, number, len(each))
        parts.append(store_rows(source, rule, origin, progress))
        if quarantine is not None:
            quarantine.admit(source.path, parts[-1].problems(), len(parts[-1].rows))
        progress(1.0)
    return RecordDataset(parts)


def split_holdout(dataset: RecordDataset | StreamingRecordDataset, ratio: float) -> HoldoutSplit:
    """Set aside about `ratio` of the queries, chosen by a hash of the query's content.

    The choice is the same on every machine, in every process and after adding rows; rows with the
    same query stay together. Both sides get at least one query.

    Raises:
        ConfigError: if `ratio` is not between 0 and 1, or the rows are a stream.
        DataError: if the rows have fewer than two different queries.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"holdout_ratio: must be above 0 and below 1. Received: {ratio}")
    if isinstance(dataset, StreamingRecordDataset):
        raise ConfigError(
            "holdout_ratio: rows of a stream cannot be held out. Set holdout_ratio: 0, and give "
            "test_data_path for a before/after table"
        )
    ids = dataset.query_ids
    smallest, largest = ids.min(), ids.max()
    if smallest == largest:
        raise DataError(
            "holdout_ratio: two different queries are needed to hold rows out. Received: "
            f"{len(ids)} row{'s' if len(ids) > 1 else ''} with the query "
            f"{str(dataset[0].query)!r}. Add rows, or give test_data_path"
        )
    # Content ids spread evenly over 63 bits. The smallest is always held out, the largest never.
    held_out = ((ids < ratio * _ID_RANGE) | (ids == smallest)) & (ids != largest)
    return HoldoutSplit(
        dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))
    )


@dataclass(frozen=True)
class _Stream:
    """One source, read anew on every pass."""

    source: Source
    rules: RowRules
    origin: Origin

    def records(
        self, needed: frozenset[str] = frozenset(), tally: Tally | None = None
    ) -> Iterator[Record]:
        """Checked records; the first problem ends the reading, unless the rules are tolerant.

        Args:
            needed: Fields that every row must have.
            tally: Counts rows and problems.

        Raises:
            DataError: about a row that cannot be used, or if there are none.
        """
        for checked in checked_rows(self.source, self.rules, stop_at_first=True):
            where = self.origin.where(checked.line, checked.file)
            problem = record = None
            if isinstance(checked.row, RowProblem):
                problem = checked.row
            else:
                label = None if checked.row.label is None else Item(checked.row.label).content_id
                row = checked.row.located(where) if self.rules.mode.has_images else checked.row
                record = self.origin.record(row, where, label)
                problem = _lacking(record, needed)
            if problem is not None and not self.rules.tolerant:
                raise DataError(problem.describe_at(where))
            if tally is not None:
                tally.rows += 1
                if problem is not None:
                    tally.add(problem, where)
            if problem is None and record is not None:
                yield record
        if tally is not None:
            tally.close()

    def first_fields(self) -> frozenset[str]:
        """The fields of the first row that can be used.

        Raises:
            DataError: if there is none.
        """
        first = next(self.records(), None)
        if first is None:
            raise DataError(f"{self.source.path}: no row of it can be used")
        return first.fields


def _lacking(record: Record, needed: frozenset[str]) -> RowProblem | None:
    absent = needed - record.fields
    if not absent:
        return None
    rule = f"rows of a stream must have what its first row has: {', '.join(sorted(needed))}"
    return RowProblem(min(absent), rule, advice="Fill it in, or leave it out of every row.")


def _to_specs(data: DataChoice | Sequence[DataChoice]) -> list[DatasetSpec]:
    several = isinstance(data, Sequence) and not isinstance(data, str)
    choices: Sequence[Any] = data if several else [data]  # type: ignore[assignment]
    if not choices:
        raise ConfigError("data_path: expected at least one path. Received: an empty list")
    return [_to_spec(choice) for choice in choices]


def _to_spec(choice: DataChoice) -> DatasetSpec:
    if isinstance(choice, DatasetSpec):
        return choice
    try:
        if isinstance(choice, Mapping):
            return DatasetSpec.model_validate(dict(choice))
        return DatasetSpec(path=str(choice))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"data_path: {place}: {first['msg']}. A data set is described by "
            f"{', '.join(DatasetSpec.model_fields)}"
        ) from None


def _source_of(spec: DatasetSpec, split: str, streaming: bool) -> Source:
    return find_source(
        spec.path,
        split=spec.split or split,
        own_split=spec.split is not None,
        streaming=streaming,
    )


def _image_folders(
    specs: Sequence[DatasetSpec],
    sources: Sequence[Source],
    mode: RetrievalMode,
    images: ImageRules,
) -> list[ImageFolder | None]:
    """What the image paths of each source are relative to."""
    if not mode.has_images:
        return [None] * len(sources)
    folders = [
        images.folder(source.image_root, root=spec.image_root)
        for spec, source in zip(specs, sources, strict=True)
    ]
    roots = [folder.root for folder in folders if folder is not None]
    return [None if folder is None else _told_apart(folder, roots) for folder in folders]


def _told_apart(folder: ImageFolder, roots: Sequence[str]) -> ImageFolder:
    """Two sets may both have a 1.jpg: what tells their folders apart goes before the path."""
    inside = os.path.relpath(folder.root, os.path.commonpath(roots))
    return folder if inside == "." else replace(folder, prefix=f"{inside}/")


def _label_names(parts: Sequence[StoredRows]) -> tuple[str, ...]:
    names = {n for part in parts for n in part.column("label").unique().to_pylist()} - {None}
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else None))
