"""Micro-batches as the objective sees them, for the tests of the first-step report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vembed.training.first_step.build import FirstBatch, build_report
from vembed.training.first_step.report import FirstStepReport
from vembed.training.objective import Objective

A, B, D, E, X = 10, 11, 13, 14, 20

# Four queries. Two share the positive a; b and a are also hard negatives; the last has two
# positives. The text of query 1 is x, a hard negative of query 0.
IDS_QUERY = [1, X, 3, 4]
POSITIVES = [[A], [B], [A], [D, E]]
NEGATIVES = [[X, B], [], [], [A]]


def vector(content: int) -> Tensor:
    """A vector for each content, equal for equal contents."""
    generator = torch.Generator().manual_seed(content)
    return torch.randn(6, generator=generator, dtype=torch.float64)


def hand_made(queries: list[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Embeddings and facts of some of the four queries."""
    ids = {
        "query": [IDS_QUERY[q] for q in queries],
        "positive": [p for q in queries for p in POSITIVES[q]],
        "negative": [n for q in queries for n in NEGATIVES[q]],
    }
    present = {role: of_role for role, of_role in ids.items() if of_role}
    student = {role: torch.stack([vector(i) for i in i_s]) for role, i_s in present.items()}
    extras: dict[str, Any] = {f"ids_{role}": torch.tensor(i_s) for role, i_s in present.items()}
    extras["counts_positive"] = torch.tensor([len(POSITIVES[q]) for q in queries])
    extras["labels"] = torch.tensor([q % 3 for q in queries])
    extras["scores"] = torch.tensor([q / 4 for q in queries])
    return student, extras


def healthy(rows: int = 16, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pairs that belong together more than by chance, and not perfectly; no copies."""
    generator = torch.Generator().manual_seed(seed)
    query, noise = torch.randn(2, rows, 32, generator=generator)
    extras = {
        "ids_query": torch.arange(rows),
        "ids_positive": 1000 + torch.arange(rows),
        "counts_positive": torch.ones(rows, dtype=torch.int64),
        "labels": torch.arange(rows) % 4,
        "scores": torch.linspace(0, 1, rows),
    }
    return {"query": query, "positive": query + 2 * noise}, extras


def report_on(student, extras, criterion, *, distillation=None, teacher=None, **facts):
    """The report on a batch, with the loss that the criterion gives it."""
    loss = Objective(criterion, distillation, 0.5)(student, extras, teacher)
    temperature = None if distillation is None else distillation.temperature
    report: FirstStepReport = build_report(
        FirstBatch(student, extras, teacher, loss),
        criterion,
        distillation_temperature=temperature,
        **facts,
    )
    return report
