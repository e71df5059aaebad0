"""Chunk sizes that are found by trying, on several processes."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_on_processes
from tests.numerics.test_gradient_cache import ToyEncoder, cached_with_limit


def back_off(limits: list[int]) -> tuple[list[float], int, int]:
    """This process has memory for so many tokens; gradient, tokens per chunk, attempts."""
    from vembed.distributed import process_index

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    encoder = ToyEncoder()
    attempts: list[int] = []
    encoder.tokens.register_forward_pre_hook(lambda _, args: attempts.append(args[0].numel()))
    grads, tokens = cached_with_limit(encoder, tokens=limits[process_index()], chunk_tokens=80)
    return torch.cat([g.flatten() for g in grads]).tolist(), tokens, max(attempts)


def test_all_processes_back_off_when_one_runs_out_of_memory():
    roomy, tight = run_on_processes(back_off, 2, [10**9, 20])
    assert roomy[1] == tight[1] <= 20
    assert roomy[2] > 20 >= tight[2]  # the first one did not run out by itself
    (alone,) = run_on_processes(back_off, 1, [10**9])
    assert alone[1] == 80
    for found in (roomy, tight):
        assert found[0] == pytest.approx(alone[0], abs=1e-12)


def test_an_item_that_fits_on_one_process_only_ends_all():
    for limits in ([10**9, 3], [3, 10**9]):
        said = run_on_processes(say_error, 2, limits, timeout=60)
        assert ["memory runs out on a single item" in text for text in said] == [True, True]


def say_error(limits: list[int]) -> str:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        back_off(limits)
    return str(caught.value)
