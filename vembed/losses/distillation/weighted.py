"""Several distillation losses as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vembed.registry import accepted_arguments


@dataclass(frozen=True)
class Term:
    """One distillation loss.

    Attributes:
        name: As it is logged.
        loss: Called as `loss(student, teacher, **extras)`.
        weight: What it is multiplied by.
    """

    name: str
    loss: Any
    weight: float = 1.0


class WeightedDistillation(nn.Module):
    """The weighted sum of distillation losses, and each of them by name."""

    def __init__(self, terms: Sequence[Term]) -> None:
        """Assign; losses that are modules become modules of this one."""
        super().__init__()
        self.terms = tuple(terms)
        self.losses = nn.ModuleList([t.loss for t in terms if isinstance(t.loss, nn.Module)])

    @property
    def required_fields(self) -> frozenset[str]:
        """Row fields without which one of the losses cannot work."""
        found = (getattr(term.loss, "required_fields", ()) for term in self.terms)
        return frozenset().union(*found)

    @property
    def weights(self) -> dict[str, float]:
        """By name."""
        return {term.name: term.weight for term in self.terms}

    def each(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rows: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Every loss by name, without its weight. Collective if one of them is.

        Args:
            student: Embeddings by role.
            teacher: The teacher's embeddings by role; empty where it gave scores only.
            rows: What the batch says about its rows; a loss gets what its signature names.
        """
        return {
            term.name: term.loss(student, teacher, **accepted_arguments(_signature(term), rows))
            for term in self.terms
        }

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], **rows: Any
    ) -> Tensor:
        """The weighted sum; see `each`."""
        values = self.each(student, teacher, rows)
        total: Tensor = sum(term.weight * values[term.name] for term in self.terms)  # type: ignore[assignment]
        return total


def _signature(term: Term) -> Any:
    """An `nn.Module`'s own `__call__` takes anything; its `forward` says what it wants."""
    return getattr(term.loss, "forward", term.loss)
