"""Reductions of a scaled similarity matrix that is never held as a whole.

The matrix is made a tile at a time, reduced, and made again in backward: memory grows with the
number of rows plus columns, not with their product, and the result is exact (running log-sum-exp:
Milakov and Gimelshein, 2018; recomputation as in FlashAttention: Dao et al., 2022).

# Shapes: R rows, C columns, D size; r, c the rows and columns of a tile. Where rows and columns are
# token vectors, D stands for tokens x size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vembed.errors import ConfigError
from vembed.losses.comparison import COSINE, Comparison
from vembed.losses.relevance import Relevance
from vembed.losses.similarity import full_precision
from vembed.placing import to_device

TILE_BYTES = 32 * 2**20
"""Held at once, on a device that wants much work at a time."""

CPU_TILE_BYTES = 8 * 2**20
"""The same on a CPU, which is no faster with more."""

TileSize = int | Literal["auto"]
"""Rows and columns of a tile; `auto` takes as many as fill `tile_bytes`."""


class Reduction(Protocol):
    """How a row of scores becomes one number. Scores that must not count are -inf."""

    empty: float
    """The result of a row without scores."""

    unit: float
    """Scores come divided by it, and results are multiplied by it."""

    def fold(self, total_R: Tensor, scores_rc: Tensor) -> Tensor:
        """Results `[r]` so far, with more columns added. May overwrite `scores_rc`."""
        ...

    def weights_(self, scores_rc: Tensor, total_R: Tensor) -> Tensor:
        """Derivatives `[r, c]` of the results by the scores, in the place of `scores_rc`."""
        ...


class _LogSumExp:
    """In powers of two, which a CPU takes three times as fast as those of e."""

    empty = -math.inf
    unit = math.log(2)

    def fold(self, total_R: Tensor, scores_rc: Tensor) -> Tensor:
        peak_R1 = finite(scores_rc.amax(1, keepdim=True))
        sums_R = scores_rc.sub_(peak_R1).exp2_().sum(1)
        return torch.logaddexp2(total_R, peak_R1.squeeze(1) + sums_R.log2())

    def weights_(self, scores_rc: Tensor, total_R: Tensor) -> Tensor:
        return scores_rc.sub_(finite(total_R)[:, None]).exp2_()


class _SoftplusSum:
    empty = 0.0
    unit = 1.0

    def fold(self, total_R: Tensor, scores_rc: Tensor) -> Tensor:
        # Above the threshold softplus(x) is taken as x; the default of 20 is wrong by 2e-9.
        return total_R + functional.softplus(scores_rc, threshold=40).sum(1)

    def weights_(self, scores_rc: Tensor, total_R: Tensor) -> Tensor:
        return scores_rc.sigmoid_()


@dataclass(frozen=True)
class Limits:
    """Similarities `row . column` above which a pair does not count; nothing here has a gradient.

    Attributes:
        row_R: Of each row.
        column_C: Of each column, for the reduction over rows.
        judge: Rows `[R, G]` and columns `[C, G]` of unit length, by whose similarity pairs are
            judged instead of by that which is reduced: what a guide model makes of the same items.
    """

    row_R: Tensor
    column_C: Tensor | None = None
    judge: Judge | None = None


class Judge(NamedTuple):
    """What pairs are judged by, in the place of what is reduced."""

    rows_RG: Tensor
    columns_CG: Tensor


@dataclass(frozen=True)
class LogSumExps:
    """Of each row over the columns, and of each column over the rows."""

    rows_R: Tensor
    columns_C: Tensor


def tiled_logsumexp(
    rows_RD: Tensor,
    columns_CD: Tensor,
    *,
    scale: Tensor,
    masked: Relevance,
    limits: Limits | None = None,
    tile_size: TileSize = "auto",
    comparison: Comparison = COSINE,
) -> Tensor:
    """`log(sum_c exp(scale * row . column))` over each row's columns that count.

    Args:
        rows_RD: `[R, D]`.
        columns_CD: `[C, D]`.
        scale: Scalar tensor, above 0.
        masked: Pairs to leave out.
        limits: Similarities above which a pair is left out as well; None: no limits.
        tile_size: Rows and columns of a tile.
        comparison: What similarity is; `row . column` above stands for it.

    Returns:
        `[R]`; -inf where every column is left out. Differentiable once, in rows, columns and scale.
    """
    factors = _Factors(rows_RD, columns_CD, scale, scale.new_zeros(()))
    (totals_R,) = _reduce(
        factors, _LogSumExp(), masked, limits, tile_size=tile_size, comparison=comparison, sides=1
    )
    return totals_R


def tiled_logsumexp_both(
    rows_RD: Tensor,
    columns_CD: Tensor,
    *,
    scale: Tensor,
    masked: Relevance,
    limits: Limits | None = None,
    tile_size: TileSize = "auto",
    comparison: Comparison = COSINE,
) -> LogSumExps:
    """`tiled_logsumexp` over columns and over rows, with the products of one of them.

    Arguments are those of `tiled_logsumexp`; limits, if there are any, are those of both. Takes
    half the time of two calls, and the room of two tiles.
    """
    factors = _Factors(rows_RD, columns_CD, scale, scale.new_zeros(()))
    return LogSumExps(
        *_reduce(
            factors,
            _LogSumExp(),
            masked,
            limits,
            tile_size=tile_size,
            comparison=comparison,
            sides=2,
        )
    )


def tiled_softplus_sum(
    rows_RD: Tensor,
    columns_CD: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    masked: Relevance,
    limits: Limits | None = None,
    tile_size: TileSize = "auto",
    comparison: Comparison = COSINE,
) -> Tensor:
    """`sum_c log(1 + exp(scale * row . column + bias))` over the columns that count.

    As `tiled_logsumexp`, but 0 where every column is left out, and differentiable in `bias` too.
    """
    factors = _Factors(rows_RD, columns_CD, scale, bias)
    (totals_R,) = _reduce(
        factors, _SoftplusSum(), masked, limits, tile_size=tile_size, comparison=comparison, sides=1
    )
    return totals_R


@torch.no_grad()
def tiled_similarities(rows_RD: Tensor, columns_CD: Tensor, comparison: Comparison) -> Tensor:
    """All similarities, `[R, C]`; those of tokens are held for a tile at a time."""
    similarity_RC = rows_RD.new_empty(len(rows_RD), len(columns_CD))
    itemsize = rows_RD.element_size() * comparison.entries(rows_RD, columns_CD)
    height, width = tile_shape(len(rows_RD), len(columns_CD), itemsize, "auto", rows_RD.device)
    nothing = rows_RD.new_zeros(())
    for rows in _slices(len(rows_RD), height):
        for columns in _slices(len(columns_CD), width):
            tile_rc = rows_RD.new_empty(rows.stop - rows.start, columns.stop - columns.start)
            comparison.compare(rows_RD[rows], columns_CD[columns], nothing, tile_rc)
            similarity_RC[rows, columns] = tile_rc
    return similarity_RC


def check_tile_size(tile_size: TileSize) -> None:
    """Check a tile size as a user may give it.

    Raises:
        ConfigError: if it is neither a positive whole number nor `auto`.
    """
    if tile_size == "auto":
        return
    if isinstance(tile_size, bool) or not isinstance(tile_size, int) or tile_size < 1:
        raise ConfigError(
            f"tile_size: expected a positive whole number or 'auto'. Received: {tile_size!r}"
        )


def tile_bytes(device: torch.device) -> int:
    """What a tile of `auto` size may take there."""
    return CPU_TILE_BYTES if device.type == "cpu" else TILE_BYTES


def tile_shape(
    rows: int, columns: int, itemsize: int, tile_size: TileSize, device: torch.device
) -> tuple[int, int]:
    """Rows and columns of a tile: square, unless `auto` needs more rows to fill it."""
    if tile_size != "auto":
        return max(1, min(rows, tile_size)), max(1, min(columns, tile_size))
    numbers = max(1, tile_bytes(device) // itemsize)
    width = max(1, min(columns, math.isqrt(numbers)))
    return max(1, min(rows, numbers // width)), width


class _Factors(NamedTuple):
    """What makes the scores: `scale * similarity(rows, columns) + bias`."""

    rows_RD: Tensor
    columns_CD: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Tile:
    """Scores of some rows and columns; making the next tile overwrites them.

    Attributes:
        rows: Which rows.
        columns: Which columns.
        room: `[r, c]` for each side. The last holds the scores, in the reduction's unit.
        seen: What the comparison wants to know again for gradients.
    """

    rows: slice
    columns: slice
    room: tuple[Tensor, ...]
    seen: Any


@dataclass(frozen=True)
class _Side:
    """A tile as it is seen from its rows, or from its columns: `scores` has one row for each."""

    span: slice
    scores: Tensor


@dataclass(frozen=True)
class _Tiling:
    """A reduction of scores, and how they are cut.

    Attributes:
        reduction: What becomes of a row of scores.
        masked: Pairs to leave out.
        limits: Of each side, scores (similarities, if there is a judge) above which pairs are left
            out as well; empty: no limits.
        judge: See `Limits`.
        tile_size: Rows and columns of a tile.
        comparison: What similarity is.
        sides: 1: rows are reduced; 2: columns are reduced as well.
    """

    reduction: Reduction
    masked: Relevance
    limits: tuple[Tensor, ...]
    judge: Judge | None
    tile_size: TileSize
    comparison: Comparison
    sides: int

    def tiles(self, factors: _Factors) -> Iterator[_Tile]:
        """Every tile, masked, row after row."""
        size = len(factors.rows_RD), len(factors.columns_CD)
        entries = self.comparison.entries(factors.rows_RD, factors.columns_CD)
        itemsize = factors.rows_RD.element_size() * entries
        height, width = tile_shape(*size, itemsize, self.tile_size, factors.rows_RD.device)
        # The same room for all: fresh pages for each tile cost a CPU as much as its arithmetic.
        rooms = [factors.rows_RD.new_empty(height * width) for _ in range(self.sides)]
        bias = factors.bias / self.reduction.unit
        for rows in _slices(size[0], height):
            scaled_rD = factors.rows_RD[rows] * (factors.scale / self.reduction.unit)
            masked = self.masked.in_tiles(rows, width)
            for columns, index in zip(_slices(size[1], width), masked, strict=True):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                *copies, scores = (room[: math.prod(shape)].view(shape) for room in rooms)
                columns_cD = factors.columns_CD[columns]
                seen = self.comparison.compare(scaled_rD, columns_cD, bias, scores)
                if len(index[0]):
                    scores[tuple(to_device(i, scores.device) for i in index)] = -math.inf
                yield _Tile(rows, columns, (*copies, scores), seen)

    def look(self, tile: _Tile) -> Iterator[_Side]:
        """The tile from each side, with its limits, in that side's room, which it may use up."""
        judged = None
        if self.judge is not None:
            judged = self.judge.rows_RG[tile.rows] @ self.judge.columns_CG[tile.columns].T
        for side, room in enumerate(tile.room):
            if room is not tile.room[-1]:
                room.copy_(tile.room[-1])
            span, scores = (tile.columns, room.T) if side else (tile.rows, room)
            if self.limits:
                judged_side = judged if judged is None or not side else judged.T
                similarity = scores if judged_side is None else judged_side
                scores.masked_fill_(similarity > self.limits[side][span, None], -math.inf)
            yield _Side(span, scores)


