"""What losses have learned: written once, found beside a model or among its adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vembed.errors import CheckpointError
from vembed.training.loss_files import (
    ADAPTER_FOLDER,
    LOSSES_FILE,
    load_losses,
    loss_state,
    save_losses,
)


def linear(size: int = 2) -> nn.Linear:
    return nn.Linear(size, size)


@pytest.mark.parametrize("place", [".", ADAPTER_FOLDER])
def test_both_losses_come_back(tmp_path, place):
    criterion, distillation = linear(), linear()
    save_losses(tmp_path / place, loss_state(criterion, distillation))
    others = linear(), linear()
    load_losses(tmp_path, *others)
    assert torch.equal(others[0].weight, criterion.weight)
    assert torch.equal(others[1].weight, distillation.weight)


def test_what_has_learned_nothing_has_no_file(tmp_path):
    save_losses(tmp_path, loss_state("a function", nn.Module()))
    assert not list(tmp_path.iterdir())
    load_losses(tmp_path, "a function", nn.Module())


def test_the_state_is_a_copy():
    criterion = linear()
    state = loss_state(criterion)
    before = state["loss.weight"].clone()
    with torch.no_grad():
        criterion.weight += 1
    assert torch.equal(state["loss.weight"], before)


def test_a_missing_part_is_an_error_unless_it_may_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"parameters of Linear\. There is no such file"):
        load_losses(tmp_path, linear())
    save_losses(tmp_path, loss_state(linear()))
    with pytest.raises(CheckpointError, match="parameters of Linear. There are none"):
        load_losses(tmp_path, None, linear())
    distillation = linear()
    before = distillation.weight.detach().clone()
    load_losses(tmp_path, None, distillation, missing_ok=True)
    assert torch.equal(distillation.weight, before)


@pytest.mark.parametrize("missing_ok", [True, False])
def test_another_loss_is_refused(tmp_path, missing_ok):
    save_losses(tmp_path, loss_state(linear(3)))
    with pytest.raises(CheckpointError, match=r"(?s)does not fit Linear.*on the same labels"):
        load_losses(tmp_path, linear(2), missing_ok=missing_ok)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / LOSSES_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"losses\.safetensors cannot be read"):
        load_losses(tmp_path, linear())
