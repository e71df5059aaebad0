"""Metrics against a slow reference written from trec_eval's definitions, on random runs with ties.

Agreement is to 1e-9. The reference shares no code with vembed: it works on document ids and scores,
and orders ties by id as trec_eval does.
"""

import math
import random

import numpy as np
import pytest

from vembed.evaluation.metrics import METRICS, compute_metrics, order_by_score

TOLERANCE = 1e-9
NAMES = [f"{base}@{k}" for base in METRICS for k in (1, 3, 10, 100)]


def trec_order(run):
    """Best score first; equal scores: the greater document id first (as form_res_rels does)."""
    return [
        doc for doc, _ in sorted(run.items(), key=lambda entry: (entry[1], entry[0]), reverse=True)
    ]


def reference(run, qrels, base, k):  # noqa: PLR0911
    ranked = trec_order(run)[:k]
    relevant = [doc for doc, grade in qrels.items() if grade > 0]
    if not relevant:
        return 0.0
    hits = [doc for doc in ranked if qrels.get(doc, 0) > 0]
    if base == "precision":
        return len(hits) / k
    if base == "recall":
        return len(hits) / len(relevant)
    if base == "capped_recall":
        return len(hits) / min(k, len(relevant))
    if base == "hit_rate":
        return 1.0 if hits else 0.0
    if base == "mrr":
        return 1.0 / (ranked.index(hits[0]) + 1) if hits else 0.0
    if base == "map":
        total, found = 0.0, 0
        for position, doc in enumerate(ranked, start=1):
            if qrels.get(doc, 0) > 0:
                found += 1
                total += found / position
        return total / len(relevant)
    assert base == "ndcg"
    gain = sum(max(0, qrels.get(doc, 0)) / math.log2(i + 2) for i, doc in enumerate(ranked))
    best = sorted((qrels[doc] for doc in relevant), reverse=True)[:k]
    return gain / sum(grade / math.log2(i + 2) for i, grade in enumerate(best))


def random_query(rng):
    """Scores with many ties, grades from -1 to 3; some queries with nothing relevant."""
    size = rng.choice([1, 2, 5, 20, 150])
    levels = rng.choice([1, 2, 5, 1000])
    share = rng.choice([0.0, 0.1, 0.5, 1.0])
    scores = [rng.randrange(levels) / 7 for _ in range(size)]
    grades = [
        rng.choice([1, 1, 2, 3]) if rng.random() < share else rng.choice([-1, 0]) for _ in scores
    ]
    return scores, grades


def ours(scores, grades):
    scores, grades = np.array(scores, dtype=float), np.array(grades, dtype=float)
    ranked = grades[order_by_score(scores, grades)][None]
    return {
        name: values[0] for name, values in compute_metrics(ranked, grades[None], NAMES).items()
    }


def with_ids(scores, grades, make_id):
    ids = [make_id(number, max(0, grade)) for number, grade in enumerate(grades)]
    return dict(zip(ids, scores, strict=True)), dict(zip(ids, grades, strict=True))


def unfavourable_id(number, grade):
    return f"{9 - grade}-{number:04d}"  # the higher the grade, the later in descending order


def favourable_id(number, grade):
    return f"{grade}-{number:04d}"


def split(name):
    base, k = name.split("@")
    return base, int(k)


def test_equals_trec_eval_under_the_least_favourable_document_ids():
    rng = random.Random(0)
    for _ in range(250):
        scores, grades = random_query(rng)
        run, qrels = with_ids(scores, grades, unfavourable_id)
        values = ours(scores, grades)
        for name in NAMES:
            assert values[name] == pytest.approx(
                reference(run, qrels, *split(name)), abs=TOLERANCE
            ), name


def test_the_tie_rule_is_what_makes_them_equal():
    """The same runs under favourable ids must differ, or the test above shows nothing."""
    rng = random.Random(0)
    differing = dict.fromkeys(NAMES, 0)
    for _ in range(250):
        scores, grades = random_query(rng)
        run, qrels = with_ids(scores, grades, favourable_id)
        values = ours(scores, grades)
        for name in NAMES:
            differing[name] += reference(run, qrels, *split(name)) > values[name] + TOLERANCE
    assert min(differing.values()) > 0, differing


def test_is_the_least_value_over_all_names_that_documents_could_have():
    rng = random.Random(1)
    for _ in range(60):
        scores, grades = random_query(rng)
        values = ours(scores, grades)
        for _ in range(5):
            salt = rng.random()
            run, qrels = with_ids(
                scores, grades, lambda n, g, salt=salt: f"{random.Random(n + salt).random()}"
            )
            for name in NAMES:
                assert values[name] <= reference(run, qrels, *split(name)) + TOLERANCE, name


def test_equals_trec_eval_whatever_the_ids_when_nothing_is_tied():
    rng = random.Random(2)
    for _ in range(100):
        _, grades = random_query(rng)
        scores = rng.sample(range(10 * len(grades)), len(grades))
        run, qrels = with_ids(scores, grades, favourable_id)
        values = ours(scores, grades)
        for name in NAMES:
            assert values[name] == pytest.approx(
                reference(run, qrels, *split(name)), abs=TOLERANCE
            ), name


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("@100")])
def test_a_constant_scorer_gets_no_credit(name):
    grades = [3, 2, 1] + [0] * 20
    assert ours([0.5] * 23, grades)[name] == 0
    assert ours([0.5] * 3 + [0.4] * 20, grades)[name] > 0
