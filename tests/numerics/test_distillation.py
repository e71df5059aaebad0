"""Distillation losses against slow references and sentence-transformers, and at their edges."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn

from tests.unit.losses.conformance import EMBEDDINGS, EXACT, make_pairs, make_rich, take_queries
from tests.unit.losses.distilling import CASES, build, scored, teacher_rows
from vembed.errors import DataError
from vembed.losses import DISTILLATION_LOSSES, build_distillation_loss
from vembed.losses.distillation.weighted import Term, WeightedDistillation

every_case = pytest.mark.parametrize("name", CASES)


def roles(batch):
    return {role: batch[role].clone() for role in EMBEDDINGS if role in batch}


def call(loss, student, teacher, batch):
    """The loss as the objective calls it."""
    return WeightedDistillation([Term("x", loss)]).each(student, teacher, batch)["x"]


def leaves(batch):
    return {role: rows.requires_grad_() for role, rows in roles(batch).items()}


def test_every_kind_has_a_case():
    assert {name.split("-")[0] for name in CASES} == set(DISTILLATION_LOSSES)


@every_case
@pytest.mark.parametrize("has_scores", [True, False])
def test_its_equation(name, has_scores):
    make, reference = CASES[name]
    batch = scored(0)
    if not has_scores:
        del batch["teacher_scores"]
    loss, student, teacher = make(), leaves(batch), teacher_rows(batch)
    fast = call(loss, student, teacher, batch)
    slow = reference(loss, student, teacher, batch)
    assert abs(fast - slow) <= EXACT
    assert slow > 1e-3
    trained = [*student.values(), *loss.parameters()]
    fast_grads, slow_grads = (
        torch.autograd.grad(value, trained, allow_unused=True) for value in (fast, slow)
    )
    for grad, truth in zip(fast_grads, slow_grads, strict=True):
        assert (grad - truth).abs().max() <= EXACT


@every_case
def test_another_teacher_is_another_loss(name):
    make, _ = CASES[name]
    batch, loss = make_rich(0), make()
    values = [call(loss, roles(batch), teacher_rows(batch, seed=seed), batch) for seed in (9, 10)]
    assert abs(values[0] - values[1]) > 1e-3


@every_case
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    make, _ = CASES[name]
    batch, loss = make_rich(0), make()
    student = leaves(batch)
    if getattr(loss, "projection", None) is not None:
        loss.projection = None
    if name == "score":
        loss.teacher_temperature = loss.temperature
    value = call(loss, student, roles(batch), batch)
    grads = torch.autograd.grad(value, student.values())
    assert abs(value) <= EXACT
    # Angles at points that nearly coincide are rounded a little more.
    assert max(grad.abs().max() for grad in grads) <= 100 * EXACT


@every_case
def test_the_order_of_rows_does_not_matter(name):
    make, _ = CASES[name]
    if name == "relational-few":
        pytest.skip("which rows are looked at depends on their order")
    batch, loss = scored(0), make()
    turned = take_queries(
        {k: v for k, v in batch.items() if k != "teacher_scores"}, [5, 0, 3, 2, 4, 1]
    )
    turned["teacher_scores"] = batch["teacher_scores"][[5, 0, 3, 2, 4, 1]]
    values = [call(loss, roles(b), teacher_rows(b), b) for b in (batch, turned)]
    assert abs(values[0] - values[1]) <= EXACT


@every_case
@pytest.mark.parametrize("rows", ["one", "same"])
def test_degenerate_batches_have_finite_gradients(name, rows):
    make, _ = CASES[name]
    loss = make()
    pairs = make_pairs(0)
    student = (
        {role: x[:1] for role, x in pairs.items()}
        if rows == "one"
        else {role: x[:1].expand(6, -1) for role, x in pairs.items()}
    )
    student, teacher = leaves(student), teacher_rows(make_pairs(1))
    teacher = {role: x[: len(student[role])] for role, x in teacher.items()}
    value = call(loss, student, teacher, {})
    grads = torch.autograd.grad(value, student.values())  # connected, whatever it is
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(name, dtype):
    make, _ = CASES[name]
    batch = scored(0)
    loss = make().float()
    low = {role: rows.to(dtype) for role, rows in roles(batch).items()}
    taught = {role: rows.to(dtype) for role, rows in teacher_rows(batch).items()}
    batch["teacher_scores"] = batch["teacher_scores"].float()
    with torch.autocast("cpu", torch.bfloat16):
        value = call(loss, low, taught, batch)
    wide = [{role: rows.float() for role, rows in side.items()} for side in (low, taught)]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(loss, *wide, batch))


@pytest.mark.parametrize("name", ["similarity_kl", "embedding", "relational"])
@pytest.mark.parametrize("kept", [("query",), ("positive", "negative")])
def test_a_teacher_of_one_side_teaches_that_side(name, kept):
    make, reference = CASES[name]
    batch, loss = make_rich(0), make()
    student = leaves(batch)
    teacher = {role: rows for role, rows in teacher_rows(batch).items() if role in kept}
    value = call(loss, student, teacher, batch)
    grads = torch.autograd.grad(value, student.values(), allow_unused=True)
    for role, grad in zip(student, grads, strict=True):
        assert (grad is not None and grad.abs().max() > 0) == (role in kept)
    if name != "similarity_kl":
        assert abs(value - reference(loss, student, teacher, batch)) <= EXACT


def test_similarity_kl_of_one_side_leaves_a_row_itself_out():
    student, teacher = make_pairs(0)["query"], teacher_rows(make_pairs(1))["query"]
    value = build("similarity_kl")({"query": student}, {"query": teacher})
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        p, q = (
            torch.softmax(
                torch.stack([torch.cosine_similarity(x[i], x[j], 0) for j in others]) / 0.3, 0
            )
            for x in (teacher, student)
        )
        total += (p * (p / q).log()).sum()
    assert abs(value - 0.09 * total / 6) <= EXACT


def test_the_projection_is_trained_and_the_same_everywhere():
    torch.manual_seed(1)
    first = build("embedding")
    torch.manual_seed(2)
    second = build("embedding")
    assert first.projection.shape == (5, 7)
    assert torch.equal(first.projection, second.projection)
    assert build_distillation_loss("embedding", student_dim=7, teacher_dim=7).projection is None
    batch = make_rich(0)
    call(first, roles(batch), teacher_rows(batch), batch).backward()
    assert first.projection.grad.abs().max() > 0
    assert [name for name, _ in WeightedDistillation([Term("x", first)]).named_parameters()] == [
        "losses.0.projection"
    ]


# --- sentence-transformers


class _Given(nn.Module):
    """A model whose features are its embeddings."""

    def forward(self, rows):
        return {"sentence_embedding": rows}


def features(*sides):
    return list(sides)


def test_mse_is_that_of_sentence_transformers():
    student, teacher = make_pairs(0), make_pairs(1)
    theirs = st_losses.MSELoss(_Given())(features(student["query"]), teacher["query"])
    ours = build_distillation_loss("embedding", distance="mse")
    value = ours({"query": student["query"]}, {"query": teacher["query"]})
    assert abs(value - theirs) <= 1e-6


@pytest.mark.parametrize(("distance", "theirs"), [("cosine", "cosine"), ("mse", "mse")])
def test_embeddings_of_all_roles_are_those_of_sentence_transformers(distance, theirs):
    """Theirs is the mean over columns, here equally long, ours over rows."""
    student, teacher = make_pairs(0), make_pairs(1)
    roles = ("query", "positive")
    loss = st_losses.EmbedDistillLoss(_Given(), distance_metric=theirs)
    taught = torch.stack([teacher[role] for role in roles], dim=1)
    expected = loss(features(*(student[role] for role in roles)), taught)
    ours = build_distillation_loss("embedding", distance=distance)
    value = ours({r: student[r] for r in roles}, {r: teacher[r] for r in roles})
    assert abs(value - expected) <= 1e-6


def test_score_kl_is_that_of_sentence_transformers():
    batch = triplets()
    rows = [batch["query"], batch["positive"], batch["negative"]]
    theirs = st_losses.DistillKLDivLoss(_Given(), temperature=2.0)(
        features(*rows), batch["teacher_scores"]
    )
    ours = build_distillation_loss("score", temperature=2.0, similarity="dot")
    assert abs(call(ours, roles(batch), {}, batch) - theirs) <= 1e-6


def test_score_margins_are_those_of_sentence_transformers():
    batch = triplets()
    scores = batch["teacher_scores"]
    rows = [batch["query"], batch["positive"], batch["negative"]]
    theirs = st_losses.MarginMSELoss(_Given())(features(*rows), scores[:, 0] - scores[:, 1])
    ours = build_distillation_loss("score", form="margin_mse", similarity="dot")
    assert abs(call(ours, roles(batch), {}, batch) - theirs) <= 1e-6


def test_counts_may_be_left_out_where_all_rows_have_equally_many():
    loss, batch = build_distillation_loss("score"), triplets()
    counted = call(loss, roles(batch), {}, batch)
    bare = {key: value for key, value in batch.items() if not key.startswith("counts")}
    assert call(loss, roles(batch), {}, bare) == counted
    with pytest.raises(DataError, match="must add up to the rows. Received: 6 and 0 for 6 pos"):
        call(loss, {**roles(batch), "negative": batch["negative"][:5]}, {}, bare)


def triplets():
    pairs = make_pairs(0)
    ones = torch.ones(6, dtype=torch.int64)
    return {
        **pairs,
        "negative": make_pairs(5)["query"],
        "counts_positive": ones,
        "counts_negative": ones,
        "teacher_scores": torch.randn(
            6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ),
    }
