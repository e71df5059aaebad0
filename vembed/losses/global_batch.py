"""The queries and documents of all processes, and which belong together.

# Shapes: B queries, M positives and K hard negatives on this process, D size, G size of a guide;
# Q queries, P positives and C documents (positives and hard negatives) of all processes. Where
# embeddings are token vectors, D stands for tokens x size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed.distributed import (
    all_reduce_sum,
    gather_messages,
    gather_rows,
    process_count,
    process_index,
)
from vembed.errors import ConfigError, DataError
from vembed.losses.comparison import COSINE, Comparison
from vembed.losses.own_triplets import counts_or_equal
from vembed.losses.relevance import Relevance, link_components
from vembed.losses.similarity import unit_rows
from vembed.losses.tiling import Judge, finite, tiled_similarities
from vembed.placing import on_host, to_device
from vembed.token_vectors import cat_items, pad_tokens

_NO_ID = -1
"""Stands for a missing content id; content ids are never negative."""


class _Sizes(NamedTuple):
    """Rows of one process, and the width of its documents."""

    queries: int
    positives: int
    negatives: int
    width: int


@dataclass(frozen=True)
class _Ids:
    """What the rows of all processes are, on the CPU. Equal ids are the same content."""

    query_Q: Tensor
    document_C: Tensor
    positive_P: Tensor
    query_of_positive_P: Tensor
    is_positive_C: Tensor

    def without_negatives(self) -> _Ids:
        """The same, where hard negatives are no documents of all."""
        all_positive = torch.ones_like(self.positive_P, dtype=torch.bool)
        return replace(self, document_C=self.positive_P, is_positive_C=all_positive)

    def pairs(self, query: Tensor, document: Tensor) -> Tensor:
        """`[n]` bool: whether each query and document of a list are paired by any row."""
        known = torch.stack([self.query_of_positive_P, self.positive_P])
        asked = torch.stack([query, document])
        _, number = torch.unique(torch.cat([known, asked], 1), dim=1, return_inverse=True)
        return torch.isin(number[known.shape[1] :], number[: known.shape[1]])


@dataclass(frozen=True)
class GuideRows:
    """What a guide model makes of the items of this process, and of the documents of all.

    Attributes:
        query_BG: Of the queries, of length one.
        positive_MG: Of the positives.
        negative_KG: Of the hard negatives.
        documents_CG: As `GlobalBatch.documents_CD`.
    """

    query_BG: Tensor
    positive_MG: Tensor
    negative_KG: Tensor
    documents_CG: Tensor


@dataclass(frozen=True)
class OwnNegatives:
    """The hard negatives of this process's queries.

    Attributes:
        owner_K: The query of each, as a row of `GlobalBatch.query_BD`.
        is_relevant_K: Whether it is relevant to its query all the same, by another row.
    """

    owner_K: Tensor
    is_relevant_K: Tensor


@dataclass(frozen=True)
class GlobalBatch:
    """What a contrastive loss on this process needs to know of all processes.

    Attributes:
        query_BD: This process's queries, as `comparison` takes them.
        positive_MD: This process's positives.
        negative_KD: This process's hard negatives.
        documents_CD: Positives, then hard negatives where they are shared, of each process in turn.
        owner_M: The query of each positive, as a row of `query_BD`.
        query_weight: Weight of each query in this process's loss. The mean over processes of the
            weighted sums is the mean over the queries of all processes.
        positive_weight_M: The same for a mean over each query's positives, then over queries.
        comparison: What similarity is.
        guide: The same rows by a guide model; None without one.
    """

    query_BD: Tensor
    positive_MD: Tensor
    negative_KD: Tensor
    documents_CD: Tensor
    owner_M: Tensor
    query_weight: float
    positive_weight_M: Tensor
    comparison: Comparison
    guide: GuideRows | None
    _one_each: bool
    _sizes: list[_Sizes]
    _ids: _Ids
    _negative_ids_K: Tensor

    @property
    def judge(self) -> Judge | None:
        """The guide's rows of this process's queries and of `documents_CD`."""
        return None if self.guide is None else Judge(self.guide.query_BG, self.guide.documents_CG)

    def similarities(self, rows: slice) -> Tensor:
        """Of some of this process's queries and all documents, without gradient: `[n, C]`."""
        return tiled_similarities(self.query_BD[rows], self.documents_CD, self.comparison)

    def own_similarities(self) -> Tensor:
        """`[M]`, of each positive of this process and its query."""
        query_MD = self.query_BD if self._one_each else self.query_BD[self.owner_M]
        return self.comparison.paired(query_MD, self.positive_MD)

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

    def gather_queries(self, rows_BD: Tensor) -> Tensor:
        """`[Q, D]`, of one row for each query. Collective: every process must call it."""
        return gather_rows(rows_BD, [size.queries for size in self._sizes])

    def only_positives(self, rows_CD: Tensor) -> Tensor:
        """`[P, D]`, of one row for each of `documents_CD`."""
        if self._ids.is_positive_C.all():
            return rows_CD
        rows_P = to_device(self._ids.is_positive_C.nonzero().squeeze(1), rows_CD.device)
        return rows_CD.index_select(0, rows_P)

    def linked_queries(self) -> Relevance:
        """Over this process's queries x those of all: pairs that must not be told apart.

        Queries are linked when a chain of relevant pairs leads from one to the other: they share a
        document, or the same content as one that does.
        """
        first = sum(size.queries for size in self._sizes[: process_index()])
        component_Q = self._components()[0]
        return Relevance.classes(component_Q[first : first + len(self.query_BD)], component_Q)

    def linked_positives(self) -> Relevance:
        """Over this process's positives x those of all, as `linked_queries`."""
        first = sum(size.positives for size in self._sizes[: process_index()])
        component_P = self._components()[1]
        return Relevance.classes(component_P[first : first + len(self.positive_MD)], component_P)

    def _components(self) -> tuple[Tensor, Tensor]:
        """Of each query and of each positive of all processes, the number of its component."""
        ids = self._ids
        component_P = link_components(ids.query_of_positive_P, ids.positive_P)
        # A query without positives is linked to its copies only.
        owners, number_P = torch.unique(ids.query_of_positive_P, return_inverse=True)
        of_owner = torch.empty_like(owners).scatter_(0, number_P, component_P)
        places = torch.searchsorted(owners, ids.query_Q).clamp(max=max(0, len(owners) - 1))
        alone_Q = -1 - torch.unique(ids.query_Q, return_inverse=True)[1]
        if not len(owners):
            return alone_Q, component_P
        has_owner = owners[places] == ids.query_Q
        return torch.where(has_owner, of_owner[places], alone_Q), component_P

    def own_negatives(self, counts_negative: Tensor | None) -> OwnNegatives:
        """Whose the hard negatives of this process are. Collective: every process must call it.

        Args:
            counts_negative: `[B]` hard negatives of each query; None when all have equally many.

        Raises:
            DataError: if the counts of any process do not add up; on every process.
        """
        queries, negatives = len(self.query_BD), len(self.negative_KD)
        device = self.query_BD.device
        counts_negative = counts_or_equal(
            counts_negative, rows=negatives, queries=queries, like=self.query_BD
        )
        owner_K = torch.arange(queries).repeat_interleave(
            on_host(counts_negative), output_size=negatives
        )
        first = sum(size.queries for size in self._sizes[: process_index()])
        owner_ids = self._ids.query_Q[first : first + queries][owner_K]
        relevant = self._ids.pairs(owner_ids, self._negative_ids_K)
        return OwnNegatives(to_device(owner_K, device), to_device(relevant, device))

    def relevant_queries(self) -> Relevance:
        """Over this process's positives x the queries of all processes."""
        first = sum(size.positives for size in self._sizes[: process_index()])
        own_M = self._ids.positive_P[first : first + len(self.positive_MD)]
        ids = self._ids
        return Relevance(own_M, ids.query_Q, ids.positive_P, ids.query_of_positive_P)


