"""The teacher's embeddings, read while the student trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from vembed.config import TrainConfig
from vembed.data import Record, RecordDataset
from vembed.errors import ConfigError, DataError
from vembed.inference.vector_store import VectorStore, as_keys, written_whole
from vembed.training.data_utils import TEACHER_VECTORS
from vembed.training.teaching.identity import (
    Taught,
    TeacherFacts,
    check_facts,
    read_facts,
    taught_items,
    taught_pairs,
    taught_roles,
)

_WINDOW_ROWS = 1024
_REMEDY = "Run `vembed teach` with the settings of this run: it computes what is missing"


class TeacherCache:
    """A teacher's embeddings of the training rows.

    Attributes:
        folder: Where they lie.
        facts: Who wrote them.
        roles: The roles that the teacher embeds.
    """

    def __init__(self, folder: Path, facts: TeacherFacts, roles: tuple[str, ...]) -> None:
        """Open the files; they are mapped into memory when they are read."""
        self.folder = folder
        self.facts = facts
        self.roles = roles
        self.store = VectorStore(folder, facts.size)

    @classmethod
    def open(cls, config: TrainConfig) -> TeacherCache:
        """The cache of `teacher_cache`.

        Raises:
            ConfigError: if there is none, or it was written by another teacher.
        """
        folder = Path(str(config.teacher_cache))
        facts = read_facts(folder)
        if facts is None:
            raise ConfigError(
                f"teacher_cache: {folder} is empty. Run `vembed teach` with the settings of this "
                "run first"
            )
        check_facts(facts, config, folder)
        return cls(folder, facts, roles_of(facts, config))

    @property
    def has_scores(self) -> bool:
        """Whether it holds scores of pairs rather than embeddings of items."""
        return self.facts.kind == "scores"

    def taught(self, record: Record) -> list[Taught]:
        """What the teacher says something about in a row."""
        if self.has_scores:
            return list(taught_pairs(record))
        return list(taught_items(record, self.roles))

    def vectors(self, items: Sequence[Taught]) -> Tensor:
        """`[n, D]` of n items, all of which must be there."""
        return torch.from_numpy(self.store.read(as_keys([item.key for item in items])))

    def missing(self, items: Sequence[Taught]) -> list[Taught]:
        """The items that have no vector."""
        there = self.store.has(as_keys([item.key for item in items]))
        return [item for item, is_there in zip(items, there, strict=True) if not is_there]

    def require(self, rows: Any) -> None:
        """Check that every item of every row is there, unless the rows are a stream.

        Rows that `vembed teach` came to the end of are known; of others every item is looked up.

        Raises:
            ConfigError: saying how many are missing, and the first row.
        """
        if not isinstance(rows, RecordDataset):
            return
        unknown = np.flatnonzero(~np.isin(rows.row_hashes, self._covered()))
        missing: set[int] = set()
        first, count, looked_at = None, 0, 0
        for record in _records(rows.select(unknown)):
            items = self.taught(record)
            looked_at += len(items)
            absent = self.missing(items)
            if absent:
                count += 1
                first = first or f"{record.where}: {absent[0].role}"
                missing.update(item.key for item in absent)
        if missing:
            raise ConfigError(
                f"teacher_cache: {self.folder} lacks {len(missing):,} items of {count:,} rows (of "
                f"{len(rows):,}), the first at {first}. {_REMEDY}"
            )

    def cover(self, rows: RecordDataset) -> None:
        """Remember that all of these rows are there, in the parts that are there now."""
        self.store.refresh()
        hashes = np.unique(rows.row_hashes)
        name = hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest()
        with written_whole(self.folder / self._covered_file(name)) as file:
            np.savez(file, rows=hashes, parts=np.array(self.store.parts, dtype=np.str_))

    def _covered_file(self, name: str) -> str:
        # Rows of which only some roles were embedded are not known for others.
        return f"rows-{'-'.join(self.roles) or 'pairs'}-{name}.npz"

    def _covered(self) -> Any:
        """Hashes of the rows that are known, as long as no part was removed since."""
        found = [np.empty(0, dtype=np.int64)]
        for path in self.folder.glob(self._covered_file("*")):
            try:
                with np.load(path, allow_pickle=False) as kept:
                    if set(kept["parts"].tolist()) <= set(self.store.parts):
                        found.append(kept["rows"])
            except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
                raise ConfigError(
                    f"teacher_cache: {path} is damaged ({error}). Remove it, and run "
                    "`vembed teach` again: it computes what is missing"
                ) from error
        return np.concatenate(found)


def roles_of(facts: TeacherFacts, config: TrainConfig) -> tuple[str, ...]:
    """The roles whose items the teacher of a cache embeds; none where it scores pairs."""
    return () if facts.kind == "scores" else taught_roles(set(facts.modalities), config)


class CachedTeacherCollator:
    """Adds the teacher's embeddings of a batch's items under `teacher_ROLE_vectors`."""

    def __init__(self, student: Callable[[list[Record]], Any], cache: TeacherCache) -> None:
        """Assign."""
        self.student = student
        self.cache = cache

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """The student's batch and the teacher's embeddings, in the order of its rows.

        Raises:
            DataError: about the first row of which something is missing.
        """
        if self.cache.has_scores:
            return dict(self.student([self._scored(record) for record in records]))
        batch = dict(self.student(list(records)))
        for role in self.cache.roles:
            items: list[Taught] = [item for r in records for item in taught_items(r, (role,))]
            if not items:
                continue
            if self.cache.missing(items):
                raise DataError(self._complaint(records))
            batch[TEACHER_VECTORS.format(role=role)] = self.cache.vectors(items)
        return batch

    def _scored(self, record: Record) -> Record:
        pairs = self.cache.taught(record)
        if self.cache.missing(pairs):
            raise DataError(self._complaint([record]))
        scores = self.cache.vectors(pairs)[:, 0].tolist()
        return replace(record, teacher_scores=tuple(scores))

    def _complaint(self, records: Sequence[Record]) -> str:
        where = next(
            f"{r.where}: {absent[0].role}"
            for r in records
            if (absent := self.cache.missing(self.cache.taught(r)))
        )
        return f"{where} is not in teacher_cache {self.cache.folder}. {_REMEDY}"


def _records(rows: RecordDataset) -> Iterator[Record]:
    for start in range(0, len(rows), _WINDOW_ROWS):
        yield from rows.__getitems__(list(range(start, min(len(rows), start + _WINDOW_ROWS))))
