"""Token ids of a data set, made once and memory-mapped: batches without a tokenizer.

A store is a folder in the cache of `datasets`, beside the rows, under a hash of all that its
content hangs on: the rows and their prompts, the tokenizer, how much of a text is kept. So it is
never stale, and the next run finds it. It is written under another name, synced and renamed: it is
there whole or not at all, whatever ends the process. A lock, which the system takes off a process
that dies, lets one process make it while others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vembed.chunking import count_tokens
from vembed.data.collator import Batch, Side, number_keys, pad_scores
from vembed.data.dataset import RecordDataset
from vembed.errors import DataError
from vembed.modes import Item
from vembed.tokens import Numbers, Padding, Tokens, ranges

logger = logging.getLogger(__name__)

_FORMAT = 1
_WINDOW_ROWS = 4096
_MANY_ROWS = 100_000
"""From so many on it takes so long that the user is told."""
# The ids have no header, because they are written before their number is known.
_IDS, _TYPES = "ids.int32", "types.int8"
_ARRAYS = ("token_starts", "content_ids", "items", "row_starts", "positives")


class TokenizingProcessor(Protocol):
    """A processor of texts whose model inputs are padded tokens and nothing else."""

    @property
    def padding(self) -> Padding:
        """How its tokens are padded."""
        ...

    def tokenize(
        self, items: Sequence[Item], *, role: Side, prompts: Sequence[str | None] | None = None
    ) -> Tokens:
        """The tokens of each item."""
        ...

    def token_key(self) -> str:
        """A hash of all that decides what `tokenize` returns, beside the items."""
        ...


class TokenStore:
    """Token ids of every item of a data set, and which items are in which row.

    Several processes may open the same folder; a worker that gets a copy maps the files by itself.
    """

    def __init__(self, folder: Path) -> None:
        """Map the files.

        Raises:
            ValueError: if they are not what was written.
            OSError: if they cannot be read.
        """
        self.folder = folder
        arrays = {name: _load(folder / f"{name}.npy") for name in _ARRAYS}
        self._token_starts, self._content_ids = arrays["token_starts"], arrays["content_ids"]
        self._items, self._row_starts = arrays["items"], arrays["row_starts"]
        self._positives = arrays["positives"]
        self._ids = _map(folder / _IDS, np.int32)
        has_types = (folder / _TYPES).exists()
        self._types = _map(folder / _TYPES, np.int8) if has_types else None
        if len(self._ids) != self._token_starts[-1] or len(self._items) != self._row_starts[-1]:
            raise ValueError(f"{folder}: files do not belong together")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        """Rows."""
        return len(self._positives)

    def tokens(self, items: Numbers) -> Tokens:
        """The tokens of some items."""
        starts = self._token_starts[items]
        lengths = self._token_starts[items + 1] - starts
        places = ranges(starts, lengths)
        types = None if self._types is None else self._types[places]
        return Tokens(self._ids[places], lengths, types)

    def content_ids(self, items: Numbers) -> Numbers:
        """The content id of each of some items."""
        return np.asarray(self._content_ids[items])

    def items_of(self, rows: Numbers) -> dict[str, tuple[Numbers, Numbers]]:
        """By role that any of some rows has, their items, and how many each row has."""
        starts = self._row_starts[rows]
        positives = self._positives[rows].astype(np.int64)
        negatives = self._row_starts[rows + 1] - starts - 1 - positives
        found = {"query": (self._items[starts], np.ones_like(starts))}
        if (positives == 1).all():
            found["positive"] = (self._items[starts + 1], positives)
        elif positives.any():
            found["positive"] = (self._items[ranges(starts + 1, positives)], positives)
        if negatives.any():
            places = ranges(starts + 1 + positives, negatives)
            found["negative"] = (self._items[places], negatives)
        return found


class TokenCollator:
    """Makes of row numbers the batches that `Collator` makes of their records, bit by bit."""

    def __init__(self, store: TokenStore, padding: Padding, dataset: RecordDataset) -> None:
        """Assign.

        Args:
            store: Tokens of the rows of `dataset`.
            padding: The processor's.
            dataset: Says labels and scores of its rows.
        """
        self._store = store
        self._padding = padding
        self._facts = _RowFacts(dataset)

    def __len__(self) -> int:
        """Rows."""
        return len(self._store)

    def __call__(self, rows: Sequence[int]) -> Batch:
        """The batch of these rows; see `Collator`."""
        batch: Batch = {"row_index": list(rows)}
        keys: dict[str, list[int]] = {}
        for role, (items, counts) in self._store.items_of(np.asarray(rows, dtype=np.int64)).items():
            tokens = self._store.tokens(items)
            inputs = self._padding.inputs(tokens)
            batch |= {f"{role}_{name}": tensor for name, tensor in inputs.items()}
            is_told = "attention_mask" in inputs
            batch[f"lengths_{role}"] = tokens.lengths.tolist() if is_told else count_tokens(inputs)
            if role != "query":
                batch[f"counts_{role}"] = torch.from_numpy(counts)
            batch[f"ids_{role}"] = torch.from_numpy(self._store.content_ids(items))
            keys[f"keys_{role}"] = items.tolist()
        return batch | number_keys(keys) | self._facts.of(rows)


class _RowFacts:
    """Labels and scores of rows, read once from the columns."""

    def __init__(self, dataset: RecordDataset) -> None:
        self._dataset = dataset

    def of(self, rows: Sequence[int]) -> Batch:
        """What all of these rows have."""
        facts: Batch = {}
        labels, scores, teacher = self._columns
        if labels is not None and (of_rows := labels[rows]).min() >= 0:
            facts["labels"] = torch.from_numpy(of_rows)
        if scores is not None and not np.isnan(of_rows := scores[rows]).any():
            facts["scores"] = torch.from_numpy(of_rows.astype(np.float32))
        if teacher is not None:
            lists = [teacher[row] for row in rows]
            if all(given is not None for given in lists):
                facts["teacher_scores"] = pad_scores(lists)
        return facts

    @cached_property
    def _columns(self) -> tuple[Any, Any, Any]:
        """Each None if no row has it."""
        dataset = self._dataset
        labels = dataset.labels if dataset.label_names else None
        scores, teacher = dataset.scores, dataset.teacher_scores
        return labels, scores, teacher


def open_token_store(dataset: RecordDataset, processor: TokenizingProcessor) -> TokenStore:
    """The store of a data set, from the cache or into it. Several processes may call this at once.

    Raises:
        DataError: if a text gives no token, or the cache cannot be written.
    """
    import datasets  # only where there are rows, which it has read

    root = Path(datasets.config.HF_DATASETS_CACHE) / "vembed_tokens"
    folder = root / _key_of(dataset, processor)
    if found := _open(folder, rows=len(dataset)):
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{folder.name}.lock"):
            if found := _open(folder, rows=len(dataset)):
                return found
            part = root / f".{folder.name}.part"
            # Of a process that died, or damaged; nobody else is here.
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            part.mkdir()
            if len(dataset) >= _MANY_ROWS:
                logger.info("tokenising %s rows, once; they are kept in %s", len(dataset), folder)
            _write(part, dataset, processor)
            part.rename(folder)
            _sync(root)
    except OSError as error:
        raise DataError(
            f"token ids cannot be stored in {root}: {error}. Set HF_DATASETS_CACHE to a folder "
            "with room, or use token_cache: false"
        ) from None
    return TokenStore(folder)


def _open(folder: Path, *, rows: int) -> TokenStore | None:
    """The store in a folder; None if there is none, or it is damaged."""
    if not folder.is_dir():
        return None
    try:
        store = TokenStore(folder)
    except (OSError, ValueError, IndexError) as error:
        logger.warning("%s is damaged, and made again (%s)", folder, error)
        return None
    return store if len(store) == rows else None


def _key_of(dataset: RecordDataset, processor: TokenizingProcessor) -> str:
    libraries = [version(name) for name in ("tokenizers", "transformers")]
    parts = [_FORMAT, libraries, dataset.fingerprint, processor.token_key()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class _Layout:
    """Which items there are, and where: from ids alone, without reading a row.

    Items are the same if content and prompt are, and both are queries or neither; they are numbered
    in the order of the rows.

    Attributes:
        items: `[places]`, the item at each place; a row's places are query, positives, negatives.
        row_starts: `[rows + 1]`, the first place of each row.
        positives: `[rows]`, positives of each row.
        is_first: `[places]`, whether an item is met for the first time.
        content_ids: `[items]`.
    """

    def __init__(self, dataset: RecordDataset) -> None:
        contents = dataset.contents
        self.row_starts = np.concatenate([np.zeros(1, np.int64), contents.ends])
        self.positives = dataset.positive_counts.astype(np.int32)
        row_of = np.repeat(np.arange(len(dataset)), np.diff(self.row_starts))
        is_document = np.ones(len(row_of), dtype=np.int64)
        is_document[self.row_starts[:-1]] = 0
        # Prompts of rows are those of their source.
        group = 2 * dataset.prompt_numbers[row_of] + is_document
        order = np.lexsort((contents.ids, group))
        ids, groups = contents.ids[order], group[order]
        is_new = np.ones(len(order), dtype=bool)
        is_new[1:] = (ids[1:] != ids[:-1]) | (groups[1:] != groups[:-1])
        # Sorting keeps the order of equals, so that the first of each is its first place.
        first = order[is_new]
        number = np.empty(len(first), dtype=np.int64)
        number[np.argsort(first)] = np.arange(len(first))
        self.items = np.empty(len(order), dtype=np.int64)
        self.items[order] = number[np.cumsum(is_new) - 1]
        self.is_first = np.zeros(len(order), dtype=bool)
        self.is_first[first] = True
        self.content_ids = contents.ids[np.sort(first)]


def _write(folder: Path, dataset: RecordDataset, processor: TokenizingProcessor) -> None:
    layout = _Layout(dataset)
    lengths: list[Numbers] = []
    has_types = False
    with (folder / _IDS).open("wb") as ids, (folder / _TYPES).open("wb") as types:
        for tokens in _tokenized(dataset, processor, layout):
            lengths.append(tokens.lengths)
            ids.write(tokens.ids.astype("<i4").tobytes())
            if tokens.types is not None:
                types.write(tokens.types.astype("<i1").tobytes())
                has_types |= bool(tokens.types.any())
        for file in (ids, types):
            file.flush()
            os.fsync(file.fileno())
    if not has_types:
        (folder / _TYPES).unlink()
    token_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    places = (layout.items, layout.row_starts, layout.positives)
    arrays: tuple[Numbers, ...] = (token_starts, layout.content_ids, *places)
    for name, array in zip(_ARRAYS, arrays, strict=True):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    _sync(folder)


def _tokenized(
    dataset: RecordDataset, processor: TokenizingProcessor, layout: _Layout
) -> Iterator[Tokens]:
    """The tokens of every item, in order, of some rows at a time."""
    for start in range(0, len(dataset), _WINDOW_ROWS):
        rows = range(start, min(start + _WINDOW_ROWS, len(dataset)))
        places = range(layout.row_starts[rows.start], layout.row_starts[rows.stop])
        is_first = iter(layout.is_first[places.start : places.stop].tolist())
        found: dict[Side, list[tuple[int, Item, str | None]]] = {"query": [], "document": []}
        number = 0
        for record in dataset.__getitems__(rows):
            sides: list[tuple[Side, Item, str | None]] = [
                ("query", record.query, record.query_prompt),
                *(
                    ("document", item, record.document_prompt)
                    for item in (*record.positives, *record.negatives)
                ),
            ]
            for side, item, prompt in sides:
                if next(is_first):
                    found[side].append((number, item, prompt))
                    number += 1
        parts: list[Tokens] = []
        order: list[int] = []
        for side, chosen in found.items():
            if chosen:
                numbers, items, prompts = zip(*chosen, strict=True)
                parts.append(processor.tokenize(items, role=side, prompts=prompts))
                order += numbers
        if parts:
            yield Tokens.join(parts).take(np.argsort(order))


def _load(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _map(path: Path, dtype: Any) -> Any:
    """The numbers in a file; an empty one cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Inside, no other process is."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Make names in a folder outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
