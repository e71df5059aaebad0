"""vembed.distributed on several gloo processes; the truth is computed from the process number."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.launch import ChildFailed, run_on_processes
from vembed import distributed
from vembed.distributed import (
    all_reduce_mean,
    all_reduce_sum,
    any_process,
    gather_counts,
    gather_messages,
    gather_numbers,
    gather_rows,
    min_over_processes,
    process_count,
    process_index,
    reduce_gradients,
)

CPU = torch.device("cpu")


def _own_rows(count: int) -> torch.Tensor:
    """Rows [process, row number], so that every row says where it comes from."""
    number = torch.arange(count, dtype=torch.float64)
    return torch.stack([torch.full_like(number, process_index()), number], dim=1)


def _gather_uneven(counts: list[int]):
    own = counts[process_index()]
    rows = _own_rows(own)
    ids = rows.long().sum(1)
    return (
        gather_counts(own, CPU),
        gather_numbers([own, -process_index()], CPU),
        gather_rows(rows).tolist(),
        gather_rows(rows, counts).tolist(),
        gather_rows(ids).tolist(),
    )


@pytest.mark.parametrize("counts", [[2, 2], [3, 1], [0, 2], [1, 0, 3], [0, 0]])
def test_uneven_rows_arrive_whole_and_in_order_on_every_process(counts):
    expected = [[float(p), float(i)] for p, count in enumerate(counts) for i in range(count)]
    for of_counts, numbers, rows, rows_again, ids in run_on_processes(
        _gather_uneven, len(counts), counts
    ):
        assert of_counts == counts
        assert numbers == [[count, -p] for p, count in enumerate(counts)]
        assert rows == rows_again == expected
        assert ids == [p + i for p, i in expected]


def _gradient_of_gathered(counts: list[int]):
    rows = _own_rows(counts[process_index()]).requires_grad_()
    gathered = gather_rows(rows)
    # Process p weighs gathered row i by (p + 1) * (i + 1).
    weights = (process_index() + 1.0) * torch.arange(1.0, len(gathered) + 1, dtype=torch.float64)
    (gathered.sum(1) * weights).sum().backward()
    return rows.grad[:, 0].tolist()


@pytest.mark.parametrize("counts", [[2, 2], [3, 1], [0, 2]])
def test_backward_sums_over_processes_without_a_factor(counts):
    grads = sum(run_on_processes(_gradient_of_gathered, 2, counts), [])
    summed = [(1 + 2) * (i + 1.0) for i in range(sum(counts))]
    assert grads == summed
    assert grads != [2 * g for g in summed]  # a factor of the number of processes
    assert grads != [g / 2 for g in summed]


def _keeps_graph_only_with_gradient():
    plain = gather_rows(torch.ones(1, 1))
    with torch.no_grad():
        without = gather_rows(torch.ones(1, 1, requires_grad=True))
    return plain.requires_grad, without.requires_grad


def test_no_graph_where_none_is_wanted():
    assert run_on_processes(_keeps_graph_only_with_gradient, 2) == [(False, False)] * 2


def _gather_messages(rounds):
    counted = []
    gather = distributed._all_gather
    distributed._all_gather = lambda *a, **k: (counted.append(1), gather(*a, **k))[1]
    found = []
    for lengths in rounds:
        counted.clear()
        own = torch.arange(lengths[process_index()]) + 10 * process_index()
        messages = [message.tolist() for message in gather_messages(own)]
        found.append((messages, len(counted)))
    return found


def test_messages_take_one_collective_unless_they_are_longer_than_ever():
    rounds = [(2, 1), (2, 2), (0, 1), (1, 4), (4, 0)]
    for found in run_on_processes(_gather_messages, 2, rounds):
        for (messages, _), (first, second) in zip(found, rounds, strict=True):
            assert messages == [list(range(first)), list(range(10, 10 + second))]
        assert [count for _, count in found] == [2, 1, 1, 2, 1]


def _reduce_values():
    value = torch.tensor(float(process_index() + 1), requires_grad=True)
    mean, total = all_reduce_mean(value), all_reduce_sum(value)
    return mean.item(), total.item(), mean.requires_grad, value.item(), process_count()


def test_value_reductions():
    assert run_on_processes(_reduce_values, 2) == [
        (1.5, 3.0, False, 1.0, 2),
        (1.5, 3.0, False, 2.0, 2),
    ]


def _reduce_gradients():
    reduced = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *a, **k: (reduced.append(tensor), all_reduce(tensor, *a, **k))[
        1
    ]
    this = process_index()
    both, first_only, nowhere, wide = (nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
    both.grad = torch.full((2,), 1.0 + this)
    wide.grad = torch.full((3,), 10.0 + this, dtype=torch.float64)
    if this == 0:
        first_only.grad = torch.full((2,), 4.0)
    calls = reduce_gradients([both, first_only, frozen, nowhere, wide])
    on_gradients = [t for t in reduced if t.is_floating_point()]
    return (
        calls,
        len(on_gradients),
        [None if p.grad is None else p.grad.tolist() for p in (both, first_only, nowhere, wide)],
        frozen.grad,
    )


def test_gradients_are_averaged_in_one_call_per_dtype():
    for calls, counted, grads, frozen in run_on_processes(_reduce_gradients, 2):
        assert calls == counted == 2  # float32 together, float64
        # The one that only process 0 used counts as zero on process 1.
        assert grads == [[1.5, 1.5], [2.0, 2.0], None, [10.5, 10.5, 10.5]]
        assert frozen is None


def _two_layers(rows: torch.Tensor, whole: bool):
    """Gradient of a squared loss of a linear layer over the batch, each process its half."""
    layer = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3))
        layer.bias.zero_()
    own = rows if whole else rows.chunk(process_count())[process_index()]
    layer(own).square().mean().backward()
    if not whole:
        reduce_gradients(layer.parameters())
    return layer.weight.grad, layer.bias.grad


def test_averaged_gradients_are_those_of_the_whole_batch():
    rows = torch.randn(4, 3, dtype=torch.float64)
    expected = _two_layers(rows, True)
    for grads in run_on_processes(_two_layers, 2, rows, False):
        for grad, truth in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, truth, rtol=0, atol=1e-12)


# --- the launcher itself


def _raise_on_second():
    if process_index() == 1:
        raise KeyError("the second one")
    dist.barrier()


def test_a_failure_comes_back_with_its_traceback():
    with pytest.raises(
        ChildFailed, match=r"process 1 failed(?s:.*)_raise_on_second(?s:.*)KeyError"
    ):
        run_on_processes(_raise_on_second, 2)


def _hang():
    time.sleep(600)


def test_a_hanging_process_is_killed_in_time():
    start = time.monotonic()
    with pytest.raises(ChildFailed, match=r"\[0, 1\] did not finish within 2"):
        run_on_processes(_hang, 2, timeout=2)
    assert time.monotonic() - start < 30


def _die():
    import os

    os._exit(3)


def test_a_dead_process_is_noticed():
    with pytest.raises(ChildFailed, match="died"):
        run_on_processes(_die, 2)


def _backward_and_autocast():
    weight = torch.randn(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()
    return bool(weight.grad.isfinite().all())


def test_a_parent_that_already_computed_can_start_processes():
    assert _backward_and_autocast()
    assert run_on_processes(_backward_and_autocast, 2) == [True, True]


def _accelerator_sees():
    from accelerate import Accelerator

    accelerator = Accelerator()
    return accelerator.num_processes, accelerator.process_index, accelerator.device.type


def test_an_accelerator_works_in_the_processes():
    assert _accelerator_sees()[:2] == (1, 0)  # what a forked process must not inherit
    assert run_on_processes(_accelerator_sees, 2) == [(2, 0, "cpu"), (2, 1, "cpu")]


def _numbers_without_a_host_group():
    """What of a default group that, as NCCL's, reaches an accelerator's memory only."""
    made = []
    new_group = dist.new_group

    def spy(*args, **kwargs):
        made.append(kwargs["backend"])
        return new_group(*args, **kwargs)

    dist.get_backend_config, dist.new_group = lambda: "cuda:nccl", spy
    original, groups = distributed._all_gather, []

    def gather(gathered, own, group):
        groups.append(group is not None)
        return original(gathered, own, group=group)

    distributed._all_gather = gather
    accelerator = torch.device("cuda")
    found = (
        gather_counts(process_index(), accelerator),
        any_process(process_index() == 1, accelerator),
        min_over_processes(5 - process_index(), accelerator),
        gather_rows(torch.arange(process_index() + 1)).tolist(),
    )
    return found, made, all(groups)


def test_numbers_do_not_go_by_way_of_the_accelerator():
    for found, made, all_by_host in run_on_processes(_numbers_without_a_host_group, 2):
        assert found == ([0, 1], True, 4, [0, 0, 1])
        assert made == ["gloo"], "one group, made once"
        assert all_by_host
