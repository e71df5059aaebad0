import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed.data import StatelessBatchSampler
from vembed.errors import ConfigError

sizes = {
    "num_rows": st.integers(1, 60),
    "batch_size": st.integers(1, 9),
    "processes": st.integers(1, 5),
    "seed": st.integers(0, 2**32),
    "epoch": st.integers(0, 5),
    "drop_last": st.booleans(),
    "shuffle": st.booleans(),
}


def batches_of(num_rows, batch_size, processes, epoch, start_batch=0, **kwargs):
    """The batches of each process; None when there is not one."""
    try:
        samplers = [
            StatelessBatchSampler(
                num_rows, batch_size, process_index=p, process_count=processes, **kwargs
            )
            for p in range(processes)
        ]
    except ConfigError:
        return None
    for sampler in samplers:
        sampler.set_epoch(epoch, start_batch=start_batch)
        assert len(list(sampler)) == max(0, len(sampler) - start_batch)
    return [list(sampler) for sampler in samplers]


@settings(max_examples=300, deadline=None)
@given(**sizes)
def test_processes_together_see_the_whole_epoch_once(
    num_rows, batch_size, processes, epoch, **kwargs
):
    shares = batches_of(num_rows, batch_size, processes, epoch, **kwargs)
    size = batch_size * processes
    full, rest = divmod(num_rows, size)
    kept = full * size + (0 if kwargs["drop_last"] else rest)
    if shares is None:
        assert kept == 0
        return
    rows = [row for share in shares for batch in share for row in batch]
    assert len(rows) == len(set(rows)) == kept
    assert set(rows) <= set(range(num_rows))
    assert len({len(share) for share in shares}) == 1
    for batch in zip(*shares, strict=True):
        lengths = [len(part) for part in batch]
        assert max(lengths) <= batch_size
        assert max(lengths) - min(lengths) <= 1


@settings(max_examples=300, deadline=None)
@given(**sizes)
def test_processes_together_see_what_one_with_a_larger_batch_sees(
    num_rows, batch_size, processes, epoch, **kwargs
):
    shares = batches_of(num_rows, batch_size, processes, epoch, **kwargs)
    one = batches_of(num_rows, batch_size * processes, 1, epoch, **kwargs)
    if shares is None:
        return
    together = [sum(parts, []) for parts in zip(*shares, strict=True)]
    assert together == one[0]


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 12), **sizes)
def test_beginning_in_the_middle_gives_the_rest_of_the_epoch(
    start, num_rows, batch_size, processes, epoch, **kwargs
):
    whole = batches_of(num_rows, batch_size, processes, epoch, **kwargs)
    if whole is not None:
        rest = batches_of(num_rows, batch_size, processes, epoch, start, **kwargs)
        assert rest == [share[start:] for share in whole]


def order(seed=0, epoch=0, shuffle=True, num_rows=1000):
    sampler = StatelessBatchSampler(num_rows, num_rows, seed=seed, shuffle=shuffle)
    sampler.set_epoch(epoch)
    return next(iter(sampler))


def test_order_hangs_on_seed_and_epoch_only():
    assert order() == order()
    orders = {tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16  # (0, 1) and (1, 0) too
    assert order(shuffle=False) == list(range(1000))


def test_order_is_the_same_everywhere():
    # Written down once: another machine, another numpy must find it.
    assert order(seed=42, epoch=3, num_rows=10) == [3, 4, 5, 0, 1, 6, 2, 7, 8, 9]


def test_every_order_is_equally_likely():
    first = [order(seed, num_rows=4)[0] for seed in range(2000)]
    assert all(420 < first.count(row) < 580 for row in range(4))


def test_set_epoch_forgets_the_start():
    sampler = StatelessBatchSampler(10, 2, seed=0)
    sampler.set_epoch(0, start_batch=3)
    assert len(list(sampler)) == 2
    assert len(sampler) == 5
    sampler.set_epoch(1)
    assert len(list(sampler)) == 5


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (3, {"process_count": 2, "drop_last": True}, "3 rows do not make one batch of 2 for each"),
        (0, {}, "0 rows"),
        (9, {"process_count": 2, "process_index": 2}, "process_index: must be from 0 to 1"),
        (9, {"batch_size": 0}, "batch_size: must be at least 1"),
    ],
)
def test_numbers_that_make_no_batch(rows, arguments, message):
    with pytest.raises(ConfigError, match=message):
        StatelessBatchSampler(rows, **{"batch_size": 2, "seed": 0, **arguments})
