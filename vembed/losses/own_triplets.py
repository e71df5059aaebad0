"""Each positive of a row with each hard negative of the same row.

# Shapes: B queries, M positives and K hard negatives, T triplets
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vembed.distributed import any_process
from vembed.errors import DataError


@dataclass(frozen=True)
class OwnTriplets:
    """Triplets of this process's rows, as positions.

    Attributes:
        query_T: Rows of the queries.
        positive_T: Rows of the positives, among those of all queries.
        negative_T: Rows of the hard negatives, likewise.
        positive_rank_T: Which positive of its query it is, from 0.
        negative_rank_T: Which negative of its query it is, from 0.
    """

    query_T: Tensor
    positive_T: Tensor
    negative_T: Tensor
    positive_rank_T: Tensor
    negative_rank_T: Tensor


def own_triplets(counts_positive: Tensor, counts_negative: Tensor) -> OwnTriplets:
    """List the triplets of rows.

    Args:
        counts_positive: `[B]` positives of each query.
        counts_negative: `[B]` hard negatives of each query.
    """
    device = counts_positive.device
    per_query_B = counts_positive * counts_negative
    query_T = torch.arange(len(per_query_B), device=device).repeat_interleave(per_query_B)
    first_B = per_query_B.cumsum(0) - per_query_B
    rank_T = torch.arange(len(query_T), device=device) - first_B[query_T]
    negatives_T = counts_negative[query_T]
    positive_rank_T = rank_T // negatives_T
    negative_rank_T = rank_T % negatives_T
    first_positive_B = counts_positive.cumsum(0) - counts_positive
    first_negative_B = counts_negative.cumsum(0) - counts_negative
    return OwnTriplets(
        query_T=query_T,
        positive_T=first_positive_B[query_T] + positive_rank_T,
        negative_T=first_negative_B[query_T] + negative_rank_T,
        positive_rank_T=positive_rank_T,
        negative_rank_T=negative_rank_T,
    )


def counts_or_equal(counts: Tensor | None, *, rows: int, queries: int, like: Tensor) -> Tensor:
    """`[B]`, how many of `rows` are each query's; without counts, all have equally many.

    Collective: every process must call it.

    Args:
        counts: `[B]`, or None.
        rows: Positives, or negatives, of this process.
        queries: B.
        like: A tensor on the device of the result.

    Raises:
        DataError: if the counts of any process do not add up to its rows; on every process.
    """
    if counts is None:
        counts = torch.full((queries,), rows // max(1, queries), device=like.device)
    is_wrong = len(counts) != queries or int(counts.sum()) != rows
    if any_process(is_wrong, like.device):
        raise DataError(
            "counts_positive and counts_negative must have one entry per query and add up to the "
            f"rows, on every process. Received here: {rows} rows of {queries} queries, counts "
            f"{counts.tolist()}"
        )
    return counts
