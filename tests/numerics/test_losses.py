"""Losses against slow references and sentence-transformers; what they cost in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores, mean_colbert_scores
from sentence_transformers.sentence_transformer import losses as st_losses
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

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
from vembed.losses import build_criterion, triplet
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
        (
            "infonce",
            {"query_negatives": True, "document_negatives": True, "hardness": 9.0},
            _many_rows(600),
        ),
        (
            "infonce",
            {"guided": True, "query_negatives": True},
            _many_rows(600, guide_query=torch.randn(600, 3), guide_positive=torch.randn(600, 3)),
        ),
        ("normalized_softmax", {"num_classes": 600}, _many_rows(600, labels=torch.arange(600))),
        ("angle", None, _many_rows(600, scores=torch.rand(600))),
        ("online_contrastive", None, _many_rows(600, scores=torch.rand(600))),
        ("cosent", None, _many_rows(600, scores=torch.rand(600))),
    ],
)
def test_no_tensor_is_as_large_as_the_batch_squared(loss_type, kwargs, batch):
    """Forward and backward; a tile of 64 x 64 and rows x size are the largest there may be."""
    kwargs = {} if kwargs is None else kwargs | {"tile_size": 64}
    kwargs |= {"embedding_dim": 4} if "num_classes" in kwargs else {}
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


EXTRA = {"query_negatives": True, "document_negatives": True}


def _gte(rows, *directions):
    return _st_loss(
        st_losses.MultipleNegativesRankingLoss,
        rows.values(),
        scale=20.0,
        directions=("query_to_doc", "query_to_query", "doc_to_doc", *directions),
    )


def test_extra_negatives_are_those_of_sentence_transformers():
    rows = make_pairs(0)
    _agrees(evaluate(build_criterion("infonce", **EXTRA), rows), _gte(rows), rows)


def test_a_joint_sum_is_that_of_sentence_transformers_with_the_positive_once():
    """Of one pair, theirs is log 2 whatever the similarity; of two, ours is theirs less that."""
    pair = {role: rows[:1] for role, rows in make_pairs(0).items()}
    theirs, _ = _gte(pair, "doc_to_query")
    assert abs(theirs - math.log(2)) < 1e-6
    criterion = build_criterion("infonce", bidirectional=True, joint=True, **EXTRA)
    assert evaluate(criterion, pair).loss == 0
    # Two pairs that are mirror images, so that the mean is each row's own.
    rows = {"query": _unit(0, 90), "positive": _unit(30, 60)}
    theirs, _ = _gte(rows, "doc_to_query")
    once = torch.log(torch.exp(theirs) - 1)
    assert abs(evaluate(criterion, rows).loss - once) < 1e-6


def test_hardness_is_that_of_sentence_transformers():
    rows, negative = make_pairs(0), torch.randn(6, 5, dtype=torch.float64)
    theirs = _st_loss(
        st_losses.MultipleNegativesRankingLoss,
        [*rows.values(), negative],
        scale=20.0,
        hardness_mode="all_negatives",
        hardness_strength=9.0,
    )
    rows |= {"negative": negative}
    _agrees(evaluate(build_criterion("infonce", hardness=9.0), rows), theirs, rows)


@pytest.mark.parametrize("margin", [{"absolute_margin": 0.1}, {"relative_margin": 0.2}])
@pytest.mark.parametrize("contrast", [True, False])
def test_guided_infonce_is_gist_embed(margin, contrast):
    rows = make_pairs(0) | {"negative": torch.randn(6, 5, dtype=torch.float64)}
    guide = {role: torch.randn(6, 3, dtype=torch.float64) for role in rows}
    ((strategy, size),) = margin.items()
    theirs = _st_loss_of_two(
        st_losses.GISTEmbedLoss,
        rows.values(),
        guide.values(),
        temperature=0.05,
        margin_strategy=strategy.removesuffix("_margin"),
        margin=size,
        contrast_anchors=contrast,
        contrast_positives=contrast,
    )
    batch = rows | {f"guide_{role}": of_role for role, of_role in guide.items()}
    extra = {"query_negatives": contrast, "document_negatives": contrast}
    guided, plain = (
        build_criterion("infonce", guided=guided, **margin, **extra) for guided in (True, False)
    )
    _agrees(evaluate(guided, batch), theirs, rows)
    # The model's own similarities judge otherwise.
    assert abs(evaluate(plain, rows).loss - theirs[0]) > 1e-3


def _st_loss_of_two(loss_class, columns, guide_columns, **kwargs):
    """A loss that asks two models for embeddings."""
    leaves = [column.clone().requires_grad_() for column in columns]
    model, guide = _Columns(leaves), _Columns(list(guide_columns))
    features = [{"input_ids": torch.tensor(number)} for number in range(len(leaves))]
    loss = loss_class(model, guide, **kwargs)(features, None)
    return loss, torch.autograd.grad(loss, leaves)


class _Columns(nn.Module):
    """A model of sentence-transformers' kind that knows the embeddings of each column."""

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    max_seq_length = 8

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def __getitem__(self, number):
        return self

    def forward(self, features):
        return {"sentence_embedding": self.columns[int(features["input_ids"])]}


