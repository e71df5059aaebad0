"""Losses against slow references and sentence-transformers; what they cost in memory."""

from __future__ import annotations

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
    distance_to_reference,
    evaluate,
    make_labelled,
    make_pairs,
    make_rich,
)
from tests.unit.losses.references import reference_info_nce, reference_similarity_kl
from vembed.losses import build_criterion, distillation
from vembed.losses.distillation import SimilarityKL

MASKED = ("infonce", "infonce-bidirectional", "sigmoid")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("tile_size", [1, 2, 5, "auto"])
def test_the_result_does_not_depend_on_the_tiles(name, tile_size):
    kwargs = {"learn_temperature": True, "tile_size": tile_size}
    if name == "infonce-bidirectional":
        kwargs["bidirectional"] = True
    loss_type = name.split("-")[0]
    case = Case(
        name, lambda: build_criterion(loss_type, **kwargs), make_rich, CASES[name].reference
    )
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


@pytest.mark.parametrize("seed", range(8))
def test_any_coincidence_of_contents(seed):
    case = Case(
        "random",
        lambda: build_criterion("infonce", bidirectional=True, temperature=0.5, tile_size=3),
        _random_contents,
        reference_info_nce,
    )
    assert distance_to_reference(case, _random_contents(seed)) <= EXACT


def test_a_pair_alone_costs_exactly_nothing():
    pair = {role: rows[:1] for role, rows in make_pairs(0).items()}
    outcome = evaluate(build_criterion("infonce", bidirectional=True), pair)
    assert outcome.loss == 0
    assert all((grad == 0).all() for grad in outcome.grads.values())


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
        ("sigmoid", {"learn_temperature": True}, _many_rows(600)),
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
