"""Checked rows as Arrow files in the cache of `datasets`, where every process finds them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vembed import image_urls, images, modes
from vembed.data.checking import CheckedRow, OnProgress, RowRules, checked_rows
from vembed.data.problems import RowProblem
from vembed.data.records import ParsedRow, Record, place_of
from vembed.data.sources import Source
from vembed.errors import DataError
from vembed.image_urls import ImageUrl
from vembed.images import (
    ImageBytes,
    ImageFile,
    ImageFolder,
    ImageInTar,
    ImageLimits,
    ImageSource,
    is_url,
)
from vembed.modes import IMAGE, TEXT, Item, RetrievalMode

# Imported where it is used: it takes long, and a step on a loader of one's own needs none of it.
if TYPE_CHECKING:
    import datasets

_ITEM_FIELDS = ("query", "positive", "negative")
_IMAGE = {"path": "large_string", "data": "large_binary", "offset": "int64", "size": "int64"}
_WRITTEN_ROWS = 1000
_WRITTEN_IMAGE_ROWS = 100
_READERS = (modes, images, image_urls)


@dataclass(frozen=True)
class Origin:
    """What all rows of one source share.

    Attributes:
        files: The files that rows are counted in.
        mode: Modality of queries and documents.
        query_prompt: See `Record`.
        document_prompt: See `Record`.
        folder: What image paths are relative to.
        limits: What images are held to.
    """

    files: tuple[str, ...]
    mode: RetrievalMode
    query_prompt: str | None = None
    document_prompt: str | None = None
    folder: ImageFolder | None = None
    limits: ImageLimits = ImageLimits()

    def where(self, line: int, file: int) -> str:
        """`file:line` of a row."""
        return f"{self.files[file]}:{line}"

    def record(
        self, row: ParsedRow, where: str, label: int | None = None, row_index: int = 0
    ) -> Record:
        """A row as training has it."""
        return Record(
            query=row.query,
            positives=row.positives,
            negatives=row.negatives,
            label=label,
            score=row.score,
            teacher_scores=row.teacher_scores,
            query_prompt=self.query_prompt,
            document_prompt=self.document_prompt,
            where=where,
            row_index=row_index,
        )


@dataclass(frozen=True)
class StoredRows:
    """The rows of one source.

    Attributes:
        rows: As `_to_columns` made them; bad ones have a `problem` and nothing else.
        origin: What they share.
    """

    rows: datasets.Dataset
    origin: Origin

    def column(self, name: str) -> Any:
        """A column, of bad rows too, whose numbers are 0."""
        return self.rows.data.column(name)

    @cached_property
    def good(self) -> np.ndarray:
        """Numbers of the rows that can be used."""
        return np.flatnonzero(self.column("problem").is_null().to_numpy())

    def contents(self) -> list[np.ndarray]:
        """Of every row, bad ones too, the content ids of its items."""
        column = self.column("item_ids").combine_chunks()
        values = column.values.to_numpy(zero_copy_only=False)
        offsets = column.offsets.to_numpy()
        return [values[start:end] for start, end in pairwise(offsets.tolist())]

    def problems(self) -> Iterator[tuple[str, RowProblem]]:
        """Where each bad row is, and its problem."""
        for number in np.setdiff1d(np.arange(len(self.rows)), self.good).tolist():
            values = self.rows[number]
            where = self.origin.where(values["line"], values["file"])
            yield where, _Problem.from_json(values["problem"]).problem

    def has_in_every_row(self, field: str) -> bool:
        """Whether every row that can be used has a value for a field of a record."""
        nulls = self.column(self._column_of(field)).null_count
        return bool(nulls == len(self.rows) - len(self.good))

    def without(self, field: str) -> np.ndarray:
        """Numbers of the rows that can be used and have no value for a field of a record."""
        is_null = self.column(self._column_of(field)).is_null().to_numpy()
        return np.asarray(self.good[is_null[self.good]])

    def where(self, number: int) -> str:
        """`file:line` of a row."""
        row = self.rows[number]
        return self.origin.where(row["line"], row["file"])

    def _column_of(self, field: str) -> str:
        return field if field in self.rows.column_names else f"{field}_image"

    def read(
        self, numbers: Sequence[int], row_indices: Sequence[int], label_numbers: Mapping[str, int]
    ) -> Iterator[Record]:
        """Some of the rows that can be used, all read at once.

        Args:
            numbers: Which of the rows.
            row_indices: The `row_index` that each gets.
            label_numbers: Class number of each label.
        """
        columns = self.rows[list(numbers)]
        for position, row_index in enumerate(row_indices):
            values = {name: column[position] for name, column in columns.items()}
            label = None if values["label"] is None else label_numbers[values["label"]]
            where = self.origin.where(values["line"], values["file"])
            row = _from_columns(values, self.origin, where)
            yield self.origin.record(row, where, label, row_index)


class ShareOfProgress:
    """Progress of one source among several.

    Among the arguments of a stored data set, which `datasets` hashes to find it again, this must
    not count: whatever it holds, it pickles to the same bytes.
    """

    def __init__(
        self, on_progress: OnProgress | None = None, number: int = 0, count: int = 1
    ) -> None:
        """Assign; `number` of `count` sources, from 0."""
        self._on_progress = on_progress
        self._number = number
        self._count = count

    def __call__(self, done: float) -> None:
        """Tell that a share of this source is done."""
        if self._on_progress is not None:
            self._on_progress((self._number + done) / self._count)

    def __reduce__(self) -> tuple[type[ShareOfProgress], tuple[()]]:
        return ShareOfProgress, ()


def store_rows(
    source: Source, rules: RowRules, origin: Origin, progress: ShareOfProgress
) -> StoredRows:
    """The checked rows of a source, from the cache or into it.

    A bad row is remembered with its reason. When that was an image file, and the file is another
    one now, the source is read again.

    Raises:
        DataError: as `checked_rows` does, or if the cache cannot be written.
    """
    stored = StoredRows(_generate(source, rules, progress), origin)
    if changes := _changed_files(stored):
        return StoredRows(_generate(source, rules, progress, changes), origin)
    return stored


def _generate(
    source: Source, rules: RowRules, progress: ShareOfProgress, changes: str = ""
) -> datasets.Dataset:
    import datasets

    arguments = {
        "source": source,
        "rules": rules,
        "key": f"{_code_digest()}{changes}",
        "progress": progress,
    }
    has_images = rules.image_check is not None
    try:
        with _quiet_datasets():
            return datasets.Dataset.from_generator(
                _generate_columns,
                features=_features(rules.mode),
                gen_kwargs=arguments,
                writer_batch_size=_WRITTEN_IMAGE_ROWS if has_images else _WRITTEN_ROWS,
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
    rules: RowRules,
    key: str,  # part of the key under which the rows are stored
    progress: ShareOfProgress,
) -> Iterator[dict[str, Any]]:
    for checked in checked_rows(source, rules, progress=progress):
        yield _to_columns(checked, rules.mode)


@cache
def _features(mode: RetrievalMode) -> datasets.Features:
    """Columns of the stored rows: texts and images of a field apart, each if the mode has it."""
    import datasets

    image = {name: datasets.Value(kind) for name, kind in _IMAGE.items()}
    text, number = datasets.Value("large_string"), datasets.Value("int64")
    features: dict[str, Any] = {}
    for field, modality in zip(_ITEM_FIELDS, _modalities(mode), strict=True):
        is_one = field == "query"
        if modality != IMAGE:
            features[field] = text if is_one else [text]
        if modality != TEXT:
            features[f"{field}_image"] = image if is_one else [image]
    return datasets.Features(
        {
            **features,
            "label": text,
            "score": datasets.Value("float64"),
            "teacher_scores": [datasets.Value("float64")],
            "line": number,
            "file": number,
            "query_id": number,
            "positive_ids": [number],
            "content_hash": number,
            "item_ids": [number],
            "problem": text,
        }
    )


def _modalities(mode: RetrievalMode) -> tuple[str, str, str]:
    return mode.query, mode.document, mode.document


def _to_columns(checked: CheckedRow, mode: RetrievalMode) -> dict[str, Any]:
    """A row as it is stored."""
    columns: dict[str, Any] = dict.fromkeys(_features(mode))
    columns |= {"line": checked.line, "file": checked.file, "query_id": 0, "content_hash": 0}
    row = checked.row
    if isinstance(row, RowProblem):
        return columns | {"problem": _Problem(row, _state_of(row.file)).to_json()}
    columns |= {
        "label": row.label,
        "score": row.score,
        "teacher_scores": None if row.teacher_scores is None else list(row.teacher_scores),
        "query_id": row.query.content_id,
        "positive_ids": [item.content_id for item in row.positives],
        "content_hash": row.content_hash(),
        "item_ids": [item.content_id for _, _, item in row.items()],
    }
    for field, items in (
        ("query", (row.query,)),
        ("positive", row.positives),
        ("negative", row.negatives),
    ):
        texts = [item.text for item in items]
        pictures = [None if item.image is None else _image_columns(item.image) for item in items]
        for name, values in ((field, texts), (f"{field}_image", pictures)):
            if name in columns and values:
                columns[name] = values[0] if field == "query" else values
    return columns


def _from_columns(values: Mapping[str, Any], origin: Origin, where: str) -> ParsedRow:
    """What `_to_columns` stored; images know where they are named."""

    def items(field: str, texts: Any, images: Any) -> tuple[Item, ...]:
        if not images:
            return tuple(map(Item, texts or ()))
        found = [
            _image_of(columns, origin, values["file"], f"{where}: {place_of(field, number)}")
            for number, columns in enumerate(images)
        ]
        return tuple(map(Item, texts or [None] * len(found), found))

    text, image = values.get("query"), values.get("query_image")
    (query,) = items("query", text and [text], image and [image])
    scores = values["teacher_scores"]
    return ParsedRow(
        query=query,
        positives=items("positive", values.get("positive"), values.get("positive_image")),
        negatives=items("negative", values.get("negative"), values.get("negative_image")),
        label=values["label"],
        score=values["score"],
        teacher_scores=None if scores is None else tuple(scores),
    )


def _image_columns(image: ImageSource) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(_IMAGE)
    match image:
        case ImageFile(path=path) | ImageUrl(url=path):
            return columns | {"path": path}
        case ImageInTar(member=member, offset=offset, size=size):
            return columns | {"path": member, "offset": offset, "size": size}
        case ImageBytes(data=data, name=name):
            return columns | {"path": name, "data": data}
    raise TypeError(f"rows hold files, shard members and bytes. Received: {type(image).__name__}")


def _image_of(columns: Mapping[str, Any], origin: Origin, file: int, where: str) -> ImageSource:
    folder, limits = origin.folder, origin.limits
    if columns["data"] is not None:
        return ImageBytes(columns["data"], columns["path"], limits=limits, where=where)
    prefix = "" if folder is None else folder.prefix
    if columns["offset"] is not None:
        member, offset, size = (columns[name] for name in ("path", "offset", "size"))
        shard = origin.files[file]
        return ImageInTar(shard, member, offset, size, prefix, limits=limits, where=where)
    if is_url(columns["path"]):
        return ImageUrl(url=columns["path"], limits=limits, where=where)
    root = "" if folder is None else folder.root
    return ImageFile(columns["path"], root, prefix, limits=limits, where=where)


@dataclass(frozen=True)
class _Problem:
    """A stored problem, with the state of the image file that it is about."""

    problem: RowProblem
    state: list[int] | None

    def to_json(self) -> str:
        return json.dumps({**vars(self.problem), "state": self.state})

    @classmethod
    def from_json(cls, text: str) -> _Problem:
        values = json.loads(text)
        state = values.pop("state")
        return cls(RowProblem(**values), state)


def _state_of(path: str) -> list[int] | None:
    """What tells one state of a file from another; None when there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _changed_files(stored: StoredRows) -> str:
    """A hash of the states of the image files that rows are bad for; empty if all are the same."""
    states = []
    is_changed = False
    for known in map(_Problem.from_json, stored.column("problem").drop_null().to_pylist()):
        if known.problem.file:
            state = _state_of(known.problem.file)
            is_changed |= state != known.state
            states.append((known.problem.file, state))
    return hashlib.blake2b(repr(states).encode(), digest_size=8).hexdigest() if is_changed else ""


def _code_digest() -> str:
    """Changes with the code that reads and checks rows: no other version's rows are served."""
    folder = Path(__file__).parent
    paths = [*sorted(folder.glob("*.py")), *(Path(str(module.__file__)) for module in _READERS)]
    files = [path.read_bytes() for path in paths]
    return hashlib.blake2b(b"\0".join(files), digest_size=8).hexdigest()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets`, whose own state is put back afterwards."""
    import datasets

    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