class Guide(NamedTuple):
    """A guide model's embeddings of the rows of this process, of any length and type."""

    query: Tensor
    positive: Tensor
    negative: Tensor | None


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
    guide: Guide | None = None,
    share_negatives: bool = True,
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
        guide: The same rows by a guide model, on every process or on none.
        share_negatives: Whether hard negatives are among the documents of all queries.

    Raises:
        ConfigError: if there are no positives.
        DataError: if ids or counts of any process do not fit its rows; on every process.
    """
    if positive is None:
        raise ConfigError("this loss needs positives. Received: a batch without them")
    negative = positive[:0] if negative is None else negative
    if counts_positive is None:
        one_each = int(len(query) == len(positive))
        counts_positive = to_device(torch.full((len(query),), one_each), query.device)
    documents = cat_items([positive, negative])
    own = _Sizes(len(query), len(positive), len(negative), documents.shape[1])
    sizes, ids = _gather_notes(
        own,
        _ids_or_none(ids_query, len(query)),
        on_host(counts_positive),
        _ids_or_none(ids_positive, len(positive)),
        _ids_or_none(ids_negative, len(negative)),
    )
    first = sum(size.positives + size.negatives for size in sizes[: process_index()])
    own_documents = ids.document_C[first : first + len(positive) + len(negative)]
    if not share_negatives:
        sizes = [size._replace(negatives=0) for size in sizes]
        ids = ids.without_negatives()
    query_BD = comparison.prepare_queries(query)
    # Together, so that a process without negatives takes part in the same collectives.
    documents = comparison.prepare_documents(
        pad_tokens(documents, max(size.width for size in sizes))
    )
    counts = [size.positives + size.negatives for size in sizes]
    owner_M = torch.arange(len(query), device=query.device).repeat_interleave(
        counts_positive, output_size=len(positive)
    )
    weight = process_count() / sum(size.queries for size in sizes)
    return GlobalBatch(
        query_BD=query_BD,
        positive_MD=_first_rows(documents, len(positive)),
        negative_KD=documents[len(positive) :],
        documents_CD=gather_rows(_first_rows(documents, counts[process_index()]), counts),
        owner_M=owner_M,
        query_weight=weight,
        positive_weight_M=weight / counts_positive[owner_M].to(query_BD.dtype),
        comparison=comparison,
        guide=None if guide is None else _guide_rows(guide, own, counts),
        _one_each=bool((on_host(counts_positive) == 1).all()),
        _sizes=sizes,
        _ids=ids,
        _negative_ids_K=own_documents[len(positive) :],
    )


def require_guide(query: Tensor | None, positive: Tensor | None, negative: Tensor | None) -> Guide:
    """A guide model's embeddings, as a guided loss is given them.

    Raises:
        ConfigError: if there are none.
    """
    if query is None or positive is None:
        raise ConfigError(
            "this loss is guided, so it needs the embeddings of a guide model: guide_query and "
            "guide_positive. Received: none. Set guide_model_name, or guided to false"
        )
    return Guide(query, positive, negative)


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


def _guide_rows(guide: Guide, own: _Sizes, counts: list[int]) -> GuideRows:
    negative = guide.query[:0] if guide.negative is None else guide.negative
    received = (len(guide.query), len(guide.positive), len(negative))
    if received != own[:3]:
        raise ConfigError(
            "the guide model must embed the rows of the batch. Received: embeddings of "
            f"{received} queries, positives and negatives, for {own[:3]}"
        )
    documents = unit_rows(torch.cat([guide.positive, negative]).detach())
    return GuideRows(
        query_BG=unit_rows(guide.query.detach()),
        positive_MG=documents[: own.positives],
        negative_KG=documents[own.positives :],
        documents_CG=gather_rows(documents[: counts[process_index()]], counts),
    )


def _first_rows(rows: Tensor, count: int) -> Tensor:
    """A slice; of all rows none, because the gradient of a slice is made by copying it."""
    return rows if count == len(rows) else rows[:count]


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


class _Rows(NamedTuple):
    """What all processes said of their rows."""

    sizes: list[_Sizes]
    ids: _Ids


def _gather_notes(own: _Sizes, *notes: Tensor) -> _Rows:
    """Tell the others, in one message, and hear them. Collective: every process must call it."""
    # On the host, because which pairs to mask decides the sizes of what follows.
    messages = gather_messages(torch.cat([torch.tensor(own), *notes]))
    sizes = [_Sizes(*message[: len(own)].tolist()) for message in messages]
    return _Rows(sizes, _join_ids([message[len(own) :] for message in messages], sizes))


def _ids_or_none(ids: Tensor | None, count: int) -> Tensor:
    return torch.full((count,), _NO_ID) if ids is None else on_host(ids)


def _join_ids(notes: list[Tensor], sizes: list[_Sizes]) -> _Ids:
    """Take apart what all processes said of their rows.

    Args:
        notes: Of each process in turn: ids of its queries, positives per query, ids of its
            positives, ids of its negatives.
        sizes: The rows of each process.
    """
    for process, (block, size) in enumerate(zip(notes, sizes, strict=True)):
        _check_notes(block, size, process)
    parts = [
        torch.split(block, [size.queries, size.queries, size.positives + size.negatives])
        for block, size in zip(notes, sizes, strict=True)
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
        is_positive_C=is_positive_C,
    )


def _check_notes(block: Tensor, size: _Sizes, process: int) -> None:
    counts = block[size.queries : 2 * size.queries]
    expected = 2 * size.queries + size.positives + size.negatives
    if len(block) != expected or counts.sum() != size.positives:
        raise DataError(
            "counts_positive must have one entry per query and add up to the positives, and "
            "ids_query, ids_positive and ids_negative must have one entry per row. Received on "
            f"process {process}: {size.queries} queries, {size.positives} positives, "
            f"{size.negatives} negatives; {len(block) - expected:+d} ids and counts, which add up "
            f"to {int(counts.sum())} positives"
        )


def _number_missing(ids: Tensor) -> Tensor:
    """A row without a content id is like no other: it gets a negative number of its own."""
    return torch.where(ids == _NO_ID, -1 - torch.arange(len(ids)), ids)
