"""The nearest documents that the rules allow, exactly: `faiss.IndexFlatIP` over unit vectors.

Each query gets a list of its nearest candidates, as deep as it needs where few of them are left
out. Where known pairs, margins or scores use the list up, it gets one four times as deep, until
enough are found or no candidate is left that could be.

Similarities are float32. Of equal ones the lower document number goes first; which of several
that equal the last of a list are on it, faiss decides. The candidates are held in memory as
float32, up to 4 GiB; more are read anew for each block of queries. Threads are those of OpenMP
(`OMP_NUM_THREADS`), as in torch.

# Shapes: Q queries, q queries of a block, r of them, C candidates, L listed, K kept, D size
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vembed.mining.pairs import Pairs
from vembed.mining.rules import Excluded
from vembed.mining.vectors import Floats32, VectorRows, blocks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BLOCK_QUERIES = 1024
_BLOCK_QUERIES_READING = 2**14  # where each block reads all candidates anew
_PART_CANDIDATES = 2**14  # read at a time
_HELD_NUMBERS = 2**30  # of all candidates' vectors in memory: 4 GiB
_LISTED_PAIRS = 2**21  # looked at together: some 200 MiB
_DEEPER = 4  # times, where a list was used up
_SPARE = 16  # listed beyond what is wanted, for what rules leave out


@dataclass(frozen=True)
class Window:
    """Which ranks are looked at, and how many candidates are wanted of them.

    Attributes:
        first: Rank of the first, from 0.
        last: Rank behind the last; None for no end.
        take: K, the candidates that are wanted.
    """

    first: int
    last: int | None
    take: int


@dataclass(frozen=True)
class Bounds:
    """Between which similarities a candidate may be.

    Attributes:
        margin_Q: Most, by the margins; infinite without.
        most: Most, by `max_score`.
        least: Least.
    """

    margin_Q: Floats
    most: float = math.inf
    least: float = -math.inf


@dataclass(frozen=True)
class Nearest:
    """What a block of queries found.

    Attributes:
        block: The queries.
        documents_qK: Document numbers, most similar first; -1 where there are fewer.
        cosines_qK: Their cosines; NaN where the document is -1.
        excluded: What was left out.
    """

    block: range
    documents_qK: Ints
    cosines_qK: Floats
    excluded: Excluded


def search(
    queries: VectorRows,
    documents: VectorRows,
    *,
    candidates: int,
    known: Pairs,
    bounds: Bounds,
    window: Window,
) -> Iterator[Nearest]:
    """The nearest candidates of every query, a block of queries at a time.

    Args:
        queries: Q vectors of any length.
        documents: Vectors of any length; the first C are candidates.
        candidates: C.
        known: Pairs of queries and candidates that may not be found.
        bounds: Similarities that are allowed.
        window: Ranks that are looked at, among what is not known.
    """
    corpus = _Corpus(documents, candidates)
    for block in blocks(len(queries), _BLOCK_QUERIES if corpus.is_held else _BLOCK_QUERIES_READING):
        vectors_qD = _unit(queries[np.arange(block.start, block.stop)])
        own = Bounds(bounds.margin_Q[block.start : block.stop], bounds.most, bounds.least)
        yield _Block(vectors_qD, corpus, known.of_block(block), own, window).solve(block)


def _unit(rows_nD: Floats32) -> Floats32:
    """Of length one, in place where it can be; zeros stay."""
    import faiss

    rows_nD = np.ascontiguousarray(rows_nD, dtype=np.float32)
    faiss.normalize_L2(rows_nD)
    return rows_nD


@dataclass(frozen=True)
class _Listed:
    """The nearest candidates of some queries, most similar first."""

    cosines_rL: Floats32
    numbers_rL: Ints


class _Corpus:
    """The candidates as unit vectors, in an index if they fit."""

    def __init__(self, documents: VectorRows, count: int) -> None:
        import faiss

        self.count = count
        self._documents = documents
        size = documents[np.zeros(1, dtype=np.int64)].shape[1]
        self.is_held = count * size <= _HELD_NUMBERS
        self._index = faiss.IndexFlatIP(size)
        if self.is_held:
            for part in self._parts():
                self._index.add(part)

    def _parts(self) -> Iterator[Floats32]:
        for part in blocks(self.count, _PART_CANDIDATES):
            yield _unit(self._documents[np.arange(part.start, part.stop)])

    def nearest(self, queries_rD: Floats32, depth: int) -> _Listed:
        """The `depth` nearest, which must not be more than there are."""
        from faiss import METRIC_INNER_PRODUCT
        from faiss.contrib.exhaustive_search import knn_ground_truth

        if self.is_held:
            cosines_rL, numbers_rL = self._index.search(queries_rD, depth)
        else:
            cosines_rL, numbers_rL = knn_ground_truth(
                queries_rD, self._parts(), depth, METRIC_INNER_PRODUCT, ngpu=0
            )
        order_rL = np.lexsort((numbers_rL, -cosines_rL), axis=1)
        return _Listed(
            np.take_along_axis(cosines_rL, order_rL, axis=1),
            np.take_along_axis(numbers_rL, order_rL, axis=1),
        )


class _Block:
    """One block of queries, and what it has found."""

    def __init__(
        self, queries_qD: Floats32, corpus: _Corpus, known: Pairs, bounds: Bounds, window: Window
    ) -> None:
        self._queries_qD = queries_qD
        self._corpus = corpus
        self._known_keys = known.queries * corpus.count + known.documents
        self._bounds = bounds
        self._window = window
        self._known_q = np.bincount(known.queries, minlength=len(queries_qD))
        left_q = corpus.count - self._known_q  # candidates that have a rank
        self._last_q = np.minimum(corpus.count if window.last is None else window.last, left_q)
        self._first_q = np.minimum(window.first, self._last_q)
        self._documents_qK = np.full((len(queries_qD), window.take), -1, dtype=np.int64)
        self._cosines_qK = np.full(self._documents_qK.shape, np.nan)
        beyond_q = left_q - (self._last_q - self._first_q)
        self._excluded = Excluded(known=len(known), rank=int(beyond_q.sum()))

    def solve(self, block: range) -> Nearest:
        """What these queries, which have the numbers of `block`, find."""
        depth = self._window.first + self._window.take + int(np.median(self._known_q)) + _SPARE
        rows = np.arange(len(block))
        while len(rows):
            depth = min(depth, self._corpus.count)
            parts = blocks(len(rows), max(1, _LISTED_PAIRS // depth))
            rows = np.concatenate(
                [self._look(rows[part.start : part.stop], depth) for part in parts]
            )
            depth *= _DEEPER
        return Nearest(block, self._documents_qK, self._cosines_qK, self._excluded)

    def _look(self, rows_r: Ints, depth: int) -> Ints:
        """Keep what some queries find among their nearest; the rows that need a deeper list."""
        listed = self._corpus.nearest(self._queries_qD[rows_r], depth)
        cosines_rL, last_r = listed.cosines_rL, self._last_q[rows_r]
        keys_rL = rows_r[:, None] * self._corpus.count + listed.numbers_rL
        is_known_rL = np.isin(keys_rL, self._known_keys)
        rank_rL = np.cumsum(~is_known_rL, axis=1) - 1
        within_rL = ~is_known_rL & (rank_rL >= self._window.first) & (rank_rL < last_r[:, None])
        is_low_rL = cosines_rL < self._bounds.least
        within_rL &= ~is_low_rL
        is_near_rL = within_rL & (cosines_rL > self._bounds.margin_Q[rows_r, None])
        is_high_rL = within_rL & ~is_near_rL & (cosines_rL > self._bounds.most)
        allowed_rL = within_rL & ~is_near_rL & ~is_high_rL
        place_rL = np.cumsum(allowed_rL, axis=1) - 1
        is_full_r = place_rL[:, -1] + 1 >= self._window.take
        is_done_r = is_full_r | (rank_rL[:, -1] + 1 >= last_r) | is_low_rL[:, -1]
        taken_rL = allowed_rL & (place_rL < self._window.take) & is_done_r[:, None]
        rows, columns = np.nonzero(taken_rL)
        target = rows_r[rows], place_rL[rows, columns]
        self._documents_qK[target] = listed.numbers_rL[rows, columns]
        self._cosines_qK[target] = cosines_rL[rows, columns]
        # What a query that found too few left out within its ranks, and by no other rule.
        near_r, high_r, taken_r = (each.sum(1) for each in (is_near_rL, is_high_rL, taken_rL))
        low_r = last_r - self._first_q[rows_r] - near_r - high_r - taken_r
        self._excluded += Excluded(
            min_score=int(low_r[is_done_r & ~is_full_r].sum()),
            margin=int(near_r[is_done_r].sum()),
            max_score=int(high_r[is_done_r].sum()),
        )
        return rows_r[~is_done_r]
