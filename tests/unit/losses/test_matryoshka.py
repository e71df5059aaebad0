"""Every loss on prefixes: the conformance battery, what must differ, what is refused."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer, losses
from torch import nn

from tests.tiny import PAIRS
from tests.unit.losses.conformance import (
    EXACT,
    MATRYOSHKAS,
    Case,
    check_all_duplicates,
    check_autocast,
    check_batch_of_one,
    check_cached,
    check_low_precision,
    check_nothing_to_compare,
    check_reference,
    check_row_order,
    distance_to_reference,
    make_labelled,
    make_pairs,
    make_rich,
)
from vembed.distributed import global_mean
from vembed.errors import ConfigError
from vembed.losses import LOSSES, build_criterion
from vembed.losses.matryoshka import Matryoshka, complete_dims, innermost
from vembed.training.learned_scale import keep_in_model
from vembed.training.objective import Objective

every_case = pytest.mark.parametrize("case", MATRYOSHKAS.values(), ids=MATRYOSHKAS)


def test_every_loss_of_one_vector_has_a_case():
    assert set(LOSSES) - {"maxsim", "colbert"} <= set(MATRYOSHKAS)


@every_case
@pytest.mark.parametrize(
    "check",
    [
        check_reference,
        check_batch_of_one,
        check_all_duplicates,
        check_row_order,
        check_nothing_to_compare,
        check_cached,
        check_autocast,
    ],
)
def test_check(case, check):
    check(case)


@every_case
def test_low_precision(case):
    check_low_precision(case, torch.bfloat16)


class _WeightsLeftBehind(Matryoshka):
    """Dimensions are put in order and weights are not."""

    def __init__(self, criterion, dims, weights):
        super().__init__(criterion, dims, weights)
        self.slow_weights = self.weights
        self.weights = dict(zip(self.weights, weights, strict=True))


class _NotRescaled(Matryoshka):
    """Prefixes as they are cut, for a loss that looks at lengths."""

    def of_dims(self, query, rows):
        positive = rows["positive"]
        return {d: self.criterion(query[:, :d], positive[:, :d]) for d in self.weights}


def _dot(query, positive):
    return global_mean(-(query * positive).sum(1))


@pytest.mark.parametrize(
    ("wrapper", "differs"), [(Matryoshka, False), (_WeightsLeftBehind, True), (_NotRescaled, True)]
)
def test_a_weight_or_a_length_gone_astray_is_seen(wrapper, differs):
    def slow(criterion, batch):
        weights = {3: 0.5, 5: 1.25, 2: 2.0}
        total = 0
        for dim, weight in weights.items():
            unit = [nn.functional.normalize(batch[r][:, :dim]) for r in ("query", "positive")]
            total = total - weight * (unit[0] * unit[1]).sum(1).mean()
        return total

    case = Case(
        "dot", lambda: wrapper(_dot, (3, 5, 2), (0.5, 1.25, 2.0)), make_pairs, reference=slow
    )
    distance = distance_to_reference(case, make_pairs(0))
    assert distance > 0.01 if differs else distance <= EXACT


def test_sentence_transformers_gives_the_same(tiny_st_path):
    model = SentenceTransformer(str(tiny_st_path), device="cpu").eval()
    texts = [[row[side] for row in PAIRS[:6]] for side in ("query", "positive")]
    ranking = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    dims, weights = [8, 32, 16], [0.3, 1.0, 2.0]
    features = [model.preprocess(side) for side in texts]
    theirs = losses.MatryoshkaLoss(model, ranking, dims, weights)(features, torch.empty(0))
    query, positive = (model.encode(side, convert_to_tensor=True) for side in texts)
    ours = Matryoshka(build_criterion("infonce", temperature=0.05), dims, weights)
    assert abs(ours(query, positive=positive) - theirs) <= 1e-5 * theirs


def test_the_temperature_is_shared_and_kept_in_range_and_in_the_model():
    inner = build_criterion("infonce", learn_temperature=True, temperature=0.01)
    wrapped = Matryoshka(inner, (5, 2))
    assert [name for name, _ in wrapped.named_parameters()] == ["criterion.logit_scale"]
    with torch.no_grad():
        inner.logit_scale += 1
    wrapped.clamp()
    assert float(inner.logit_scale) == pytest.approx(4.60517)
    kept = {}

    class Encoder:
        def set_logits(self, **logits):
            kept.update(logits)

    keep_in_model(wrapped, Encoder())
    assert kept == {"logit_scale": inner.logit_scale}
    assert innermost(wrapped) is inner is innermost(inner)


def test_each_dimension_is_a_part_of_the_task():
    batch = make_rich(0)
    criterion = Matryoshka(build_criterion("infonce"), (2, 5), (3.0, 1.0))
    student = {role: batch.pop(role) for role in ("query", "positive", "negative")}
    loss = Objective(criterion)(student, batch)
    assert list(loss.parts) == ["task", "mrl.5", "mrl.2"]
    assert loss.weights == {"task": 1.0}
    torch.testing.assert_close(loss.total, loss.parts["mrl.5"] + 3 * loss.parts["mrl.2"])
    taught = Objective(criterion, lambda student, teacher: student["query"].sum(), 0.25)
    both = taught(student, batch, teacher={"query": student["query"]})
    torch.testing.assert_close(both.total, 0.25 * loss.total + 0.75 * both.parts["distillation"])


def test_layers_are_parts_of_the_task_as_dimensions_are():
    """Each as the loss of the embeddings of that layer; the distillation sees the whole."""
    batch = make_rich(0)
    whole = {role: batch.pop(role) for role in ("query", "positive", "negative")}
    generator = torch.Generator().manual_seed(1)
    early = {r: torch.randn(e.shape, generator=generator).to(e) for r, e in whole.items()}
    student = {role: torch.stack([early[role], whole[role]], dim=1) for role in whole}
    inner = build_criterion("infonce", bidirectional=True)
    criterion = Matryoshka(inner, (2, 5), (3.0, 1.0), layers=(4,))
    loss = Objective(criterion)(student, batch)
    alone = {"": whole, "layers4.": early}
    expected = {
        f"mrl.{name}{part.removeprefix('mrl.')}": value
        for name, embeddings in alone.items()
        for part, value in Objective(Matryoshka(inner, (2, 5)))(embeddings, batch).parts.items()
        if part != "task"
    }
    assert list(loss.parts) == ["task", "mrl.5", "mrl.2", "mrl.layers4.5", "mrl.layers4.2"]
    for name, value in expected.items():
        torch.testing.assert_close(loss.parts[name], value)
    total = sum((3 if name.endswith("2") else 1) * value for name, value in expected.items())
    torch.testing.assert_close(loss.total, total)
    assert criterion.total_weight == 8
    seen = []
    taught = Objective(criterion, lambda student, teacher: seen.append(student) or 0 * loss.total)
    taught(student, batch, teacher={"query": whole["query"]})
    assert all(torch.equal(seen[0][role], whole[role]) for role in whole)


def test_class_vectors_are_cut_as_the_items_are():
    criterion = build_criterion("arcface", num_classes=8, embedding_dim=5).double()
    batch = make_labelled(0)
    Matryoshka(criterion, (2,))(**batch).backward()
    assert (criterion.proxies.grad[:, 2:] == 0).all()
    assert (criterion.proxies.grad[:, :2] != 0).any()


class _OneSize(nn.Module):
    def __init__(self, embedding_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(embedding_dim))

    def forward(self, query):
        return (query * self.weight).sum()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Matryoshka(build_criterion("maxsim"), (5,)), "a vector for each token"),
        (lambda: Matryoshka(_OneSize(5), (5, 2)), "prefix_dim"),
        (lambda: Matryoshka(Matryoshka(_dot, (5,)), (5,)), "already"),
        (lambda: Matryoshka(_dot, ()), "mrl_dims"),
        (lambda: Matryoshka(_dot, (2, 2)), "mrl_dims"),
        (lambda: Matryoshka(_dot, (2, 0)), "mrl_dims"),
        (lambda: Matryoshka(_dot, (2, 1), (1,)), "mrl_weights"),
        (lambda: Matryoshka(_dot, (2,), (0,)), "mrl_weights"),
        (lambda: Matryoshka(_dot, (9,))(torch.ones(2, 5), positive=torch.ones(2, 5)), r"\[2, 5\]"),
        (lambda: Matryoshka(_dot, (2,))(torch.ones(2, 3, 5)), r"\[2, 3, 5\]"),
        (lambda: Matryoshka(_dot, (2,), layers=(1,))(torch.ones(2, 5)), r"2 numbers of layers"),
        (lambda: Matryoshka(_dot, (2,), layers=(1,))(torch.ones(2, 3, 5)), r"\[2, 3, 5\]"),
        (lambda: complete_dims([64], None, embedding_dim=32), "32 numbers. Received: 64"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_whole_is_always_among_the_dimensions():
    assert complete_dims(None, None, embedding_dim=384) == dict.fromkeys((384, 192, 96, 48, 24), 1)
    assert complete_dims(None, None, embedding_dim=20) == {20: 1.0, 10: 1.0}
    assert list(complete_dims([8, 16], [0.5, 2], embedding_dim=32).items()) == [
        (32, 1.0),
        (16, 2.0),
        (8, 0.5),
    ]
    assert complete_dims([8, 32], [0.5, 2], embedding_dim=32) == {32: 2.0, 8: 0.5}
