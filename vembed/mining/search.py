"""The nearest documents that the rules allow, exactly, in tiles: never all against all.

Similarities are computed in float32, on the accelerator where there is one, and the few that could
be among the nearest again in float64. What is not listed is less similar than the last that is, to
rounding: where that does not prove the choice, as with hundreds of equal vectors, the query is
ranked in float64 throughout.

# Shapes: Q queries, q queries of a block, C candidates, t candidates of a tile, K kept, D size
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vembed.mining.vectors import VectorRows

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# What float32 may err by in a cosine: twice what was seen at size 4,096 (see `losses.margins`).
_ROUNDING = 64 * float(np.finfo(np.float32).eps)
# Similarities are compared in steps of 2^-30; within one, the lower document number goes first.
_STEPS = 2.0**30
_BLOCK_QUERIES = 1024
_TILE_CANDIDATES = 2**13
_SPARE = 8  # listed beyond what is wanted, so that rounding rarely leaves a doubt
_MORE_SPARE = 256  # where it does, before a query is compared with everything in float64
_HELD_NUMBERS = 2**28  # of all candidates' vectors, kept ready on the device: 1 GiB
_EXACT_NUMBERS = 2**23  # held at once in float64: 64 MiB


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a document number, sorted by query."""

    queries: Ints
    documents: Ints

    @classmethod
    def of(cls, queries: Ints, documents: Ints) -> Pairs:
        """Each pair once."""
        both = np.unique(np.stack([queries, documents], axis=1), axis=0)
        return cls(both[:, 0], both[:, 1])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.queries)

    def below(self, count: int) -> Pairs:
        """Those with one of the first documents."""
        is_below = self.documents < count
        return Pairs(self.queries[is_below], self.documents[is_below])

    def select(self, rows: Ints) -> Pairs:
        """Those of some queries, in ascending order, which are then counted from 0."""
        chosen = np.isin(self.queries, rows)
        return Pairs(np.searchsorted(rows, self.queries[chosen]), self.documents[chosen])

    def of_block(self, block: range) -> Pairs:
        """Those of some queries, which are then counted from 0."""
        low, high = np.searchsorted(self.queries, [block.start, block.stop])
        return Pairs(self.queries[low:high] - block.start, self.documents[low:high])


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

    @property
    def upper_Q(self) -> Floats:
        """Most, by margins and score."""
        return np.minimum(self.margin_Q, self.most)

    def select(self, rows: Ints) -> Bounds:
        """Those of some queries."""
        return Bounds(self.margin_Q[rows], self.most, self.least)


