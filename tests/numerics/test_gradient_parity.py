"""The harness of `vembed verify gradients` on one process: over every loss and encoder family.

Two processes: tests/distributed/test_gradient_parity.py.
"""

from __future__ import annotations

import pytest
import torch

from tests.tiny import PAIRS, tiny_bert, write_rows
from tests.unit.models.families import family_path, pictures, rows_in
from vembed.config import TrainConfig
from vembed.losses import LOSSES
from vembed.models import ENCODERS
from vembed.registry import resolve
from vembed.training import gradient_cache
from vembed.training.teaching.teach import teach
from vembed.training.trainer import Trainer
from vembed.training.verification import gradients as harness
from vembed.training.verification.cases import (
    ACCUMULATION,
    AMP,
    AS_CONFIGURED,
    DROPOUT,
    LORA,
    LOSS_SCALING,
    UNEVEN,
    Case,
    Scope,
)
from vembed.training.verification.comparison import compare
from vembed.training.verification.subject import load_subject, prepare
from vembed.training.verification.verify import quiet, verify_on

FAMILIES = {"bert": "text", "modernbert": "text", "qwen3": "text"}
"""Tiny models of texts, each with its kind in `ENCODERS`."""

OF_IMAGES = {
    "clip": ("dual", "t2i"),
    "siglip2": ("dual", "i2m"),
    "vit": ("vision", "i2i"),
    "mae": ("vision", "i2i"),
    "qwen2_5_vl": ("vlm", "m2t"),
    "composed": ("composed", "t2m"),
}
"""Tiny models for images, each with its kind and a mode; every mode: tests/distributed."""

DISTINCT = {target: name for name, target in LOSSES.items()}.values()
"""A name for each loss of the table."""

ALONE = Scope(processes=1, precision="float64", pairs=8)

# Embeddings that draw other masks differ by this much at least; a rounding error by 1e-12 at most.
VISIBLE = 0.1


def rows_for(loss: str) -> list[dict]:
    """Rows that the loss can use; a third of the pairs has hard negatives, two share a positive."""
    required = resolve("loss_type", loss, LOSSES).required_fields
    if "label" in required:
        return [{"text": pair["query"], "label": i % 5} for i, pair in enumerate(PAIRS)]
    if "score" in required:
        return [{**pair, "score": i * 7 % 5 / 4} for i, pair in enumerate(PAIRS)]
    if "teacher_scores" in required:
        return [
            {**pair, "negatives": ["the sun is cold"], "teacher_scores": [4.0, i % 5]}
            for i, pair in enumerate(PAIRS)
        ]
    rows = [dict(pair) for pair in PAIRS]
    for number in range(0, len(rows), 3):
        rows[number]["negatives"] = [PAIRS[(number + 5) % len(rows)]["positive"], "the sun is cold"]
    rows[7]["positive"] = rows[8]["positive"]
    return rows


def fitting(loss: str) -> dict:
    """Settings that the loss needs."""
    tokens = loss in LOSSES and LOSSES[loss].endswith(":MaxSimInfoNCE")
    return {"pooling_method": "none", "projection_dim": 8} if tokens else {}


@pytest.fixture
def make_config(tmp_path, request):
    """A config of a tiny model and of rows for the loss."""

    def make(family: str = "bert", loss: str = "infonce", rows=None, **settings) -> TrainConfig:
        path = write_rows(tmp_path / "rows.jsonl", rows or rows_for(loss))
        model = request.getfixturevalue(f"tiny_{family}_path")
        settings = {**fitting(loss), "loss_type": loss, **settings}
        return TrainConfig(model_name=str(model), data_path=str(path), **settings)

    return make


def verify(config: TrainConfig, *variations, scope: Scope = ALONE):
    return verify_on(None, config, scope, variations=variations)


def failures(verification) -> list[str]:
    return [f"{s.case.name}: {s.text} ({s.setting})" for s in verification.suspicions]


