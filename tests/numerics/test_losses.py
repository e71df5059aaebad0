"""Losses against slow references and sentence-transformers; what they cost in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.losses.conformance import (
    CASES,
    EMBEDDINGS,
    EXACT,
    Case,
    build_double,
    distance_to_reference,
    evaluate,
    make_labelled,
    make_pairs,
    make_rich,
)
from tests.unit.losses.references import reference_info_nce, reference_similarity_kl
from vembed.losses import build_criterion
from vembed.losses.distillation import similarity as distillation
from vembed.losses.distillation.similarity import SimilarityKL
from vembed.losses.margins import Margins

MASKED = ("infonce", "infonce-bidirectional", "sigmoid")


@pytest.mark.parametrize("name", [*MASKED, "infonce-margins", "sigmoid-margins"])
@pytest.mark.parametrize("tile_size", [1, 2, 5, "auto"])
def test_the_result_does_not_depend_on_the_tiles(name, tile_size):
    def build():
        criterion = CASES[name].build()
        criterion.tile_size = tile_size
        return criterion

    case = replace(CASES[name], build=build)
    assert distance_to_reference(case, make_rich(3)) <= EXACT


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("ids", ["ids_query", "ids_positive", "ids_negative"])
def test_without_any_of_the_ids_the_loss_is_another(name, ids):
    """Each kind of duplicate is in the batch, so each kind of id must matter."""
    blind = {key: rows for key, rows in make_rich(0).items() if key != ids}
    case = CASES[name]
    assert distance_to_reference(case, blind, make_rich(0)) > 1e-3
    assert distance_to_reference(case, blind) <= EXACT


def _random_contents(seed):
    """Few contents for many rows: every kind of coincidence."""
    generator = torch.Generator().manual_seed(seed)
    queries = 8
    batch = {
        "counts_positive": torch.randint(1, 4, (queries,), generator=generator),
        "counts_negative": torch.randint(0, 3, (queries,), generator=generator),
    }
    counts = {
        "query": queries,
        "positive": int(batch["counts_positive"].sum()),
        "negative": int(batch["counts_negative"].sum()),
    }
    contents = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    for role, count in counts.items():
        batch[f"ids_{role}"] = torch.randint(0, 6, (count,), generator=generator)
        batch[role] = contents[batch[f"ids_{role}"]]
    return batch


@pytest.mark.parametrize("margins", [{}, {"absolute_margin": 0.3}])
@pytest.mark.parametrize("seed", range(8))
def test_any_coincidence_of_contents(seed, margins):
    kwargs = {"bidirectional": True, "temperature": 0.5, "tile_size": 3} | margins
    case = Case(
        "random",
        lambda: build_criterion("infonce", **kwargs),
        _random_contents,
        reference_info_nce,
    )
    assert distance_to_reference(case, _random_contents(seed)) <= EXACT


def test_a_pair_alone_costs_exactly_nothing():
    pair = {role: rows[:1] for role, rows in make_pairs(0).items()}
    outcome = evaluate(build_criterion("infonce", bidirectional=True), pair)
    assert outcome.loss == 0
    assert all((grad == 0).all() for grad in outcome.grads.values())


# --- margins


def _unit(*degrees):
    """Vectors in the plane."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _loss_of_one_query(positive, negatives, **kwargs):
    """Of a query at 0 degrees, temperature 1."""
    batch = {"query": _unit(0), "positive": _unit(positive), "negative": _unit(*negatives)}
    return evaluate(build_criterion("infonce", temperature=1.0, **kwargs), batch).loss


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    "margins",
    [
        {"absolute_margin": 0.0},
        {"absolute_margin": -0.3},
        {"relative_margin": 0.0},
        {"relative_margin": 0.5},
        {"absolute_margin": 0.1, "relative_margin": -0.2},
    ],
)
@pytest.mark.parametrize("tile_size", [1, 3, "auto"])
def test_margins_are_those_of_the_reference(name, margins, tile_size):
    kwargs = {"learn_temperature": True, "tile_size": tile_size}
    kwargs |= {"bidirectional": True} if name == "infonce-bidirectional" else {}
    without, case = (
        replace(CASES[name], build=partial(build_criterion, name.split("-")[0], **kwargs, **more))
        for more in ({}, margins)
    )
    assert distance_to_reference(case, make_rich(0)) <= EXACT
    losses = [evaluate(build_double(each), make_rich(0)).loss for each in (without, case)]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("margins", [{"relative_margin": 0.2}, {"absolute_margin": 0.1}])
