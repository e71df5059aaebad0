"""Training rows: checked on loading, kept in memory-mapped Arrow files, or streamed."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import datasets
import numpy as np
import torch.utils.data
from pydantic import ValidationError

from vembed import modes
from vembed.config import DatasetSpec
from vembed.data.problems import ProblemLog, RowProblem
from vembed.data.records import FIELDS, ParsedRow, Record, RowParser, normalise_mapping
from vembed.data.sources import Source, find_source
from vembed.errors import ConfigError, DataError
from vembed.modes import TEXT, Item, RetrievalMode

OnProgress = Callable[[float], None]
"""Called now and then with the share of the work that is done, from 0 to 1."""

DataChoice = str | PathLike[str] | DatasetSpec | Mapping[str, Any]

_PROGRESS_ROWS = 1000
_READ_ROWS = 1000
_FEATURES = datasets.Features(
    {
        "query": datasets.Value("large_string"),
        "positive": [datasets.Value("large_string")],
        "negative": [datasets.Value("large_string")],
        "label": datasets.Value("large_string"),
        "score": datasets.Value("float64"),
        "teacher_scores": [datasets.Value("float64")],
        "line": datasets.Value("int64"),
        "query_id": datasets.Value("int64"),
        "content_hash": datasets.Value("int64"),
    }
)
_ID_RANGE = 2.0**63


@dataclass(frozen=True)
class _Origin:
    """What all rows of one source share."""

    path: str
    query_prompt: str | None
    document_prompt: str | None


@dataclass(frozen=True)
class _Part:
    """The checked rows of one source."""

    rows: datasets.Dataset
    origin: _Origin

    def column(self, name: str) -> Any:
        return self.rows.data.column(name)


class RecordDataset(torch.utils.data.Dataset[Record]):
    """Rows that are all checked, can be indexed, and are read from disk when asked for.

    Attributes:
        fields: Those of query, positive, negative, label, score, teacher_scores that every row has.
        label_names: The labels, in the order of their class numbers; empty without labels.
    """

    def __init__(self, parts: Sequence[_Part], indices: np.ndarray | None = None) -> None:
        """Assign; see `load_dataset_records` for building one from files.

        Args:
            parts: Rows of each source.
            indices: Which rows of all parts, in this order; None for all.
        """
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
        self._indices = np.arange(self._starts[-1]) if indices is None else indices
        self.fields = frozenset.intersection(*(_fields_of(part) for part in parts))
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
            part = self._parts[part_number]
            columns = part.rows[[places[i][1] for i in slots]]
            for position, slot in enumerate(slots):
                values = {name: column[position] for name, column in columns.items()}
                label = None if values["label"] is None else self._label_numbers[values["label"]]
                row_index = range(len(self))[indices[slot]]
                records[slot] = _to_record(values, part.origin, label, row_index)
        return [record for record in records if record is not None]

    def select(self, indices: Sequence[int] | np.ndarray) -> RecordDataset:
        """The rows at these positions, in this order."""
        return RecordDataset(self._parts, self._indices[np.asarray(indices, dtype=np.int64)])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the rows, their order and their prompts, wherever the files lie."""
        digest = hashlib.blake2b(self.content_hashes.astype("<i8").tobytes(), digest_size=16)
        parts = np.searchsorted(self._starts, self._indices, side="right") - 1
        digest.update(parts.astype("<i8").tobytes())
        prompts = [(p.origin.query_prompt, p.origin.document_prompt) for p in self._parts]
        digest.update(repr(prompts).encode())
        return digest.hexdigest()

    @property
    def query_ids(self) -> np.ndarray:
        """`[rows]` int64, the content id of each row's query."""
        return self._numbers("query_id")

    @property
    def content_hashes(self) -> np.ndarray:
        """`[rows]` int64, a hash of everything in each row but its prompts."""
        return self._numbers("content_hash")

    def _numbers(self, name: str) -> np.ndarray:
        columns = [part.column(name).to_numpy() for part in self._parts]
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

    def __init__(self, streams: Sequence[_Stream]) -> None:
        """Read the first row of every source; see `load_dataset_records`.

        Raises:
            DataError: if a first row cannot be used.
        """
        self._streams = list(streams)
        self.fields = frozenset.intersection(*(_first_fields(stream) for stream in streams))

    def __iter__(self) -> Iterator[Record]:
        row_index = 0
        for stream in self._streams:
            for record in stream.records():
                absent = self.fields - record.fields - {"negative"}
                if absent:
                    raise DataError(
                        f"{record.where}: {min(absent)}: rows of a stream must have what its "
                        f"first row has: {', '.join(sorted(self.fields - {'negative'}))}. "
                        "Fill it in, or leave it out of every row"
                    )
                yield replace(record, row_index=row_index)
                row_index += 1

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
    streaming: bool,
    split: str = ...,
    on_progress: OnProgress | None = ...,
) -> RecordDataset | StreamingRecordDataset: ...
def load_dataset_records(
    data: DataChoice | Sequence[DataChoice],
    *,
    retrieval_mode: str | RetrievalMode = "t2t",
    column_mapping: Mapping[str, str] | None = None,
    streaming: bool = False,
    split: str = "train",
    on_progress: OnProgress | None = None,
) -> RecordDataset | StreamingRecordDataset:
    """Read and check training rows.

    All rows are checked before this returns, and stored as Arrow files in the cache of `datasets`
    (`HF_DATASETS_CACHE`), where the next run and other processes find them; an edited file is read
    again. Several processes may call this at once.

    Args:
        data: A JSONL (also .gz), CSV, TSV or Parquet file, an Arrow folder, a BEIR folder, a hub id
            (`owner/name`, `owner/name:config`), or a DatasetSpec (or such a mapping) of one of them
            with prompts, split and column_mapping of its own; or a list of these.
        retrieval_mode: Modality of queries and documents.
        column_mapping: Our field to your column, where a DatasetSpec has none of its own.
        streaming: Check rows when they are needed rather than before, and store nothing.
        split: Rows of a folder or hub data set, where a DatasetSpec does not say.
        on_progress: Told the share of all sources that is read.

    Raises:
        DataError: about the first row that cannot be used, and how many more there are.
        ConfigError: if an argument cannot be meant.
    """
    mode = RetrievalMode.parse(retrieval_mode)
    if (mode.query, mode.document) != (TEXT, TEXT):
        raise ConfigError(f"retrieval_mode: rows are texts so far, t2t. Received: '{mode}'")
    specs = _to_specs(data)
    sources = [_source_of(spec, split, streaming) for spec in specs]
    mappings = [column_mapping if s.column_mapping is None else s.column_mapping for s in specs]
    for mapping in mappings:
        normalise_mapping(mapping)
    origins = [
        _Origin(source.path, spec.query_prompt, spec.document_prompt)
        for source, spec in zip(sources, specs, strict=True)
    ]
    if streaming:
        return StreamingRecordDataset(
            [_Stream(*each) for each in zip(sources, mappings, origins, strict=True)]
        )
    parts = []
    for number, (source, mapping) in enumerate(zip(sources, mappings, strict=True)):
        progress = _ShareOfProgress(on_progress, number, len(sources))
        parts.append(_Part(_stored_rows(source, mapping, progress), origins[number]))
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
            f"{dataset[0].query.text!r}. Add rows, or give test_data_path"
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
    column_mapping: Mapping[str, str] | None
    origin: _Origin

    def records(self) -> Iterator[Record]:
        """Checked records; the first problem ends the reading.

        Raises:
            DataError: about a row that cannot be used, or if there are none.
        """
        for line, row in _checked_rows(self.source, self.column_mapping, stop_at_first=True):
            label = None if row.label is None else Item(text=row.label).content_id
            yield _to_record(_to_columns(line, row), self.origin, label, 0)


