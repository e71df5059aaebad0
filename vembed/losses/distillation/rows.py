"""The rows that teacher and student both have.

A teacher may embed one side only, as a teacher of texts does for a student of texts and images;
then it teaches that side.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vembed.distributed import gather_numbers, gather_rows
from vembed.errors import ConfigError

ROLES = ("query", "positive", "negative")


def check_rows(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the teacher has rows, and as many of each role as the student."""
    rows, taught = (
        {role: len(of_role) for role, of_role in embeddings.items()}
        for embeddings in (student, teacher)
    )
    if not taught or any(rows.get(role) != count for role, count in taught.items()):
        raise ConfigError(
            "this distillation loss needs the teacher's embeddings of the same rows. "
            f"Received: {rows} of the student, {taught} of the teacher"
        )


def documents_of(embeddings: Mapping[str, Tensor]) -> Tensor | None:
    """Positives, then hard negatives, `[M + K, D]`; None without positives."""
    if "positive" not in embeddings:
        return None
    return torch.cat([embeddings[role] for role in ROLES[1:] if role in embeddings])


def gather_all(embeddings: Mapping[str, Tensor]) -> Tensor:
    """The rows of all processes and roles, in the order of one large batch: role by role.

    Collective: every process must call it; negatives may be absent on some.
    """
    some = next(iter(embeddings.values()))
    own = [len(embeddings.get(role, ())) for role in ROLES]
    counts = gather_numbers(own, some.device)
    return torch.cat(
        [
            # No rows of a process that lacks the role, but with a graph: gathering wants one of all
            gather_rows(embeddings.get(role, some[:0]), [of_process[i] for of_process in counts])
            for i, role in enumerate(ROLES)
            if any(of_process[i] for of_process in counts)
        ]
        or [some]
    )
