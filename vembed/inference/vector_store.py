"""Vectors by key in memory-mapped files, written a part at a time.

A part is two files, `NAME.vectors.npy` `[n, D]` and `NAME.keys.npy` `[n]`. Both are written under
another name, synced and renamed, the keys last: a part is there whole or not at all, whatever ends
the process. A part's name is a hash of its keys, so that two processes that compute the same part
write the same file, and a lock, which the system takes off a process that dies, lets only one of
them do so.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from vembed.errors import ConfigError
from vembed.images import ImageBytes, ImageInMemory, ImageSource
from vembed.models.protocol import Role
from vembed.modes import Item

Keys = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_KEYS, _VECTORS = ".keys.npy", ".vectors.npy"


class VectorStore:
    """A folder of parts. Several processes may read and write it at once.

    Attributes:
        folder: Where the parts are.
        size: D, numbers in a vector.
    """

    def __init__(self, folder: Path, size: int) -> None:
        """Find the parts that are there.

        Raises:
            ConfigError: if a part is not what was written.
        """
        self.folder = folder
        self.size = size
        self._names: list[str] = []
        self._keys = np.empty(0, dtype=np.int64)
        self._part_of = np.empty(0, dtype=np.int32)
        self._row_of = np.empty(0, dtype=np.int32)
        self._open: dict[int, Any] = {}
        self.refresh()

    def __len__(self) -> int:
        """Keys that have a vector."""
        return len(self._keys)

    @property
    def parts(self) -> list[str]:
        """Names of the parts that were found."""
        return list(self._names)

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the files by itself: pickled, they would be copied.
        return {**self.__dict__, "_open": {}}

    def refresh(self) -> None:
        """Find parts that were written since."""
        names = sorted(path.name.removesuffix(_KEYS) for path in self.folder.glob(f"*{_KEYS}"))
        if names == self._names:
            return
        parts = [self._load_keys(name) for name in names]
        self._names, self._open = names, {}
        keys = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        self._keys, first = np.unique(keys, return_index=True)
        sizes = [len(part) for part in parts]
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        row_of = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes] or [part_of])
        self._part_of, self._row_of = part_of[first], row_of[first]

    def has(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of the keys have a vector."""
        return np.isin(keys, self._keys)

    def read(self, keys: Keys) -> Vectors:
        """`[n, D]`, the vectors of n keys, all of which must be there."""
        places = np.searchsorted(self._keys, keys)
        vectors = np.empty((len(keys), self.size), dtype=np.float32)
        parts = self._part_of[places]
        for part in np.unique(parts).tolist():
            rows = np.flatnonzero(parts == part)
            vectors[rows] = self._vectors(part)[self._row_of[places[rows]]]
        return vectors

    def write(self, keys: Keys, vectors: Vectors) -> None:
        """Store a part. A process that dies in here leaves no trace but a temporary file."""
        name = self.folder / name_of(keys)
        for ending, array in ((_VECTORS, vectors.astype(np.float32, copy=False)), (_KEYS, keys)):
            with written_whole(name.with_name(name.name + ending)) as file:
                np.save(file, array, allow_pickle=False)

    @contextmanager
    def claim(self, keys: Keys, *, wait: bool) -> Iterator[bool]:
        """Inside, no other process that asks computes the part of these keys.

        Args:
            keys: Of the part.
            wait: Whether to wait for a process that does, rather than give False at once.
        """
        path = self.folder / f"{name_of(keys)}.lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)

    def has_part(self, keys: Keys) -> bool:
        """Whether the part of just these keys has been written, by whomever."""
        return (self.folder / f"{name_of(keys)}{_KEYS}").exists()

    def _load_keys(self, name: str) -> Keys:
        path = self.folder / f"{name}{_KEYS}"
        try:
            keys: Keys = np.load(path, allow_pickle=False)
            shape = self._map(name).shape
        except (OSError, ValueError, EOFError) as error:
            raise self._broken(path, str(error)) from error
        if shape != (len(keys), self.size) or name_of(keys) != name:
            raise self._broken(path, f"{len(keys)} keys for vectors of shape {shape}")
        return keys

    def _broken(self, path: Path, detail: str) -> ConfigError:
        name = path.name.removesuffix(_KEYS)
        return ConfigError(
            f"{path} is damaged ({detail}). Remove {self.folder / name}.*, and run the command "
            "that wrote it (`vembed teach`, `vembed mine`) again: it computes what is missing"
        )

    def _vectors(self, part: int) -> Any:
        if part not in self._open:
            self._open[part] = self._map(self._names[part])
        return self._open[part]

    def _map(self, name: str) -> Any:
        return np.load(self.folder / f"{name}{_VECTORS}", mmap_mode="r", allow_pickle=False)


def item_key(item: Item, role: Role, prompt: str | None) -> int:
    """A 63-bit hash of everything that decides an item's vector, but for the model.

    Of an image it is the bytes that count: a file that was replaced is another image.
    """
    image = None if item.image is None else _content(item.image)
    return _hash((role, prompt, item.text, image))


def pair_key(query: str, document: str) -> int:
    """A 63-bit hash of both texts."""
    return _hash((query, document))


def _hash(known: tuple[str | None, ...]) -> int:
    text = repr(known).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _content(image: ImageSource) -> str:
    if isinstance(image, ImageBytes | ImageInMemory):
        return image.identity
    return hashlib.blake2b(image.read(), digest_size=16).hexdigest()


def name_of(keys: Keys) -> str:
    """The name of the part with these keys."""
    return hashlib.blake2b(keys.astype("<i8").tobytes(), digest_size=8).hexdigest()


def as_keys(keys: Sequence[int]) -> Keys:
    """Keys as an array."""
    return np.asarray(keys, dtype=np.int64)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which is at `path` only when all of it is on the disk."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
