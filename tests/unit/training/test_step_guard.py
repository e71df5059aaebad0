"""A loss or gradient that is not finite changes no weight, and is told with its rows."""

from __future__ import annotations

import json
import logging
import math
import random

import pytest
import torch

from tests.unit.training.test_trainer import Bag, Criterion, lines, make_batches, make_trainer
from vembed.errors import NonFiniteError
from vembed.training.run import run_training
from vembed.training.step_guard import SpikeWatch
from vembed.training.trainer import StepOutput, Trainer

BAD = 2
"""The batch (from 0) that the poisoned losses below spoil."""


def poisoned(value, *, batch=BAD, times=1):
    """A criterion whose loss is `value` for one batch, by a constant term without a gradient."""

    class Poisoned(Criterion):
        calls = -1

        def forward(self, query, positive):
            self.calls += 1
            loss = super().forward(query, positive)
            return loss + value if batch <= self.calls < batch + times else loss

    return Poisoned()


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.parameters()])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_run_ends_before_the_update(tmp_path, value):
    batches = [{**batch, "row_index": [n, n + 10]} for n, batch in enumerate(make_batches())]
    trainer = make_trainer(tmp_path, batches=batches, criterion=poisoned(value), logging_steps=10)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert caught.value.exit_code == 5
    assert f"step 3: loss and gradients must be finite. Received: loss {value}" in str(caught.value)
    assert f"(task {value})" in str(caught.value)
    assert "Rows: row 2, row 12 (" in str(caught.value)
    expected = make_trainer(tmp_path / "two", max_steps=2)
    expected.train()
    assert torch.equal(weights(trainer), weights(expected))
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["step"], told["processes"][0]["rows"]) == (3, ["row 2", "row 12"])


def test_a_gradient_alone_ends_it_too(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.words.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"step 1: .* loss \d.*, gradient norm (nan|inf)"):
        trainer.train()
    assert torch.equal(trainer.model.words.weight, Bag().words.weight)


def test_one_micro_batch_of_several_is_enough(tmp_path):
    trainer = make_trainer(tmp_path, criterion=poisoned(math.nan), gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.train()


def test_a_skipped_step_is_a_step_without_its_batch(tmp_path):
    batches = make_batches()
    trainer = make_trainer(
        tmp_path, batches=batches, criterion=poisoned(math.nan), on_nonfinite="skip",
        optimizer="adamw",
    )  # fmt: skip
    state = trainer.train()
    others = [batch for n, batch in enumerate(batches) if n != BAD]
    expected = make_trainer(tmp_path / "others", batches=others, optimizer="adamw")
    expected.train()
    assert torch.equal(weights(trainer), weights(expected))
    assert state.skipped_steps == 1
    seen = lines(tmp_path)
    assert ["loss" in line for line in seen] == [True, True, False, True]
    assert [line.get("skipped_steps") for line in seen] == [None, None, 1, 1]


def test_skipping_has_an_end(tmp_path, caplog):
    settings = {"on_nonfinite": "skip", "max_nonfinite_steps": 2}
    with caplog.at_level(logging.WARNING, logger="vembed"):
        make_trainer(tmp_path / "a", criterion=poisoned(math.nan, times=2), **settings).train()
    assert "The step is left out, 2 of at most 2" in caplog.text
    assert "2 of 4 steps changed nothing" in caplog.text
    trainer = make_trainer(
        tmp_path / "b", criterion=poisoned(math.nan, batch=0, times=3), **settings
    )
    with pytest.raises(NonFiniteError, match="3 such steps are more than max_nonfinite_steps: 2"):
        trainer.train()


class Halved(Trainer):
    """Runs as with fp16, which Accelerate does not have on a CPU."""

    def prepare(self):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        super().prepare()
        self.optimizer.scaler = self.accelerator.scaler

    def _step_standard(self, batch):
        rows = [self._embed({"input_ids": batch[f"{r}_input_ids"]}) for r in ("query", "positive")]
        loss = self.criterion(*rows)
        self.accelerator.scaler.scale(loss).backward()
        return StepOutput(loss.detach(), {"task": loss.detach()})

    def clip_gradients(self):
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])


def test_an_overflow_of_fp16_is_no_failure(tmp_path):
    """The scaler leaves the step out and scales less; the window's loss and norm stay finite."""
    trainer = make_trainer(tmp_path, trainer_class=Halved, logging_steps=2)
    factors = [math.inf, 1.0, 1.0, 1.0]

    def scale_up(parameter):
        parameter.grad.mul_(factors.pop(0))

    trainer.model.words.weight.register_post_accumulate_grad_hook(scale_up)
    trainer.train()
    assert not factors
    seen = lines(tmp_path)
    assert len(seen) == 2
    assert all(math.isfinite(value) for line in seen for value in line.values())
    assert trainer.accelerator.scaler.get_scale() == 2.0


def test_an_overflow_that_no_scale_cures_is_a_failure(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=Halved, epochs=3)
    trainer.model.words.weight.register_hook(lambda gradient: gradient * math.inf)
    # Scales 4, 2 and 1 overflow; 0.5 is no longer for want of range.
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer.train()


def test_rows_are_told_by_file_and_line(tmp_path, tiny_st_path, pairs_path, monkeypatch):
    step = Trainer.step

    def spoiled(self, batch):
        output = step(self, batch)
        self.model.get_parameter("backbone.embeddings.word_embeddings.weight").grad[0] = math.nan
        return output

    monkeypatch.setattr(Trainer, "step", spoiled)
    settings = {
        "model_name": str(tiny_st_path), "data_path": str(pairs_path), "batch_size": 2,
        "max_steps": 1, "device": "cpu", "progress": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"Rows: .*pairs.jsonl:\d+, .*pairs.jsonl:\d+ \("):
        run_training(settings)


class TestSpikes:
    def test_a_jump_is_told_once_with_its_step(self, tmp_path, caplog):
        jump = poisoned(100.0, batch=30)
        trainer = make_trainer(tmp_path, epochs=10, criterion=jump, lr=0.0)
        with caplog.at_level(logging.WARNING, logger="vembed"):
            trainer.train()
        told = [message for message in caplog.messages if "jumped" in message]
        assert len(told) == 1
        assert told[0].startswith("step 31: the loss jumped to 10")

    @pytest.mark.parametrize(
        "noise",
        [
            lambda step, draw: 3 * math.exp(-step / 200) + 0.1 * draw.expovariate(1),
            lambda step, draw: 2 + draw.gauss(0, 0.3),
            lambda step, draw: 0.01 * draw.lognormvariate(0, 1) + 2 * math.exp(-step / 50),
            lambda step, draw: 1 - 0.5 * (step % 400 > 200) + draw.gauss(0, 0.1),
        ],
        ids=["falling", "flat", "close to zero with rare hard batches", "a step at each epoch"],
    )
    def test_ordinary_losses_are_none(self, noise):
        draw, watch = random.Random(0), SpikeWatch()
        found = [watch.usual_before(noise(step, draw)) for step in range(5000)]
        assert found == [None] * 5000
        assert watch.usual_before(30.0) is not None
        assert watch.usual_before(30.0) is None
