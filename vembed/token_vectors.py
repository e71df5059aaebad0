"""Several vectors for one item, one for each of its tokens, as late interaction compares them.

In a step they are a tensor `[n, T, D]` like any other embeddings: tokens have length one, and a row
of zeros is no token. So what counts is seen in the vectors themselves, wherever they are cut,
gathered or put in order, and padding can be added or taken off without a mask to carry along.

At rest, where a corpus would be padded to its longest item, they are `TokenVectors`.

# Shapes: n items, T tokens of the longest, D size; S tokens of all items
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

_TILE_ENTRIES = 2**22
"""Similarities of tokens that are held at once: 32 MB."""

_TILE_TOKENS = 2**10
"""Tokens of queries in a tile, at most, unless one query has more."""


def real_tokens(vectors_nTD: Tensor) -> Tensor:
    """`[n, T]`, which tokens there are; NaN is one, so that it does not go unseen."""
    return (vectors_nTD != 0).any(-1)


def pad_tokens(vectors: Tensor, tokens: int) -> Tensor:
    """Rows of zeros behind those that are there, up to `tokens`; `[n, D]` stays as it is."""
    if vectors.dim() < 3:
        return vectors
    return functional.pad(vectors, (0, 0, 0, tokens - vectors.shape[1]))


def cat_items(parts: Sequence[Tensor]) -> Tensor:
    """Embeddings of items one after the other, padded to the longest; `[n, D]` or `[n, T, D]`.

    May be one of the parts itself.
    """
    tokens = max(part.shape[1] for part in parts)
    padded = [pad_tokens(part, tokens) for part in parts]
    filled = [part for part in padded if len(part)]
    # What is all there is, is not copied.
    return filled[0] if len(filled) == 1 else torch.cat(padded)


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """The token vectors of n items, one item after the other.

    Attributes:
        flat_SD: All vectors.
        offsets: `[n + 1]` int64; those of item i are `flat_SD[offsets[i] : offsets[i + 1]]`.
    """

    flat_SD: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def from_padded(cls, vectors_nTD: Tensor) -> TokenVectors:
        """Take the padding off."""
        mask_nT = real_tokens(vectors_nTD)
        offsets = functional.pad(mask_nT.sum(1).cumsum(0), (1, 0))
        return cls(vectors_nTD[mask_nT].float().cpu().numpy(), offsets.cpu().numpy())

    @classmethod
    def from_arrays(cls, arrays: Sequence[npt.NDArray[Any]]) -> TokenVectors:
        """From one array `[T_i, D]` for each of at least one item."""
        lengths = [len(array) for array in arrays]
        flat = np.concatenate(arrays).astype(np.float32, copy=False)
        return cls(flat, np.cumsum([0, *lengths], dtype=np.int64))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[n]` tokens of each item."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        """An array `[T_i, D]` for each item."""
        return iter(np.split(self.flat_SD, self.offsets[1:-1]) if len(self) else [])

    def __getitem__(self, rows: slice | npt.NDArray[np.int64] | list[int]) -> TokenVectors:
        """The items of some rows, in the order of the rows."""
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            offsets = self.offsets[start : max(start, stop) + 1]
            return TokenVectors(self.flat_SD[offsets[0] : offsets[-1]], offsets - offsets[0])
        index = np.arange(len(self))[rows]
        lengths = self.lengths[index]
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
        # Of each new token: where its item begins, and how far into the item it is.
        within = np.arange(offsets[-1]) - offsets[:-1].repeat(lengths)
        return TokenVectors(self.flat_SD[self.offsets[index].repeat(lengths) + within], offsets)


Vectors = npt.NDArray[np.float32] | TokenVectors
"""What items are encoded to: `[n, D]`, or token vectors. Both have a length, and take rows."""


def join_vectors(parts: Sequence[Vectors]) -> Vectors:
    """The items of at least one part, one part after the other; all parts are of one kind."""
    tokens = [part for part in parts if isinstance(part, TokenVectors)]
    if not tokens:
        return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    lengths = np.concatenate([part.lengths for part in tokens])
    flat = np.concatenate([part.flat_SD for part in tokens])
    return TokenVectors(flat, np.concatenate([[0], lengths.cumsum()]).astype(np.int64))


def max_sim(queries: TokenVectors, documents: TokenVectors) -> npt.NDArray[np.float64]:
    """`[Q, N]` MaxSim (Khattab and Zaharia, 2020), as the mean over a query's tokens, in float64.

    For each token of a query, its largest cosine with a token of the document. The mean, which is
    from -1 to 1, ranks documents as the sum does. What has no tokens is near nothing: 0. Token
    similarities are made a tile at a time.
    """
    scores_QN = np.zeros((len(queries), len(documents)))
    for rows in _item_blocks(queries, _TILE_TOKENS):
        block = queries[rows]
        query_SD = _unit_rows(block.flat_SD)
        room = _TILE_ENTRIES // max(1, len(query_SD))
        for columns in _item_blocks(documents, room):
            few = documents[columns]
            similarity_SS = query_SD @ _unit_rows(few.flat_SD).T
            best = _reduce_items(np.maximum, similarity_SS, few, axis=1)
            scores_QN[rows, columns] = _reduce_items(np.add, best, block, axis=0)
    scores_QN /= np.maximum(queries.lengths, 1)[:, None]
    return scores_QN


def paired_max_sim(queries: TokenVectors, documents: TokenVectors) -> npt.NDArray[np.float64]:
    """`[n]` MaxSim of item i of one side with item i of the other, as in `max_sim`."""
    pairs = range(len(queries))
    scores = [max_sim(queries[i : i + 1], documents[i : i + 1])[0, 0] for i in pairs]
    return np.asarray(scores, dtype=np.float64)


def _item_blocks(vectors: TokenVectors, tokens: int) -> Iterator[slice]:
    """Consecutive items, together at most `tokens` long, or a longer one."""
    start = 0
    while start < len(vectors):
        limit = vectors.offsets[start] + tokens
        stop = int(np.searchsorted(vectors.offsets, limit, side="right")) - 1
        stop = max(stop, start + 1)
        yield slice(start, stop)
        start = stop


def _unit_rows(rows_SD: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = rows_SD.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = wide / np.maximum(length, np.finfo(np.float64).tiny)
    return unit


def _reduce_items(
    function: np.ufunc, values: npt.NDArray[np.float64], items: TokenVectors, *, axis: int
) -> npt.NDArray[np.float64]:
    """One number for the tokens of each item along an axis; 0 for an item without tokens."""
    present = np.flatnonzero(items.lengths)
    shape = list(values.shape)
    shape[axis] = len(items)
    reduced = np.zeros(shape)
    if len(present):
        # `reduceat` reduces from each start to the next, so items without tokens must not be there.
        found = function.reduceat(values, items.offsets[present], axis=axis)
        reduced[(slice(None),) * axis + (present,)] = found
    return reduced
