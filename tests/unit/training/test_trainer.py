from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vembed.errors import ConfigError
from vembed.training.evaluator import Evaluator
from vembed.training.optimizer_builder import build_optimizer, build_scheduler
from vembed.training.trainer import Trainer
from vembed.training.training_loop import StepPlan


class Bag(nn.Module):
    """Token ids to the mean of their vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.EmbeddingBag(30, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.words(input_ids)

    def save_pretrained(self, path):
        torch.save(self.state_dict(), path / "bag.pt")


class Criterion(nn.Module):
    """Cross entropy over in-batch positives, with a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, query, positive):
        return nn.functional.cross_entropy(
            query @ positive.T * self.logit_scale.exp(), torch.arange(len(query))
        )


def make_batches(count: int = 4, rows: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "query_input_ids": torch.randint(0, 30, (rows, 2), generator=generator),
            "positive_input_ids": torch.randint(0, 30, (rows, 2), generator=generator),
        }
        for _ in range(count)
    ]


def make_trainer(
    tmp_path, *, batches=None, trainer_class=Trainer, criterion=None, model=None, **settings
):
    config = {
        "output_dir": str(tmp_path),
        "epochs": 1,
        "lr": 0.1,
        "optimizer": "sgd",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "progress": False,
        **settings,
    }
    model, criterion = model or Bag(), criterion or Criterion()
    return trainer_class(
        model,
        build_optimizer(model, config, criterion),
        make_batches() if batches is None else batches,
        criterion,
        Accelerator(cpu=True),
        config,
    )


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_plain_sgd_on_the_mean_loss(tmp_path):
    trainer = make_trainer(tmp_path, batches=make_batches(1), max_grad_norm=0)
    expected, criterion = Bag(), Criterion()
    batch = make_batches(1)[0]
    loss = criterion(expected(batch["query_input_ids"]), expected(batch["positive_input_ids"]))
    loss.backward()
    trainer.train()
    updated = expected.words.weight - 0.1 * expected.words.weight.grad
    assert torch.allclose(trainer.model.words.weight, updated, atol=1e-7)
    assert lines(tmp_path)[0]["loss"] == pytest.approx(float(loss))
    scale = criterion.logit_scale - 0.1 * criterion.logit_scale.grad
    assert torch.allclose(trainer.criterion.logit_scale, scale)


def test_accelerate_is_asked_for_the_encoder_once_not_for_every_chunk(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.prepare()
    asked = []
    unwrap = trainer.accelerator.unwrap_model
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda m: asked.append(m) or unwrap(m))
    for batch in make_batches():
        trainer.step(batch)
        trainer.reduce_gradients()
    assert len(asked) <= 1
    trainer.model = other = Bag()
    assert trainer.encoder is other


def test_accumulation_is_the_mean_over_micro_batches_uneven_last_group_included(tmp_path):
    # 3 batches in groups of 2: the last group has one micro-batch and its gradient is not halved.
    batches = make_batches(3)
    trainer = make_trainer(
        tmp_path, batches=batches, gradient_accumulation_steps=2, max_grad_norm=0
    )
    assert StepPlan.of(trainer) == StepPlan(per_epoch=2, total=2)
    expected, criterion = Bag(), Criterion()
    for group in (batches[:2], batches[2:]):
        expected.zero_grad()
        criterion.zero_grad()
        for batch in group:
            query, positive = (expected(batch[f"{r}_input_ids"]) for r in ("query", "positive"))
            (criterion(query, positive) / len(group)).backward()
        for parameter in (*expected.parameters(), *criterion.parameters()):
            parameter.data -= 0.1 * parameter.grad
    trainer.train()
    assert torch.allclose(trainer.model.words.weight, expected.words.weight, atol=1e-7)


def test_clipping_limits_the_norm_and_reports_the_one_before(tmp_path):
    trainer = make_trainer(tmp_path, batches=make_batches(1), max_grad_norm=1e-3)
    before = trainer.model.words.weight.detach().clone()
    trainer.train()
    moved = (trainer.model.words.weight - before).norm() / 0.1
    assert float(moved) <= 1.01e-3
    assert lines(tmp_path)[0]["grad_norm"] > 1e-2


@pytest.mark.parametrize(
    ("settings", "steps"), [({}, 4), ({"epochs": 3}, 12), ({"max_steps": 6}, 6)]
)
def test_number_of_steps(tmp_path, settings, steps):
    state = make_trainer(tmp_path, **settings).train()
    assert state.step == steps
    assert lines(tmp_path)[-1]["step"] == steps


