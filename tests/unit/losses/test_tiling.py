"""How a similarity matrix is cut, and which of its pairs are masked."""

from __future__ import annotations

import pytest
import torch

from vembed.losses.relevance import Relevance
from vembed.losses.tiling import (
    CPU_TILE_BYTES,
    TILE_BYTES,
    Limits,
    tile_shape,
    tiled_logsumexp,
    tiled_logsumexp_both,
    tiled_softplus_sum,
)


@pytest.mark.parametrize(
    ("rows", "columns", "tile_size", "device", "shape"),
    [
        (10, 20, 4, "cpu", (4, 4)),
        (3, 2, 4, "cpu", (3, 2)),
        (0, 5, 4, "cpu", (1, 4)),
        (100, 100, "auto", "cpu", (100, 100)),
        (10**6, 10**6, "auto", "cpu", (1448, 1448)),  # 8 MB of float32
        (10**6, 10**6, "auto", "cuda", (2896, 2896)),  # 32 MB
        (10**6, 1000, "auto", "cuda", (8388, 1000)),  # few columns leave room for more rows
    ],
)
def test_tile_shape(rows, columns, tile_size, device, shape):
    assert tile_shape(rows, columns, 4, tile_size, torch.device(device)) == shape
    assert shape[0] * shape[1] * 4 <= (CPU_TILE_BYTES if device == "cpu" else TILE_BYTES)


def _pairs(relevance, rows, start, stop):
    row, column = relevance.pairs(slice(start, stop))
    assert (column.diff() >= 0).all()
    return {(start + r, c) for r, c in zip(row.tolist(), column.tolist(), strict=True)}


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_of_the_relation(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns, related_rows = (
        torch.randint(-3, 4, (size,), generator=generator) for size in (7, 9, 6)
    )
    related_columns = columns[torch.randint(0, 9, (6,), generator=generator)]
    relevance = Relevance(rows, columns, related_rows, related_columns)
    related = set(zip(related_rows.tolist(), related_columns.tolist(), strict=True))
    for start, stop in ((0, 7), (2, 5), (6, 7)):
        assert _pairs(relevance, rows, start, stop) == {
            (r, c)
            for r in range(start, stop)
            for c in range(9)
            if (int(rows[r]), int(columns[c])) in related
        }


def test_a_relation_of_all_with_all_names_each_pair_once():
    same = torch.zeros(4, dtype=torch.int64)
    row, column = Relevance(same, same, same, same).pairs(slice(0, 4))
    assert len(row) == 16
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == 16


def test_each_row_and_itself():
    row, column = Relevance.identity(first=2, rows=3, columns=6).pairs(slice(1, 3))
    assert (row.tolist(), column.tolist()) == ([0, 1], [3, 4])


@pytest.mark.parametrize("tile_size", [1, 3, "auto"])
def test_reductions_are_dense_ones(tile_size):
    rows, columns = torch.randn(5, 3), torch.randn(7, 3)
    scale, bias = torch.tensor(2.0), torch.tensor(-1.0)
    own = Relevance.identity(first=1, rows=5, columns=7)
    scores = scale * rows @ columns.T
    scores[torch.arange(5), torch.arange(1, 6)] = -torch.inf
    torch.testing.assert_close(
        tiled_logsumexp(rows, columns, scale=scale, masked=own, tile_size=tile_size),
        scores.logsumexp(1),
    )
    torch.testing.assert_close(
        tiled_softplus_sum(rows, columns, scale=scale, bias=bias, masked=own, tile_size=tile_size),
        torch.nn.functional.softplus(scores + bias).sum(1),
    )
    both = tiled_logsumexp_both(rows, columns, scale=scale, masked=own, tile_size=tile_size)
    torch.testing.assert_close(both.rows_R, scores.logsumexp(1))
    torch.testing.assert_close(both.columns_C, scores.logsumexp(0))


@pytest.mark.parametrize("tile_size", [1, 3, "auto"])
def test_each_side_has_limits_of_its_own(tile_size):
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randn(n, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (5, 7)
    )
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    own = Relevance.identity(first=1, rows=5, columns=7)
    limits = Limits(torch.linspace(-0.5, 1, 5).double(), torch.linspace(1, -0.5, 7).double())

    def reduce(*factors):
        rows, columns, scale = factors
        found = tiled_logsumexp_both(
            rows, columns, scale=scale, masked=own, limits=limits, tile_size=tile_size
        )
        return found.rows_R.exp(), found.columns_C.exp()  # a sum of nothing is 0, not -inf

    similarity = rows @ columns.T
    relevant = torch.zeros(5, 7, dtype=torch.bool)
    relevant[torch.arange(5), torch.arange(1, 6)] = True
    for side, limit, dim in zip(
        reduce(rows, columns, scale), (limits.row_R[:, None], limits.column_C), (1, 0), strict=True
    ):
        left_out = relevant | (similarity > limit)
        assert left_out.sum() > relevant.sum()
        dense = (scale * similarity).exp().masked_fill(left_out, 0).sum(dim)
        torch.testing.assert_close(side, dense, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(reduce, (rows, columns, scale))


def test_a_row_without_unmasked_columns():
    rows = torch.ones(1, 2, requires_grad=True)
    scale = torch.tensor(1.0)
    itself = Relevance.identity(first=0, rows=1, columns=1)
    empty = tiled_logsumexp(rows, rows, scale=scale, masked=itself)
    assert empty.tolist() == [-torch.inf]
    (grad,) = torch.autograd.grad(empty.sum(), rows)
    assert grad.tolist() == [[0, 0]]
    nothing = tiled_softplus_sum(rows, rows, scale=scale, bias=scale, masked=itself)
    assert nothing.tolist() == [0]
