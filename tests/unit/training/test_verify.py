"""The parts of `vembed verify gradients`; the whole of it is in test_gradient_parity.py."""

from __future__ import annotations

import math
import os
import signal
import time

import psutil
import pytest
import torch

from tests.tiny import PAIRS, write_rows
from vembed.config import TrainConfig
from vembed.errors import ConfigError, DataError, DistributedError
from vembed.training.verification import verify
from vembed.training.verification.cases import (
    ACCUMULATION,
    AMP,
    AS_CONFIGURED,
    DROPOUT,
    LOSS_SCALING,
    UNEVEN,
    Case,
    Scope,
    chunk_size,
    settings_of,
)
from vembed.training.verification.comparison import (
    CaseResult,
    GroupDifference,
    compare,
    explain,
    group_of,
)
from vembed.training.verification.processes import LocalProcesses
from vembed.training.verification.subject import DoesNotApplyError, load_subject
from vembed.training.verification.verify import verify_gradients

SCOPE = Scope(processes=2, precision="float64", pairs=8)

# --- comparison


def gradients(scale: float = 1.0, loss: float = 0.5) -> dict[str, torch.Tensor]:
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64)
    return {
        "encoder.backbone.a": weight * scale,
        "encoder.backbone.b": weight[0] * scale,
        "encoder.projections.0.weight": weight,
        "loss.logit_scale": torch.tensor(loss, dtype=torch.float64),
    }


def test_equal_gradients_differ_by_nothing():
    found = compare(gradients(), gradients())
    assert list(found) == ["backbone", "projections", "logit_scale"]
    for group in found.values():
        assert (group.ratio, group.difference, group.is_zero) == (1.0, 0.0, False)
        assert group.cosine == pytest.approx(1)


def test_a_factor_shows_in_the_ratio_of_its_group_alone():
    found = compare(gradients(scale=3), gradients())
    assert found["backbone"].ratio == pytest.approx(3)
    assert found["backbone"].cosine == pytest.approx(1)
    assert found["backbone"].difference == pytest.approx(8 / 4)
    assert found["projections"].difference == 0


def test_a_parameter_of_the_loss_is_judged_by_the_size_of_the_whole_gradient():
    found = compare(gradients(loss=0.5 + 4e-13), gradients())
    assert found["logit_scale"].difference == pytest.approx(1e-13, rel=0.01)
    assert compare(gradients(loss=1.0), gradients())["logit_scale"].difference == 0.125


def test_a_missing_gradient_is_zero():
    actual = gradients()
    del actual["encoder.projections.0.weight"]
    found = compare(actual, gradients())["projections"]
    assert (found.ratio, found.difference) == (0.0, 1.0)
    zeros = {name: torch.zeros_like(gradient) for name, gradient in gradients().items()}
    both = compare({}, zeros)["backbone"]
    assert (both.is_zero, both.difference) == (True, 0.0)
    assert compare(gradients(), zeros)["backbone"].difference == math.inf


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("parameter", ["encoder.backbone.a", "encoder.backbone.b"])
def test_a_gradient_that_is_not_finite_fails(broken, parameter):
    actual = gradients()
    actual[parameter] = torch.full_like(actual[parameter], broken)
    result = CaseResult(Case(AS_CONFIGURED, "plain", 1), 0.1, groups=compare(actual, gradients()))
    assert result.failing == ["backbone"]


def test_groups():
    assert group_of("encoder.backbone.layer.0.weight") == "backbone"
    assert group_of("encoder.backbone.base_model.model.vision_model.x") == "vision_model"
    assert group_of("encoder.projections.0.weight") == "projections"
    assert group_of("loss.logit_scale") == "logit_scale"
    assert group_of("distillation.logit_scale") == "distillation.logit_scale"


# --- what a difference points to


def result(variation, step, processes, **groups: tuple[float, float, float]) -> CaseResult:
    """Groups are (ratio, cosine, difference)."""
    found = {name: GroupDifference(*numbers, is_zero=False) for name, numbers in groups.items()}
    return CaseResult(Case(variation, step, processes), 1e-12, "replayed", groups=found)


GOOD = (1.0, 1.0, 1e-15)


