"""Where rows come from: what a path, folder or hub id stands for, and how its rows are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from vembed.data.file_names import is_image_name
from vembed.data.problems import list_names
from vembed.data.reading import (
    RawRow,
    arrow_rows,
    read_beir,
    read_beir_corpus,
    read_csv,
    read_jsonl,
    read_parquet,
)
from vembed.data.shards import read_shards
from vembed.errors import ConfigError, DataError, shorten
from vembed.registry import did_you_mean

FILE_READERS: dict[str, Callable[[str], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
"""File endings that are understood."""

_ARROW_MARKERS = ("dataset_info.json", "dataset_dict.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_SHARD_ENDING = ".tar"
_BATCH_ROWS = 100

Stamp = tuple[Any, ...]


class Source(Protocol):
    """Rows that can be read from the start, any number of times.

    Attributes:
        path: What the user wrote; errors start with it.
        files: The files that `RawRow.file` counts.
        image_root: Folder that image paths are relative to unless the user names one; None where
            there is none.
        text_cells: Whether every value is a text, as in CSV.
        has_header: Whether every row has the same columns.
        stamp: Changes whenever the rows may have changed.
    """

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def image_root(self) -> str | None: ...  # noqa: D102
    @property
    def text_cells(self) -> bool: ...  # noqa: D102
    @property
    def has_header(self) -> bool: ...  # noqa: D102
    @property
    def stamp(self) -> Stamp: ...  # noqa: D102
    def read(self) -> Iterator[RawRow]: ...  # noqa: D102


@dataclass(frozen=True)
class FileSource:
    """One file; see `FILE_READERS`."""

    path: str
    ending: str
    stamp: Stamp

    @property
    def files(self) -> tuple[str, ...]:
        """The file itself."""
        return (self.path,)

    @property
    def image_root(self) -> str:
        """The file's folder."""
        return os.path.dirname(self.path) or "."

    @property
    def text_cells(self) -> bool:
        """CSV and TSV know no numbers."""
        return self.ending in (".csv", ".tsv")

    @property
    def has_header(self) -> bool:
        """JSON Lines may have other columns in every row."""
        return not self.ending.startswith(".jsonl")

    def read(self) -> Iterator[RawRow]:
        """The rows of the file."""
        return FILE_READERS[self.ending](self.path)


@dataclass(frozen=True)
class BeirSource:
    """The queries of one split of a BEIR folder, each with its relevant documents."""

    path: str
    split: str
    stamp: Stamp
    text_cells: bool = False
    has_header: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """Where the queries are."""
        return (self.path,)

    @property
    def image_root(self) -> str:
        """The BEIR folder."""
        return os.path.dirname(self.path)

    def read(self) -> Iterator[RawRow]:
        """One row for each query of the split."""
        return read_beir(str(Path(self.path).parent), self.split)


@dataclass(frozen=True)
class BeirCorpusSource:
    """All documents of a BEIR folder: `text`, a title and a text, and `image` if there is one."""

    path: str
    stamp: Stamp
    text_cells: bool = False
    has_header: bool = False

    @classmethod
    def of(cls, folder: str) -> BeirCorpusSource:
        """Those of a folder."""
        path = Path(folder).expanduser() / "corpus.jsonl"
        return cls(str(path), _stamp([path]))

    @property
    def files(self) -> tuple[str, ...]:
        """The file itself."""
        return (self.path,)

    @property
    def image_root(self) -> str:
        """The BEIR folder."""
        return os.path.dirname(self.path)

    def read(self) -> Iterator[RawRow]:
        """One row for each document."""
        return read_beir_corpus(self.path)