GRADES = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.0, 1.0])
SIMILAR = torch.tensor([0, 1, 1, 0, 0, 1])


@pytest.mark.parametrize(
    ("loss_type", "loss_class", "scores", "theirs"),
    [
        ("angle", st_losses.AnglELoss, GRADES, {"scale": 20.0}),
        ("cosine_mse", st_losses.CosineSimilarityLoss, GRADES, {}),
        ("contrastive", st_losses.ContrastiveLoss, SIMILAR, {"margin": 0.5}),
    ],
)
def test_losses_of_scored_pairs_are_those_of_sentence_transformers(
    loss_type, loss_class, scores, theirs
):
    rows = make_pairs(0)
    outcome = evaluate(build_criterion(loss_type), rows | {"scores": scores})
    _agrees(outcome, _st_loss(loss_class, rows.values(), scores, **theirs), rows)


def test_online_contrastive_adds_up_the_mean_in_sentence_transformers():
    rows = make_pairs(0)
    outcome = evaluate(build_criterion("online_contrastive"), rows | {"scores": SIMILAR})
    loss, grads = _st_loss(st_losses.OnlineContrastiveLoss, rows.values(), SIMILAR, margin=0.5)
    counted = round(float(loss.detach() / outcome.loss))
    assert counted > 1
    _agrees(outcome, (loss / counted, [grad / counted for grad in grads]), rows)


def test_own_triplets_are_those_of_sentence_transformers():
    rows = make_pairs(0) | {"negative": torch.randn(6, 5, dtype=torch.float64)}
    theirs = _st_loss(
        st_losses.TripletLoss,
        rows.values(),
        distance_metric=st_losses.TripletDistanceMetric.COSINE,
        triplet_margin=0.5,
    )
    criterion = build_criterion("triplet", triplets="own", margin=0.5)
    _agrees(evaluate(criterion, rows), theirs, rows)


@pytest.mark.parametrize(
    ("triplets", "loss_class"),
    [
        ("all", st_losses.BatchAllTripletLoss),
        ("hard", st_losses.BatchHardTripletLoss),
        ("semi_hard", st_losses.BatchSemiHardTripletLoss),
    ],
)
def test_triplets_of_labels_are_those_of_sentence_transformers(triplets, loss_class):
    rows, labels = {"query": make_pairs(0)["query"]}, torch.tensor([7, 3, 7, 3, 3, 7])
    cosine = st_losses.BatchHardTripletLossDistanceFunction.cosine_distance
    theirs = _st_loss(loss_class, rows.values(), labels, distance_metric=cosine, margin=0.5)
    criterion = build_criterion("label_triplet", triplets=triplets, margin=0.5)
    _agrees(evaluate(criterion, rows | {"labels": labels}), theirs, rows)


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse_is_that_of_sentence_transformers(negatives):
    rows, columns = make_pairs(0), torch.randn(negatives, 6, 5, dtype=torch.float64)
    scores = torch.randn(6, 1 + negatives, dtype=torch.float64)
    loss, grads = _st_loss(st_losses.MarginMSELoss, [*rows.values(), *columns], scores)
    batch = rows | {"negative": columns.transpose(0, 1).reshape(-1, 5), "teacher_scores": scores}
    _agrees(evaluate(build_criterion("margin_mse"), batch), (loss, grads[:2]), rows)


