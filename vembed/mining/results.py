"""What mining found, in numbers and in examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vembed.mining.choosing import Chosen
from vembed.mining.rows import Pool
from vembed.mining.rules import Excluded
from vembed.modes import Item


@dataclass(frozen=True)
class Scored:
    """A document and how it was judged."""

    item: Item
    score: float


@dataclass(frozen=True)
class Example:
    """What one query got, to look at."""

    query: Item
    positives: list[Scored]
    negatives: list[Scored]


@dataclass(frozen=True)
class MiningResult:
    """What was done.

    Attributes:
        output: The file that was written.
        rows: Rows that were read.
        written: Rows that were written.
        queries: Distinct queries.
        candidates: Distinct documents that could be negatives.
        negatives: Negatives that were written, over all rows.
        short_rows: Rows whose query has fewer than `num_negatives`.
        excluded: Pairs of a query and a candidate that each rule left out.
        positive_score: Mean score of queries with their positives: cosine, or what the
            cross-encoder says, from 0 to 1.
        negative_score: Likewise, with the negatives that were chosen; NaN where there are none.
        computed: Items that were encoded, and pairs that a cross-encoder scored.
        examples: Queries that stand at equal distances in the rows.
        cache: Where vectors are kept; None where they were removed.
        seconds: How long it took.
    """

    output: Path
    rows: int
    written: int
    queries: int
    candidates: int
    negatives: int
    short_rows: int
    excluded: Excluded
    positive_score: float
    negative_score: float
    computed: int
    examples: list[Example]
    cache: Path | None
    seconds: float


def find_examples(
    pool: Pool, chosen: Chosen, positive_scores_P: NDArray[np.float64], count: int
) -> list[Example]:
    """Queries at equal distances, with all that belongs to them."""
    if count < 1:
        return []
    found = []
    for query in np.unique(np.linspace(0, len(pool.queries) - 1, count).astype(np.int64)).tolist():
        low, high = np.searchsorted(pool.positives.queries, [query, query + 1])
        numbers = chosen.documents_QN[query]
        mined = numbers >= 0
        positives = pool.documents.read(pool.positives.documents[low:high].tolist())
        negatives = pool.documents.read(numbers[mined].tolist())
        found.append(
            Example(
                pool.queries.read([query])[0],
                list(map(Scored, positives, positive_scores_P[low:high].tolist())),
                list(map(Scored, negatives, chosen.scores_QN[query][mined].tolist())),
            )
        )
    return found