@pytest.mark.parametrize(
    ("loss", "family"),
    [
        *((loss, "bert") for loss in DISTINCT),
        ("infonce", "modernbert"),
        ("supcon", "qwen3"),
        ("maxsim", "qwen3"),
    ],
)
def test_every_loss_and_every_encoder_family(make_config, loss, family):
    verification = verify(make_config(family, loss), AS_CONFIGURED, DROPOUT)
    assert not failures(verification)
    assert not any(g.is_zero for r in verification.results for g in r.groups.values())


@pytest.mark.parametrize("family", OF_IMAGES)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid", "cosent"])
def test_losses_of_pairs_with_images(tmp_path, loss, family):
    _, mode = OF_IMAGES[family]
    config = TrainConfig(
        model_name=str(family_path(family)),
        data_path=str(write_rows(tmp_path / "rows.jsonl", rows_in(mode, rows_for(loss)))),
        image_root=str(pictures()),
        retrieval_mode=mode,
        loss_type=loss,
    )
    with quiet():
        verification = verify(config, AS_CONFIGURED, scope=Scope(1, "float64", 4))
    assert not failures(verification)
    assert not any(g.is_zero for r in verification.results for g in r.groups.values())


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        ("infonce", {"query_negatives": True, "hard_negatives": "own", "hardness": 3.0}),
        ("maxsim", {"hard_negatives": "own", "hardness": 3.0}),
    ],
)
def test_a_guided_loss(make_config, tiny_qwen3_path, loss, arguments):
    config = make_config(loss=loss, guide_model_name=str(tiny_qwen3_path), loss_kwargs=arguments)
    assert not failures(verify(config, AS_CONFIGURED, DROPOUT))


def test_every_kind_of_encoder_has_a_family_here():
    assert {*FAMILIES.values(), *(kind for kind, _ in OF_IMAGES.values())} == set(ENCODERS)


@pytest.mark.parametrize(
    "settings",
    [
        {"learn_temperature": True, "loss_bidirectional": True},
        {"use_lora": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "torch_dtype": "bfloat16", "gradient_cache_keep": "auto"},
        {"use_gradient_cache": True, "gradient_cache_chunk_size": 1},
        {
            "loss": "maxsim",
            "loss_kwargs": {"normalize_scores": False},
            "loss_bidirectional": True,
            "learn_temperature": True,
            "temperature": 0.5,
            "loss_tile_size": 3,
        },
    ],
    ids=[
        "learned-both-ways",
        "lora-checkpointing-accumulation",
        "half-precision",
        "chunks-of-one",
        "sums-of-tokens-in-tiles",
    ],
)
def test_settings_of_the_run(make_config, settings):
    assert not failures(verify(make_config(**settings), AS_CONFIGURED, DROPOUT, AMP))


def test_distillation(make_config, tiny_qwen3_path):
    config = make_config(teacher_model_name=str(tiny_qwen3_path), distillation_alpha=0.3)
    verification = verify(config, AS_CONFIGURED, ACCUMULATION)
    assert not failures(verification)
    # The teacher pads on the left and turns its positions in float32: cutting rows shows in 1e-8.
    assert {r.reference for r in verification.results} == {"replayed"}


NESTED = {
    "use_mrl": True,
    "mrl_dims": [8, 32, 16],
    "mrl_weights": [0.5, 1.0, 2.0],
    "learn_temperature": True,
}


def test_a_matryoshka_with_all_that_it_goes_with(make_config, tmp_path, tiny_qwen3_path):
    """Distillation with a projection, a guide, adapters, accumulation."""
    config = make_config(
        **NESTED,
        guide_model_name=str(tiny_qwen3_path),
        teacher_model_name=str(tiny_bert(tmp_path / "teacher", hidden_size=16, seed=5)),
        distillation_loss={"similarity_kl": 1, "embedding": 0.5},
    )
    verification = verify(config, AS_CONFIGURED, ACCUMULATION, DROPOUT, LORA)
    assert not failures(verification)
    scales = [r.groups["logit_scale"] for r in verification.results]
    assert scales
    assert not any(group.is_zero for group in scales)