@dataclass(frozen=True)
class ArrowSource:
    """A folder that `datasets.Dataset.save_to_disk` wrote."""

    path: str
    split: str
    stamp: Stamp
    text_cells: bool = False
    has_header: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """The folder."""
        return (self.path,)

    @property
    def image_root(self) -> str:
        """The folder itself."""
        return self.path

    def read(self) -> Iterator[RawRow]:
        """The rows of the folder."""
        return _rows_of(self.path, _load_arrow(self.path, self.split))


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub; `name:config` picks a configuration."""

    path: str
    split: str
    streaming: bool
    stamp: Stamp = ()
    text_cells: bool = False
    has_header: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """The hub id."""
        return (self.path,)

    @property
    def image_root(self) -> None:
        """Rows of the hub hold their images themselves."""
        return None

    def read(self) -> Iterator[RawRow]:
        """The rows of the split, downloaded first unless streaming."""
        dataset = _load_hub(self.path, self.split, self.streaming)
        return _stream_of(dataset) if self.streaming else _rows_of(self.path, dataset)


@dataclass(frozen=True)
class TarSource:
    """Tar shards in the layout of webdataset; see `read_shards`."""

    path: str
    files: tuple[str, ...]
    stamp: Stamp
    text_cells: bool = False
    has_header: bool = False

    @property
    def image_root(self) -> str:
        """The folder of the shards."""
        return os.path.commonpath([os.path.dirname(file) for file in self.files])

    def read(self) -> Iterator[RawRow]:
        """The samples of all shards."""
        return read_shards(self.files)


def find_source(path: str, *, split: str, own_split: bool, streaming: bool) -> Source:
    """What `path` stands for.

    Args:
        path: A file, tar shards (`shards-*.tar`), an Arrow folder, a BEIR folder, or a hub id
            (`owner/name[:config]`).
        split: Which rows of a folder or hub data set.
        own_split: Whether the user asked for this split, rather than it being the default.
        streaming: Whether a hub data set is read without downloading it first.

    Raises:
        DataError: if there is nothing that can be read.
        ConfigError: if a split is asked of a single file.
    """
    local = Path(path).expanduser()
    if path.lower().endswith(_SHARD_ENDING) and not local.is_dir():
        return _find_shards(path, local, split if own_split else None)
    if local.is_dir():
        return _find_folder(path, local, split)
    if local.is_file():
        return _find_file(path, local, split if own_split else None)
    if local.exists():
        raise DataError(f"{path}: must be a file or a folder; it is neither")
    if _HUB_ID.fullmatch(path) and _ending_of(path) is None:
        return _find_on_hub(path, local, split, streaming)
    raise DataError(_not_there(path, local))


_HINTS = {
    ".json": "; a .json file is one value: write one object per line and name it .jsonl",
    ".tgz": "; a compressed tar cannot be read in places: unpack it to .tar",
    ".tar.gz": "; a compressed tar cannot be read in places: unpack it to .tar",
}


def _find_file(path: str, local: Path, split: str | None) -> FileSource:
    ending = _ending_of(path)
    if ending is None:
        hint = next((h for end, h in _HINTS.items() if path.lower().endswith(end)), "")
        raise DataError(
            f"{path}: the file's ending must be one of {', '.join(FILE_READERS)}, "
            f"{_SHARD_ENDING}. Received: {local.suffix!r}{hint}"
        )
    _refuse_split(path, split)
    if local.stat().st_size == 0:
        raise DataError(f"{path}: must have rows. Received: an empty file")
    return FileSource(str(local), ending, _stamp([local]))


def _refuse_split(path: str, split: str | None) -> None:
    if split is not None:
        raise ConfigError(
            f"{path}: split: a single file has no splits. Received: {split!r}. "
            "Leave split out, or give the file of that split as the path"
        )


def _find_shards(path: str, local: Path, split: str | None) -> TarSource:
    _refuse_split(path, split)
    files = [str(local)] if local.is_file() else sorted(glob(str(local)))
    if not files:
        hint = " Write a pattern as in shards-*.tar." if "{" in path else ""
        raise DataError(f"{_not_there(path, local)}{hint}")
    # Absolute, because members are read later, in workers.
    return TarSource(path, tuple(map(os.path.abspath, files)), _stamp([Path(f) for f in files]))


def _find_folder(path: str, local: Path, split: str) -> Source:
    if any((local / name).is_file() for name in _ARROW_MARKERS):
        files = [file for file in sorted(local.rglob("*")) if file.is_file()]
        return ArrowSource(str(local), split, _stamp(files))
    if (local / "queries.jsonl").is_file() and (local / "corpus.jsonl").is_file():
        queries = local / "queries.jsonl"
        qrels = local / "qrels" / f"{split}.tsv"
        files = [file for file in (queries, local / "corpus.jsonl", qrels) if file.is_file()]
        return BeirSource(str(queries), split, _stamp(files))
    usable = sorted(file.name for file in local.iterdir() if _ending_of(file.name))
    if not usable and any(is_image_name(file.name) for file in local.iterdir()):
        raise DataError(
            f"{path}: a folder of images does not say what belongs to which. Write a CSV in it "
            "whose first line is `caption,image`, with a row for each image, and give that file, "
            "with retrieval_mode: t2i. To encode images alone, a .txt with a path per line will "
            "do, with --modality i"
        )
    instead = f"Name one of its files: {list_names(usable)}. " if usable else ""
    raise DataError(
        f"{path}: a folder must be one that datasets.save_to_disk wrote (dataset_info.json) or "
        f"have the BEIR layout (corpus.jsonl, queries.jsonl, qrels/). {instead}Received: a folder "
        f"with {list_names(sorted(file.name for file in local.iterdir()))}"
    )


def _find_on_hub(path: str, local: Path, split: str, streaming: bool) -> HubSource:
    try:
        dataset = _load_hub(path, split, streaming)
    except DataError as error:
        raise DataError(f"{_not_there(path, local)} {error}") from None
    return HubSource(path, split, streaming, () if streaming else (dataset._fingerprint,))


def _not_there(path: str, local: Path) -> str:
    folder = local.parent
    if not folder.is_dir():
        return f"{path}: there is no such file, nor its folder {str(folder)!r}."
    near = get_close_matches(local.name, [file.name for file in folder.iterdir()], n=2)
    names = " or ".join(repr(str(folder / name)) for name in near)
    hint = f" Did you mean {names}?" if near else ""
    return f"{path}: there is no such file or folder.{hint}"


def _ending_of(path: str) -> str | None:
    lower = path.lower()
    return next((ending for ending in FILE_READERS if lower.endswith(ending)), None)


def _stamp(files: Sequence[Path]) -> Stamp:
    """What tells one state of files from another, without reading them.

    The time of the last change of the inode cannot be set by hand: a file that was replaced by one
    of the same size and modification time still counts as another.
    """
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return tuple((n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats)


def _load_arrow(path: str, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except MemoryError:
        raise
    except Exception as error:
        # Of a damaged folder, `datasets` raises whatever happens to it.
        raise _damaged_folder(path, error) from None
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise DataError(
            f"{path}: there is no split {split!r}. Splits: {list_names(loaded)}. "
            f"Choose one with split{did_you_mean(split, list(loaded))}"
        )
    return loaded[split]


def _damaged_folder(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: must be a whole folder of datasets.save_to_disk. "
        f"Received: {shorten(str(error)) or type(error).__name__}. Save it again"
    )


def _load_hub(path: str, split: str, streaming: bool) -> Any:
    import datasets

    name, _, config = path.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"{path}: split {split!r} of this data set of the hub cannot be loaded: {reason}"
        ) from None


def _rows_of(path: str, dataset: Any) -> Iterator[RawRow]:
    import pyarrow  # type: ignore[import-untyped]

    total, row = len(dataset), 0
    # As Arrow: otherwise `datasets` would decode every image.
    tables = dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    try:
        for table in tables:
            for values in arrow_rows(table):
                row += 1
                yield RawRow(row, values, row / total)
    except (pyarrow.ArrowException, OSError, IndexError) as error:
        raise _damaged_folder(path, error) from None


def _stream_of(dataset: Any) -> Iterator[RawRow]:
    # Iterating over single rows inside a DataLoader worker, `datasets` would give each worker only
    # some of the shards; by batches it gives all rows, of which the loader picks its own.
    if dataset.features is not None:
        dataset = dataset.decode(False)
    row = 0
    for batch in dataset.iter(batch_size=_BATCH_ROWS):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            row += 1
            yield RawRow(row, dict(zip(columns, values, strict=True)), 0.0)
