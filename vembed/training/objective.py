"""What is minimised: a function of embeddings, which never sees a model or a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vembed.errors import ConfigError
from vembed.losses.distillation.weighted import Term, WeightedDistillation
from vembed.losses.matryoshka import Matryoshka, whole_embeddings
from vembed.registry import accepted_arguments

Embeddings = dict[str, Tensor]
"""By role: `query` [B, D], `positive` [M, D], `negative` [K, D]; absent roles are left out.

Of models that keep a vector for each token [B, T, D] and so on (see `vembed.token_vectors`).
"""


@dataclass(frozen=True)
class StepLoss:
    """The loss of one micro-batch.

    Attributes:
        total: Scalar to differentiate. Its mean over processes is the loss of the global batch.
        parts: Named terms, detached scalars, for the log; also what the task is made of.
        weights: What terms are multiplied by; those without a weight are parts of the task.
    """

    total: Tensor
    parts: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)


class Objective:
    """The criterion on the student's embeddings, mixed with distillation where there is some.

    `total = alpha * task + (1 - alpha) * distillation`, where distillation is one term or the
    weighted sum of several. Every term is a scalar whose mean over processes is that of the global
    batch, so that their ratio does not depend on the number of processes.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        distillation_loss_fn: Callable[..., Tensor] | None = None,
        alpha: float = 1.0,
    ) -> None:
        """Assign.

        Args:
            criterion: Called as `criterion(query, positive, negative, **extras)` with the extras
                its signature names (see `vembed.losses`).
            distillation_loss_fn: Called as `fn(student, teacher, **extras)` on embeddings by role.
            alpha: Weight of the task loss, in [0, 1].
        """
        self.criterion = criterion
        self.distillation_loss_fn = distillation_loss_fn
        self.alpha = alpha
        self._distillation: WeightedDistillation | None = None
        if isinstance(distillation_loss_fn, WeightedDistillation):
            self._distillation = distillation_loss_fn
        elif distillation_loss_fn is not None:
            self._distillation = WeightedDistillation([Term("distillation", distillation_loss_fn)])

    def __call__(
        self,
        student: Embeddings,
        extras: Mapping[str, Any],
        teacher: Embeddings | None = None,
    ) -> StepLoss:
        """The loss of these embeddings.

        Args:
            student: Embeddings by role, with gradient. A Matryoshka of layers gets those of each
                number of layers; distillation looks at the whole.
            extras: What the batch says about its rows: ids, counts, labels, scores.
            teacher: The teacher's embeddings by role, of all of them or some. A distillation term
                needs them, or the `teacher_scores` of the rows.
        """
        task, by_dim = self._task(student, extras)
        if self._distillation is None:
            return StepLoss(task, {"task": task.detach(), **by_dim}, {"task": 1.0})
        if teacher is None and "teacher_scores" not in extras:
            raise ConfigError(
                "distillation_loss_fn is set, but there are neither teacher embeddings nor "
                "teacher_scores. Give a teacher_model, or rows that say what the teacher said"
            )
        terms = {"task": task}
        whole = whole_embeddings(self.criterion, student)
        for name, value in self._distillation.each(whole, teacher or {}, extras).items():
            # As for the task: a mean over no rows counts for nothing.
            terms[name] = value if len(student["query"]) else value.nan_to_num()
        share = 1 - self.alpha
        weights = {
            "task": self.alpha,
            **{name: share * weight for name, weight in self._distillation.weights.items()},
        }
        total: Tensor = sum(weights[name] * value for name, value in terms.items())  # type: ignore[assignment]
        parts = {name: value.detach() for name, value in terms.items()}
        return StepLoss(total, {**parts, **by_dim}, weights)

    def _task(self, student: Embeddings, extras: Mapping[str, Any]) -> _Task:
        criterion, query = self.criterion, student["query"]
        offered = {
            "positive": student.get("positive"),
            "negative": student.get("negative"),
            **extras,
        }
        by_dim: dict[str, Tensor] = {}
        if isinstance(criterion, Matryoshka):
            losses = criterion.each(query, offered)
            loss = criterion.weighted_sum(losses)
            by_dim = {name: of_dim.detach() for name, of_dim in losses.items()}
        else:
            loss = criterion(query, **accepted_arguments(_signature_of(criterion), offered))
        if len(query):
            return _Task(loss, by_dim)
        # A mean over the rows of a process that has none counts for nothing; torch calls it NaN.
        return _Task(loss.nan_to_num(), {name: part.nan_to_num() for name, part in by_dim.items()})


class _Task(NamedTuple):
    """The criterion's loss; under a Matryoshka also that of each dimension, by name, detached."""

    loss: Tensor
    by_dim: dict[str, Tensor]


def _signature_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An `nn.Module`'s own `__call__` takes anything; its `forward` says what it wants."""
    return getattr(function, "forward", function)
