"""Every family of encoders in every mode that it has, on two processes and on one: same gradients.

Losses and conditions, with text models: tests/distributed/test_gradient_parity.py.
"""

from __future__ import annotations

import pytest

from tests.numerics.test_gradient_parity import failures, rows_for
from tests.tiny import write_rows
from tests.unit.models.families import FAMILY_MODE, family_path, pictures, rows_in
from vembed.config import TrainConfig
from vembed.training import trainer
from vembed.training.verification.cases import AMP, AS_CONFIGURED, VARIATIONS, Scope
from vembed.training.verification.processes import LocalProcesses
from vembed.training.verification.verify import quiet, verify_on

TWO = Scope(processes=2, precision="float64", pairs=2)

# What LLaVA shares with Qwen-VL is tested with these.
CASES = [(family, mode) for family, mode in FAMILY_MODE if family != "llava"]

EVERY_CONDITION = [
    ("clip", "t2i"),
    ("siglip2", "i2i"),
    ("dinov3", "i2i"),
    ("composed", "t2m"),
    ("qwen2_5_vl", "t2i"),
]
"""One of each kind; that of texts alone is in test_gradient_parity."""

GROUPS = {
    ("clip", "t2t"): {"text_model", "text_projection", "logit_scale"},
    ("clip", "i2i"): {"vision_model", "visual_projection", "logit_scale"},
    ("clip", "t2i"): {
        "text_model",
        "text_projection",
        "vision_model",
        "visual_projection",
        "logit_scale",
    },
    ("siglip", "t2m"): {"text_model", "vision_model", "logit_scale"},
    ("composed", "i2i"): {"image", "projections"},
    ("composed", "i2t"): {"text", "image", "projections"},
    ("qwen3_vl", "t2t"): {"language_model"},
    ("qwen3_vl", "i2t"): {"language_model", "visual"},
    ("vit", "i2i"): {"backbone"},
}
"""What trains, for some; the temperature is the checkpoint's."""


@pytest.fixture(scope="module")
def pair():
    """Two processes that serve every test here."""
    with LocalProcesses(2, timeout_s=120) as group, quiet():
        yield group


@pytest.fixture
def verify(pair, tmp_path):
    """Verifies a tiny model on rows of a mode, with hard negatives and a repeated positive."""

    def run(family, mode, *variations, scope=TWO, **settings):
        path = write_rows(tmp_path / "rows.jsonl", rows_in(mode, rows_for("infonce")))
        images = {} if mode == "t2t" else {"image_root": str(pictures())}
        config = TrainConfig(
            model_name=str(family_path(family)), data_path=str(path), retrieval_mode=mode,
            **images, **settings,
        )  # fmt: skip
        return verify_on(pair, config, scope, variations=variations)

    return run


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_plain_and_cached_on_one_and_two_processes(verify, family, mode):
    verification = verify(family, mode, AS_CONFIGURED)
    assert not failures(verification)
    assert [r.case.step_name for r in verification.results] == [
        "plain", "plain x 2", "cached", "cached x 2",
    ]  # fmt: skip
    assert not any(g.is_zero for r in verification.results for g in r.groups.values())
    found = set(verification.results[0].groups)
    assert found == GROUPS.get((family, mode), found)


@pytest.mark.parametrize(("family", "mode"), EVERY_CONDITION)
def test_every_condition(verify, family, mode):
    verification = verify(family, mode, *VARIATIONS)
    assert not failures(verification)
    assert len(verification.results) == 4 * len(VARIATIONS)
    assert not any(result.skipped for result in verification.results)


# --- what the harness must see


def test_a_loss_without_a_gather_is_seen_by_every_tower(verify):
    loss = "tests.numerics.broken_losses:WithoutGather"
    verification = verify("clip", "t2i", AS_CONFIGURED, AMP, loss_type=loss)
    failing = [r.failing for r in verification.results if r.case.processes == 2]
    towers = GROUPS["clip", "t2i"] - {"logit_scale"}  # of which that loss makes no use
    assert [set(names) for names in failing] == [towers] * 4


def test_gradients_in_less_than_the_weights_precision_hide_no_mistake(verify, pair):
    """SigLIP 2 adds up its positions' gradient in float32: the reference must be cut alike."""
    right = verify("siglip2", "t2i", AS_CONFIGURED)
    replayed = [result for result in right.results if result.reference == "replayed"]
    assert replayed
    assert not failures(right)
    assert all(1e-12 < result.cutting_error < 1e-6 for result in replayed)
    pair.run(scale_gradients, 1 + 1e-9, what="breaking the reduction")
    try:
        wrong = verify("siglip2", "t2i", AS_CONFIGURED)
    finally:
        pair.run(scale_gradients, 1.0, what="mending the reduction")
    assert [suspicion.case.processes for suspicion in wrong.suspicions] == [2, 2]


_reduce = trainer.reduce_gradients


def scale_gradients(factor: float) -> None:
    def reduce(parameters):
        parameters = list(parameters)
        calls = _reduce(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= factor
        return calls

    trainer.reduce_gradients = reduce
