"""Which queries a change of model fixed, and which it broke."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vembed.errors import ConfigError
from vembed.evaluation.results import EvalResult, Rankings


@dataclass(frozen=True)
class MovedQuery:
    """One query whose right answer changed its rank.

    Attributes:
        query: Its text, or where its image is.
        right_answer: The relevant document that stands highest after.
        rank_before: Rank of the highest relevant document before, from 1.
        rank_after: The same after.
        top_before: The document that stood first before.
        top_after: The document that stands first after.
    """

    query: str
    right_answer: str
    rank_before: int
    rank_after: int
    top_before: str
    top_after: str


@dataclass(frozen=True)
class MovedQueries:
    """The queries that moved most, either way, and how many moved at all.

    Attributes:
        improved: Those whose right answer rose most, the largest move first.
        worsened: Those whose right answer fell most, the largest move first.
        improved_count: Queries whose right answer rose, all of them.
        worsened_count: Queries whose right answer fell, all of them.
        unchanged_count: Queries whose right answer kept its rank.
    """

    improved: list[MovedQuery] = field(default_factory=list)
    worsened: list[MovedQuery] = field(default_factory=list)
    improved_count: int = 0
    worsened_count: int = 0
    unchanged_count: int = 0


def moved_queries(before: EvalResult, after: EvalResult, n: int = 5) -> MovedQueries:
    """The `n` queries that moved most in each direction.

    A move is the ratio of the two ranks: from 20 to 2 is as far as from 10 to 1, and farther than
    from 900 to 300. Equal moves keep the order of the queries. Tasks without rankings have no moved
    queries.

    Raises:
        ConfigError: if the two results are not of the same queries.
    """
    if before.rankings is None or after.rankings is None:
        return MovedQueries()
    if list(before.rankings.queries) != list(after.rankings.queries):
        raise ConfigError(
            "moved_queries: expected two results of the same task. Received: different queries"
        )
    ranks_before = before.rankings.neighbours.right_rank_Q
    ranks_after = after.rankings.neighbours.right_rank_Q
    move = np.log(ranks_before) - np.log(ranks_after)
    rising, falling = np.argsort(-move, kind="stable"), np.argsort(move, kind="stable")
    return MovedQueries(
        improved=[_show(q, before.rankings, after.rankings) for q in rising[:n] if move[q] > 0],
        worsened=[_show(q, before.rankings, after.rankings) for q in falling[:n] if move[q] < 0],
        improved_count=int((ranks_after < ranks_before).sum()),
        worsened_count=int((ranks_after > ranks_before).sum()),
        unchanged_count=int((ranks_after == ranks_before).sum()),
    )


def _show(query: int, before: Rankings, after: Rankings) -> MovedQuery:
    return MovedQuery(
        query=str(after.queries[query]),
        right_answer=str(after.documents[after.neighbours.right_document_Q[query]]),
        rank_before=int(before.neighbours.right_rank_Q[query]),
        rank_after=int(after.neighbours.right_rank_Q[query]),
        top_before=str(before.documents[before.neighbours.documents_QK[query, 0]]),
        top_after=str(after.documents[after.neighbours.documents_QK[query, 0]]),
    )
