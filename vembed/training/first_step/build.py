"""From what the first micro-batch was to the report about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vembed.distributed import all_reduce_mean, gather_counts
from vembed.losses.comparison import COSINE
from vembed.losses.info_nce import InfoNCE
from vembed.losses.matryoshka import Matryoshka, innermost
from vembed.losses.sigmoid import PairwiseSigmoid
from vembed.registry import accepted_arguments
from vembed.training.first_step.candidates import Candidates, look_at_candidates
from vembed.training.first_step.report import (
    BatchSize,
    FirstStepReport,
    GradientNorm,
    Loss,
    Memory,
    RoleChunks,
    Temperature,
)
from vembed.training.first_step.rows import (
    compare_with_scores,
    compare_with_teacher,
    count_copies,
    gather_ids,
    look_at_embeddings,
    look_at_labels,
    look_at_scores,
)
from vembed.training.objective import Embeddings, StepLoss


@dataclass(frozen=True)
class FirstBatch:
    """The first micro-batch of this process, as the objective saw it; without graphs.

    Attributes:
        student: Embeddings by role.
        extras: What the batch says about its rows.
        teacher: The teacher's embeddings by role, or None.
        loss: What the objective returned.
    """

    student: Embeddings
    extras: Mapping[str, Any]
    teacher: Embeddings | None
    loss: StepLoss


@torch.no_grad()
def build_report(
    batch: FirstBatch,
    criterion: Callable[..., Tensor],
    *,
    distillation_temperature: float | None = None,
    score_temperature: float | None = None,
    micro_batches: int = 1,
    gradients: Mapping[str, GradientNorm] | None = None,
    chunks: Mapping[str, RoleChunks] | None = None,
    memory: Memory | None = None,
) -> FirstStepReport:
    """Look at a batch from all sides.

    Collective: every process must call it. The facts about rows are those of the global batch and
    the same on every process.

    Args:
        batch: What the objective saw.
        criterion: The task loss; candidates are counted for those that rank them.
        distillation_temperature: Of the distillation loss, where there is a teacher.
        score_temperature: What a teacher's scores in the rows are divided by, where they are used.
        micro_batches: Of the optimizer step.
        gradients: By group of parameters.
        chunks: By role.
        memory: Of this process.
    """
    student, extras = batch.student, batch.extras
    ids = {role: gather_ids(student, extras, role) for role in ("query", "positive")}
    copies = {role: count_copies(of_role) for role, of_role in ids.items()}
    temperature = find_temperature(criterion)
    loss = innermost(criterion)
    used = accepted_arguments(getattr(loss, "forward", loss), extras)
    teacher = None
    if batch.teacher and distillation_temperature is not None:
        teacher = compare_with_teacher(student, batch.teacher, distillation_temperature)
    elif score_temperature is not None and "teacher_scores" in extras:
        teacher = compare_with_scores(student, extras, score_temperature)
    return FirstStepReport(
        batch=BatchSize(
            tuple(gather_counts(len(student["query"]), student["query"].device)), micro_batches
        ),
        loss=_mean_loss(batch.loss, _name_of(criterion)),
        temperature=temperature,
        distillation_temperature=distillation_temperature,
        candidates=_look_at_candidates(batch, criterion, temperature),
        copies={role: found for role, found in copies.items() if found is not None},
        embeddings=look_at_embeddings(student, ids, extras.get("counts_positive"))
        if student["query"].dim() == 2
        else None,
        labels=look_at_labels(extras["labels"]) if "labels" in used else None,
        scores=look_at_scores(extras["scores"]) if "scores" in used else None,
        teacher=teacher,
        gradients=dict(gradients or {}),
        chunks=dict(chunks or {}),
        memory=memory,
    )


def find_temperature(criterion: Callable[..., Tensor]) -> Temperature | None:
    """The temperature of a loss that has one; it is learned as `logit_scale = ln(1 / it)`."""
    loss = innermost(criterion)
    scale = getattr(loss, "logit_scale", None)
    if isinstance(scale, Tensor):
        return Temperature(float(torch.exp(-scale.detach())), scale.requires_grad)
    value = getattr(loss, "temperature", None)
    return Temperature(float(value), learned=False) if isinstance(value, int | float) else None


def _name_of(criterion: Callable[..., Tensor]) -> str:
    if not isinstance(criterion, Matryoshka):
        return type(criterion).__name__
    name = type(criterion.criterion).__name__
    return f"Matryoshka of {name} (weights add up to {criterion.total_weight:g})"


def _mean_loss(loss: StepLoss, name: str) -> Loss:
    """Over processes. Collective."""
    values = all_reduce_mean(torch.stack([loss.total, *loss.parts.values()]).float()).tolist()
    parts = dict(zip(loss.parts, values[1:], strict=True))
    return Loss(name, values[0], parts, dict(loss.weights))


def _look_at_candidates(
    batch: FirstBatch, criterion: Callable[..., Tensor], temperature: Temperature | None
) -> Candidates | None:
    """For the losses of which it is known that they rank candidates. Collective."""
    if isinstance(criterion, Matryoshka):
        found = _look_at_candidates(batch, criterion.criterion, temperature)
        if found is None or found.chance is None:
            return found
        return replace(found, chance=found.chance * criterion.total_weight)
    if not isinstance(criterion, InfoNCE | PairwiseSigmoid) or criterion.guided:
        return None
    softmax = isinstance(criterion, InfoNCE) and temperature is not None
    if isinstance(criterion, InfoNCE) and criterion.compares_more:
        return None
    return look_at_candidates(
        batch.student,
        batch.extras,
        softmax_temperature=temperature.value if softmax and temperature else None,
        bidirectional=isinstance(criterion, InfoNCE) and criterion.bidirectional,
        margins=criterion.margins,
        comparison=criterion.comparison if isinstance(criterion, InfoNCE) else COSINE,
    )
