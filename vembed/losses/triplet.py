"""Triplet losses: an anchor shall be nearer to a positive than to a negative, by a margin.

# Shapes: R anchors of this process, C candidates of all, r anchors of a block; D size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vembed.distributed import gather_counts, gather_rows, global_ratio, process_index
from vembed.errors import ConfigError
from vembed.losses.contrastive import check_distance_margin
from vembed.losses.global_batch import gather_batch
from vembed.losses.own_triplets import counts_or_equal, own_triplets
from vembed.losses.relevance import Relevance
from vembed.losses.similarity import dot_products, full_precision, unit_rows
from vembed.losses.supcon import check_labels
from vembed.losses.tiling import TILE_BYTES
from vembed.placing import on_host

BatchTriplets = Literal["all", "hard", "semi_hard"]
"""Which triplets of the global batch count."""


class Triplet(nn.Module):
    r"""Triplet loss (Schroff et al., 2015, FaceNet) for queries with positives, on cosine distance.

    Of a query q, a document p that is relevant to it and one that is not, n, with d = 1 - cos:

        loss(q, p, n) = max(0, d(q, p) - d(q, n) + margin)

    Documents are the positives and hard negatives of all processes; which are relevant is decided
    as in `InfoNCE`, except that every relevant document is a positive, those of other rows too.
    `triplets` says which of them count:

    - `own`: the positives and hard negatives of q's own row; the mean over these triplets.
    - `all`: every triplet; the mean over those whose loss is above 0 (Hermans et al., 2017, batch
      all). Of copies, each counts.
    - `hard`: of each query, the farthest positive and the nearest negative; the mean over queries
      (Hermans et al., 2017, batch hard).
    - `semi_hard`: for each positive, the nearest negative that is farther than it, or the farthest
      of all where none is; the mean over queries and positives (Schroff et al., 2015).

    0 where there is no triplet. Memory grows with the batch, not its square.

    sentence-transformers' TripletLoss with cosine distance is `own`, for rows of one negative each.
    """

    def __init__(
        self, margin: float = 0.2, triplets: Literal["own"] | BatchTriplets = "semi_hard"
    ) -> None:
        """Assign and check.

        Args:
            margin: Difference of cosine distances, above 0 and at most 2.
            triplets: Which triplets count.

        Raises:
            ConfigError: if an argument is out of range.
        """
        super().__init__()
        check_distance_margin(margin)
        _check_triplets(triplets, ("own", *get_args(BatchTriplets)))
        self.margin = margin
        self.triplets = triplets
        if triplets == "own":
            self.required_fields = frozenset({"positive", "negative"})

    required_fields = frozenset({"positive"})
    takes_tokens = False

    def forward(
        self,
        query: Tensor,
        positive: Tensor | None,
        negative: Tensor | None = None,
        *,
        counts_positive: Tensor | None = None,
        counts_negative: Tensor | None = None,
        ids_query: Tensor | None = None,
        ids_positive: Tensor | None = None,
        ids_negative: Tensor | None = None,
    ) -> Tensor:
        """The loss of this process's queries. Collective: every process must call it.

        Arguments and errors are those of `gather_batch`; `counts_negative` `[B]` says whose the
        negatives are, and is looked at where a query has its own only.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.
        """
        with full_precision(query.device):
            if self.triplets == "own":
                return self._of_own(query, positive, negative, counts_positive, counts_negative)
            batch = gather_batch(
                query,
                positive,
                negative,
                counts_positive=counts_positive,
                ids_query=ids_query,
                ids_positive=ids_positive,
                ids_negative=ids_negative,
            )
            return _batch_loss(
                batch.query_BD,
                batch.documents_CD,
                positives=batch.relevant_documents(),
                itself=None,
                margin=self.margin,
                triplets=self.triplets,
            )

    def _of_own(
        self,
        query: Tensor,
        positive: Tensor | None,
        negative: Tensor | None,
        counts_positive: Tensor | None,
        counts_negative: Tensor | None,
    ) -> Tensor:
        if positive is None:
            raise ConfigError("this loss needs positives. Received: a batch without them")
        negative = query[:0] if negative is None else negative
        counts = [
            counts_or_equal(given, rows=len(rows), queries=len(query), like=query)
            for given, rows in ((counts_positive, positive), (counts_negative, negative))
        ]
        of = own_triplets(*counts)
        query_TD = unit_rows(query)[of.query_T]
        to_positive_T = (query_TD * unit_rows(positive)[of.positive_T]).sum(1)
        to_negative_T = (query_TD * unit_rows(negative)[of.negative_T]).sum(1)
        loss_T = functional.relu(to_negative_T - to_positive_T + self.margin)
        return global_ratio(loss_T.sum(), len(loss_T))


class LabelTriplet(nn.Module):
    r"""Triplet loss (Hermans et al., 2017) for labelled items, on cosine distance.

    Of an item a, another item p of its label and an item n of another, with d = 1 - cos:

        loss(a, p, n) = max(0, d(a, p) - d(a, n) + margin)

    over items of all processes. `triplets` says which of them count, as in `Triplet`: `all`, `hard`
    or `semi_hard`. 0 where there is no triplet.

    sentence-transformers' BatchAllTripletLoss, BatchHardTripletLoss and BatchSemiHardTripletLoss
    are `all`, `hard` and `semi_hard`, with cosine distance; their `hard` also takes the mean over
    items that have no positive or no negative, and theirs rank within a process.
    """

    required_fields = frozenset({"label"})
    takes_tokens = False
    batch_sampler = "class_balanced"

    def __init__(self, margin: float = 0.2, triplets: BatchTriplets = "semi_hard") -> None:
        """Assign and check.

        Args:
            margin: Difference of cosine distances, above 0 and at most 2.
            triplets: Which triplets count.

        Raises:
            ConfigError: if an argument is out of range.
        """
        super().__init__()
        check_distance_margin(margin)
        _check_triplets(triplets, get_args(BatchTriplets))
        self.margin = margin
        self.triplets = triplets

    def forward(self, query: Tensor, *, labels: Tensor) -> Tensor:
        """The loss of this process's items. Collective: every process must call it.

        Args:
            query: `[B, D]`, one row per item.
            labels: `[B]` int64.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if the number of labels is not that of the items.
        """
        check_labels(query, labels)
        with full_precision(query.device):
            own_BD = unit_rows(query)
            counts = gather_counts(len(query), query.device)
            all_QD, labels_Q = gather_rows(own_BD, counts), gather_rows(on_host(labels), counts)
            start = sum(counts[: process_index()])
            return _batch_loss(
                own_BD,
                all_QD,
                positives=Relevance.classes(labels_Q[start : start + len(query)], labels_Q),
                itself=Relevance.identity(first=start, rows=len(query), columns=len(all_QD)),
                margin=self.margin,
                triplets=self.triplets,
            )


class _Counted(NamedTuple):
    """A sum of losses and how many they are, both scalars."""

    total: Tensor
    number: Tensor


def _check_triplets(triplets: str, known: tuple[str, ...]) -> None:
    if triplets not in known:
        raise ConfigError(f"triplets: expected one of {', '.join(known)}. Received: {triplets!r}")


def _batch_loss(
    rows_RD: Tensor,
    columns_CD: Tensor,
    *,
    positives: Relevance,
    itself: Relevance | None,
    margin: float,
    triplets: str,
) -> Tensor:
    """The mean loss over triplets of anchors and candidates, a block of anchors at a time.

    Collective: every process must call it.
    """
    reduce = {"all": _all_triplets, "hard": _hard_triplets, "semi_hard": _semi_hard_triplets}
    total, count = rows_RD.new_zeros(()), rows_RD.new_zeros(())
    for rows in _blocks(rows_RD, columns_CD):
        kinds = _kinds(positives, itself, rows, len(columns_CD)).to(rows_RD.device)
        of_block: _Counted = checkpoint(
            _of_block,
            reduce[triplets],
            rows_RD[rows],
            columns_CD,
            kinds,
            margin,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        total, count = total + of_block.total, count + of_block.number
    # Backward through the gather of the columns is collective, also where there is no anchor.
    return global_ratio(total + 0 * columns_CD.sum() + 0 * rows_RD.sum(), count)


def _blocks(rows_RD: Tensor, columns_CD: Tensor) -> Iterator[slice]:
    height = max(1, TILE_BYTES // max(1, columns_CD.element_size() * len(columns_CD)))
    for start in range(0, len(rows_RD), height):
        yield slice(start, min(start + height, len(rows_RD)))


_NEGATIVE, _POSITIVE, _ITSELF = 0, 1, 2


def _kinds(positives: Relevance, itself: Relevance | None, rows: slice, num_columns: int) -> Tensor:
    """`[r, C]` int8: what each candidate is to each anchor of a block."""
    kinds = torch.full((rows.stop - rows.start, num_columns), _NEGATIVE, dtype=torch.int8)
    kinds[positives.pairs(rows)] = _POSITIVE
    if itself is not None:
        kinds[itself.pairs(rows)] = _ITSELF
    return kinds


def _of_block(
    reduce: Callable[[Tensor, Tensor, Tensor, float], _Counted],
    rows_rD: Tensor,
    columns_CD: Tensor,
    kinds_rC: Tensor,
    margin: float,
) -> _Counted:
    cosine_rC = dot_products(rows_rD, columns_CD)
    return reduce(cosine_rC, kinds_rC == _POSITIVE, kinds_rC == _NEGATIVE, margin)


def _hard_triplets(
    cosine_rC: Tensor, positive_rC: Tensor, negative_rC: Tensor, margin: float
) -> _Counted:
    farthest = cosine_rC.masked_fill(~positive_rC, math.inf).amin(1)
    nearest = cosine_rC.masked_fill(~negative_rC, -math.inf).amax(1)
    counts = positive_rC.any(1) & negative_rC.any(1)
    difference = torch.where(counts, nearest - farthest, 0)
    loss = functional.relu(difference + margin).masked_fill(~counts, 0)
    return _Counted(loss.sum(), counts.sum())


def _semi_hard_triplets(
    cosine_rC: Tensor, positive_rC: Tensor, negative_rC: Tensor, margin: float
) -> _Counted:
    # Of each row, negatives from the least similar on, behind those that are none.
    sorted_rC = cosine_rC.masked_fill(~negative_rC, -math.inf).sort(dim=1).values
    others_r = (~negative_rC).sum(1, keepdim=True)
    below_rC = torch.searchsorted(sorted_rC.detach(), cosine_rC.detach().contiguous())
    # The last one below the positive; where there is none, the least similar of all.
    place_rC = torch.maximum(below_rC - 1, others_r).clamp(max=cosine_rC.shape[1] - 1)
    counts = positive_rC & negative_rC.any(1, keepdim=True)
    difference = torch.where(counts, sorted_rC.gather(1, place_rC) - cosine_rC, 0)
    loss = functional.relu(difference + margin).masked_fill(~counts, 0)
    return _Counted(loss.sum(), counts.sum())


def _all_triplets(
    cosine_rC: Tensor, positive_rC: Tensor, negative_rC: Tensor, margin: float
) -> _Counted:
    # A positive's triplets that cost something are those with negatives above a bound: the end of
    # the sorted row, whose sum is that of what comes after.
    columns = cosine_rC.shape[1]
    sorted_rC = cosine_rC.masked_fill(~negative_rC, -math.inf).sort(dim=1).values
    finite_rC = sorted_rC.masked_fill(sorted_rC == -math.inf, 0)
    sums_rC = functional.pad(finite_rC.flip(1).cumsum(1).flip(1), (0, 1))
    bound_rC = cosine_rC - margin
    first_rC = torch.searchsorted(sorted_rC.detach(), bound_rC.detach().contiguous(), right=True)
    count_rC = (columns - first_rC).masked_fill(~positive_rC, 0)
    loss_rC = sums_rC.gather(1, first_rC) - count_rC * bound_rC
    return _Counted(loss_rC.masked_fill(count_rC == 0, 0).sum(), count_rC.sum())
