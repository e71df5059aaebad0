"""The queries and documents of all processes, and which belong together.

# Shapes: B queries, M positives and K hard negatives on this process, D size;
# Q queries, P positives and C documents (positives and hard negatives) of all processes. Where
# embeddings are token vectors, D stands for tokens x size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed.distributed import (
    all_reduce_sum,
    gather_numbers,
    gather_rows,
    process_count,
    process_index,
)
from vembed.errors import ConfigError, DataError
from vembed.losses.comparison import COSINE, Comparison
from vembed.losses.relevance import Relevance
from vembed.losses.tiling import finite, tiled_similarities
from vembed.token_vectors import cat_items, pad_tokens

_NO_ID = -1
"""Stands for a missing content id; content ids are never negative."""


class _Sizes(NamedTuple):
    """Rows of one process, how many numbers it says about them, and the width of its documents."""

    queries: int
    positives: int
    negatives: int
    notes: int
    width: int


@dataclass(frozen=True)
class _Ids:
    """What the rows of all processes are, on the CPU. Equal ids are the same content."""

    query_Q: Tensor
    document_C: Tensor
    positive_P: Tensor
    query_of_positive_P: Tensor


@dataclass(frozen=True)
class GlobalBatch:
    """What a contrastive loss on this process needs to know of all processes.

    Attributes:
        query_BD: This process's queries, as `comparison` takes them.
        positive_MD: This process's positives.
        documents_CD: Positives, then hard negatives, of each process in turn.
        owner_M: The query of each positive, as a row of `query_BD`.
        query_weight: Weight of each query in this process's loss. The mean over processes of the
            weighted sums is the mean over the queries of all processes.
        positive_weight_M: The same for a mean over each query's positives, then over queries.
        comparison: What similarity is.
    """

    query_BD: Tensor
    positive_MD: Tensor
    documents_CD: Tensor
    owner_M: Tensor
    query_weight: float
    positive_weight_M: Tensor
    comparison: Comparison
    _sizes: list[_Sizes]
    _ids: _Ids

    def similarities(self, rows: slice) -> Tensor:
        """Of some of this process's queries and all documents, without gradient: `[n, C]`."""
        return tiled_similarities(self.query_BD[rows], self.documents_CD, self.comparison)

    def own_similarities(self) -> Tensor:
        """`[M]`, of each positive of this process and its query."""
        return self.comparison.paired(self.query_BD[self.owner_M], self.positive_MD)

    def own_positives(self, values_C: Tensor) -> Tensor:
        """`[M]`, of one number per document the numbers of this process's positives."""
        first = sum(size.positives + size.negatives for size in self._sizes[: process_index()])
        return values_C[first : first + len(self.positive_MD)]

    def gather_of_positives(self, values_M: Tensor) -> Tensor:
        """`[C]`, one number per document, from one per positive; hard negatives have +inf.

        Collective: every process must call it.
        """
        own = self._sizes[process_index()]
        values = torch.cat([values_M, values_M.new_full((own.negatives,), math.inf)])
        return gather_rows(values, [size.positives + size.negatives for size in self._sizes])

    def relevant_documents(self) -> Relevance:
        """Over this process's queries x `documents_CD`."""
        first = sum(size.queries for size in self._sizes[: process_index()])
        own_B = self._ids.query_Q[first : first + len(self.query_BD)]
        ids = self._ids
        return Relevance(own_B, ids.document_C, ids.query_of_positive_P, ids.positive_P)

    def relevant_queries(self) -> Relevance:
        """Over this process's positives x the queries of all processes."""
        first = sum(size.positives for size in self._sizes[: process_index()])
        own_M = self._ids.positive_P[first : first + len(self.positive_MD)]
        ids = self._ids
        return Relevance(own_M, ids.query_Q, ids.positive_P, ids.query_of_positive_P)


