"""The harness of `vembed verify gradients` on two processes: what it passes, and what it sees.

One process: tests/numerics/test_gradient_parity.py.
"""

from __future__ import annotations

import pytest

from tests.numerics.test_gradient_parity import (
    DISTINCT,
    EVERY_KIND,
    FAMILIES,
    NESTED,
    failures,
    fitting,
    rows_for,
    towers,
)
from tests.tiny import PAIRS, tiny_bert, write_rows
from vembed.config import TrainConfig
from vembed.training import gradient_cache, trainer
from vembed.training.teaching.teach import teach
from vembed.training.verification.cases import (
    ACCUMULATION,
    AS_CONFIGURED,
    DROPOUT,
    LORA,
    UNEVEN,
    VARIATIONS,
    Case,
    Scope,
)
from vembed.training.verification.processes import LocalProcesses
from vembed.training.verification.verify import verify_on

TWO = Scope(processes=2, precision="float64", pairs=4)


@pytest.fixture(scope="module")
def pair():
    """Two processes that serve every test here."""
    with LocalProcesses(2, timeout_s=120) as group:
        yield group


@pytest.fixture
def verify(pair, tmp_path, request):
    """Verifies a tiny model on rows for the loss."""

    def run(*variations, family="bert", loss="infonce", rows=None, scope=TWO, **settings):
        path = write_rows(tmp_path / "rows.jsonl", rows or rows_for(loss))
        model = request.getfixturevalue(f"tiny_{family}_path")
        settings = {**fitting(loss), "loss_type": loss, **settings}
        config = TrainConfig(model_name=str(model), data_path=str(path), **settings)
        return verify_on(pair, config, scope, variations=variations)

    return run


def test_a_matryoshka(verify, tmp_path):
    teacher = tiny_bert(tmp_path / "teacher", hidden_size=16, seed=5)
    verification = verify(AS_CONFIGURED, UNEVEN, LORA, **NESTED, teacher_model_name=str(teacher))
    assert not failures(verification)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_matryoshka_of_layers(verify, strategy):
    settings = {"mrl_layers": [1], "distributed_strategy": strategy}
    verification = verify(AS_CONFIGURED, UNEVEN, LORA, **NESTED, **settings)
    assert not failures(verification)


@pytest.mark.parametrize("loss", DISTINCT)
def test_every_loss(verify, loss):
    verification = verify(AS_CONFIGURED, UNEVEN, loss=loss)
    assert not failures(verification)
    assert not any(g.is_zero for r in verification.results for g in r.groups.values())


