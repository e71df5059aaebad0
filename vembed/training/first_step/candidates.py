"""What each query of a batch is compared with, and how decided the softmax over it is.

# Shapes: B queries, M positives and K hard negatives of this process; C documents of all processes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vembed.distributed import (
    all_reduce_mean,
    all_reduce_sum,
    gather_counts,
    gather_numbers,
    gather_rows,
    min_over_processes,
    process_index,
)
from vembed.losses.global_batch import GlobalBatch, gather_batch
from vembed.losses.margins import Margins, find_limits
from vembed.losses.relevance import Relevance
from vembed.training.objective import Embeddings

_SAMPLED_QUERIES = 128
"""Queries of each process whose softmax is looked at: enough for a mean, and small."""

_DECIDED = 0.999
_IDS = ("counts_positive", "ids_query", "ids_positive", "ids_negative")


@dataclass(frozen=True)
class Spread:
    """The smallest, the mean and the largest of some numbers."""

    low: float
    mean: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """The spread of at least one value."""
        wide = values.double()
        return cls(float(wide.min()), float(wide.mean()), float(wide.max()))

    def __str__(self) -> str:
        low, mean, high = (f"{value:.4g}" for value in (self.low, self.mean, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Softmax:
    """How a softmax over candidates spreads its weight, as means over queries.

    Attributes:
        evenness: Candidates that share the weight (the exponential of the entropy), as a share of
            all: 1 when it is flat, near 0 when one candidate has all of it.
        decided: Share of the queries that give one candidate more than 0.999.
    """

    evenness: float
    decided: float


@dataclass(frozen=True)
class Candidates:
    """What the queries of all processes are compared with.

    The spreads are over queries. `local + other_processes + hard = negatives`.

    Attributes:
        queries: Number of queries.
        local: Negatives that are positives of other queries on the same process.
        other_processes: Negatives that are positives of queries on other processes.
        hard: Hard negatives, a query's own and those of others.
        masked: Documents that do not count, because they are copies of a relevant one.
        too_similar: Documents that a margin of the loss leaves out; None without margins.
        negatives: All negatives.
        few: Queries with at most one negative.
        own_text: Queries with their own content among their negatives; None without ids.
        chance: The loss of a model that cannot tell documents apart; None for a loss other than
            InfoNCE, or one that ranks both ways with margins.
        softmax: At the temperature of the loss; None for a loss other than InfoNCE, and where no
            query has a negative.
    """

    queries: int
    local: Spread
    other_processes: Spread
    hard: Spread
    masked: Spread
    too_similar: Spread | None
    negatives: Spread
    few: int
    own_text: int | None
    chance: float | None
    softmax: Softmax | None


def look_at_candidates(
    student: Embeddings,
    extras: Mapping[str, Any],
    *,
    softmax_temperature: float | None,
    bidirectional: bool = False,
    margins: Margins | None = None,
) -> Candidates:
    """Count what the contrastive losses of `vembed.losses` compare, by their own rule.

    Collective: every process must call it.

    Args:
        student: Embeddings by role.
        extras: What the batch says about its rows.
        softmax_temperature: The temperature of an InfoNCE loss; None for another loss.
        bidirectional: Whether that loss ranks queries as well.
        margins: Those of the loss.
    """
    ids: dict[str, Any] = {name: extras.get(name) for name in _IDS}
    batch = gather_batch(student["query"], student.get("positive"), student.get("negative"), **ids)
    relevance = batch.relevant_documents()
    limits_B = _limits(batch, margins)
    own_B5 = _count_documents(batch, relevance, student, limits_B)
    chance = softmax = None
    if softmax_temperature is not None:
        softmax = _softmax_of_queries(batch, relevance, softmax_temperature, limits_B)
        if limits_B is None or not bidirectional:
            chance = _chance(batch, own_B5[:, :3].sum(1), bidirectional)
    local, other, hard, masked, similar = gather_rows(own_B5.to(batch.query_BD.device)).cpu().T
    negatives = local + other + hard
    return Candidates(
        queries=len(negatives),
        local=Spread.of(local),
        other_processes=Spread.of(other),
        hard=Spread.of(hard),
        masked=Spread.of(masked),
        too_similar=None if limits_B is None else Spread.of(similar),
        negatives=Spread.of(negatives),
        few=int((negatives <= 1).sum()),
        own_text=_count_own_texts(student, extras),
        chance=chance,
        softmax=softmax,
    )


def _limits(batch: GlobalBatch, margins: Margins | None) -> Tensor | None:
    """The similarity from which on candidates of each query are left out, `[B]`."""
    if margins is None:
        return None
    similarity_M = (batch.query_BD[batch.owner_M] * batch.positive_MD).sum(1)
    limits = find_limits(margins, batch, similarity_M)
    return None if limits is None else limits.row_R


def _count_documents(
    batch: GlobalBatch, relevance: Relevance, student: Embeddings, limits_B: Tensor | None
) -> Tensor:
    """`[B, 5]`: negatives of this process, of others, hard; masked; too similar. Collective."""
    rows = [len(student.get(role, ())) for role in ("positive", "negative")]
    sizes = gather_numbers(rows, batch.query_BD.device)
    hard_C = torch.cat([torch.arange(m + k) >= m for m, k in sizes])
    owner_C = torch.cat([torch.full((m + k,), p) for p, (m, k) in enumerate(sizes)])
    is_here_C = owner_C == process_index()
    groups = (~hard_C & is_here_C, ~hard_C & ~is_here_C, hard_C)
    relevant = [relevance.count(group) for group in groups]
    own_positives_B = torch.bincount(batch.owner_M.cpu(), minlength=len(batch.query_BD))
    similar_B3 = _count_too_similar(batch, relevance, groups, limits_B)
    left_B3 = torch.stack(
        [group.sum() - count for group, count in zip(groups, relevant, strict=True)], dim=1
    )
    masked_B = torch.stack(relevant).sum(0) - own_positives_B
    totals = torch.stack([masked_B, similar_B3.sum(1)], dim=1)
    return torch.cat([left_B3 - similar_B3, totals], dim=1)


def _count_too_similar(
    batch: GlobalBatch,
    relevance: Relevance,
    groups: Sequence[Tensor],
    limits_B: Tensor | None,
) -> Tensor:
    """`[B, 3]`: documents of each group that are not relevant, but beyond a query's limit."""
    counts_B3 = torch.zeros(len(batch.query_BD), len(groups), dtype=torch.int64)
    if limits_B is None:
        return counts_B3
    for start in range(0, len(counts_B3), _SAMPLED_QUERIES):
        rows = slice(start, min(start + _SAMPLED_QUERIES, len(counts_B3)))
        beyond_nC = batch.query_BD[rows] @ batch.documents_CD.T > limits_B[rows, None]
        beyond_nC = beyond_nC.cpu()
        beyond_nC[relevance.pairs(rows)] = False
        counts_B3[rows] = torch.stack([beyond_nC[:, group].sum(1) for group in groups], dim=1)
    return counts_B3