def test_a_margin_of_a_negative_similarity_leaves_out_more_not_less(margins):
    """The positive has the similarity -0.5, so the limit is -0.6; as a share of it, -0.4."""
    within, below = math.degrees(math.acos(-0.55)), math.degrees(math.acos(-0.65))
    loss = _loss_of_one_query(120, [within, below], **margins)
    with_both = _loss_of_one_query(120, [within, below])
    with_one = _loss_of_one_query(120, [below])
    assert abs(loss - with_one) <= EXACT
    assert abs(loss - with_both) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tile_size", [1, 7, "auto"])
def test_a_copy_of_the_positive_is_left_out_with_and_without_ids(dtype, tile_size):
    """By rounding alone, its similarity in a tile is above or below that of the positive."""
    query = torch.randn(20, 300, dtype=torch.float64)
    positive = 3 * query + torch.randn(20, 300, dtype=torch.float64)
    batch = {"query": query.to(dtype), "positive": positive.to(dtype)}
    batch["negative"] = batch["positive"].clone()
    ids = {f"ids_{role}": torch.arange(20) for role in ("positive", "negative")}
    criterion = build_criterion("infonce", temperature=1.0, tile_size=tile_size)
    with_ids = evaluate(criterion, batch | ids).loss
    assert abs(evaluate(criterion, batch).loss - with_ids) > 0.01
    criterion.margins = Margins(absolute=0.0)
    assert abs(evaluate(criterion, batch).loss - with_ids) < 1e-6


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_batch_without_negatives_left_costs_nothing(bidirectional):
    kwargs = {"bidirectional": bidirectional, "learn_temperature": True, "absolute_margin": 2.0}
    outcome = evaluate(build_criterion("infonce", **kwargs), make_rich(0))
    assert outcome.loss == 0
    assert all((grad == 0).all() for grad in outcome.grads.values())
    outcome = evaluate(build_criterion("sigmoid", absolute_margin=2.0), make_rich(0))
    assert outcome.loss > 0
    assert (outcome.grads["negative"] == 0).all()
    assert all(outcome.grads[role].abs().max() > 0 for role in ("query", "positive"))


def test_a_query_is_judged_by_its_most_similar_positive():
    """At 45 degrees a candidate is nearer than the positive at 60, but not than that at 30."""
    batch = {
        "query": _unit(0),
        "positive": _unit(60, 30),
        "negative": _unit(45),
        "counts_positive": torch.tensor([2]),
    }
    losses = [
        evaluate(build_criterion("infonce", absolute_margin=margin), batch).loss
        for margin in (None, 0.0, 0.2)
    ]
    assert losses[0] == losses[1] > losses[2] == 0


def test_supcon_without_partners_is_zero_with_a_graph():
    batch = make_labelled(0) | {"labels": torch.arange(6)}
    outcome = evaluate(build_criterion("supcon"), batch)
    assert outcome.loss == 0
    assert (outcome.grads["query"] == 0).all()


def test_cosent_of_equal_scores_is_zero_with_a_graph():
    outcome = evaluate(build_criterion("cosent"), make_pairs(0) | {"scores": torch.ones(6)})
    assert outcome.loss == 0
    assert all((grad == 0).all() for grad in outcome.grads.values())