@pytest.mark.parametrize(
    ("failed", "others", "setting", "text"),
    [
        (
            result(
                AS_CONFIGURED, "plain", 4, backbone=(4.0, 1.0, 3.0), logit_scale=(4.0, 1.0, 3.0)
            ),
            [result(AS_CONFIGURED, "plain", 1, backbone=GOOD)],
            "loss_type",
            "the loss or the reduction multiplies or divides by the number of processes",
        ),
        (
            result(AS_CONFIGURED, "plain", 2, backbone=GOOD, logit_scale=(0.5, 1.0, 0.5)),
            [result(AS_CONFIGURED, "plain", 1, backbone=GOOD)],
            "loss_type",
            "logit_scale is 0.5 times what it should be: a parameter of the loss",
        ),
        (
            result(UNEVEN, "plain", 2, backbone=(0.9, 0.8, 0.6)),
            [result(UNEVEN, "plain", 1, backbone=GOOD)],
            "loss_type",
            "rows of other processes",
        ),
        (
            result(DROPOUT, "cached", 1, backbone=(1.0, 0.7, 0.7)),
            [result(DROPOUT, "plain", 1, backbone=GOOD)],
            "use_gradient_cache",
            "other random numbers",
        ),
        (
            result(ACCUMULATION, "plain", 1, backbone=(0.5, 1.0, 0.5)),
            [],
            "gradient_accumulation_steps",
            "divisor",
        ),
        (
            result(ACCUMULATION, "plain", 2, backbone=(0.5, 1.0, 0.5)),
            [result(ACCUMULATION, "plain", 1, backbone=(0.5, 1.0, 0.5))],
            "gradient_accumulation_steps",
            "divisor",
        ),
        (
            result(LOSS_SCALING, "cached", 1, backbone=(65536.0, 1.0, 65535.0)),
            [],
            "mixed_precision",
            "loss scale",
        ),
        (
            result(AS_CONFIGURED, "plain", 1, backbone=(1.0, 0.2, math.nan)),
            [],
            "model_name",
            "not that of the whole batch",
        ),
    ],
)
def test_the_likeliest_cause_is_named(failed, others, setting, text):
    suspicion = explain([*others, failed])[-1]
    assert suspicion.case == failed.case
    assert suspicion.setting == setting
    assert text in suspicion.text


def test_nothing_is_suspected_of_cases_that_pass():
    assert explain([result(DROPOUT, "cached", 2, backbone=GOOD)]) == []


# --- a case that fails against one graph of all rows


@pytest.mark.parametrize(("error", "accepted"), [(1e-8, True), (1e-6, True), (1e-5, False)])
def test_the_cut_graph_explains_only_differences_of_rounding(error, accepted):
    whole, cut = gradients(), gradients(scale=1 + error * 0.999)
    case = Case(AS_CONFIGURED, "plain", 1)
    failed = CaseResult(case, 1e-12, "whole", 0.0, compare(cut, whole))
    assert not failed.passed
    found = verify._replayed(failed, cut, whole, lambda: cut)
    assert found.passed == accepted
    if accepted:
        assert found.reference == "replayed"
        assert found.cutting_error == pytest.approx(error, rel=0.01)
    else:
        assert found == failed


def test_what_the_cut_graph_does_not_explain_stays_a_failure():
    whole, cut = gradients(), gradients(scale=1 + 1e-8)
    failed = CaseResult(
        Case(AS_CONFIGURED, "plain", 1), 1e-12, "whole", 0.0, compare(gradients(scale=2), whole)
    )
    assert verify._replayed(failed, gradients(scale=2), whole, lambda: cut) == failed


# --- cases


def test_settings_of_a_case():
    config = TrainConfig(
        batch_size=512,
        gradient_accumulation_steps=8,
        mixed_precision="fp16",
        torch_dtype="bfloat16",
        ddp_static_graph=True,
        attn_implementation="flash_attention_2",
        num_processes=4,
    )
    plain = settings_of(config, SCOPE, Case(UNEVEN, "plain", 2))
    assert (plain.batch_size, plain.mixed_precision, plain.torch_dtype) == (8, "no", "float32")
    assert (plain.device, plain.num_processes, plain.attn_implementation) == ("cpu", None, None)
    assert plain.gradient_accumulation_steps == 2  # as configured, though not as many
    assert settings_of(config, SCOPE, Case(AMP, "cached", 2)).mixed_precision == "bf16"
    config.gradient_accumulation_steps = 1
    assert settings_of(config, SCOPE, Case(UNEVEN, "plain", 2)).ddp_static_graph
    # DDP would crash.
    assert not settings_of(config, SCOPE, Case(UNEVEN, "cached", 2)).ddp_static_graph
    assert not settings_of(config, SCOPE, Case(ACCUMULATION, "plain", 2)).ddp_static_graph
    assert config.batch_size == 512
    config.distributed_strategy = "fsdp2"
    assert settings_of(config, SCOPE, Case(AMP, "plain", 2)).distributed_strategy == "fsdp2"
    assert settings_of(config, SCOPE, Case(AMP, "plain", 1)).distributed_strategy == "ddp"


@pytest.mark.parametrize(
    ("configured", "pairs", "used"), [(32, 8, 3), (2, 8, 2), ("auto", 9, 3), (None, 1, 1)]
)
def test_the_cached_step_has_several_chunks(configured, pairs, used):
    config = TrainConfig(gradient_cache_chunk_size=configured)
    assert chunk_size(config, Scope(2, "float64", pairs)) == used


# --- rows


