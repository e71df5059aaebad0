"""Each positive of a row with each hard negative of the same row.

# Shapes: B queries, M positives and K hard negatives, T triplets
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vembed.distributed import any_process
from vembed.errors import DataError
from vembed.placing import on_host, to_device


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
    # On the host: how many there are is known there, and no device needs to be asked.
    device = counts_positive.device
    positives_B, negatives_B = on_host(counts_positive), on_host(counts_negative)
    per_query_B = positives_B * negatives_B
    query_T = torch.arange(len(per_query_B)).repeat_interleave(per_query_B)
    first_B = per_query_B.cumsum(0) - per_query_B
    rank_T = torch.arange(len(query_T)) - first_B[query_T]
    negatives_T = negatives_B[query_T]
    positive_rank_T = rank_T // negatives_T
    negative_rank_T = rank_T % negatives_T
    first_positive_B = positives_B.cumsum(0) - positives_B
    first_negative_B = negatives_B.cumsum(0) - negatives_B
    return OwnTriplets(
        query_T=to_device(query_T, device),
        positive_T=to_device(first_positive_B[query_T] + positive_rank_T, device),
        negative_T=to_device(first_negative_B[query_T] + negative_rank_T, device),
        positive_rank_T=to_device(positive_rank_T, device),
        negative_rank_T=to_device(negative_rank_T, device),
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
        counts = to_device(torch.full((queries,), rows // max(1, queries)), like.device)
    is_wrong = len(counts) != queries or int(on_host(counts).sum()) != rows
    if any_process(is_wrong, like.device):
        raise DataError(
            "counts_positive and counts_negative must have one entry per query and add up to the "
            f"rows, on every process. Received here: {rows} rows of {queries} queries, counts "
            f"{counts.tolist()}"
        )
    return counts