def test_a_small_loss_keeps_its_digits_in_float32():
    """-log(p) with p near one is lost when written as log-sum-exp minus score."""
    query = torch.eye(3)
    batch = {"query": query, "positive": query}
    outcome = evaluate(build_criterion("infonce", temperature=0.05), batch)
    truth = torch.log1p(2 * torch.exp(torch.tensor(-20.0, dtype=torch.float64)))
    torch.testing.assert_close(outcome.loss.double(), truth, rtol=1e-5, atol=0)


def test_the_largest_scale_does_not_overflow():
    batch = make_rich(0) | {role: make_rich(0)[role].float() for role in EMBEDDINGS}
    outcome = evaluate(build_criterion("infonce", temperature=1e-3), batch)
    assert outcome.loss.isfinite()
    assert all(grad.isfinite().all() for grad in outcome.grads.values())


def test_a_second_derivative_is_refused():
    rows = make_pairs(0)
    query = rows["query"].requires_grad_()
    loss = build_criterion("infonce")(query, rows["positive"])
    (grad,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_embeddings_of_a_frozen_tower_get_no_gradient():
    rows = make_pairs(0)
    rows["positive"].requires_grad_()
    build_criterion("infonce", bidirectional=True)(rows["query"], rows["positive"]).backward()
    full = evaluate(build_criterion("infonce", bidirectional=True), make_pairs(0))
    torch.testing.assert_close(rows["positive"].grad, full.grads["positive"], rtol=0, atol=EXACT)
    assert rows["query"].grad is None


# --- memory


class _LargestTensor(TorchDispatchMode):
    """Counts the numbers of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:
                self.numel = max(self.numel, tensor.numel())
        return out


def _largest(criterion, batch):
    with _LargestTensor() as mode:
        evaluate(criterion, batch)
    return mode.numel


def _many_rows(count, **extras):
    query, positive = torch.randn(2, count, 4)
    return {"query": query, "positive": positive} | extras


@pytest.mark.parametrize(
    ("loss_type", "kwargs", "batch"),
    [
        ("infonce", {"bidirectional": True}, _many_rows(600)),
        ("infonce", {"bidirectional": True, "absolute_margin": 0.0}, _many_rows(600)),
        ("sigmoid", {"learn_temperature": True, "relative_margin": 0.1}, _many_rows(600)),
        # Two contents, so that half of all pairs are related, and one query with all documents.
        ("infonce", {}, _many_rows(600, ids_positive=torch.arange(600) % 2)),
        ("sigmoid", {}, _many_rows(600, ids_query=torch.zeros(600, dtype=torch.int64))),
        ("supcon", {}, _many_rows(600, labels=torch.arange(600) % 7)),
        ("cosent", None, _many_rows(600, scores=torch.rand(600))),
    ],
)
def test_no_tensor_is_as_large_as_the_batch_squared(loss_type, kwargs, batch):
    """Forward and backward; a tile of 64 x 64 and rows x size are the largest there may be."""
    kwargs = {} if kwargs is None else kwargs | {"tile_size": 64}
    assert _largest(build_criterion(loss_type, **kwargs), batch) <= 64 * 64
    if kwargs:
        dense = build_criterion(loss_type, **kwargs | {"tile_size": 600})
        assert _largest(dense, batch) >= 600 * 600


# --- the same definitions elsewhere


def _st_loss(loss_class, columns, labels=None, **kwargs):
    leaves = [column.clone().requires_grad_() for column in columns]
    loss = loss_class(nn.Identity(), **kwargs).compute_loss_from_embeddings(leaves, labels)
    return loss, torch.autograd.grad(loss, leaves)


def _agrees(outcome, theirs, roles):
    loss, grads = theirs
    torch.testing.assert_close(outcome.loss, loss.detach(), rtol=0, atol=1e-6)
    for role, grad in zip(roles, grads, strict=True):
        torch.testing.assert_close(outcome.grads[role], grad, rtol=0, atol=1e-6)


def test_infonce_is_that_of_sentence_transformers():
    rows = make_pairs(0)
    theirs = _st_loss(st_losses.MultipleNegativesRankingLoss, rows.values(), scale=20.0)
    _agrees(evaluate(build_criterion("infonce", temperature=0.05), rows), theirs, rows)


def test_infonce_with_hard_negatives_is_that_of_sentence_transformers():
    """Two negatives per query: theirs come as columns, ours query by query."""
    rows, columns = make_pairs(0), torch.randn(2, 6, 5, dtype=torch.float64)
    theirs = _st_loss(
        st_losses.MultipleNegativesRankingLoss, [*rows.values(), *columns], scale=20.0
    )
    negative = columns.transpose(0, 1).reshape(12, 5)
    outcome = evaluate(build_criterion("infonce", temperature=0.05), rows | {"negative": negative})
    grads = outcome.grads["negative"].view(6, 2, 5).transpose(0, 1)
    outcome.grads.update(first=grads[0], second=grads[1])
    _agrees(outcome, theirs, ["query", "positive", "first", "second"])


def test_bidirectional_infonce_is_that_of_sentence_transformers():
    rows = make_pairs(0)
    theirs = _st_loss(
        st_losses.MultipleNegativesRankingLoss,
        rows.values(),
        scale=20.0,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    criterion = build_criterion("infonce", temperature=0.05, bidirectional=True)
    _agrees(evaluate(criterion, rows), theirs, rows)


def test_cosent_is_that_of_sentence_transformers():
    rows, scores = make_pairs(0), torch.tensor([0.1, 0.9, 0.5, 0.9, 0.0, 1.0])
    theirs = _st_loss(st_losses.CoSENTLoss, rows.values(), scores, scale=20.0)
    criterion = build_criterion("cosent", temperature=0.05)
    _agrees(evaluate(criterion, rows | {"scores": scores}), theirs, rows)


# --- distillation


def _roles(batch):
    return {role: batch[role].clone() for role in EMBEDDINGS if role in batch}


@pytest.mark.parametrize("temperature", [0.05, 2.0])
def test_similarity_kl_is_its_equation(temperature):
    student, teacher = _roles(make_rich(0)), _roles(make_rich(1))
    for rows in student.values():
        rows.requires_grad_()
    fast = SimilarityKL(temperature)(student, teacher)
    slow = reference_similarity_kl(temperature, student, teacher)
    assert abs(fast - slow) <= EXACT
    without_factor = slow / temperature**2
    assert abs(fast - without_factor) > 1e-3
    for grad, truth in zip(
        torch.autograd.grad(fast, student.values()),
        torch.autograd.grad(slow, student.values()),
        strict=True,
    ):
        assert (grad - truth).abs().max() <= EXACT


def test_similarity_kl_in_tiles(monkeypatch):
    student, teacher = _roles(_many_rows(300)), _roles(_many_rows(300))
    student["query"].requires_grad_()
    whole = SimilarityKL()(student, teacher)
    monkeypatch.setattr(distillation, "TILE_BYTES", 4 * 300 * 7)  # seven rows
    with _LargestTensor() as mode:
        tiled = SimilarityKL()(student, teacher)
        (grad,) = torch.autograd.grad(tiled, student["query"])
    assert mode.numel <= 300 * 7
    torch.testing.assert_close(tiled, whole)
    torch.testing.assert_close(grad, torch.autograd.grad(whole, student["query"])[0])


def test_the_teacher_gets_no_gradient_and_may_have_another_size():
    student = _roles(make_pairs(0))
    teacher = {role: torch.randn(6, 9, dtype=torch.float64, requires_grad=True) for role in student}
    student["query"].requires_grad_()
    SimilarityKL()(student, teacher).backward()
    assert student["query"].grad.abs().max() > 0
    assert all(rows.grad is None for rows in teacher.values())


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn():
    student = _roles(make_pairs(0))
    student["query"].requires_grad_()
    loss = SimilarityKL()(student, _roles(make_pairs(0)))
    (grad,) = torch.autograd.grad(loss, student["query"])
    assert abs(loss) <= EXACT
    assert grad.abs().max() <= EXACT
