"""Vectors of items: computed once and kept on disk by content, or read from a file.

# Shapes: n items, D size
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from vembed.errors import ConfigError, DataError, VembedError, shorten
from vembed.inference.vector_store import VectorStore, as_keys, item_key, written_whole
from vembed.models.checkpoint_format import NO_POOLING
from vembed.models.fingerprint import fingerprint
from vembed.models.paths import resolve_model_path
from vembed.models.protocol import Role
from vembed.modes import Item

if TYPE_CHECKING:
    from vembed.inference import Predictor

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Advance = Callable[[int], None]

_CHUNK_ITEMS = 4096
"""Items read, encoded and stored at a time: what a kill loses, and what is held in memory."""

_FACTS = "model.json"


class VectorRows(Protocol):
    """Vectors that are read when they are asked for."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, numbers: Ints) -> Floats32:
        """`[n, D]`, a copy, of the vectors with these numbers."""
        ...


class Items(Protocol):
    """Items that are read when they are asked for."""

    def __len__(self) -> int: ...  # noqa: D105
    def read(self, numbers: Sequence[int]) -> list[Item]:
        """The items with these numbers."""
        ...


def blocks(count: int, size: int) -> Iterator[range]:
    """Consecutive numbers, `size` at a time."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


@dataclass(frozen=True)
class StoredVectors:
    """Of items that a store has."""

    store: VectorStore
    keys: Ints

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, numbers: Ints) -> Floats32:
        return self.store.read(self.keys[numbers])


@dataclass(frozen=True)
class FileVectors:
    """Rows of an array on disk.

    Attributes:
        rows_nD: The array, mapped into memory.
        numbers: Which of its rows is which vector.
    """

    rows_nD: Floats32
    numbers: Ints

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, numbers: Ints) -> Floats32:
        return np.asarray(self.rows_nD[self.numbers[numbers]], dtype=np.float32)


def open_vectors(path: str | Path, *, rows: int, numbers: Ints, setting: str) -> FileVectors:
    """Vectors that `vembed encode` wrote.

    Args:
        path: A .npy file of `[rows, D]`.
        rows: How many there must be.
        numbers: Which of its rows is which vector.
        setting: What named the file.

    Raises:
        DataError: if the file does not hold that, or has a number that is not finite.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{setting}: {path}: cannot be read as .npy ({error})") from error
    if array.ndim != 2 or array.dtype.kind != "f" or len(array) != rows:
        raise DataError(
            f"{setting}: {path}: expected {rows:,} rows of floating-point numbers, one for each "
            f"row of the data. Received: {array.dtype} of shape {list(array.shape)}. Write it "
            "with `vembed encode`"
        )
    for start in range(0, rows, _CHUNK_ITEMS):
        broken = np.flatnonzero(~np.isfinite(array[start : start + _CHUNK_ITEMS]).all(axis=1))
        if len(broken):
            raise DataError(f"{setting}: {path}: row {start + broken[0]}: NaN or infinity")
    return FileVectors(array, numbers)


@dataclass(frozen=True)
class ModelChoice:
    """The model that decides what is similar, and how it is run.

    Attributes:
        name: Folder, `package:NAME[/subdir]` or hub id.
        encoder_mode: What loads it, as `vembed.models.load_encoder` takes it.
        query_prompt: Text put before every query; None for the model's own.
        document_prompt: Likewise, of documents.
        max_seq_length: Tokens kept of a text; None for the model's own.
        batch_size: Most items in a forward pass; None lets their length decide.
        device: Where it runs; None takes an accelerator when there is one.
    """

    name: str
    encoder_mode: str = "auto"
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_seq_length: int | None = None
    batch_size: int | None = None
    device: str | None = None

    def identity(self) -> dict[str, str | int | None]:
        """What decides a vector beside the item and its role, in a form that can be written."""
        facts = asdict(self)
        del facts["batch_size"], facts["device"], facts["name"]
        return {**facts, "weights": fingerprint(resolve_model_path(self.name))}


class Embedder:
    """A model that is loaded only if a vector is not on disk yet.

    Attributes:
        folder: Where vectors are kept.
        computed: Items that it embedded.
    """

    def __init__(self, choice: ModelChoice, cache: Path, modalities: dict[Role, str]) -> None:
        """Find what is there.

        Args:
            choice: The model.
            cache: Folder with a folder of its own for each model and its settings.
            modalities: Letter of what queries and documents are.

        Raises:
            ConfigError: if there is no such model.
        """
        self._choice = choice
        self._modalities = modalities
        self._facts = choice.identity()
        text = json.dumps(self._facts, sort_keys=True)
        self.folder = cache / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self._predictor: Predictor | None = None
        self.computed = 0

    def embed(self, items: Items, role: Role, advance: Advance) -> StoredVectors:
        """Vectors of items, of which those that are missing are computed and stored.

        A process that is killed in here loses one chunk; the next call goes on after it.

        Raises:
            ConfigError: if the model gives a vector for each token, or does not embed such items.
            VembedError: if a vector is not finite.
        """
        store = VectorStore(self.folder, self._size())
        keys = np.empty(len(items), dtype=np.int64)
        for numbers in blocks(len(items), _CHUNK_ITEMS):
            chunk = items.read(numbers)
            # Prompts are in the name of the folder.
            own = as_keys([item_key(item, role, None) for item in chunk])
            keys[numbers.start : numbers.stop] = own
            missing = np.flatnonzero(~store.has(own))
            if len(missing):
                vectors = self._compute([chunk[n] for n in missing.tolist()], role)
                store.write(own[missing], vectors)
            advance(len(numbers))
        store.refresh()
        return StoredVectors(store, keys)

    def _compute(self, items: list[Item], role: Role) -> Floats32:
        from vembed.inference import encode_items

        vectors = encode_items(
            self._load().encoder, items, role=role, max_items=self._choice.batch_size
        )
        rows_nD = np.asarray(vectors, dtype=np.float32)
        broken = np.flatnonzero(~np.isfinite(rows_nD).all(axis=1))
        if len(broken):
            raise VembedError(
                f"{self._choice.name}: gives NaN or infinity for {len(broken)} of {len(items)} "
                f"items, the first is {shorten(str(items[broken[0]]), quote=True)}"
            )
        self.computed += len(items)
        return rows_nD

    def _size(self) -> int:
        path = self.folder / _FACTS
        if path.exists():
            return int(json.loads(path.read_text(encoding="utf-8"))["size"])
        size = self._load().embedding_dim
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(json.dumps({**self._facts, "size": size}, indent=2).encode())
        return size

    def _load(self) -> Predictor:
        if self._predictor is not None:
            return self._predictor
        from vembed.inference import Predictor

        choice = self._choice
        predictor = Predictor(
            choice.name,
            device=choice.device,
            encoder_mode=choice.encoder_mode,
            query_prompt=choice.query_prompt,
            document_prompt=choice.document_prompt,
            max_seq_length=choice.max_seq_length,
        )
        encoder = predictor.encoder
        if encoder.pooling_method == NO_POOLING:
            raise ConfigError(
                f"model: {choice.name!r} gives a vector for each token, and mining needs one for "
                "each item. Mine with another model: the rows can train this one"
            )
        for role, letter in self._modalities.items():
            if letter not in encoder.modalities:
                raise ConfigError(
                    f"model: {choice.name!r} embeds {', '.join(sorted(encoder.modalities))}, and "
                    f"retrieval_mode has {letter} as {role} (t text, i image, m both)"
                )
        self._predictor = predictor
        return predictor
