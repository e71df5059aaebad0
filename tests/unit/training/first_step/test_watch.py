from __future__ import annotations

import json
import logging

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vembed.losses.distillation.similarity import SimilarityKL
from vembed.losses.info_nce import InfoNCE
from vembed.training.first_step import FirstStepWatch
from vembed.training.first_step.report import GradientNorm
from vembed.training.first_step.watch import gradient_norms
from vembed.training.optimizer_builder import build_optimizer
from vembed.training.trainer import StepOutput, Trainer
from vembed.training.training_loop import optimizer_step


class Bag(nn.Module):
    """Token ids to the mean of their vectors, projected; dropout makes every forward different."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Embedding(30, 8)
        self.dropout = nn.Dropout(0.2)
        self.projections = nn.ModuleList([nn.Linear(8, 6)])

    def forward(self, input_ids, attention_mask):
        hidden = self.dropout(self.backbone(input_ids)) * attention_mask.unsqueeze(-1)
        return self.projections[0](hidden.sum(1) / attention_mask.sum(1, keepdim=True))

    def save_pretrained(self, path):
        torch.save(self.state_dict(), path / "bag.pt")


def make_batches(count: int = 2, rows: int = 9) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        batch = {"counts_positive": torch.ones(rows, dtype=torch.int64)}
        for number, (role, width) in enumerate((("query", 2), ("positive", 4))):
            ids = torch.randint(1, 30, (rows, width), generator=generator)
            mask = torch.ones_like(ids)
            mask[1, -1] = 0
            batch[f"{role}_input_ids"], batch[f"{role}_attention_mask"] = ids, mask
            batch[f"ids_{role}"] = torch.arange(rows) + 100 * number
        batches.append(batch)
    return batches


def make_trainer(folder, *, trainer_class=Trainer, distils=False, batches=None, **settings):
    config = {"output_dir": str(folder), "epochs": 1, "lr": 0.1, "progress": False, **settings}
    model, criterion = Bag(), InfoNCE(0.2, learn_temperature=True)
    return trainer_class(
        model,
        build_optimizer(model, config, criterion),
        make_batches() if batches is None else batches,
        criterion,
        Accelerator(cpu=True),
        config,
        teacher_model=Bag() if distils else None,
        distillation_loss_fn=SimilarityKL(0.1) if distils else None,
    )


def watched_step(trainer, batches):
    """The report on one optimizer step; also the gradients that it was made from."""
    trainer.prepare()
    watch, reports, gradients = FirstStepWatch(trainer), [], {}

    def look():
        reports.append(watch.report())
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    optimizer_step(trainer, batches, look)
    return reports[0], gradients


def test_a_run_leaves_the_table_the_warnings_and_the_file(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="vembed"):
        make_trainer(tmp_path, batches=make_batches(3, rows=2)).train()
    shown = [m for m in caplog.messages if m.startswith("negatives ")]
    expected = "1 per query: 1 of its process, 0 of other processes, 0 hard; masked as relevant: 0"
    assert shown == [f"negatives      {expected}"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[0].startswith("warning        2 of 2 queries have one negative or none")
    written = json.loads((tmp_path / "first_step.json").read_text())
    assert [f"warning        {text}" for text in written["warnings"]] == warnings
    assert written["candidates"]["negatives"] == {"low": 1, "mean": 1, "high": 1}
    assert written["batch"] == {"by_process": [2], "micro_batches": 1}


@pytest.mark.parametrize("settings", [{}, {"use_gradient_cache": True, "distils": True}])
def test_watching_changes_no_weight(tmp_path, monkeypatch, settings):
    weights = []
    for name in ("watched", "alone"):
        if name == "alone":
            monkeypatch.setattr("vembed.training.training_loop.FirstStepWatch", NoWatch)
        trainer = make_trainer(tmp_path / name, **settings)
        torch.manual_seed(5)
        trainer.train()
        weights.append([p.detach() for p in trainer.parameters()])
    assert (tmp_path / "watched" / "first_step.json").exists()
    assert not (tmp_path / "alone" / "first_step.json").exists()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class NoWatch:
    def __init__(self, trainer) -> None:
        self.tell = None


def test_the_watch_ends_with_the_report(tmp_path):
    trainer = make_trainer(tmp_path)
    objective = trainer.objective
    watched_step(trainer, make_batches(1))
    assert trainer.objective is objective
    assert not trainer.model._forward_pre_hooks


def test_gradient_norms_by_hand(tmp_path):
    report, gradients = watched_step(make_trainer(tmp_path), make_batches(2))
    weight, bias = (gradients[f"projections.0.{name}"] for name in ("weight", "bias"))
    assert report.gradients["projections"].norm == pytest.approx(
        float((weight.square().sum() + bias.square().sum()).sqrt()), rel=1e-6
    )
    assert report.gradients["backbone"] == GradientNorm(
        1, pytest.approx(float(gradients["backbone.weight"].norm()), rel=1e-6)
    )
    assert report.gradients["loss"].norm > 0
    assert list(report.gradients) == ["backbone", "projections", "loss"]


def test_a_frozen_group_is_not_expected_to_train(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.projections.requires_grad_(False)
    trainer.prepare()
    watch = FirstStepWatch(trainer)
    trainer.step(make_batches(1)[0])
    trainer.reduce_gradients()
    assert list(watch.report().gradients) == ["backbone", "loss"]


def test_the_first_of_several_micro_batches_is_described(tmp_path):
    batches = [make_batches(1, rows=5)[0], make_batches(1, rows=3)[0]]
    report, _ = watched_step(make_trainer(tmp_path), batches)
    assert (report.batch.by_process, report.batch.micro_batches) == ((5,), 2)
    assert report.candidates.queries == 5
    assert report.chunks["query"].rows == 5


@pytest.mark.parametrize(
    ("settings", "chunks", "kept"),
    [
        ({}, [1, 1], [1, 1]),
        ({"chunk_tokens": 8}, [3, 5], [3, 5]),
        ({"use_gradient_cache": True, "gradient_cache_chunk_size": 4}, [3, 3], [0, 0]),
        (
            {
                "use_gradient_cache": True,
                "gradient_cache_chunk_size": 4,
                "gradient_cache_keep": 4,
            },
            [3, 3],
            [3, 1],
        ),
    ],
)
def test_chunks_are_those_of_the_step(tmp_path, settings, chunks, kept):
    report, _ = watched_step(make_trainer(tmp_path, **settings), make_batches(2))
    found = [report.chunks[role] for role in ("query", "positive")]
    assert [of_role.chunks for of_role in found] == chunks
    assert [of_role.kept for of_role in found] == kept
    assert [of_role.real_tokens for of_role in found] == [17, 35]
    assert report.memory.activation_bytes > 0
    assert report.memory.peak_bytes is None


def test_distillation_is_described(tmp_path):
    report, _ = watched_step(make_trainer(tmp_path, distils=True), make_batches(1))
    assert set(report.loss.parts) == {"task", "distillation"}
    assert report.teacher.spearman > 0.2
    assert report.distillation_temperature == 0.05  # as the settings have it
    assert "teacher" in dict(report.lines())


class OwnStep(Trainer):
    def _step_standard(self, batch):
        rows = self._embed({k.removeprefix("query_"): v for k, v in batch.items() if "query_" in k})
        loss = rows.square().sum() + self.criterion.logit_scale
        self.accelerator.backward(loss)
        return StepOutput(loss.detach(), {})


def test_of_a_step_of_ones_own_the_gradients_are_known(tmp_path, caplog):
    trainer = make_trainer(tmp_path, trainer_class=OwnStep)
    with caplog.at_level(logging.INFO, logger="vembed"):
        trainer.train()
    written = json.loads((tmp_path / "first_step.json").read_text())
    assert written["loss"] is None
    assert written["gradients"]["loss"] == {"parameters": 1, "norm": 1.0}


def test_the_factor_of_loss_scaling_is_not_in_the_norms(tmp_path):
    norms = []
    for scale in (None, 8.0):
        trainer = make_trainer(tmp_path)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(5)
        trainer.step(make_batches(1)[0])
        norms.append({name: g.norm for name, g in gradient_norms(trainer).items()})
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
