from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity, normalize

from tests.unit.training.first_step.batches import hand_made, healthy
from vembed.training.first_step.rows import (
    Copies,
    compare_with_scores,
    compare_with_teacher,
    count_copies,
    gather_ids,
    look_at_embeddings,
    look_at_labels,
    look_at_scores,
)


def test_copies():
    student, extras = hand_made([0, 1, 2, 3])
    ids = {role: gather_ids(student, extras, role) for role in ("query", "positive")}
    assert count_copies(ids["query"]) == Copies(rows=4, different=4, with_copy=0)
    assert count_copies(ids["positive"]) == Copies(rows=5, different=4, with_copy=2)
    assert count_copies(torch.tensor([5, 5, 5])) == Copies(rows=3, different=1, with_copy=3)
    assert count_copies(gather_ids(student, {}, "query")) is None
    del student["negative"], extras["ids_negative"]
    assert count_copies(gather_ids(student, extras, "negative")) is None


def test_similarity_of_random_pairs_leaves_copies_out():
    student, extras = hand_made([0, 1, 2, 3])
    ids = {role: extras[f"ids_{role}"] for role in ("query", "positive")}
    found = look_at_embeddings(student, ids, extras["counts_positive"])
    different = normalize(student["positive"][[0, 1, 3, 4]], dim=1)
    cosine = different @ different.T
    expected = (cosine.sum() - 4) / 12
    assert found.random_pairs["positive"] == pytest.approx(float(expected))
    pairs = cosine_similarity(student["query"][[0, 1, 2, 3, 3]], student["positive"])
    assert found.own_pairs == pytest.approx(float(pairs.mean()))
    assert found.norms["query"].high == pytest.approx(float(student["query"].norm(dim=1).max()))


def test_single_items_have_no_pairs():
    found = look_at_embeddings({"query": torch.ones(1, 3)}, {"query": None}, None)
    assert found.own_pairs is None
    assert found.random_pairs == {"query": None}


def test_labels_by_hand():
    found = look_at_labels(torch.tensor([1, 1, 1, 2, 2, 9]))
    assert (found.items, found.labels, found.alone) == (6, 3, 1)
    assert (found.partners.low, found.partners.high) == (0, 2)
    assert found.partners.mean == pytest.approx((2 * 3 + 1 * 2) / 6)


def test_scores_by_hand():
    found = look_at_scores(torch.tensor([0.0, 0.5, 0.5, 1.0]))
    assert (found.pairs, found.different) == (4, 3)
    assert (found.spread.low, found.spread.mean, found.spread.high) == (0, 0.5, 1)


def test_agreement_with_a_teacher():
    student, _ = healthy(rows=9, seed=1)
    other, _ = healthy(rows=9, seed=2)
    same = compare_with_teacher(student, {r: 3 * e for r, e in student.items()}, 0.1)
    assert (same.spearman, same.same_best) == (pytest.approx(1), 1)
    found = compare_with_teacher(student, other, 0.1)
    sides = [
        normalize(e["query"], dim=1) @ normalize(e["positive"], dim=1).T for e in (student, other)
    ]
    ranks = [spearmanr(*rows).statistic for rows in zip(*(s.numpy() for s in sides), strict=True)]
    assert found.spearman == pytest.approx(sum(ranks) / 9)
    assert found.same_best == (sides[0].argmax(1) == sides[1].argmax(1)).double().mean()
    assert found.teacher_deviation == pytest.approx(float(sides[1].std(dim=1).mean()))


def test_agreement_with_a_teacher_of_one_side():
    """Rows of that side are ranked for each other, itself left out."""
    student, _ = healthy(rows=6, seed=1)
    other, _ = healthy(rows=6, seed=2)
    found = compare_with_teacher(student, {"query": other["query"]}, 0.1)
    ranks = []
    for i in range(6):
        rest = [j for j in range(6) if j != i]
        sides = [cosine_similarity(e["query"][i][None], e["query"][rest]) for e in (student, other)]
        ranks.append(spearmanr(*(side.numpy() for side in sides)).statistic)
    assert found.spearman == pytest.approx(sum(ranks) / 6)


def test_agreement_with_scores_of_a_teacher():
    """Of each query's own candidates; a query with one says nothing."""
    student, extras = hand_made([0, 1, 2, 3])
    extras["counts_negative"] = torch.tensor([2, 0, 0, 1])
    documents = [[0, 5, 6], [1], [2], [3, 4, 7]]
    every = torch.cat([student["positive"], student["negative"]])
    scores = torch.full((4, 3), -torch.inf)
    for row, of_row in enumerate(documents):
        scores[row, : len(of_row)] = cosine_similarity(student["query"][row][None], every[of_row])
    found = compare_with_scores(student, {**extras, "teacher_scores": 5 * scores}, 5.0)
    assert (found.spearman, found.same_best) == (pytest.approx(1), 1)
    assert found.temperature == 5.0
    turned = compare_with_scores(student, {**extras, "teacher_scores": -5 * scores.abs()}, 5.0)
    assert turned.spearman < 1


def test_one_document_agrees_with_nothing():
    student = {"query": torch.ones(1, 3), "positive": torch.ones(1, 3)}
    assert compare_with_teacher(student, student, 0.1) is None