class _Tokens(nn.Module):
    """A multi-vector model of sentence-transformers' kind, whose features are its embeddings."""

    def forward(self, features, task=None):
        tokens = features["tokens"]
        return {"token_embeddings": tokens, "attention_mask": (tokens != 0).any(-1)}


@pytest.mark.parametrize(
    ("ours", "scale", "scores"),
    [({"normalize_scores": False}, 1.0, colbert_scores), ({}, 20.0, mean_colbert_scores)],
)
def test_maxsim_is_that_of_sentence_transformers(ours, scale, scores):
    """Two hard negatives of each query, which theirs takes as columns; items of other lengths."""
    generator = torch.Generator().manual_seed(0)
    columns = nn.functional.normalize(
        torch.randn(4, 6, 3, 5, dtype=torch.float64, generator=generator), dim=-1
    )
    columns[:, ::2, 2] = 0
    leaves = [column.clone().requires_grad_() for column in columns]
    with column_merging_disabled():
        loss = MultiVectorMultipleNegativesRankingLoss(
            _Tokens(), scale=scale, similarity_fct=scores
        )([{"tokens": leaf} for leaf in leaves])
    grads = torch.autograd.grad(loss, leaves)
    rows = {
        "query": columns[0],
        "positive": columns[1],
        "negative": columns[2:].transpose(0, 1).reshape(12, 3, 5),
    }
    outcome = evaluate(build_criterion("maxsim", temperature=1 / scale, **ours), rows)
    negative = torch.stack(grads[2:], dim=1).reshape(12, 3, 5)
    # Padding gets a gradient in neither, but the length of a token does in theirs: it is given.
    theirs = [
        _along(grad, rows[role]) for grad, role in zip([*grads[:2], negative], rows, strict=True)
    ]
    _agrees(outcome, (loss.double(), theirs), rows)  # it adds tokens up in float32


def _along(grad, tokens):
    """A gradient without the part that would change the length of unit vectors."""
    return grad - (grad * tokens).sum(-1, keepdim=True) * tokens


# --- definitions that a reference alone could share a mistake with


def test_hardness_without_gradient_of_the_weights():
    """The weights are constants: the gradient is that of a sum with them written out."""
    rows = make_pairs(0)
    leaves = {role: of_role.clone().requires_grad_() for role, of_role in rows.items()}
    unit = [nn.functional.normalize(of_role, dim=1) for of_role in leaves.values()]
    cosine = unit[0] @ unit[1].T
    weights = torch.exp(9.0 * cosine.detach()).fill_diagonal_(1)
    loss = -(20 * cosine.diagonal() - (weights * torch.exp(20 * cosine)).sum(1).log()).mean()
    grads = torch.autograd.grad(loss, leaves.values())
    outcome = evaluate(build_criterion("infonce", hardness=9.0), rows)
    _agrees(outcome, (loss, grads), rows)
    assert abs(evaluate(build_criterion("infonce"), rows).loss - loss) > 1e-3