def _chance(batch: GlobalBatch, negatives_B: Tensor, bidirectional: bool) -> float:
    """InfoNCE when all similarities are equal. Collective."""
    device = batch.query_BD.device
    chance = batch.query_weight * torch.log1p(negatives_B.float()).sum()
    if bidirectional:
        queries = sum(gather_counts(len(batch.query_BD), device))
        relevant_M = batch.relevant_queries().count(torch.ones(queries, dtype=torch.bool))
        ranked_M = torch.log1p((queries - relevant_M).float())
        chance = (chance + (ranked_M * batch.positive_weight_M.cpu()).sum()) / 2
    return float(all_reduce_mean(chance.to(device)))


def _softmax_of_queries(
    batch: GlobalBatch, relevance: Relevance, temperature: float, limits_B: Tensor | None
) -> Softmax | None:
    """Of each query's first positive and its negatives. Collective."""
    query_nD = batch.query_BD[:_SAMPLED_QUERIES]
    similarity = query_nD @ batch.documents_CD.T
    logits = similarity / temperature
    if limits_B is not None:
        logits[similarity > limits_B[:_SAMPLED_QUERIES, None]] = -torch.inf
    row, column = relevance.pairs(slice(0, len(query_nD)))
    logits[row.to(logits.device), column.to(logits.device)] = -torch.inf
    numbers = torch.arange(len(query_nD), device=logits.device)
    first_n = torch.searchsorted(batch.owner_M, numbers)
    own = (query_nD * batch.positive_MD[first_n]).sum(1, keepdim=True) / temperature
    return mean_softmax(torch.cat([own, logits], dim=1))


def mean_softmax(logits: Tensor) -> Softmax | None:
    """How decided the softmax of each row is, over the rows of all processes. Collective.

    Args:
        logits: `[n, C]`; `-inf` is no candidate. Rows with a single candidate decide nothing and
            are left out.

    Returns:
        None when no row is left.
    """
    candidates_n = (logits > -torch.inf).sum(1)
    chosen = candidates_n > 1
    log_share = torch.log_softmax(logits[chosen].float(), dim=1)
    share = log_share.exp()
    entropy_n = -(share * log_share).nan_to_num(0.0).sum(1)
    sums = torch.stack(
        [
            (entropy_n.exp() / candidates_n[chosen]).sum(),
            (share > _DECIDED).sum().float(),
            chosen.sum().float(),
        ]
    )
    evenness, decided, rows = all_reduce_sum(sums).tolist()
    return Softmax(evenness / rows, decided / rows) if rows else None


def _count_own_texts(student: Embeddings, extras: Mapping[str, Any]) -> int | None:
    """Queries whose content is that of a document which is not relevant to them. Collective."""
    device = student["query"].device
    known = all(extras.get(f"ids_{role}") is not None for role in student)
    if not min_over_processes(int(known), device):
        return None
    query, positive = extras["ids_query"], extras["ids_positive"]
    documents = [extras[f"ids_{role}"] for role in ("positive", "negative") if role in student]
    counts = extras.get("counts_positive")
    of_positive = query if counts is None else query.repeat_interleave(counts)
    paired_with_itself = gather_rows(positive[of_positive == positive])
    is_negative = torch.isin(query, gather_rows(torch.cat(documents)))
    is_negative &= ~torch.isin(query, paired_with_itself)
    return sum(gather_counts(int(is_negative.sum()), device))