# One of each kind: tiles and ids, all pairs, labels, a part of its own that is trained, tokens.
@pytest.mark.parametrize("loss", ["infonce", "cosent", "supcon", "arcface", "maxsim"])
def test_kinds_of_losses_under_every_condition(verify, loss):
    verification = verify(*VARIATIONS, loss=loss)
    assert not failures(verification)
    assert len(verification.results) == 4 * len(VARIATIONS)
    assert not any(g.is_zero for r in verification.results for g in r.groups.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoder_family(verify, family):
    assert not failures(verify(AS_CONFIGURED, DROPOUT, UNEVEN, family=family))


@pytest.mark.parametrize("stored", [False, True])
def test_every_kind_of_distillation(verify, tmp_path, stored):
    """From a teacher of another size, whose projection is trained."""
    teacher = {
        "teacher_model_name": str(tiny_bert(tmp_path / "teacher", hidden_size=16, seed=5)),
        "teacher_cache": str(tmp_path / "cache") if stored else None,
    }
    if stored:
        path = write_rows(tmp_path / "rows.jsonl", rows_for("infonce"))
        teach({**teacher, "data_path": str(path), "device": "cpu"})
    settings = {"distillation_loss": EVERY_KIND, "distillation_alpha": 0.3}
    verification = verify(AS_CONFIGURED, ACCUMULATION, DROPOUT, UNEVEN, **teacher, **settings)
    assert not failures(verification)
    groups = [r.groups["distillation.losses.1.projection"] for r in verification.results]
    assert not any(group.is_zero for group in groups)


def test_float32(verify):
    scope = Scope(2, "float32", 4)
    settings = {"learn_temperature": True, "loss_bidirectional": True}
    verification = verify(*VARIATIONS, scope=scope, **settings)
    assert not failures(verification)
    exact = [r for r in verification.results if not r.case.variation.autocast]
    assert {r.tolerance for r in exact} == {1e-5}
    assert max(g.difference for r in exact for g in r.groups.values()) > 1e-9


def test_a_learned_temperature_and_both_directions(verify):
    settings = {"learn_temperature": True, "loss_bidirectional": True}
    verification = verify(*VARIATIONS, **settings)
    assert not failures(verification)
    assert all(set(r.groups) == {"backbone", "logit_scale"} for r in verification.results)


def test_adapters_and_checkpointing(verify):
    settings = {"use_lora": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    assert not failures(verify(AS_CONFIGURED, UNEVEN, **settings))


def test_distillation(verify, tiny_qwen3_path):
    """The teacher's embeddings depend a little on how rows are cut, though not in every cut."""
    settings = {"teacher_model_name": str(tiny_qwen3_path), "rows": PAIRS}
    assert not failures(verify(AS_CONFIGURED, UNEVEN, **settings))


@pytest.mark.parametrize(
    ("settings", "variations"),
    [
        ({"ddp_static_graph": True}, (AS_CONFIGURED,)),
        ({"distributed_strategy": "fsdp2"}, (AS_CONFIGURED, ACCUMULATION, LORA, UNEVEN)),
    ],
    ids=["static-graph", "fsdp2"],
)
def test_other_ways_to_reduce_gradients(verify, settings, variations):
    assert not failures(verify(*variations, learn_temperature=True, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_lora": True, "use_dora": True, "use_rslora": True, "dropout": 0.2},
        {
            "freeze": ["backbone.embeddings.*"],
            "unfreeze_at_step": {"backbone.encoder.layer.0.*": 5, "loss.*": 5},
            "learn_temperature": True,
        },
    ],
    ids=["dora", "partial"],
)
def test_adapters_of_other_kinds_and_frozen_parts(verify, settings):
    verification = verify(AS_CONFIGURED, UNEVEN, **settings)
    assert not failures(verification)
    assert all(set(result.groups) == {"backbone"} for result in verification.results)


# --- traps


def test_a_process_without_hard_negatives(verify):
    rows = [dict(pair) for pair in PAIRS[:8]]
    rows[3]["negatives"] = ["the sun is cold", "an old stone"]
    assert not failures(verify(AS_CONFIGURED, ACCUMULATION, DROPOUT, UNEVEN, rows=rows))


def test_one_row_for_each_process(verify):
    scope = Scope(2, "float64", 1)
    # With one row less, one process has none.
    verification = verify(AS_CONFIGURED, ACCUMULATION, DROPOUT, UNEVEN, scope=scope)
    assert not failures(verification)
    assert not any(result.skipped for result in verification.results)


def test_a_process_with_one_row_beside_one_with_two(verify):
    scope = Scope(2, "float64", 2)
    assert not failures(verify(AS_CONFIGURED, DROPOUT, UNEVEN, scope=scope))


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_one_text_repeated(verify, loss):
    verification = verify(AS_CONFIGURED, UNEVEN, loss=loss, rows=[PAIRS[0]] * 8)
    assert not failures(verification)


def test_the_last_chunk_of_every_process_uses_one_tower(verify):
    verification = verify(AS_CONFIGURED, ACCUMULATION, UNEVEN, **towers("load"))
    assert not failures(verification)
    assert set(verification.results[0].groups) == {"text_model", "vision_model"}


def test_frozen_and_unused_parameters(verify):
    assert not failures(verify(AS_CONFIGURED, **towers("load_with_frozen_tower")))
    spare = towers("load_with_spare_parameter")
    assert not failures(verify(AS_CONFIGURED, **spare, ddp_find_unused_parameters=True))


# --- what the harness must see


def broken(name: str) -> str:
    return f"tests.numerics.broken_losses:{name}"


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TimesProcesses", "backbone is 2 times"),
        ("OverProcesses", "backbone is 0.5 times"),
        ("WithoutGather", "rows of other processes do not reach the loss"),
        ("TemperatureTimesProcesses", "logit_scale is 2 times"),
    ],
)
def test_mistakes_in_a_loss(verify, name, text, precision):
    scope = Scope(2, precision, 4)
    verification = verify(AS_CONFIGURED, UNEVEN, loss=broken(name), scope=scope)
    assert len(verification.suspicions) == 4  # two conditions, plain and cached
    for suspicion in verification.suspicions:
        assert suspicion.case.processes == 2
        assert suspicion.setting == "loss_type"
        assert text in suspicion.text