@pytest.mark.parametrize("loss", ["arcface", "angle"])
def test_a_matryoshka_of_other_losses(make_config, loss):
    assert not failures(verify(make_config(loss=loss, use_mrl=True), AS_CONFIGURED))


EVERY_KIND = {"similarity_kl": 1, "embedding": 0.5, "relational": 0.5, "score": 0.5}


@pytest.mark.parametrize("stored", [False, True])
def test_every_kind_of_distillation(make_config, tmp_path, stored):
    """From a teacher of another size, whose projection is trained."""
    teacher = {
        "teacher_model_name": str(tiny_bert(tmp_path / "teacher", hidden_size=16, seed=5)),
        "teacher_cache": str(tmp_path / "cache") if stored else None,
    }
    config = make_config(**teacher, distillation_loss=EVERY_KIND, distillation_alpha=0.3)
    if stored:
        teach({**teacher, "data_path": config.data_path, "device": "cpu"})
    verification = verify(config, AS_CONFIGURED, ACCUMULATION, DROPOUT, LORA)
    assert not failures(verification)
    projections = [r.groups["distillation.losses.1.projection"] for r in verification.results]
    assert projections
    assert not any(group.is_zero for group in projections)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_any_number_of_kept_chunks(make_config, keep, monkeypatch):
    original = harness.step_gradients

    def step(trainer: Trainer, batches, *, seed):
        trainer.gradient_cache.keep = keep
        return original(trainer, batches, seed=seed)

    monkeypatch.setattr("vembed.training.verification.verify.step_gradients", step)
    assert not failures(verify(make_config(), DROPOUT))


# --- what the harness must see


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_without_replay_the_error_is_plain(make_config, monkeypatch, precision):
    monkeypatch.setattr(gradient_cache.RandomState, "restore", lambda self: None)
    scope = Scope(1, precision, 8)
    verification = verify(make_config(), DROPOUT, ACCUMULATION, scope=scope)
    (suspicion,) = verification.suspicions
    assert (suspicion.case.variation, suspicion.case.step) == (DROPOUT, "cached")
    assert suspicion.setting == "use_gradient_cache"
    assert "random numbers" in suspicion.text
    (result,) = [r for r in verification.results if not r.passed]
    assert 0.2 < result.groups["backbone"].difference < 2
    assert result.groups["backbone"].cosine < 0.95


def test_a_reference_with_other_masks_would_measure_noise(make_config):
    """Why the reference replays: without, a right gradient looks as wrong as one without replay."""
    subject = load_subject(make_config(), ALONE)
    prepared = prepare(subject, Case(DROPOUT, "cached", 1))
    trainer, whole = prepared.trainer, prepared.whole()
    actual = harness.step_gradients(trainer, whole, seed=1)
    same = harness.replayed_gradients(trainer, whole, [whole], seed=1)
    other = harness.replayed_gradients(trainer, whole, [whole], seed=2)
    one_forward = harness.whole_batch_gradients(trainer, whole)
    assert compare(actual, same)["backbone"].difference <= 1e-12
    assert compare(actual, other)["backbone"].difference > VISIBLE
    assert compare(actual, one_forward)["backbone"].difference > VISIBLE


def test_double_loss_scaling_is_seen(make_config, monkeypatch):
    original = gradient_cache._grad_rows

    def scaled_again(*args):
        return original(*args) * LOSS_SCALING.loss_scale

    monkeypatch.setattr(gradient_cache, "_grad_rows", scaled_again)
    verification = verify(make_config(), LOSS_SCALING)
    assert [s.case.step for s in verification.suspicions] == ["plain", "cached"]
    assert all("the loss scale is applied more" in s.text for s in verification.suspicions)
    assert {s.setting for s in verification.suspicions} == {"mixed_precision"}


