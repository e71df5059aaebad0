"""Reductions over the rows of a scaled similarity matrix that is never held as a whole.

The matrix is made a tile at a time, reduced, and made again in backward: memory grows with the
number of rows plus columns times the width of a tile, not with their product, and the result is exact
(the running log-sum-exp of Milakov and Gimelshein, 2018; recomputation as in FlashAttention, Dao et
al., 2022).

# Shapes: R rows, C columns, D size; r, c the rows and columns of a tile
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        """Derivatives `[r, c]` of the results with respect to the scores. May overwrite `scores_rc`."""
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
    result: Tensor = _TiledReduction.apply(
        rows_RD, columns_CD, scale, None, _LogSumExp(), masked, tile_size
    )
    return result


def tiled_softplus_sum(
    rows_RD: Tensor,
    columns_CD: Tensor,
    scale: Tensor,
    bias: Tensor,
    masked: Relevance,
    tile_size: TileSize = "auto",
) -> Tensor:
    """`sum_c log(1 + exp(scale * row . column + bias))`; as `tiled_logsumexp`, 0 where all is masked."""
    result: Tensor = _TiledReduction.apply(
        rows_RD, columns_CD, scale, bias, _SoftplusSum(), masked, tile_size
    )
    return result


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
    """Rows and columns of a tile: square, unless there are too few columns for `auto` to fill it."""
    if tile_size != "auto":
        return max(1, min(rows, tile_size)), max(1, min(columns, tile_size))
    numbers = TILE_BYTES // itemsize
    width = max(1, min(columns, math.isqrt(numbers)))
    return max(1, min(rows, numbers // width)), width


class _TiledReduction(torch.autograd.Function):
    """A `Reduction` of the rows of `scale * rows @ columns.T + bias`, recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        columns_CD: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reduction: Reduction,
        masked: Relevance,
        tile_size: TileSize,
    ) -> Tensor:
        total_R = rows_RD.new_full((len(rows_RD),), reduction.empty)
        for rows, _, scores in _score_tiles(rows_RD, columns_CD, scale, bias, masked, tile_size):
            total_R[rows] = reduction.fold(total_R[rows], scores)
        ctx.save_for_backward(rows_RD, columns_CD, scale, bias, total_R)
        ctx.reduction, ctx.masked, ctx.tile_size = reduction, masked, tile_size
        return total_R

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, columns_CD, scale, bias, total_R = ctx.saved_tensors
        needs_rows, needs_columns, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        grad_rows = torch.zeros_like(rows_RD) if needs_rows or needs_scale else None
        grad_columns = torch.zeros_like(columns_CD) if needs_columns else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        # Backward may be called inside autocast, which would lower these products too.
        with full_precision(rows_RD.device):
            for rows, columns, scores in _score_tiles(
                rows_RD, columns_CD, scale, bias, ctx.masked, ctx.tile_size
            ):
                weights = ctx.reduction.weights_(scores, total_R[rows]).mul_(grad_R[rows, None])
                if grad_rows is not None:
                    grad_rows[rows].addmm_(weights, columns_CD[columns])
                if grad_columns is not None:
                    grad_columns[columns].addmm_(weights.T, rows_RD[rows])
                if grad_bias is not None:
                    grad_bias += weights.sum()
        # sum of weight * similarity, without another pass: similarity is row . column.
        grad_scale = (rows_RD * grad_rows).sum() if needs_scale else None
        return (
            grad_rows.mul_(scale) if needs_rows and grad_rows is not None else None,
            None if grad_columns is None else grad_columns.mul_(scale),
            grad_scale,
            grad_bias,
            None,
            None,
            None,
        )


def _score_tiles(
    rows_RD: Tensor,
    columns_CD: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    masked: Relevance,
    tile_size: TileSize,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The rows, the columns and the masked scores of each tile; the next tile overwrites the scores."""
    num_rows, num_columns = len(rows_RD), len(columns_CD)
    height, width = tile_shape(num_rows, num_columns, rows_RD.element_size(), tile_size)
    # One buffer for all tiles: to get fresh pages for each costs the CPU as much as its arithmetic.
    buffer = rows_RD.new_empty(height * width)
    for rows in _slices(num_rows, height):
        masked_rows, masked_columns = masked.pairs(rows)
        scaled_rD = rows_RD[rows] * scale
        for columns in _slices(num_columns, width):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            scores = buffer[: math.prod(shape)].view(shape)
            torch.mm(scaled_rD, columns_CD[columns].T, out=scores)
            if bias is not None:
                scores += bias
            first, last = torch.searchsorted(
                masked_columns, torch.tensor([columns.start, columns.stop])
            ).tolist()
            index = (masked_rows[first:last], masked_columns[first:last] - columns.start)
            scores[tuple(i.to(scores.device, non_blocking=True) for i in index)] = -math.inf
            yield rows, columns, scores


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _finite(values: Tensor) -> Tensor:
    """-inf (nothing to reduce) replaced by 0, so that `-inf - value` stays -inf instead of nan."""
    return values.masked_fill(values == -math.inf, 0)