class _ShareOfProgress:
    """Progress of one source among several.

    Among the arguments of a stored data set, which `datasets` hashes to find it again, this must
    not count: whatever it holds, it pickles to the same bytes.
    """

    def __init__(
        self, on_progress: OnProgress | None = None, number: int = 0, count: int = 1
    ) -> None:
        self._on_progress = on_progress
        self._number = number
        self._count = count

    def __call__(self, done: float) -> None:
        if self._on_progress is not None:
            self._on_progress((self._number + done) / self._count)

    def __reduce__(self) -> tuple[type[_ShareOfProgress], tuple[()]]:
        return _ShareOfProgress, ()


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


def _checked_rows(
    source: Source,
    column_mapping: Mapping[str, str] | None,
    *,
    stop_at_first: bool = False,
    progress: OnProgress | None = None,
) -> Iterator[tuple[int, ParsedRow]]:
    """The rows of a source with their lines; every one that has no problem.

    Raises:
        DataError: after the last row, or after enough problems, if there was a problem; or if there
            was no row.
    """
    parser = RowParser(column_mapping, text_cells=source.text_cells)
    problems = ProblemLog()
    count = 0
    for line, values, done in source.read():
        count += 1
        try:
            if isinstance(values, RowProblem):
                raise values
            if count == 1 and source.has_header:
                parser.check_columns(source.path, list(values))
            yield line, parser.parse(values)
        except RowProblem as problem:
            problems.add(problem, f"{source.path}:{line}")
            if problems.is_full or stop_at_first:
                break
        if progress is not None and count % _PROGRESS_ROWS == 0:
            progress(done)
    problems.raise_if_any()
    if not count:
        raise DataError(f"{source.path}: must have rows. Received: none")
    parser.check_seen(source.path)