def config_of(tmp_path, rows, **settings) -> TrainConfig:
    return TrainConfig(data_path=str(write_rows(tmp_path / "rows.jsonl", rows)), **settings)


def row_numbers(subject) -> list[list[int]]:
    return [[record.row_index for record in batch] for batch in subject.micro_batches]


def test_the_first_micro_batches_are_those_that_a_run_trains_on(tmp_path):
    from vembed.data import StatelessBatchSampler

    subject = load_subject(config_of(tmp_path, PAIRS, seed=3), Scope(2, "float64", 4))
    order = list(StatelessBatchSampler(len(PAIRS), 8, seed=3))
    assert row_numbers(subject) == order[:2]


def test_a_stream_is_read_from_its_beginning(tmp_path):
    config = config_of(tmp_path, PAIRS, streaming=True)
    subject = load_subject(config, Scope(2, "float64", 3))
    texts = [[record.query.text for record in batch] for batch in subject.micro_batches]
    assert texts == [[p["query"] for p in PAIRS[:6]], [p["query"] for p in PAIRS[6:12]]]


def test_few_rows_serve_twice(tmp_path):
    first, second = row_numbers(load_subject(config_of(tmp_path, PAIRS[:5]), SCOPE))
    assert sorted(first) == [0, 1, 2, 3, 4]
    assert second == first[::-1]


def test_an_uneven_batch_has_one_row_less(tmp_path):
    subject = load_subject(config_of(tmp_path, PAIRS), Scope(2, "float64", 1))
    assert [len(batch) for batch in subject.records(AS_CONFIGURED, 2)] == [2, 2]
    assert [len(batch) for batch in subject.records(UNEVEN, 2)] == [2, 1]
    alone = load_subject(config_of(tmp_path, PAIRS), Scope(1, "float64", 1))
    with pytest.raises(DoesNotApplyError, match="without one of 1 rows"):
        alone.records(UNEVEN, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 0}, "processes: must be at least 1. Received: 0"),
        ({"pairs": 0}, "pairs: must be at least 1. Received: 0"),
        ({"precision": "float16"}, "precision: expected float64 or float32"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, arguments, message):
    config = config_of(tmp_path, PAIRS, model_name="none")
    with pytest.raises(ConfigError, match=message):
        verify_gradients(config, **arguments)


def test_a_process_of_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="starts its own processes"):
        verify_gradients(config_of(tmp_path, PAIRS, model_name="none"))


# --- processes


def rank_and_sum(number: int) -> tuple[int, int]:
    from vembed.distributed import all_reduce_sum, process_index

    return process_index(), int(all_reduce_sum(torch.tensor(number + process_index())))


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("on purpose")
    rank_and_sum(1)


def die_on_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    rank_and_sum(1)


def wait_on_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def raise_config_error() -> None:
    raise ConfigError("learn_temperature: no")


def raise_data_error() -> None:
    raise DataError("3 rows")


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture
def nothing_left():
    """Fails if a test leaves processes behind, beside the two that `multiprocessing` keeps."""
    with LocalProcesses(1):
        pass
    before = children()
    yield
    deadline = time.monotonic() + 10
    while (left := children() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_processes_call_functions_together_again_and_again(nothing_left):
    with LocalProcesses(2) as group:
        assert group.run(rank_and_sum, 10, what="a sum") == [(0, 21), (1, 21)]
        call = group.start(rank_and_sum, 1, what="a sum")
        assert call.results() == [(0, 3), (1, 3)]


def test_processes_have_the_environment_of_their_parent(nothing_left, monkeypatch):
    monkeypatch.setenv("VEMBED_TEST", "set after the imports were made")
    with LocalProcesses(2, threads=3) as group:
        found = group.run(look_around, what="a look around")
    assert found == [("0", "2", "set after the imports were made", 3, True)] + [
        ("1", "2", "set after the imports were made", 3, True)
    ]


def look_around() -> tuple:
    names = ("RANK", "WORLD_SIZE", "VEMBED_TEST")
    ignores_interrupts = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return (*(os.environ[name] for name in names), torch.get_num_threads(), ignores_interrupts)


@pytest.mark.parametrize(
    ("fn", "timeout_s", "message"),
    [
        (fail_on_one, 60, r"a test: process 1 failed:(.|\n)*ZeroDivisionError: on purpose"),
        (die_on_one, 60, "a test: process 1 died"),
        (wait_on_one, 3, "a test: process 1 did not finish within 3 s"),
        (raise_config_error, 60, "a test: process . *: learn_temperature: no"),
        (raise_data_error, 60, "a test: process . *: 3 rows"),
    ],
)
def test_a_failure_ends_all_of_them(nothing_left, fn, timeout_s, message):
    expected = {raise_config_error: ConfigError, raise_data_error: DataError}
    with (
        pytest.raises(expected.get(fn, DistributedError), match=message),
        LocalProcesses(2, timeout_s=timeout_s) as group,
    ):
        group.run(fn, what="a test")