class _TiledReduction(torch.autograd.Function):
    """Keeps the reduced rows and columns only, and makes the scores again in backward."""

    @staticmethod
    def forward(ctx: Any, tiling: _Tiling, *tensors: Tensor) -> tuple[Tensor, ...]:
        factors, reduction = _Factors(*tensors), tiling.reduction
        reduced = tensors[: tiling.sides]
        totals = [rows.new_full((len(rows),), reduction.empty) for rows in reduced]
        for tile in tiling.tiles(factors):
            for total, side in zip(totals, tiling.look(tile), strict=True):
                total[side.span] = reduction.fold(total[side.span], side.scores)
        ctx.save_for_backward(*factors, *totals)
        ctx.tiling = tiling
        return tuple(total * reduction.unit for total in totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        factors, totals, tiling = _Factors(*tensors[:4]), tensors[4:], ctx.tiling
        rows_RD, columns_CD, scale, bias = factors
        needs_rows, needs_columns, needs_scale, needs_bias = ctx.needs_input_grad[1:]
        grad_rows, grad_columns = torch.zeros_like(rows_RD), torch.zeros_like(columns_CD)
        grad_bias = torch.zeros_like(bias)
        # Backward may be called inside autocast, which would lower these products too.
        with full_precision(rows_RD.device):
            for tile in tiling.tiles(factors):
                for total, grad, side in zip(totals, grads, tiling.look(tile), strict=True):
                    derivatives = tiling.reduction.weights_(side.scores, total[side.span])
                    derivatives.mul_(grad[side.span, None])
                *others, weights = tile.room
                for of_side in others:
                    weights.add_(of_side)
                tiling.comparison.add_gradients(
                    tile.seen,
                    weights,
                    rows_RD[tile.rows],
                    columns_CD[tile.columns],
                    grad_rows=grad_rows[tile.rows] if needs_rows or needs_scale else None,
                    grad_columns=grad_columns[tile.columns] if needs_columns else None,
                )
                if needs_bias:
                    grad_bias += weights.sum()
        # The sum of weight * similarity needs no pass of its own: similarity is linear in a factor
        # of the row.
        grad_scale = (rows_RD * grad_rows).sum() if needs_scale else None
        return (
            None,
            grad_rows.mul_(scale) if needs_rows else None,
            grad_columns.mul_(scale) if needs_columns else None,
            grad_scale,
            grad_bias if needs_bias else None,
        )


def _reduce(
    factors: _Factors,
    reduction: Reduction,
    masked: Relevance,
    limits: Limits | None,
    *,
    tile_size: TileSize,
    comparison: Comparison,
    sides: int,
) -> tuple[Tensor, ...]:
    """The results of each side."""
    of_sides = [] if limits is None else [limits.row_R, limits.column_C][:sides]
    judge = None if limits is None else limits.judge
    scale, bias = factors.scale.detach(), factors.bias.detach()
    bounds = tuple(limit for limit in of_sides if limit is not None)
    if judge is None:
        bounds = tuple((limit * scale + bias) / reduction.unit for limit in bounds)
    tiling = _Tiling(reduction, masked, bounds, judge, tile_size, comparison, sides)
    reduced: tuple[Tensor, ...] = _TiledReduction.apply(  # type: ignore[no-untyped-call]
        tiling, *factors
    )
    return reduced


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def finite(values: Tensor) -> Tensor:
    """-inf (nothing to reduce) replaced by 0, so that `-inf - value` stays -inf instead of nan."""
    return values.masked_fill(values == -math.inf, 0)