def _stored_rows(
    source: Source, column_mapping: Mapping[str, str] | None, progress: _ShareOfProgress
) -> datasets.Dataset:
    arguments = {
        "source": source,
        "column_mapping": tuple(sorted((column_mapping or {}).items())),
        "code": _code_digest(),
        "progress": progress,
    }
    try:
        with _quiet_datasets():
            return datasets.Dataset.from_generator(
                _generate_columns, features=_FEATURES, gen_kwargs=arguments
            )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, OSError):
            raise DataError(
                f"{source.path}: its rows cannot be stored in {datasets.config.HF_DATASETS_CACHE}: "
                f"{cause}. Set HF_DATASETS_CACHE to a folder with room, or use streaming: true"
            ) from None
        raise


def _generate_columns(
    source: Source,
    column_mapping: tuple[tuple[str, str], ...],
    code: str,  # part of the key under which the rows are stored
    progress: _ShareOfProgress,
) -> Iterator[dict[str, Any]]:
    for line, row in _checked_rows(source, dict(column_mapping), progress=progress):
        yield _to_columns(line, row)


def _to_columns(line: int, row: ParsedRow) -> dict[str, Any]:
    return {
        "query": row.query,
        "positive": list(row.positives) or None,
        "negative": list(row.negatives) or None,
        "label": row.label,
        "score": row.score,
        "teacher_scores": None if row.teacher_scores is None else list(row.teacher_scores),
        "line": line,
        "query_id": Item(text=row.query).content_id,
        "content_hash": row.content_hash(),
    }


def _to_record(
    values: Mapping[str, Any], origin: _Origin, label: int | None, row_index: int
) -> Record:
    scores = values["teacher_scores"]
    return Record(
        query=Item(text=values["query"]),
        positives=tuple(Item(text=text) for text in values["positive"] or ()),
        negatives=tuple(Item(text=text) for text in values["negative"] or ()),
        label=label,
        score=values["score"],
        teacher_scores=None if scores is None else tuple(scores),
        query_prompt=origin.query_prompt,
        document_prompt=origin.document_prompt,
        where=f"{origin.path}:{values['line']}",
        row_index=row_index,
    )


def _fields_of(part: _Part) -> frozenset[str]:
    return frozenset(name for name in FIELDS if part.column(name).null_count == 0)


def _first_fields(stream: _Stream) -> frozenset[str]:
    (first,) = islice(stream.records(), 1)
    return first.fields


def _label_names(parts: Sequence[_Part]) -> tuple[str, ...]:
    names = {n for part in parts for n in part.column("label").unique().to_pylist()} - {None}
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else None))


def _code_digest() -> str:
    """Changes with the code that reads and checks rows: no other version's rows are served."""
    names = ("dataset.py", "problems.py", "reading.py", "records.py", "sources.py")
    paths = [*(Path(__file__).with_name(name) for name in names), Path(modes.__file__)]
    files = [path.read_bytes() for path in paths]
    return hashlib.blake2b(b"\0".join(files), digest_size=8).hexdigest()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets`, whose own state is put back afterwards."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
