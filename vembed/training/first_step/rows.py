"""What the rows of a batch are like: copies, embeddings, labels, scores, and what a teacher thinks.

# Shapes: B queries, M positives of this process; D size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vembed.distributed import (
    all_reduce_sum,
    gather_counts,
    gather_rows,
    min_over_processes,
    process_index,
)
from vembed.evaluation.correlation import spearman
from vembed.losses.distillation.rows import documents_of
from vembed.losses.distillation.score import Candidates
from vembed.losses.similarity import unit_rows
from vembed.training.first_step.candidates import Softmax, Spread, mean_softmax
from vembed.training.objective import Embeddings

_SAMPLED_QUERIES = 128
_SAMPLED_DOCUMENTS = 1024


@dataclass(frozen=True)
class Copies:
    """Rows of one role that hold the same content, over all processes.

    Attributes:
        rows: All rows.
        different: Different contents among them.
        with_copy: Rows whose content another row has too.
    """

    rows: int
    different: int
    with_copy: int


@dataclass(frozen=True)
class Geometry:
    """Embeddings as the encoder gives them. Similarities are cosines, means over all processes.

    Attributes:
        norms: Lengths, by role.
        own_pairs: Similarity of a query and its positive; None without positives.
        random_pairs: Similarity of two rows with different contents, by role; None for a role with
            fewer than two.
    """

    norms: dict[str, Spread]
    own_pairs: float | None
    random_pairs: dict[str, float | None]


@dataclass(frozen=True)
class Labels:
    """Labels of the items of all processes.

    Attributes:
        items: Number of items.
        labels: Number of different labels.
        partners: Other items of the same label, over items.
        alone: Items without any.
    """

    items: int
    labels: int
    partners: Spread
    alone: int


@dataclass(frozen=True)
class Scores:
    """Scores of the pairs of all processes.

    Attributes:
        pairs: Number of pairs.
        different: Number of different scores.
        spread: Of the scores.
    """

    pairs: int
    different: int
    spread: Spread


@dataclass(frozen=True)
class Agreement:
    """Teacher and student on the same queries and documents, each process's own; means.

    Attributes:
        spearman: Rank correlation of a query's similarities to the documents.
        same_best: Share of the queries for which both put the same document first.
        teacher_deviation: Standard deviation of a query's similarities, by the teacher.
        temperature: What the teacher's similarities are divided by.
        softmax: Of the teacher's similarities at that temperature.
    """

    spearman: float
    same_best: float
    teacher_deviation: float
    temperature: float
    softmax: Softmax


def gather_ids(student: Embeddings, extras: Mapping[str, Any], role: str) -> Tensor | None:
    """Content ids of a role, of all processes, on the CPU. Collective.

    None unless every process has them.
    """
    device = student["query"].device
    rows = len(student.get(role, ()))
    ids = extras.get(f"ids_{role}")
    if not min_over_processes(int(rows == 0 or ids is not None), device):
        return None
    own = torch.empty(0, dtype=torch.int64, device=device) if ids is None else ids
    return gather_rows(own).cpu()


def count_copies(ids: Tensor | None) -> Copies | None:
    """Copies among the rows with these content ids; None without ids or rows."""
    if ids is None or len(ids) == 0:
        return None
    _, counts = torch.unique(ids, return_counts=True)
    return Copies(len(ids), len(counts), int(counts[counts > 1].sum()))


def look_at_embeddings(
    student: Embeddings, ids: Mapping[str, Tensor | None], counts_positive: Tensor | None
) -> Geometry:
    """Measure the embeddings of queries and positives. Collective: every process must call it.

    Args:
        student: Embeddings by role.
        ids: Content ids by role, of all processes; None where they are not known.
        counts_positive: `[B]` positives of each query; None when each has one.
    """
    roles = [role for role in ("query", "positive") if role in student]
    unit = {role: unit_rows(student[role]) for role in roles}
    norms: dict[str, Spread] = {}
    random_pairs: dict[str, float | None] = {}
    for role in roles:
        norms[role] = Spread.of(gather_rows(student[role].float().norm(dim=1)))
        random_pairs[role] = _random_pairs(unit[role], ids[role])
    own_pairs = None
    if "positive" in unit:
        query_MD = unit["query"]
        if counts_positive is not None:
            query_MD = query_MD.repeat_interleave(counts_positive, dim=0)
        cosine_M = (query_MD * unit["positive"]).sum(1)
        total, rows = _totals(cosine_M.sum(), len(cosine_M))
        own_pairs = total / rows
    return Geometry(norms, own_pairs, random_pairs)


def _random_pairs(unit_BD: Tensor, ids: Tensor | None) -> float | None:
    """Mean cosine over all pairs of rows, the first of each content only. Collective."""
    if ids is not None:
        counts = gather_counts(len(unit_BD), unit_BD.device)
        start = sum(counts[: process_index()])
        _, first = np.unique(ids.numpy(), return_index=True)
        own = torch.from_numpy(first[(first >= start) & (first < start + len(unit_BD))] - start)
        unit_BD = unit_BD[own.to(unit_BD.device)]
    # The squared length of the sum is the sum over all pairs, of which n are of a row with itself.
    summed, squares = all_reduce_sum(unit_BD.sum(0)), unit_BD.square().sum()
    itself, rows = _totals(squares, len(unit_BD))
    pairs = rows * (rows - 1)
    return (float(summed.square().sum()) - itself) / pairs if pairs else None


def _totals(value: Tensor, rows: int) -> tuple[float, int]:
    """The sums of a number and of rows over processes. Collective."""
    total, num_rows = all_reduce_sum(torch.stack([value, value.new_tensor(rows)])).tolist()
    return total, int(num_rows)


def look_at_labels(labels: Tensor) -> Labels:
    """Count the partners of each item. Collective: every process must call it."""
    everyone = gather_rows(labels).cpu()
    _, which, counts = torch.unique(everyone, return_inverse=True, return_counts=True)
    partners = counts[which] - 1
    return Labels(len(everyone), len(counts), Spread.of(partners), int((partners == 0).sum()))


def look_at_scores(scores: Tensor) -> Scores:
    """The spread of the scores. Collective: every process must call it."""
    everyone = gather_rows(scores).cpu()
    return Scores(len(everyone), len(torch.unique(everyone)), Spread.of(everyone))


def compare_with_teacher(
    student: Embeddings, teacher: Embeddings, temperature: float
) -> Agreement | None:
    """Whether both rank alike. Collective: every process must call it.

    Each process compares some of its queries with some of its documents; of a teacher that embeds
    one side only, rows of that side with each other.

    Returns:
        None when no process has two documents.
    """
    taught = {role: student[role] for role in teacher}
    return _compare(_similarities(taught), _similarities(teacher), temperature)


def compare_with_scores(
    student: Embeddings, extras: Mapping[str, Any], temperature: float
) -> Agreement | None:
    """The same for a teacher that scored each query's own positives and negatives. Collective.

    Args:
        student: Embeddings by role.
        extras: `teacher_scores` and the counts of positives and negatives.
        temperature: What the scores are divided by.

    Returns:
        None when no query has two candidates.
    """
    candidates = Candidates(student, extras.get("counts_positive"), extras.get("counts_negative"))
    own, taught = candidates.scores(student), candidates.fit(extras["teacher_scores"])
    off = ~candidates.real_BC
    own, taught = (scores.float().masked_fill(off, -torch.inf) for scores in (own, taught))
    return _compare(own, taught, temperature)


def _compare(own_nC: Tensor, taught_nC: Tensor, temperature: float) -> Agreement | None:
    """Rows of similarities; -inf is no candidate, of both. Collective."""
    sums = own_nC.new_zeros(4)
    for own_C, taught_C in zip(own_nC, taught_nC, strict=True):
        own, taught = own_C[own_C > -torch.inf], taught_C[taught_C > -torch.inf]
        if len(own) < 2:
            continue
        columns = torch.stack([own, taught], dim=-1).cpu().double().numpy()
        sums += torch.stack(
            [
                own.new_tensor(float(spearman(columns))),
                (own.argmax() == taught.argmax()).to(own.dtype),
                taught.std(),
                own.new_ones(()),
            ]
        )
    ranks, best, deviation, counted = all_reduce_sum(sums).tolist()
    softmax = mean_softmax(taught_nC / temperature)
    if softmax is None:
        return None
    return Agreement(ranks / counted, best / counted, deviation / counted, temperature, softmax)


def _similarities(embeddings: Embeddings) -> Tensor:
    """Some rows with some documents, `[n, C]`; -inf for a row with itself."""
    documents = documents_of(embeddings)
    if documents is not None and "query" in embeddings:
        query = unit_rows(embeddings["query"][:_SAMPLED_QUERIES]).float()
        return query @ unit_rows(documents[:_SAMPLED_DOCUMENTS]).float().T
    alone = embeddings["query"] if documents is None else documents
    rows = unit_rows(alone[:_SAMPLED_DOCUMENTS]).float()
    similarities = rows[:_SAMPLED_QUERIES] @ rows.T
    return similarities.fill_diagonal_(-torch.inf)