def test_an_own_hard_negative_that_another_row_pairs_with_the_query_is_none():
    """Rows 0 and 1 are the same query; the hard negative of row 0 is the positive of row 1."""
    batch = make_pairs(0) | {
        "negative": make_pairs(0)["positive"][[1]],
        "counts_negative": torch.tensor([1, 0, 0, 0, 0, 0]),
        "ids_query": torch.tensor([7, 7, 2, 3, 4, 5]),
        "ids_positive": torch.tensor([10, 11, 12, 13, 14, 15]),
        "ids_negative": torch.tensor([11]),
    }
    case = replace(CASES["infonce-own"], make_batch=lambda seed: batch)
    assert distance_to_reference(case, batch) <= EXACT
    other = batch | {"ids_negative": torch.tensor([20])}
    masked, counted = (
        evaluate(build_criterion("infonce", hard_negatives="own"), rows) for rows in (batch, other)
    )
    assert (masked.grads["negative"] == 0).all()
    assert masked.loss < counted.loss


def test_a_guide_of_the_same_vectors_judges_as_the_model_itself():
    rows = make_rich(0)
    batch = rows | {f"guide_{role}": rows[role] for role in EMBEDDINGS}
    kwargs = {"absolute_margin": 0.2, "bidirectional": True, "query_negatives": True}
    own, guided = (
        evaluate(build_criterion("infonce", guided=guided, **kwargs), batch)
        for guided in (False, True)
    )
    assert own.distance(guided) <= EXACT


def test_a_margin_below_zero_similarity_is_safe():
    """With positives of negative similarity, a relative margin still leaves out more, not less."""
    batch = {"query": _unit(0), "positive": _unit(120), "negative": _unit(122)}
    guide = {f"guide_{role}": rows for role, rows in batch.items()}
    losses = [
        evaluate(
            build_criterion("infonce", guided=True, relative_margin=margin), batch | guide
        ).loss
        for margin in (0.0, 0.5)
    ]
    assert losses[0] > 0
    assert losses[1] == 0


def test_queries_that_share_a_document_are_not_told_apart():
    rows = make_pairs(0) | {"ids_positive": torch.tensor([1, 1, 2, 3, 4, 5])}
    rows["positive"][1] = rows["positive"][0]
    apart = rows | {"ids_positive": torch.tensor([1, 6, 2, 3, 4, 5])}
    criterion = build_criterion("infonce", query_negatives=True, document_negatives=True)
    assert abs(evaluate(criterion, rows).loss - evaluate(criterion, apart).loss) > 1e-3


@pytest.mark.parametrize("triplets", ["all", "hard", "semi_hard"])
def test_triplets_in_blocks(monkeypatch, triplets):
    case = CASES["triplet"]
    batch = case.make_batch(0)
    whole = evaluate(build_criterion("triplet", triplets=triplets), batch)
    monkeypatch.setattr(triplet, "TILE_BYTES", 8 * 15 * 2)  # two queries of fifteen documents
    heights = []
    kinds = triplet._kinds
    monkeypatch.setattr(
        triplet, "_kinds", lambda *args: heights.append(len(kinds(*args))) or kinds(*args)
    )
    assert evaluate(build_criterion("triplet", triplets=triplets), batch).distance(whole) <= EXACT
    assert heights == [2, 2, 2]


def test_arcface_without_a_margin_is_normalized_softmax():
    losses = []
    for loss_type, kwargs in (("arcface", {"margin": 0.0}), ("normalized_softmax", {})):
        torch.manual_seed(0)
        criterion = build_criterion(
            loss_type, temperature=0.05, num_classes=8, embedding_dim=5, **kwargs
        )
        losses.append(evaluate(criterion.double(), make_labelled(0)).loss)
    assert losses[0] == losses[1]


def test_arcface_grows_with_the_angle_past_pi():
    """Where cos(a + margin) would rise again, the loss must not fall."""
    criterion = build_criterion(
        "arcface", temperature=1.0, margin=1.0, num_classes=2, embedding_dim=2
    ).double()
    criterion.proxies.data = _unit(0, 90)
    losses = [
        evaluate(criterion, {"query": _unit(angle), "labels": torch.tensor([0])}).loss
        for angle in range(-180, -90, 5)
    ]
    assert all(farther > nearer for farther, nearer in zip(losses, losses[1:], strict=False))


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
