import math

import numpy as np
import pytest

from vembed.errors import ConfigError
from vembed.evaluation.metrics import compute_metrics, metric_label, order_by_score, parse_metric

# Query 0 found the grades 0 2 0 1 of the relevant 2 1 3; query 1 found nothing of its one.
RANKED = np.array([[0.0, 2, 0, 1], [0, 0, 0, 0]])
RELEVANT = np.array([[2.0, 1, 3], [1, 0, 0]])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("recall@1", 0),
        ("recall@2", 1 / 3),
        ("recall@10", 2 / 3),
        ("capped_recall@2", 1 / 2),  # min(2, 3 relevant) = 2 could have been found
        ("capped_recall@10", 2 / 3),
        ("hit_rate@1", 0),
        ("hit_rate@2", 1),
        ("precision@4", 2 / 4),
        ("precision@10", 2 / 10),  # k larger than what was ranked
        ("mrr@1", 0),
        ("mrr@10", 1 / 2),
        ("map@2", (1 / 2) / 3),
        ("map@10", (1 / 2 + 2 / 4) / 3),
        # ranks 2 and 4 hold gains 2 and 1; the best order is 3 2 1
        ("ndcg@10", (2 / math.log2(3) + 1 / math.log2(5)) / (3 + 2 / math.log2(3) + 1 / 2)),
        ("ndcg@2", (2 / math.log2(3)) / (3 + 2 / math.log2(3))),
    ],
)
def test_hand_computed(name, first):
    values = compute_metrics(RANKED, RELEVANT, [name])[name]
    assert values == pytest.approx([first, 0], abs=1e-12)


def test_recall_capped_recall_and_hit_rate_are_three_numbers():
    ranked, relevant = np.array([[1.0, 1, 0]]), np.array([[1.0, 1, 1, 1]])
    values = compute_metrics(ranked, relevant, ["recall@3", "capped_recall@3", "hit_rate@3"])
    assert [v[0] for v in values.values()] == pytest.approx([2 / 4, 2 / 3, 1])


def test_a_perfect_ranking_has_ndcg_one_and_a_swapped_one_less():
    relevant = np.array([[3.0, 2, 1]])
    values = [
        compute_metrics(np.array([r]), relevant, ["ndcg@3"])["ndcg@3"][0]
        for r in ([3.0, 2, 1], [2.0, 3, 1])
    ]
    assert values[0] == pytest.approx(1)
    assert values[1] < 0.95


def test_judged_as_not_relevant_is_the_same_as_not_judged():
    with_negative = compute_metrics(
        np.array([[-1.0, 1]]), np.array([[1.0, -1]]), ["ndcg@2", "map@2", "mrr@2"]
    )
    without = compute_metrics(
        np.array([[0.0, 1]]), np.array([[1.0, 0]]), ["ndcg@2", "map@2", "mrr@2"]
    )
    assert with_negative == without


def test_a_query_without_relevant_documents_scores_zero():
    names = ["ndcg@3", "mrr@3", "map@3", "recall@3", "capped_recall@3", "hit_rate@3", "precision@3"]
    values = compute_metrics(np.zeros((1, 3)), np.zeros((1, 0)), names)
    assert {name: v.tolist() for name, v in values.items()} == {name: [0.0] for name in names}


def test_nothing_ranked_scores_zero():
    values = compute_metrics(
        np.zeros((1, 0)), np.ones((1, 1)), ["mrr@3", "map@3", "ndcg@3", "recall@3"]
    )
    assert all(v.tolist() == [0.0] for v in values.values())


def test_tied_documents_stand_least_relevant_first():
    scores, gains = np.array([0.5, 0.9, 0.5, 0.5]), np.array([2.0, 0, 0, 1])
    assert order_by_score(scores, gains).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    "name", ["ndcg", "ndcg@", "ndcg@0", "ndcg@-1", "ndcg@1.5", "@10", "ndgc@10", "ndcg@²"]
)
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(ConfigError, match="NAME@K"):
        parse_metric(name)


def test_a_misspelt_metric_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'ndcg'"):
        parse_metric("ndgc@10")


def test_labels():
    assert [metric_label(n) for n in ("ndcg@10", "hit_rate@1", "spearman", "odd")] == [
        "nDCG@10",
        "Hit rate@1",
        "Spearman",
        "odd",
    ]
