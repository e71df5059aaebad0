"""Pairs with a score, which several losses look at."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vembed.errors import ConfigError


class ScoredPairs(NamedTuple):
    """Two items of each pair, and its score."""

    first: Tensor
    second: Tensor
    scores: Tensor


def check_scored_pairs(query: Tensor, positive: Tensor | None, scores: Tensor) -> ScoredPairs:
    """The pairs of a batch whose rows are a query, one positive, and a score.

    Args:
        query: `[B, D]`, the first item of each pair.
        positive: `[B, D]`, the second.
        scores: `[B]`.

    Raises:
        ConfigError: if the number of second items or scores is not that of the first.
    """
    received = [None if t is None else len(t) for t in (query, positive, scores)]
    if positive is None or len(set(received)) > 1:
        raise ConfigError(
            "this loss needs one positive and one score per query. Received: "
            f"{received[0]} queries, {received[1]} positives, {received[2]} scores"
        )
    return ScoredPairs(query, positive, scores)
