"""Reductions over the rows of a scaled similarity matrix that is never held as a whole.

The matrix is made a tile at a time, reduced, and made again in backward: memory grows with the
number of rows plus columns, not with their product, and the result is exact (running log-sum-exp:
Milakov and Gimelshein, 2018; recomputation as in FlashAttention: Dao et al., 2022).

# Shapes: R rows, C columns, D size; r, c the rows and columns of a tile
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vembed.errors import ConfigError
from vembed.losses.relevance import Relevance
from vembed.losses.similarity import full_precision

TILE_BYTES = 32 * 2**20

TileSize = int | Literal["auto"]
"""Rows and columns of a tile; `auto` takes as many as fill `TILE_BYTES`."""


class Reduction(Protocol):
    """How a row of scores becomes one number. Masked scores are -inf and must not count."""

    empty: float
    """The result of a row without scores."""

    def fold(self, total_R: Tensor, scores_rc: Tensor) -> Tensor:
        """Results `[r]` so far, with more columns added. May overwrite `scores_rc`."""
        ...

    def weights_(self, scores_rc: Tensor, total_R: Tensor) -> Tensor:
        """Derivatives `[r, c]` of the results by the scores. May overwrite `scores_rc`."""
        ...


class _LogSumExp:
    empty = -math.inf

    def fold(self, total_R: Tensor, scores_rc: Tensor) -> Tensor:
        peak_R1 = _finite(scores_rc.amax(1, keepdim=True))
        sums_R = scores_rc.sub_(peak_R1).exp_().sum(1)
        return torch.logaddexp(total_R, peak_R1.squeeze(1) + sums_R.log())

    def weights_(self, scores_rc: Tensor, total_R: Tensor) -> Tensor:
        return scores_rc.sub_(_finite(total_R)[:, None]).exp_()


class _SoftplusSum:
    empty = 0.0

    def fold(self, total_R: Tensor, scores_rc: Tensor) -> Tensor:
        # Above the threshold softplus(x) is taken as x; the default of 20 is wrong by 2e-9.
        return total_R + functional.softplus(scores_rc, threshold=40).sum(1)

    def weights_(self, scores_rc: Tensor, total_R: Tensor) -> Tensor:
        return scores_rc.sigmoid_()


def tiled_logsumexp(
    rows_RD: Tensor,
    columns_CD: Tensor,
    *,
    scale: Tensor,
    masked: Relevance,
    tile_size: TileSize = "auto",
) -> Tensor:
    """`log(sum_c exp(scale * row . column))` over each row's columns that are not masked.

    Args:
        rows_RD: `[R, D]`.
        columns_CD: `[C, D]`.
        scale: Scalar tensor.
        masked: Pairs to leave out.
        tile_size: Rows and columns of a tile.

    Returns:
        `[R]`; -inf where every column is masked. Differentiable once, in rows, columns and scale.
    """
    tiling = _Tiling(_LogSumExp(), masked, tile_size)
    return tiling.reduce(rows_RD, columns_CD, scale, scale.new_zeros(()))


def tiled_softplus_sum(
    rows_RD: Tensor,
    columns_CD: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    masked: Relevance,
    tile_size: TileSize = "auto",
) -> Tensor:
    """`sum_c log(1 + exp(scale * row . column + bias))` over the columns that are not masked.

    As `tiled_logsumexp`, but 0 where every column is masked, and differentiable in `bias` too.
    """
    tiling = _Tiling(_SoftplusSum(), masked, tile_size)
    return tiling.reduce(rows_RD, columns_CD, scale, bias)


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


def tile_shape(rows: int, columns: int, itemsize: int, tile_size: TileSize) -> tuple[int, int]:
    """Rows and columns of a tile: square, unless `auto` needs more rows to fill it."""
    if tile_size != "auto":
        return max(1, min(rows, tile_size)), max(1, min(columns, tile_size))
    numbers = TILE_BYTES // itemsize
    width = max(1, min(columns, math.isqrt(numbers)))
    return max(1, min(rows, numbers // width)), width


@dataclass(frozen=True)
class _Tiling:
    """A reduction of `scale * rows @ columns.T + bias`, and how it is cut."""

    reduction: Reduction
    masked: Relevance
    tile_size: TileSize

    def reduce(self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        reduced: Tensor = _TiledReduction.apply(  # type: ignore[no-untyped-call]
            self, rows_RD, columns_CD, scale, bias
        )
        return reduced

    def score_tiles(
        self, rows_RD: Tensor, columns_CD: Tensor, scale: Tensor, bias: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """The rows, columns and masked scores of each tile; the next one overwrites the scores."""
        size = len(rows_RD), len(columns_CD)
        height, width = tile_shape(*size, rows_RD.element_size(), self.tile_size)
        # One buffer for all: fresh pages for every tile cost a CPU as much as its arithmetic.
        buffer = rows_RD.new_empty(height * width)
        for rows in _slices(len(rows_RD), height):
            masked_rows, masked_columns = self.masked.pairs(rows)
            scaled_rD = rows_RD[rows] * scale
            for columns in _slices(len(columns_CD), width):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                scores = buffer[: math.prod(shape)].view(shape)
                torch.addmm(bias, scaled_rD, columns_CD[columns].T, out=scores)
                first, last = torch.searchsorted(
                    masked_columns, torch.tensor([columns.start, columns.stop])
                ).tolist()
                index = masked_rows[first:last], masked_columns[first:last] - columns.start
                scores[tuple(i.to(scores.device, non_blocking=True) for i in index)] = -math.inf
                yield rows, columns, scores


class _TiledReduction(torch.autograd.Function):
    """Keeps the reduced rows only, and makes the scores again in backward."""

    @staticmethod
    def forward(ctx: Any, tiling: _Tiling, *factors: Tensor) -> Tensor:
        rows_RD = factors[0]
        total_R = rows_RD.new_full((len(rows_RD),), tiling.reduction.empty)
        for rows, _, scores in tiling.score_tiles(*factors):
            total_R[rows] = tiling.reduction.fold(total_R[rows], scores)
        ctx.save_for_backward(*factors, total_R)
        ctx.tiling = tiling
        return total_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        *factors, total_R = ctx.saved_tensors
        rows_RD, columns_CD, scale, bias = factors
        needs_rows, needs_columns, needs_scale, needs_bias = ctx.needs_input_grad[1:]
        grad_rows, grad_columns = torch.zeros_like(rows_RD), torch.zeros_like(columns_CD)
        grad_bias = torch.zeros_like(bias)
        # Backward may be called inside autocast, which would lower these products too.
        with full_precision(rows_RD.device):
            for rows, columns, scores in ctx.tiling.score_tiles(*factors):
                weights = ctx.tiling.reduction.weights_(scores, total_R[rows])
                weights.mul_(grad_R[rows, None])
                if needs_rows or needs_scale:
                    grad_rows[rows].addmm_(weights, columns_CD[columns])
                if needs_columns:
                    grad_columns[columns].addmm_(weights.T, rows_RD[rows])
                if needs_bias:
                    grad_bias += weights.sum()
        # The sum of weight * similarity needs no pass of its own: similarity is row . column.
        grad_scale = (rows_RD * grad_rows).sum() if needs_scale else None
        return (
            None,
            grad_rows.mul_(scale) if needs_rows else None,
            grad_columns.mul_(scale) if needs_columns else None,
            grad_scale,
            grad_bias if needs_bias else None,
        )


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _finite(values: Tensor) -> Tensor:
    """-inf (nothing to reduce) replaced by 0, so that `-inf - value` stays -inf instead of nan."""
    return values.masked_fill(values == -math.inf, 0)
