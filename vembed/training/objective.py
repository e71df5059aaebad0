"""What is minimised: a function of embeddings, which never sees a model or a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vembed.errors import ConfigError
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
        parts: Named terms, detached scalars, for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective:
    """The criterion on the student's embeddings, mixed with a distillation term where there is one.

    `total = alpha * task + (1 - alpha) * distillation`.
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        distillation_loss_fn: Callable[..., Tensor] | None = None,
        alpha: float = 1.0,
    ) -> None:
        """Assign and check.

        Args:
            criterion: Called as `criterion(query, positive, negative, **extras)` with the extras
                its signature names (see `vembed.losses`).
            distillation_loss_fn: Called as `fn(student, teacher, **extras)` on embeddings by role.
            alpha: Weight of the task loss, in [0, 1].
        """
        self.criterion = criterion
        self.distillation_loss_fn = distillation_loss_fn
        self.alpha = alpha

    def __call__(
        self,
        student: Embeddings,
        extras: Mapping[str, Any],
        teacher: Embeddings | None = None,
    ) -> StepLoss:
        """The loss of these embeddings.

        Args:
            student: Embeddings by role, with gradient.
            extras: What the batch says about its rows: ids, counts, labels, scores.
            teacher: The teacher's embeddings by role; required when there is a distillation term.
        """
        task = self._call(self.criterion, student, extras)
        if self.distillation_loss_fn is None:
            return StepLoss(task, {"task": task.detach()})
        if teacher is None:
            raise ConfigError("distillation_loss_fn is set but no teacher embeddings were given")
        offered = accepted_arguments(_signature_of(self.distillation_loss_fn), extras)
        distillation = self.distillation_loss_fn(student, teacher, **offered)
        total = self.alpha * task + (1 - self.alpha) * distillation
        parts = {"task": task.detach(), "distillation": distillation.detach()}
        return StepLoss(total, parts)

    @staticmethod
    def _call(
        criterion: Callable[..., Tensor], student: Embeddings, extras: Mapping[str, Any]
    ) -> Tensor:
        offered = {
            "positive": student.get("positive"),
            "negative": student.get("negative"),
            **extras,
        }
        loss = criterion(student["query"], **accepted_arguments(_signature_of(criterion), offered))
        # A mean over the rows of a process that has none counts for nothing; torch calls it NaN.
        return loss if len(student["query"]) else loss.nan_to_num()


def _signature_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An `nn.Module`'s own `__call__` takes anything; its `forward` says what it wants."""
    return getattr(function, "forward", function)
