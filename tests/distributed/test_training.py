"""Two processes of batch B train like one process of batch 2B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.launch import ChildFailed, run_on_processes
from tests.tiny import PAIRS, tiny_bert, write_rows
from vembed import distributed

TRAINING = {
    "epochs": 2,
    "lr": 0.2,
    "optimizer": "sgd",
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
    "chunk_tokens": 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    # Without dropout: processes draw other masks than one process does.
    tiny_bert(path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    # 23 rows: the last batch is uneven. One row in three has negatives; two rows share a positive.
    rows = [dict(pair) for pair in PAIRS[:23]]
    for number, row in enumerate(rows):
        if number % 3 == 0:
            row["negatives"] = [PAIRS[(number + 5) % 23]["query"] + " not", "the sun is cold"]
    rows[7]["positive"] = rows[8]["positive"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "pairs.jsonl").write_text(text)
    write_rows(path / "plain.jsonl", PAIRS[:23])
    tiny_bert(path / "guide", seed=7)
    write_rows(
        path / "labelled.jsonl",
        [{"text": row["query"], "label": number % 4} for number, row in enumerate(PAIRS[:23])],
    )
    return path


def train(folder: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    from vembed.training.run import run_training

    calls: list[int] = []
    original = distributed.reduce_gradients

    def counted(parameters):
        calls.append(original(parameters))
        return calls[-1]

    from vembed.training import trainer

    trainer.reduce_gradients = counted
    try:
        path = Path(folder)
        result = run_training(
            {
                **TRAINING,
                "model_name": str(path / "bert"),
                "data_path": str(path / "pairs.jsonl"),
                "val_data_path": str(path / "pairs.jsonl"),
                "holdout_ratio": 0.2,
                "output_dir": str(path / name),
                **settings,
            }
        )
    finally:
        trainer.reduce_gradients = original
    from safetensors.torch import load_file

    return {
        "history": result.state.history,
        "weights": load_file(path / name / "final" / "model.safetensors"),
        "after": result.proof.after.metrics,
        "reductions": calls,
    }


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"use_gradient_cache": True, "gradient_cache_chunk_size": 3, "learn_temperature": True},
        {"loss_bidirectional": True, "use_lora": True, "lora_dropout": 0.0},
        {
            "guide_model_name": "<guide>",
            "batch_sampler": "no_duplicates",
            "loss_kwargs": {"hard_negatives": "own", "query_negatives": True},
        },
        {
            "data_path": "<labelled>",
            "val_data_path": "<labelled>",
            "loss_type": "arcface",
            "batch_sampler": "class_balanced",
        },
    ],
    ids=["plain", "accumulation", "cached", "bidirectional-lora", "guided", "classes"],
)
def test_two_processes_train_like_one(folder, settings, request):
    name = request.node.callspec.id
    places = {"<guide>": str(folder / "guide"), "<labelled>": str(folder / "labelled.jsonl")}
    settings = {
        key: places.get(value, value) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    one = train(str(folder), f"{name}-1", {"batch_size": 6, **settings})
    two = run_on_processes(
        train, 2, str(folder), f"{name}-2", {"batch_size": 3, **settings}, timeout=240
    )[0]

    assert len(one["history"]) == len(two["history"]) > 4
    for expected, actual in zip(one["history"], two["history"], strict=True):
        assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert largest_difference(one["weights"], two["weights"]) < 2e-5
    assert two["after"] == pytest.approx(one["after"], abs=1e-6)
    # One all-reduce of gradients in each optimizer step, however many chunks and micro-batches.
    assert set(two["reductions"]) == {1}


def count_collectives(folder: str, settings: dict[str, Any]) -> dict[str, int]:
    """Of a run, by kind."""
    distributed._MESSAGE_ROOM.clear()  # or the first run alone would have to find it out
    counts = {"gather": 0, "reduce": 0}
    gather, reduce = distributed._all_gather, dist.all_reduce

    def counting(kind, original):
        def call(*args, **kwargs):
            counts[kind] += 1
            return original(*args, **kwargs)

        return call

    distributed._all_gather = counting("gather", gather)
    dist.all_reduce = counting("reduce", reduce)
    try:
        train(folder, "counted", {"overwrite_output_dir": True, "batch_size": 2, **settings})
    finally:
        distributed._all_gather, dist.all_reduce = gather, reduce
    return counts


def _collectives_of_a_step(folder: str, settings: dict[str, Any]) -> dict[str, int]:
    """What a run of two steps has more of than one of one."""
    quiet = {"data_path": f"{folder}/plain.jsonl", "val_data_path": None}
    one, two = (
        count_collectives(folder, {"logging_steps": 100, "max_steps": n, **quiet, **settings})
        for n in (1, 2)
    )
    return {kind: two[kind] - one[kind] for kind in two}


@pytest.mark.parametrize(
    ("settings", "gather", "reduce"),
    [
        # Gathered: failures and signals; sizes and ids; documents. Reduced: the gradient of
        # documents; that of parameters.
        ({}, 3, 2),
        ({"use_gradient_cache": True, "gradient_cache_chunk_size": 2}, 3, 2),
        # One sum for each document, there and back.
        ({"loss_bidirectional": True}, 4, 3),
        # Two micro-batches, each with all of it but failures and parameters.
        ({"gradient_accumulation_steps": 2}, 5, 3),
        # Means of the window.
        ({"logging_steps": 1}, 3, 3),
    ],
    ids=["plain", "cached", "bidirectional", "accumulation", "logging"],
)
def test_collectives_of_a_step(folder, settings, gather, reduce):
    found = run_on_processes(_collectives_of_a_step, 2, str(folder), settings, timeout=240)
    assert found == [{"gather": gather, "reduce": reduce}] * 2


def cosine_distance(query, positive):
    return distributed.global_mean(1 - torch.cosine_similarity(query, positive))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_gradient_cache": True, "learn_temperature": True, "loss_bidirectional": True},
        {"teacher_model_name": "bert"},
        {"loss_type": f"{__name__}:cosine_distance"},
    ],
    ids=["infonce", "distillation", "own-loss"],
)
def test_a_last_batch_with_fewer_rows_than_processes(folder, settings, request):
    name = request.node.callspec.id
    if "teacher_model_name" in settings:
        settings = {"teacher_model_name": str(folder / "bert")}
    # The last batch of training and of validation has one row of 23.
    settings = {"holdout_ratio": 0, "test_data_path": str(folder / "pairs.jsonl"), **settings}
    one = train(str(folder), f"{name}-few-1", {"batch_size": 22, **settings})
    two = run_on_processes(
        train, 2, str(folder), f"{name}-few-2", {"batch_size": 11, **settings}, timeout=240
    )[0]
    for expected, actual in zip(one["history"], two["history"], strict=True):
        assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert largest_difference(one["weights"], two["weights"]) < 2e-5


def test_twice_the_batch_is_not_the_same_run(folder):
    """The comparison above can tell runs apart."""
    one = train(str(folder), "other-1", {"batch_size": 6})
    other = train(str(folder), "other-2", {"batch_size": 3})
    assert largest_difference(one["weights"], other["weights"]) > 1e-4


def test_static_graph_trains_the_same_through_ddp(folder):
    settings = {"batch_size": 3, "drop_last": True}
    plain = run_on_processes(train, 2, str(folder), "explicit", settings)[0]
    static = run_on_processes(
        train, 2, str(folder), "static", {**settings, "ddp_static_graph": True}
    )[0]
    assert largest_difference(plain["weights"], static["weights"]) < 1e-6
    assert set(static["reductions"]) == {0}


def test_static_graph_is_refused_where_ddp_would_crash(folder):
    settings = {"batch_size": 3, "ddp_static_graph": True, "use_gradient_cache": True}
    with pytest.raises(ChildFailed, match="static"):
        run_on_processes(train, 2, str(folder), "refused", settings)