def gather_batch(
    query: Tensor,
    positive: Tensor | None,
    negative: Tensor | None,
    *,
    counts_positive: Tensor | None,
    ids_query: Tensor | None,
    ids_positive: Tensor | None,
    ids_negative: Tensor | None,
    comparison: Comparison = COSINE,
) -> GlobalBatch:
    """Gather documents and ids. Collective: every process must call it.

    Args:
        query: `[B, D]`, any length, any floating type; or token vectors `[B, T, D]`, as are then
            the documents, with a T of their own.
        positive: `[M, D]`, in the order of their queries.
        negative: `[K, D]`, or None when this process has none; other processes still may.
        counts_positive: `[B]` positives of each query; may be None when each has one.
        ids_query: `[B]` content ids: equal ids are the same query. None: all differ.
        ids_positive: `[M]` content ids of the positives. None: all differ.
        ids_negative: `[K]` content ids of the negatives. None: all differ.
        comparison: What similarity is.

    Raises:
        ConfigError: if there are no positives.
        DataError: if ids or counts of any process do not fit its rows; on every process.
    """
    if positive is None:
        raise ConfigError("this loss needs positives. Received: a batch without them")
    num_queries, num_positives = len(query), len(positive)
    num_negatives = 0 if negative is None else len(negative)
    if counts_positive is None:
        counts_positive = query.new_full(
            (num_queries,), int(num_queries == num_positives), dtype=torch.int64
        )
    notes = torch.cat(
        [
            _ids_or_none(ids_query, num_queries, query.device),
            counts_positive,
            _ids_or_none(ids_positive, num_positives, query.device),
            _ids_or_none(ids_negative, num_negatives, query.device),
        ]
    )
    documents = positive if negative is None else cat_items([positive, negative])
    own = _Sizes(num_queries, num_positives, num_negatives, len(notes), documents.shape[1])
    sizes = [_Sizes(*numbers) for numbers in gather_numbers(own, query.device)]
    # The one wait for the device in a loss: which pairs to mask decides the sizes of what follows.
    ids = _join_ids(gather_rows(notes, [size.notes for size in sizes]).cpu(), sizes)

    query_BD = comparison.prepare_queries(query)
    # Together, so that a process without negatives takes part in the same collectives.
    documents = comparison.prepare_documents(
        pad_tokens(documents, max(size.width for size in sizes))
    )
    owner_M = torch.arange(num_queries, device=query.device).repeat_interleave(
        counts_positive, output_size=num_positives
    )
    weight = process_count() / sum(size.queries for size in sizes)
    return GlobalBatch(
        query_BD=query_BD,
        positive_MD=documents[:num_positives],
        documents_CD=gather_rows(documents, [size.positives + size.negatives for size in sizes]),
        owner_M=owner_M,
        query_weight=weight,
        positive_weight_M=weight / counts_positive[owner_M].to(query_BD.dtype),
        comparison=comparison,
        _sizes=sizes,
        _ids=ids,
    )


def logsumexp_over_processes(values_C: Tensor) -> Tensor:
    """`log(sum(exp(values)))` over processes, element by element.

    As with `gather_rows`, the backward pass sums the gradients of all processes, without a factor
    of their number. Collective, and its backward too: every process's loss must depend on it.

    Args:
        values_C: `[C]`, of the same length on every process; -inf is the empty sum.
    """
    if process_count() == 1:
        return values_C
    total: Tensor = _LogSumExpOverProcesses.apply(values_C)  # type: ignore[no-untyped-call]
    return total


class _LogSumExpOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_C: Tensor) -> Tensor:
        count = process_count()
        gathered = gather_rows(values_C.detach(), [len(values_C)] * count)
        total_C = gathered.view(count, -1).logsumexp(0)
        ctx.save_for_backward(values_C, total_C)
        return total_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> Tensor:
        values_C, total_C = ctx.saved_tensors
        weights_C: Tensor = (values_C - finite(total_C)).exp()
        return weights_C * all_reduce_sum(grad_C)


def _ids_or_none(ids: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.full((count,), _NO_ID, device=device) if ids is None else ids


def _join_ids(notes: Tensor, sizes: list[_Sizes]) -> _Ids:
    """Take apart what all processes said of their rows.

    Args:
        notes: Of each process in turn: ids of its queries, positives per query, ids of its
            positives, ids of its negatives.
        sizes: The rows of each process.
    """
    blocks = torch.split(notes, [size.notes for size in sizes])
    for process, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        _check_notes(block, size, process)
    parts = [
        torch.split(block, [size.queries, size.queries, size.positives + size.negatives])
        for block, size in zip(blocks, sizes, strict=True)
    ]
    queries, counts, documents = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
    query_Q, document_C = _number_missing(queries), _number_missing(documents)
    is_positive_C = torch.cat(
        [torch.arange(size.positives + size.negatives) < size.positives for size in sizes]
    )
    return _Ids(
        query_Q=query_Q,
        document_C=document_C,
        positive_P=document_C[is_positive_C],
        query_of_positive_P=query_Q.repeat_interleave(counts),
    )


def _check_notes(block: Tensor, size: _Sizes, process: int) -> None:
    counts = block[size.queries : 2 * size.queries]
    expected = 2 * size.queries + size.positives + size.negatives
    if size.notes != expected or counts.sum() != size.positives:
        raise DataError(
            "counts_positive must have one entry per query and add up to the positives, and "
            "ids_query, ids_positive and ids_negative must have one entry per row. Received on "
            f"process {process}: {size.queries} queries, {size.positives} positives, "
            f"{size.negatives} negatives; {size.notes - expected:+d} ids and counts, which add up "
            f"to {int(counts.sum())} positives"
        )


def _number_missing(ids: Tensor) -> Tensor:
    """A row without a content id is like no other: it gets a negative number of its own."""
    return torch.where(ids == _NO_ID, -1 - torch.arange(len(ids)), ids)
