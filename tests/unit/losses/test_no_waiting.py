"""No loss waits for the device: on one that holds no numbers, any question about them is an error.

The meta device is such a one. What came from the host (`vembed.placing`) is still known there.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.unit.losses.conformance import CASES, EMBEDDINGS, build_double
from vembed.placing import on_host, to_device
from vembed.registry import accepted_arguments

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """There is none on meta."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


def step_on_meta(criterion, batch) -> None:
    """Forward and backward of a loss on embeddings without numbers."""
    if isinstance(criterion, nn.Module):
        criterion = criterion.to(META)
    accepted = accepted_arguments(getattr(criterion, "forward", criterion), batch)
    placed = {key: to_device(value, META) for key, value in accepted.items()}
    for role in EMBEDDINGS:
        if role in placed:
            placed[role] = torch.empty_like(placed[role], requires_grad=True)
    criterion(**placed).backward()


def test_a_question_is_an_error_on_meta():
    placed = to_device(torch.arange(3), META)
    assert torch.equal(on_host(placed), torch.arange(3))
    for ask in (bool, float, int):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask(placed.sum())
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_host(placed + 1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        placed[placed > 1]


@pytest.mark.parametrize("name", CASES)
def test_a_loss_asks_nothing(name):
    case = CASES[name]
    step_on_meta(build_double(case), case.make_batch(0))
