"""From ranked candidates to the negatives of each query.

The margins are those of NV-Retriever (Moreira et al., 2024, arXiv 2407.15831): a candidate `n` of a
query `q` with the positive `p` is a negative if `s(q, n) <= s(q, p) - a` (TopK-MarginPos) and
`s(q, n) <= s(q, p) - r |s(q, p)|`, which is `(1 - r) s(q, p)` for positives above zero
(TopK-PercPos). Of several positives, the least similar one counts.

# Shapes: Q queries, q queries of a block, K candidates of a query, N negatives of a query, P pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from vembed.losses.margins import Margins
from vembed.mining.pairs import Pairs
from vembed.mining.rescoring import Judge, as_probability
from vembed.mining.rules import Excluded, MiningRules
from vembed.mining.search import Bounds, Nearest, Window, search
from vembed.mining.vectors import VectorRows

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class Chosen:
    """The negatives of every query.

    Attributes:
        documents_QN: Document numbers, the hardest first; -1 where there are fewer.
        scores_QN: What they were chosen by: cosines, or what a cross-encoder says, from 0 to 1.
        excluded: What was left out.
    """

    documents_QN: Ints
    scores_QN: NDArray[np.float32]
    excluded: Excluded

    @property
    def counts_Q(self) -> Ints:
        """Negatives of each query."""
        return np.asarray((self.documents_QN >= 0).sum(1))


def choose(
    queries: VectorRows,
    documents: VectorRows,
    *,
    candidates: int,
    known: Pairs,
    positives: Pairs,
    positive_scores_P: Floats,
    query_ids_Q: Ints,
    rules: MiningRules,
    judge: Judge | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Chosen:
    """The negatives of every query.

    Args:
        queries: Q vectors.
        documents: Vectors, of which the first `candidates` may be negatives.
        candidates: How many.
        known: Pairs that are not candidates.
        positives: Pairs that belong together, at least one of each query.
        positive_scores_P: How similar they are, on the scale of the rules.
        query_ids_Q: Content of each query: with the seed, all that random choices depend on.
        rules: Which candidates are allowed.
        judge: Scores all candidates within the ranks; rules and order are then by its scores.
        advance: Called after each block with the number of further queries that are done.
    """
    limit_Q = margin_limits(rules, positives, positive_scores_P)
    last = rules.last_rank(is_pool=judge is not None)
    is_pool = judge is not None or rules.sampling == "random"
    take = last - rules.range_min if is_pool and last is not None else rules.num_negatives
    no_bounds = Bounds(np.full(len(queries), math.inf))
    bounds = Bounds(limit_Q, *_score_range(rules)) if judge is None else no_bounds
    chosen = Chosen(
        np.full((len(queries), rules.num_negatives), -1, dtype=np.int64),
        np.full((len(queries), rules.num_negatives), np.nan, dtype=np.float32),
        Excluded(),
    )
    for ranked in search(
        queries,
        documents,
        candidates=candidates,
        known=known,
        bounds=bounds,
        window=Window(rules.range_min, last, take),
    ):
        nearest = ranked if judge is None else _rescored(ranked, judge, limit_Q, rules)
        rows = slice(nearest.block.start, nearest.block.stop)
        places_qN = _places(nearest.documents_qK, query_ids_Q[rows], rules)
        is_there = places_qN >= 0
        for target, source in (
            (chosen.documents_QN, nearest.documents_qK),
            (chosen.scores_QN, nearest.cosines_qK),
        ):
            taken = np.take_along_axis(source, np.maximum(places_qN, 0), axis=1)
            target[rows][is_there] = taken[is_there]
        chosen.excluded += nearest.excluded
        advance(len(nearest.block))
    return chosen


def margin_limits(rules: MiningRules, positives: Pairs, scores_P: Floats) -> Floats:
    """`[Q]`, the score above which a candidate is too similar; infinite without margins."""
    starts_Q = np.flatnonzero(np.diff(positives.queries, prepend=-1))
    least_Q = np.minimum.reduceat(scores_P, starts_Q)
    margins = Margins(rules.absolute_margin, rules.relative_margin)
    # In float32, as vectors are: two encodings of one content differ by as much.
    limit_Q = margins.limits(torch.from_numpy(least_Q).float())
    if limit_Q is None:
        return np.full(len(starts_Q), math.inf)
    return np.asarray(limit_Q.double().numpy())


def _score_range(rules: MiningRules) -> tuple[float, float]:
    most = math.inf if rules.max_score is None else rules.max_score
    return most, -math.inf if rules.min_score is None else rules.min_score


def _rescored(nearest: Nearest, judge: Judge, limit_Q: Floats, rules: MiningRules) -> Nearest:
    """The candidates that the rules allow by the judge's scores, best first."""
    rows, columns = np.nonzero(nearest.documents_qK >= 0)
    pairs = Pairs(rows + nearest.block.start, nearest.documents_qK[rows, columns])
    scores_qK = np.full(nearest.documents_qK.shape, np.nan)
    scores_qK[rows, columns] = as_probability(judge(pairs))
    most, least = _score_range(rules)
    limit_q1 = limit_Q[nearest.block.start : nearest.block.stop, None]
    is_low = scores_qK < least
    is_near = ~is_low & (scores_qK > limit_q1)
    is_high = ~is_near & (scores_qK > most)
    is_out = is_near | is_high | is_low | np.isnan(scores_qK)
    order = np.argsort(np.where(is_out, np.inf, -scores_qK), axis=1, kind="stable")
    documents_qK = np.where(is_out, -1, nearest.documents_qK)
    return replace(
        nearest,
        documents_qK=np.take_along_axis(documents_qK, order, axis=1),
        cosines_qK=np.take_along_axis(scores_qK, order, axis=1),
        excluded=nearest.excluded
        + Excluded(
            min_score=int(is_low.sum()), margin=int(is_near.sum()), max_score=int(is_high.sum())
        ),
    )


def _places(documents_qK: Ints, query_ids_q: Ints, rules: MiningRules) -> Ints:
    """`[q, N]`, which of the K candidates become negatives; -1 where there are too few."""
    counts_q = (documents_qK >= 0).sum(1)  # those that are there come first
    wanted = rules.num_negatives
    places_qN = np.tile(np.arange(wanted), (len(documents_qK), 1))
    places_qN[places_qN >= counts_q[:, None]] = -1
    if rules.sampling == "random":
        for row in np.flatnonzero(counts_q > wanted).tolist():
            seeds = np.random.SeedSequence([rules.seed, int(query_ids_q[row])])
            drawn = np.random.Generator(np.random.PCG64(seeds)).choice(
                int(counts_q[row]), size=wanted, replace=False
            )
            places_qN[row] = np.sort(drawn)
    return places_qN