def test_an_accumulation_divisor_that_is_applied_twice_is_seen(make_config, monkeypatch):
    original = Trainer.reduce_gradients

    def divide_again(self, micro_batches=1):
        original(self, micro_batches)
        for parameter in self.parameters():
            parameter.grad /= micro_batches

    monkeypatch.setattr(Trainer, "reduce_gradients", divide_again)
    verification = verify(make_config(), AS_CONFIGURED, ACCUMULATION)
    failed = [(s.case.variation, s.case.step) for s in verification.suspicions]
    assert failed == [(ACCUMULATION, "plain"), (ACCUMULATION, "cached")]
    assert {s.setting for s in verification.suspicions} == {"gradient_accumulation_steps"}
    assert "is 0.5 times what it should be" in verification.suspicions[0].text


def test_mixed_precision_is_on_where_it_is_verified(make_config):
    """Its gradient is not that of float32; or the comparison would be of two exact ones."""
    subject = load_subject(make_config(), Scope(1, "float32", 8))
    found = []
    for variation in (AMP, ACCUMULATION):
        prepared = prepare(subject, Case(variation, "plain", 1))
        found.append(harness.step_gradients(prepared.trainer, prepared.whole()[:1], seed=1))
    difference = compare(*found)["backbone"].difference
    assert 1e-3 < difference < 0.5


def test_adapters_have_a_gradient_on_both_sides(make_config):
    prepared = prepare(load_subject(make_config(), ALONE), Case(LORA, "plain", 1))
    found = harness.step_gradients(prepared.trainer, prepared.whole(), seed=1)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert {name.split(".")[-3] for name in found} == {"lora_A", "lora_B"}


# --- traps


def towers(loader: str) -> dict:
    return {"encoder_mode": f"tests.numerics.two_towers:{loader}"}


def test_the_last_chunk_uses_one_tower_only(make_config):
    variations = (AS_CONFIGURED, ACCUMULATION, LORA, LOSS_SCALING)
    verification = verify(make_config(**towers("load")), *variations)
    assert not failures(verification)
    assert set(verification.results[0].groups) == {"text_model", "vision_model"}


def test_a_frozen_tower(make_config):
    verification = verify(make_config(**towers("load_with_frozen_tower")), AS_CONFIGURED)
    assert not failures(verification)
    assert set(verification.results[0].groups) == {"text_model"}


def test_a_parameter_that_nothing_uses(make_config):
    config = make_config(**towers("load_with_spare_parameter"), ddp_find_unused_parameters=True)
    assert not failures(verify(config, AS_CONFIGURED, UNEVEN))


def test_an_encoder_that_takes_no_adapters_is_said_to_take_none(make_config):
    verification = verify(make_config(lora_target_modules=["no_such_layer"]), LORA)
    assert all("lora_target_modules" in result.skipped for result in verification.results)
    assert verification.passed


def test_a_batch_of_one(make_config):
    scope = Scope(1, "float64", 1)
    config = make_config(rows=[rows_for("infonce")[0]])
    verification = verify(config, AS_CONFIGURED, UNEVEN, scope=scope)
    assert not failures(verification)
    assert not verification.results[0].groups["backbone"].is_zero  # it has hard negatives
    assert "without one of 1 rows" in verification.results[-1].skipped
    alone = verify(make_config(rows=PAIRS[:1]), AS_CONFIGURED, scope=scope)
    assert alone.results[0].groups["backbone"].is_zero  # nothing to tell apart from


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_a_batch_of_one_text_repeated(make_config, loss):
    verification = verify(make_config("bert", loss, rows=[PAIRS[0]] * 8), AS_CONFIGURED)
    assert not failures(verification)
    groups = verification.results[0].groups
    # Copies of a positive are no negatives: InfoNCE has nothing to rank, and no NaN either.
    assert groups["backbone"].is_zero == (loss == "infonce")


def test_the_harness_leaves_the_process_as_it_was(make_config):
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    verify(make_config(), LOSS_SCALING)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
