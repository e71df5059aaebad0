"""vembed.distributed without a process group, and pure parts of it."""

from __future__ import annotations

import torch
from torch import nn

from vembed import distributed
from vembed.distributed import (
    all_reduce_mean,
    all_reduce_sum,
    gather_counts,
    gather_numbers,
    gather_rows,
    is_distributed,
    process_count,
    process_index,
    reduce_gradients,
)


def test_one_process_is_the_whole_group():
    assert not is_distributed()
    assert (process_count(), process_index()) == (1, 0)
    assert gather_counts(3, torch.device("cpu")) == [3]
    assert gather_numbers([3, 0], torch.device("cpu")) == [[3, 0]]


def test_one_process_gathers_its_own_rows_with_their_graph():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows


def test_reductions_of_one_process_leave_values_and_drop_the_graph():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    for reduced in (all_reduce_mean(value), all_reduce_sum(value)):
        assert reduced.tolist() == [1.0, 2.0]
        assert not reduced.requires_grad


def test_one_process_reduces_no_gradients():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    assert reduce_gradients([parameter]) == 0
    assert parameter.grad.tolist() == [3.0, 3.0]


def test_buckets_are_full_and_of_one_dtype(monkeypatch):
    monkeypatch.setattr(distributed, "_BUCKET_BYTES", 32)
    parameters = [
        nn.Parameter(torch.ones(size, dtype=dtype))
        for size, dtype in [
            (4, torch.float32),
            (4, torch.float32),  # fills the first bucket to the byte
            (4, torch.float64),  # another dtype
            (100, torch.float64),  # larger than a bucket
            (1, torch.float64),
        ]
    ]
    sizes = [[p.numel() for p in bucket] for bucket in distributed._buckets(parameters)]
    assert sizes == [[4, 4], [4], [100], [1]]