def test_every_condition_shows_a_factor(verify):
    scope = Scope(2, "float32", 4)
    verification = verify(*VARIATIONS, loss=broken("TimesProcesses"), scope=scope)
    failed = [s.case for s in verification.suspicions]
    assert failed == [Case(v, step, 2) for v in VARIATIONS for step in ("plain", "cached")]


def test_a_bias_of_uneven_batches_shows_in_them_alone(verify):
    verification = verify(AS_CONFIGURED, DROPOUT, UNEVEN, loss=broken("MeanOfMeans"))
    failed = [s.case for s in verification.suspicions]
    assert failed == [Case(UNEVEN, step, 2) for step in ("plain", "cached")]


def test_a_tower_that_is_not_reduced_is_seen(verify, pair):
    """As by a wrapper that goes by what the last chunk used."""
    pair.run(reduce_text_tower, what="breaking the reduction")
    try:
        verification = verify(AS_CONFIGURED, **towers("load"))
    finally:
        pair.run(reduce_everything, what="mending the reduction")
    failed = [(result.case.processes, result.failing) for result in verification.results]
    assert failed == [(1, []), (2, ["vision_model"])] * 2


def test_a_reduction_that_sums_is_seen(verify, pair):
    pair.run(sum_gradients, what="breaking the reduction")
    try:
        verification = verify(AS_CONFIGURED)
    finally:
        pair.run(reduce_everything, what="mending the reduction")
    assert [s.case.processes for s in verification.suspicions] == [2, 2]
    assert all("is 2 times what it should be" in s.text for s in verification.suspicions)
    assert not failures(verify(AS_CONFIGURED))


def test_without_replay_the_error_is_plain(verify, pair):
    pair.run(forget_replay, what="breaking the cache")
    try:
        verification = verify(DROPOUT)
    finally:
        pair.run(remember_replay, what="mending the cache")
    (suspicion,) = verification.suspicions  # this process, on its own, was left whole
    assert (suspicion.case.step, suspicion.case.processes) == ("cached", 2)
    (result,) = [r for r in verification.results if not r.passed]
    assert 0.2 < result.groups["backbone"].difference < 2


_reduce = trainer.reduce_gradients
_restore = gradient_cache.RandomState.restore


def sum_gradients() -> None:
    def reduce(parameters):
        parameters = list(parameters)
        calls = _reduce(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= 2
        return calls

    trainer.reduce_gradients = reduce


def reduce_text_tower() -> None:
    def reduce(parameters):
        parameters = list(parameters)  # those of the towers, one after the other
        return _reduce(parameters[: len(parameters) // 2])

    trainer.reduce_gradients = reduce


def reduce_everything() -> None:
    trainer.reduce_gradients = _reduce


def forget_replay() -> None:
    gradient_cache.RandomState.restore = lambda self: None


def remember_replay() -> None:
    gradient_cache.RandomState.restore = _restore
