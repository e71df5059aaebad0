from __future__ import annotations

import torch
from torch import nn

from vembed.training.first_step.encoding import (
    Forward,
    PeakMemory,
    count_chunks,
    expected_activations,
    split_by_role,
)
from vembed.training.first_step.report import RoleChunks


def forward(rows: int, width: int, *, real: int | None = None, kept: bool = True) -> Forward:
    mask = torch.zeros(rows, width, dtype=torch.int64)
    mask.view(-1)[: rows * width if real is None else real] = 1
    with torch.set_grad_enabled(kept):
        return Forward.of({"input_ids": mask, "attention_mask": mask})


class Exponential(nn.Module):
    """Keeps 8 bytes for each token: what the weight is multiplied with, and the exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids, attention_mask=None):
        torch.rand(1)  # as dropout would
        return (input_ids.float() * self.weight).exp().sum(1, keepdim=True)


def test_chunks_by_hand():
    chunks = [forward(2, 5), forward(3, 4, real=9, kept=False)]
    assert count_chunks(chunks) == RoleChunks(
        rows=5, chunks=2, kept=1, padded_tokens=22, real_tokens=19
    )


def test_rows_without_a_mask_count_one_token_each():
    chunk = Forward.of({"pixel_values": torch.zeros(4, 3, 8, 8)})
    assert (chunk.rows, chunk.padded_tokens, int(chunk.real_tokens)) == (4, 4, 4)


def test_passes_follow_the_roles():
    query, first, second = forward(3, 5), forward(2, 9), forward(1, 2)
    by_role = split_by_role([query, first, second], {"query": 3, "positive": 3})
    assert by_role == {"query": [query], "positive": [first, second]}
    assert list(by_role) == ["query", "positive"]


def test_passes_before_the_batch_are_left_out():
    """A measurement on single items, and a first try that was broken off."""
    whole = [forward(3, 5), forward(3, 9)]
    tried = [forward(1, 5), forward(1, 9), forward(2, 5), *whole]
    assert split_by_role(tried, {"query": 3, "positive": 3}) == {
        "query": whole[:1],
        "positive": whole[1:],
    }


def test_passes_that_mix_roles_are_not_told_apart():
    both = forward(6, 5)
    assert split_by_role([both], {"query": 3, "positive": 3}) == {"all": [both]}
    assert split_by_role([], {"query": 3}) == {}


def test_expected_activations_are_the_kept_ones_and_the_largest_other():
    state = torch.get_rng_state()
    encoder = Exponential()
    assert expected_activations(encoder, {"query": [forward(1, 100)]}) == 8 * 100
    chunks = {
        "query": [forward(2, 10), forward(3, 7, kept=False)],
        "positive": [forward(4, 5, kept=False), forward(2, 6)],
    }
    assert expected_activations(encoder, chunks) == 8 * (2 * 10 + 2 * 6 + 3 * 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_does_not_count_its_peak():
    assert PeakMemory(torch.device("cpu")).read() is None