@dataclass(frozen=True)
class Excluded:
    """Pairs of a query and a candidate that each rule left out; the first that does so counts.

    Attributes:
        known: Positives, negatives that the rows had, and the query's own content.
        rank: Nearer than `range_min`, or farther than `range_max`.
        margin: Too near to the positive.
        max_score: Too similar.
        min_score: Not similar enough.
    """

    known: int = 0
    rank: int = 0
    margin: int = 0
    max_score: int = 0
    min_score: int = 0

    def __add__(self, other: Excluded) -> Excluded:
        sums = zip(vars(self).values(), vars(other).values(), strict=True)
        return Excluded(*(first + second for first, second in sums))


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
    device: torch.device | str = "cpu",
) -> Iterator[Nearest]:
    """The nearest candidates of every query, a block of queries at a time.

    Args:
        queries: Q vectors of any length.
        documents: Vectors of any length; the first C are candidates.
        candidates: C.
        known: Pairs that are not candidates.
        bounds: Similarities that are allowed.
        window: Ranks that are looked at, among what is not known.
        device: Where similarities are computed.
    """
    tiles = _Tiles(documents, candidates, torch.device(device))
    for start in range(0, len(queries), _BLOCK_QUERIES):
        block = range(start, min(start + _BLOCK_QUERIES, len(queries)))
        numbers = np.arange(block.start, block.stop)
        vectors_qD = torch.from_numpy(queries[numbers])
        work = _Block(vectors_qD, tiles, known.of_block(block), bounds.select(numbers), window)
        with _full_precision():
            found = work.solve(block)
        yield found


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in float32 itself, whatever a program has set: TF32 or bf16 err by far more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Tiles:
    """The candidates, a tile of unit vectors at a time, which stay on the device if they fit."""

    def __init__(self, documents: VectorRows, count: int, device: torch.device) -> None:
        self.documents = documents
        self.count = count
        self.device = device
        self._held: dict[int, Tensor] | None = {}

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the first candidate, and `[t, D]`."""
        for start in range(0, self.count, _TILE_CANDIDATES):
            yield start, self._tile(start)

    def _tile(self, start: int) -> Tensor:
        if self._held is not None and start in self._held:
            return self._held[start]
        numbers = np.arange(start, min(start + _TILE_CANDIDATES, self.count))
        tile = functional.normalize(torch.from_numpy(self.documents[numbers]).to(self.device))
        if self._held is not None:
            if self.count * tile.shape[1] > _HELD_NUMBERS:
                self._held = None
            else:
                self._held[start] = tile
        return tile

    def exact(self, queries_qD: Tensor, numbers_qK: Ints) -> Floats:
        """`[q, K]` cosines of unit vectors in float64 with some candidates each."""
        found = np.empty(numbers_qK.shape, dtype=np.float64)
        rows = max(1, _EXACT_NUMBERS // max(1, numbers_qK.shape[1] * queries_qD.shape[1]))
        for start in range(0, len(numbers_qK), rows):
            part = slice(start, start + rows)
            flat = torch.from_numpy(self.documents[numbers_qK[part].ravel()]).double()
            vectors_qKD = flat.view(*numbers_qK[part].shape, -1)
            lengths_qK = vectors_qKD.norm(dim=2).clamp_min(np.finfo(np.float64).tiny)
            dots_qK = torch.bmm(vectors_qKD, queries_qD[part, :, None])[:, :, 0]
            found[part] = (dots_qK / lengths_qK).numpy()
        return found

    def exact_row(self, query_D: Tensor) -> Floats:
        """`[C]` cosines of one unit vector in float64 with all candidates."""
        size = max(1, _EXACT_NUMBERS // len(query_D))
        parts = [
            self.exact(query_D[None], np.arange(at, min(at + size, self.count))[None])[0]
            for at in range(0, self.count, size)
        ]
        return np.concatenate([*parts, np.empty(0)])


@dataclass
class _Listed:
    """The nearest of a block in float32, and how many there are above and below some bounds."""

    cosines_qL: Floats
    numbers_qL: Ints
    above_margin_q: Ints
    above_q: Ints
    reaching_q: Ints


@dataclass(frozen=True)
class _Found:
    """The first K of each query, and the list that they are from."""

    numbers_qK: Ints
    cosines_qK: Floats
    listed: _Listed


class _Block:
    """One block of queries."""

    def __init__(
        self, vectors_qD: Tensor, tiles: _Tiles, known: Pairs, bounds: Bounds, window: Window
    ) -> None:
        self.queries_qD = functional.normalize(vectors_qD.double())
        self.tiles = tiles
        self.known = known
        self.bounds = bounds
        self.window = window
        self.known_q = np.bincount(known.queries, minlength=len(vectors_qD))
        self.left_q = tiles.count - self.known_q  # candidates that have a rank
        last = tiles.count if window.last is None else window.last
        self.last_q = np.minimum(last, self.left_q)

    def solve(self, block: range) -> Nearest:
        """What these queries, which have the numbers of `block`, find."""
        found = self.find(_SPARE)
        return Nearest(block, found.numbers_qK, found.cosines_qK, self._excluded(found.listed))

    def find(self, spare: int) -> _Found:
        """The first K that are allowed, from a list of some more than could be needed."""
        listed = self._list(self.window.first + self.window.take + spare)
        cosines_qL = self.tiles.exact(self.queries_qD, np.maximum(listed.numbers_qL, 0))
        is_above_qL = (listed.numbers_qL >= 0) & (cosines_qL > self.bounds.upper_Q[:, None])
        above_q = listed.above_q + is_above_qL.sum(1)
        cosines_qL[(listed.numbers_qL < 0) | is_above_qL] = -np.inf
        order_qL = np.lexsort((listed.numbers_qL, -np.rint(cosines_qL * _STEPS)), axis=1)
        numbers_qL = np.take_along_axis(listed.numbers_qL, order_qL, axis=1)
        cosines_qL = np.take_along_axis(cosines_qL, order_qL, axis=1)
        numbers_qK, cosines_qK = self._take(numbers_qL, cosines_qL, above_q, self.last_q)
        doubtful = np.flatnonzero(~self._is_proven(listed, cosines_qL, above_q))
        if len(doubtful) and spare < _MORE_SPARE:
            again = self._select(doubtful).find(_MORE_SPARE)
            numbers_qK[doubtful], cosines_qK[doubtful] = again.numbers_qK, again.cosines_qK
        elif len(doubtful):
            for row in doubtful.tolist():
                numbers_qK[row], cosines_qK[row] = self._rank_exactly(row)
        return _Found(numbers_qK, cosines_qK, listed)

    def _select(self, rows: Ints) -> _Block:
        known, bounds = self.known.select(rows), self.bounds.select(rows)
        return _Block(self.queries_qD[rows], self.tiles, known, bounds, self.window)

    def _list(self, wanted: int) -> _Listed:
        device, count = self.tiles.device, len(self.queries_qD)
        queries_qD = self.queries_qD.float().to(device)
        upper_q, surely_q, margin_q = (
            torch.from_numpy(bound).float().to(device)[:, None]
            for bound in (
                self.bounds.upper_Q,
                self.bounds.upper_Q + _ROUNDING,
                self.bounds.margin_Q,
            )
        )
        wanted = min(wanted, self.tiles.count)
        best_qL = torch.full((count, wanted), -math.inf, device=device)
        numbers_qL = torch.full((count, wanted), -1, dtype=torch.int64, device=device)
        above_margin_q, above_q, reaching_q = torch.zeros(
            (3, count), dtype=torch.int64, device=device
        )
        room = torch.empty(count * min(_TILE_CANDIDATES, self.tiles.count), device=device)
        has_upper = bool(np.isfinite(self.bounds.upper_Q).any())
        for start, tile_tD in self.tiles:
            # Memory that is used again: fresh pages cost a tenth of the product.
            cosines_qt = room[: count * len(tile_tD)].view(count, -1)
            torch.matmul(queries_qD, tile_tD.T, out=cosines_qt)
            self._mask_known(cosines_qt, start)
            if math.isfinite(self.bounds.least):
                reaching_q += (cosines_qt >= self.bounds.least).sum(1)
            here_qL, places_qL = cosines_qt.topk(min(wanted, cosines_qt.shape[1]), dim=1)
            if has_upper:  # of most queries nothing in the tile is: counting costs as much as topk
                rows = (here_qL[:, 0] > upper_q[:, 0]).nonzero()[:, 0]
                some_qt = cosines_qt[rows]
                is_above_qt = some_qt > surely_q[rows]
                above_q[rows] += is_above_qt.sum(1)
                above_margin_q[rows] += (some_qt > margin_q[rows]).sum(1)
                left = some_qt.masked_fill_(is_above_qt, -math.inf).topk(here_qL.shape[1], dim=1)
                here_qL[rows], places_qL[rows] = left
            both_q = torch.cat([best_qL, here_qL], dim=1)
            numbers_q = torch.cat([numbers_qL, places_qL + start], dim=1)
            best_qL, order_qL = both_q.topk(wanted, dim=1)
            numbers_qL = numbers_q.gather(1, order_qL)
        numbers_qL = numbers_qL.masked_fill(best_qL == -math.inf, -1)
        if not math.isfinite(self.bounds.least):
            reaching_q += self.tiles.count
        return _Listed(
            best_qL.double().cpu().numpy(),
            numbers_qL.cpu().numpy(),
            above_margin_q.cpu().numpy(),
            above_q.cpu().numpy(),
            reaching_q.cpu().numpy(),
        )

    def _mask_known(self, cosines_qt: Tensor, start: int) -> None:
        documents = self.known.documents - start
        here = (documents >= 0) & (documents < cosines_qt.shape[1])
        rows, columns = self.known.queries[here], documents[here]
        cosines_qt[torch.from_numpy(rows), torch.from_numpy(columns)] = -math.inf

    def _take(
        self, numbers_qL: Ints, cosines_qL: Floats, above_q: Ints, last_q: Ints
    ) -> tuple[Ints, Floats]:
        """The first K of sorted candidates that have an allowed rank and are similar enough."""
        rank_qL = above_q[:, None] + np.arange(numbers_qL.shape[1])
        allowed_qL = (rank_qL >= self.window.first) & (rank_qL < last_q[:, None])
        allowed_qL &= (cosines_qL >= self.bounds.least) & np.isfinite(cosines_qL)
        places_qL = np.cumsum(allowed_qL, axis=1) - 1
        allowed_qL &= places_qL < self.window.take
        numbers_qK = np.full((len(numbers_qL), self.window.take), -1, dtype=np.int64)
        cosines_qK = np.full(numbers_qK.shape, np.nan)
        rows, columns = np.nonzero(allowed_qL)
        places = places_qL[rows, columns]
        numbers_qK[rows, places] = numbers_qL[rows, columns]
        cosines_qK[rows, places] = cosines_qL[rows, columns]
        return numbers_qK, cosines_qK

    def _is_proven(self, listed: _Listed, cosines_qL: Floats, above_q: Ints) -> NDArray[np.bool_]:
        """Whether nothing that is not listed could have been taken."""
        is_short = listed.numbers_qL.shape[1] == self.tiles.count
        is_complete_q = is_short | (listed.numbers_qL[:, -1] < 0)
        # Nothing unlisted is more similar than this.
        rest_q = listed.cosines_qL[:, -1] + _ROUNDING + 1 / _STEPS
        certain_q = (cosines_qL > rest_q[:, None]).sum(1)
        wanted_q = self.window.take + np.maximum(0, self.window.first - above_q)
        return np.asarray(
            is_complete_q
            | (certain_q >= wanted_q)
            | (above_q + certain_q >= self.last_q)
            | (rest_q < self.bounds.least)
        )

    def _rank_exactly(self, row: int) -> tuple[Ints, Floats]:
        """`[K]` each, of one query, from similarities in float64."""
        cosines_C = self.tiles.exact_row(self.queries_qD[row])
        cosines_C[self.known.documents[self.known.queries == row]] = -np.inf
        is_above_C = cosines_C > self.bounds.upper_Q[row]
        cosines_C[is_above_C] = -np.inf
        wanted = min(self.window.first + self.window.take, len(cosines_C))
        steps_C = np.rint(cosines_C * _STEPS)
        last = np.partition(steps_C, len(steps_C) - wanted)[len(steps_C) - wanted]
        numbers = np.flatnonzero(steps_C >= last)
        numbers = numbers[np.argsort(-steps_C[numbers], kind="stable")]
        found_1K, cosines_1K = self._take(
            numbers[None], cosines_C[numbers][None], is_above_C.sum(keepdims=True),
            self.last_q[row : row + 1],
        )  # fmt: skip
        return found_1K[0], cosines_1K[0]

    def _excluded(self, listed: _Listed) -> Excluded:
        """By place in the order of similarity: first those above a bound, last those below one."""
        first_q = np.minimum(self.window.first, self.last_q)

        def within(place_q: Ints) -> Ints:
            return np.asarray(np.clip(place_q, first_q, self.last_q))

        margin_q, above_q = (
            within(listed.above_margin_q),
            within(np.maximum(listed.above_q, listed.above_margin_q)),
        )
        reaching_q = np.maximum(within(listed.reaching_q), above_q)
        return Excluded(
            known=int(self.known_q.sum()),
            rank=int((self.left_q - (self.last_q - first_q)).sum()),
            margin=int((margin_q - first_q).sum()),
            max_score=int((above_q - margin_q).sum()),
            min_score=int((self.last_q - reaching_q).sum()),
        )
