"""Retrieval metrics with graded relevance, as trec_eval defines them: pure functions of a ranking.

Each takes the gains of the ranked documents and the gains of all relevant documents, and gives one
number per query; the figure of a data set is their mean. A gain of 0 or less means not relevant.

Equal scores: trec_eval orders them by document id, which says nothing about the scorer, so the same
run can get any of several values. Here tied documents are ordered least relevant first
(`order_by_score`): the value is the one trec_eval gives under the least favourable document ids,
and a constant scorer gets credit only once k exceeds the number of documents that are not relevant.
The expected value over the orders of a tie was rejected: it gives a collapsed model the score of a
random one, and no single trec_eval run reproduces it.

# Shapes: Q queries, K ranked documents (best first), R relevant documents (rows padded with 0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from vembed.errors import ConfigError
from vembed.registry import did_you_mean

Floats = NDArray[np.float64]


def ndcg(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """Discounted gain of the first k over that of the best possible ranking (trec_eval `ndcg_cut`).

    The gain is linear in the relevance grade and the discount is log2(rank + 1) (Jarvelin and
    Kekalainen, 2002).
    """
    ideal_QR = -np.sort(-_positive(relevant_QR), axis=1)
    ideal_Q = _discounted_sum(ideal_QR[:, :k])
    return _ratio(_discounted_sum(_positive(ranked_QK)[:, :k]), ideal_Q)


def mrr(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """1 / rank of the first relevant document, 0 when it is beyond k (trec_eval `recip_rank`)."""
    hits_Qk = ranked_QK[:, :k] > 0
    if hits_Qk.shape[1] == 0:
        return np.zeros(len(ranked_QK))
    return np.where(hits_Qk.any(axis=1), 1.0 / (hits_Qk.argmax(axis=1) + 1), 0.0)


def average_precision(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """Precision at each relevant document of the first k, averaged over all relevant documents.

    This is trec_eval's `map_cut`; relevant documents beyond k count as 0.
    """
    hits_Qk = ranked_QK[:, :k] > 0
    precision_Qk = hits_Qk.cumsum(axis=1) / np.arange(1, hits_Qk.shape[1] + 1)
    return _ratio((precision_Qk * hits_Qk).sum(axis=1), _count(relevant_QR))


def precision(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """Share of the first k that is relevant; of k even when fewer are ranked (trec_eval `P`)."""
    return _count(ranked_QK[:, :k]) / k


def recall(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """Share of the relevant documents that is among the first k (trec_eval `recall`)."""
    return _ratio(_count(ranked_QK[:, :k]), _count(relevant_QR))


def capped_recall(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """Hits over min(k, relevant documents): 1 can be reached when more than k are relevant."""
    return _ratio(_count(ranked_QK[:, :k]), np.minimum(_count(relevant_QR), k))


def hit_rate(ranked_QK: Floats, relevant_QR: Floats, k: int) -> Floats:
    """1 when any of the first k is relevant, else 0 (trec_eval `success`)."""
    return (_count(ranked_QK[:, :k]) > 0).astype(np.float64)


METRICS: dict[str, Callable[[Floats, Floats, int], Floats]] = {
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
    "precision": precision,
    "recall": recall,
    "capped_recall": capped_recall,
    "hit_rate": hit_rate,
}

_LABELS = {
    "ndcg": "nDCG",
    "mrr": "MRR",
    "map": "MAP",
    "precision": "Precision",
    "recall": "Recall",
    "capped_recall": "Capped recall",
    "hit_rate": "Hit rate",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "knn": "kNN accuracy",
    "p": "Precision",
}


def parse_metric(name: str) -> tuple[str, int]:
    """Split `"ndcg@10"` into `("ndcg", 10)`.

    Raises:
        ConfigError: if it is not a metric of `METRICS`, an @ and a positive number.
    """
    base, _, cut = name.partition("@")
    if base in METRICS and cut.isascii() and cut.isdigit() and int(cut) > 0:
        return base, int(cut)
    raise ConfigError(
        f"metric: expected NAME@K with K > 0, as in ndcg@10. Received: {name!r}"
        f"{did_you_mean(base, list(METRICS))}; NAME is one of: {', '.join(METRICS)}"
    )


def metric_label(name: str) -> str:
    """The name a reader sees: `nDCG@10` for `ndcg@10`; an unknown name as it is."""
    whole, bracket, of_what = name.partition("[")
    base, at, cut = whole.partition("@")
    return _LABELS.get(base, base) + at + cut + (f" {bracket}{of_what}" if bracket else "")


def metric_without_reduction(name: str) -> str:
    """`ndcg@10` of `ndcg@10[256]`, which is the same on smaller vectors."""
    return name.partition("[")[0]


def compute_metrics(
    ranked_QK: Floats, relevant_QR: Floats, names: Iterable[str]
) -> dict[str, Floats]:
    """Every metric of `names`, per query.

    Args:
        ranked_QK: Gains of the ranked documents, best first; rows shorter than K end in zeros. K
            must reach the largest k of `names` unless all documents are ranked.
        relevant_QR: Gains of all relevant documents of each query, in any order. A query without
            any gets 0.
        names: Such as `"ndcg@10"`.

    Raises:
        ConfigError: as `parse_metric` does.
    """
    values = {}
    for name in names:
        base, k = parse_metric(name)
        values[name] = METRICS[base](ranked_QK, relevant_QR, k)
    return values


def order_by_score(scores_N: Floats, gains_N: Floats) -> NDArray[np.int64]:
    """Document numbers, best score first; equal scores least relevant first."""
    return np.lexsort((_positive(gains_N), -scores_N)).astype(np.int64)


def _positive(gains: Floats) -> Floats:
    return np.maximum(gains, 0.0)


def _count(gains_QK: Floats) -> Floats:
    return np.asarray((gains_QK > 0).sum(axis=1), dtype=np.float64)


def _discounted_sum(gains_QK: Floats) -> Floats:
    discount_K = 1.0 / np.log2(np.arange(2, gains_QK.shape[1] + 2))
    return np.asarray((gains_QK * discount_K).sum(axis=1), dtype=np.float64)


def _ratio(part_Q: Floats, whole_Q: Floats) -> Floats:
    """`part / whole`, and 0 where the whole is 0: as in trec_eval, nothing relevant scores 0."""
    return np.divide(part_Q, whole_Q, out=np.zeros(len(part_Q)), where=whole_Q > 0)