def test_logging_steps_average_the_window_and_the_last_step_is_always_logged(tmp_path):
    every = make_trainer(tmp_path / "a").train().history
    windows = make_trainer(tmp_path / "b", logging_steps=3).train().history
    assert [line["step"] for line in windows] == [3, 4]
    assert windows[0]["loss"] == pytest.approx(sum(line["loss"] for line in every[:3]) / 3)
    assert windows[0]["temperature"] == pytest.approx(every[2]["temperature"])


def test_the_schedule_advances_once_per_optimizer_step(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.scheduler, _ = build_scheduler(
        trainer.optimizer, {"scheduler_type": "linear", "warmup_ratio": 0.0}, 1, 2
    )
    history = trainer.train().history
    assert [line["lr"] for line in history] == pytest.approx([0.05, 0.0])


def test_checkpoints_are_written_and_rotated(tmp_path):
    make_trainer(tmp_path, epochs=2, save_steps=2, save_total_limit=2).train()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000008",
    ]
    assert (tmp_path / "final" / "bag.pt").exists()


def test_best_is_kept_by_validation_loss(tmp_path):
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.val_dataloader = make_batches(2)
    trainer.evaluator = Evaluator(
        trainer.model, trainer.criterion, trainer.accelerator, retrieval_mode="t2t"
    )
    state = trainer.train()
    losses = {line["step"]: line["val_loss"] for line in state.history if "val_loss" in line}
    assert sorted(losses) == [0, 4, 8]
    assert state.best_value == min(losses.values())
    assert losses[state.best_step] == state.best_value
    assert (tmp_path / "best").exists()


def test_a_metric_that_is_not_measured_is_an_error_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, metric_for_best="ndcg@7")
    trainer.val_dataloader = make_batches(1)
    trainer.evaluator = Evaluator(
        trainer.model, trainer.criterion, trainer.accelerator, retrieval_mode="t2t"
    )
    with pytest.raises(ConfigError, match="'ndcg@7' is not measured here; measured: loss"):
        trainer.train()


def test_the_validation_loss_counts_every_query_once(tmp_path):
    """Batches of 3 and 1: the mean over four queries, not over two batches."""
    trainer = make_trainer(tmp_path)
    evaluator = Evaluator(
        trainer.model, lambda query: query.square().sum(1).mean(), trainer.accelerator, "t2t"
    )
    batches = [*make_batches(1, rows=3), *make_batches(1, rows=1)]
    rows = torch.cat([trainer.model(batch["query_input_ids"]) for batch in batches])
    assert evaluator.evaluate(batches) == pytest.approx(float(rows.square().sum(1).mean()))
    assert trainer.model.training


def test_parts_that_do_not_fit_are_refused(tmp_path):
    config = {"output_dir": str(tmp_path), "lr": 0.1}
    model, criterion = Bag(), Criterion()
    optimizer = build_optimizer(model, config)
    with pytest.raises(ConfigError, match="1 trainable parameters of the criterion"):
        Trainer(model, optimizer, [], criterion, Accelerator(cpu=True), config)
    whole = build_optimizer(model, config, criterion)
    with pytest.raises(ConfigError, match="only teacher_model"):
        Trainer(model, whole, [], criterion, Accelerator(cpu=True), config, teacher_model=Bag())

    class Own(Trainer):
        def _step_standard(self, batch):
            return super()._step_standard(batch)

    with pytest.raises(ConfigError, match="Own overrides _step_standard"):
        make_trainer(tmp_path, trainer_class=Own, use_gradient_cache=True)


def test_an_accelerator_that_accumulates_by_itself_is_refused(tmp_path):
    model, criterion = Bag(), Criterion()
    config = {"output_dir": str(tmp_path)}
    optimizer = build_optimizer(model, config, criterion)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=2"):
        Trainer(model, optimizer, [], criterion, accelerator, config)


def test_a_step_that_returns_something_else_is_named(tmp_path):
    class Own(Trainer):
        def _step_standard(self, batch):
            return 1.0

    with pytest.raises(TypeError, match="must return a StepOutput"):
        make_trainer(tmp_path, trainer_class=Own).train()


def test_a_parameter_without_gradient_is_named_unless_allowed(tmp_path):
    class WithSpare(Bag):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(2))

    def build(**settings):
        config = {
            "output_dir": str(tmp_path),
            "lr": 0.1,
            "epochs": 1,
            "progress": False,
            **settings,
        }
        model, criterion = WithSpare(), Criterion()
        optimizer = build_optimizer(model, config, criterion)
        return Trainer(model, optimizer, make_batches(1), criterion, Accelerator(cpu=True), config)

    with pytest.raises(
        ConfigError, match=r"1 trainable parameters got no gradient in a step: spare"
    ):
        build().train()
    build(ddp_find_unused_parameters=True).train()
