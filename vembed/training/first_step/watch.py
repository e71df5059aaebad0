"""Looks over the shoulder of the first optimizer step; later steps pay nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vembed.losses.distillation.score import ScoreDistillation
from vembed.losses.distillation.weighted import WeightedDistillation
from vembed.losses.matryoshka import whole_embeddings
from vembed.training.first_step.advice import advise
from vembed.training.first_step.build import FirstBatch, build_report
from vembed.training.first_step.encoding import (
    Forward,
    PeakMemory,
    count_chunks,
    expected_activations,
    split_by_role,
)
from vembed.training.first_step.report import FirstStepReport, GradientNorm, Memory
from vembed.training.objective import Embeddings, Objective, StepLoss
from vembed.training.parts import part_of
from vembed.training.sharding import total_norm

if TYPE_CHECKING:
    from vembed.training.trainer import Trainer

logger = logging.getLogger(__name__)


class FirstStepWatch:
    """Sees the first micro-batch, from when it is made until `report` or `tell`.

    It costs the step nothing but references to the embeddings that it computes anyway. The report
    gathers those embeddings once more, and encodes one sequence of each role.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Begin to watch.

        Args:
            trainer: Prepared, before its first step.
        """
        self._trainer = trainer
        self._objective = trainer.objective
        self._encoder = trainer.accelerator.unwrap_model(trainer.model)
        self._batch: FirstBatch | None = None
        self._micro_batches = 0
        self._forwards: list[Forward] = []
        self._peak = PeakMemory(trainer.accelerator.device)
        self._hook = self._encoder.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        trainer.objective = _WatchedObjective(trainer.objective, self._see_batch)

    def tell(self) -> FirstStepReport:
        """Make the report; log it as a table with warnings and write `first_step.json`.

        Call it where `report` may be called. Collective; the main process tells.
        """
        report = self.report()
        if self._trainer.accelerator.is_main_process:
            warnings = [advice.text for advice in advise(report)]
            for label, fact in report.lines():
                logger.info("%-14s %s", label, fact)
            for warning in warnings:
                logger.warning("%-14s %s", "warning", warning)
            report.write(Path(self._trainer.config.output_dir), warnings)
        return report

    def report(self) -> FirstStepReport:
        """End the watch and look at what was seen.

        Call it when the gradients of the step are reduced and not yet clipped. Collective: every
        process must call it.
        """
        trainer, peak_bytes = self._trainer, self._peak.read()
        self._hook.remove()
        trainer.objective = self._objective
        gradients = gradient_norms(trainer)
        if self._batch is None:
            # A step of the user's own, which computes its loss elsewhere.
            return FirstStepReport(gradients=gradients)
        rows = {role: len(embeddings) for role, embeddings in self._batch.student.items()}
        by_role = split_by_role(self._forwards, rows)
        with trainer.whole_weights():
            activations = expected_activations(self._encoder, by_role)
        return build_report(
            self._batch,
            trainer.criterion,
            distillation_temperature=(
                trainer.config.distillation_temperature if self._batch.teacher else None
            ),
            score_temperature=_score_temperature(trainer.distillation_loss_fn),
            micro_batches=self._micro_batches,
            gradients=gradients,
            chunks={role: count_chunks(forwards) for role, forwards in by_role.items()},
            memory=Memory(activations, peak_bytes),
        )

    def _see_inputs(self, _: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        if self._micro_batches == 0 and not args:
            tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            self._forwards.append(Forward.of(tensors))

    def _see_batch(
        self, student: Embeddings, extras: Mapping[str, Any], teacher: Embeddings | None,
        loss: StepLoss,
    ) -> None:  # fmt: skip
        self._micro_batches += 1
        if self._batch is None:
            whole = whole_embeddings(self._trainer.criterion, student)
            detached = {role: embeddings.detach() for role, embeddings in whole.items()}
            loss = StepLoss(loss.total.detach(), loss.parts, loss.weights)
            self._batch = FirstBatch(detached, extras, teacher, loss)


def _score_temperature(distillation: Any) -> float | None:
    """What a teacher's scores are divided by, where a loss uses them."""
    terms = distillation.terms if isinstance(distillation, WeightedDistillation) else ()
    scoring = [term.loss for term in terms if isinstance(term.loss, ScoreDistillation)]
    return scoring[0].teacher_temperature if scoring else None


class _WatchedObjective(Objective):
    """The objective of a trainer, which also shows what it is called with."""

    def __init__(self, objective: Objective, show: Any) -> None:
        super().__init__(objective.criterion, objective.distillation_loss_fn, objective.alpha)
        self._objective = objective
        self._show = show

    def __call__(
        self, student: Embeddings, extras: Mapping[str, Any], teacher: Embeddings | None = None
    ) -> StepLoss:
        loss = self._objective(student, extras, teacher)
        self._show(student, extras, teacher, loss)
        return loss


def gradient_norms(trainer: Trainer) -> dict[str, GradientNorm]:
    """Norms of the gradients of each part of the encoder, and of the losses; one wait in all."""
    encoder = trainer.accelerator.unwrap_model(trainer.model)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append(parameter)
    for name, loss in (("loss", trainer.criterion), ("distillation", trainer.distillation_loss_fn)):
        if isinstance(loss, nn.Module):
            trained = [p for p in loss.parameters() if p.requires_grad]
            groups |= {name: trained} if trained else {}
    # The scaler of fp16 takes its factor off at clipping, which comes later.
    scaler = trainer.accelerator.scaler
    scale = 1.0 if scaler is None else scaler.get_scale()
    norms = [
        total_norm([p.grad for p in group if p.grad is not None]).float()
        for group in groups.values()
    ]
    device = trainer.accelerator.device
    values = torch.stack([norm.to(device) for norm in norms]).tolist()
    return {
        name: GradientNorm(len(group), value / scale)
        for (name, group), value in zip(groups.items(), values, strict=True)
    }
