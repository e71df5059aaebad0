"""The report of two processes is about their batches taken together."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.launch import run_on_processes
from tests.tiny import PAIRS, tiny_bert, write_rows
from tests.unit.training.first_step.batches import hand_made, report_on
from vembed.distributed import process_index
from vembed.losses.cosent import CoSENT
from vembed.losses.info_nce import InfoNCE
from vembed.losses.supcon import SupervisedContrastive
from vembed.training.first_step.advice import advise

# Of the queries of `hand_made`. Only 0 and 3 have hard negatives: on one process here, on both
# there; uneven.
SPLITS = [([0, 3], [1, 2]), ([0, 1], [2, 3]), ([1], [0, 2, 3])]


def report(split, criterion):
    student, extras = hand_made(split[process_index()])
    if isinstance(criterion, SupervisedContrastive):
        student = {"query": student["query"]}
    return report_on(student, extras, criterion)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("criterion", [InfoNCE(0.5), InfoNCE(0.5, bidirectional=True)])
def test_two_processes_count_what_one_counts(split, criterion):
    first, second = run_on_processes(report, 2, split, criterion)
    assert first == second
    together = report([split[0] + split[1]], criterion)
    assert first.batch.by_process == tuple(len(part) for part in split)
    for name in ("negatives", "hard", "masked", "queries", "few", "own_text"):
        assert getattr(first.candidates, name) == getattr(together.candidates, name)
    assert first.copies == together.copies
    for name in ("chance", "softmax"):
        found, expected = (getattr(each.candidates, name) for each in (first, together))
        assert as_numbers(found) == pytest.approx(as_numbers(expected), rel=1e-6)
    assert first.loss.total == pytest.approx(together.loss.total, rel=1e-6)
    assert first.embeddings.own_pairs == pytest.approx(together.embeddings.own_pairs)
    assert first.embeddings.random_pairs == pytest.approx(together.embeddings.random_pairs)
    assert [a.name for a in advise(first)] == [a.name for a in advise(together)]


def as_numbers(value):
    return value if isinstance(value, float) else asdict(value)


def test_which_negatives_come_from_the_other_process():
    """By hand: positives a b on the first process, a d e on the second."""
    found, _ = run_on_processes(report, 2, ([0, 1], [2, 3]), InfoNCE(0.5))
    local, others = found.candidates.local, found.candidates.other_processes
    # Query 0 meets b, query 1 meets a, query 2 meets d and e, query 3 meets a.
    assert (local.low, local.mean, local.high) == (1, 5 / 4, 2)
    # Query 0 meets d e, query 1 meets a d e, query 2 meets b, query 3 meets a b.
    assert (others.low, others.mean, others.high) == (1, 8 / 4, 3)


@pytest.mark.parametrize("criterion", [CoSENT(), SupervisedContrastive()])
def test_labels_and_scores_are_gathered(criterion):
    first, second = run_on_processes(report, 2, ([1], [0, 2]), criterion)
    together = report([[1, 0, 2]], criterion)
    assert first == second
    assert (first.labels, first.scores) == (together.labels, together.scores)
    assert (first.labels is None) == isinstance(criterion, CoSENT)


def train(folder: str, settings: dict) -> dict:
    from vembed.training.run import run_training

    path = Path(folder)
    run_training(
        {
            "model_name": str(path / "bert"),
            "data_path": str(path / "pairs.jsonl"),
            "holdout_ratio": 0,
            "max_steps": 1,
            "device": "cpu",
            "progress": False,
            **settings,
            "output_dir": str(path / settings["output_dir"]),
        }
    )
    return json.loads((path / settings["output_dir"] / "first_step.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("first-step")
    # Without dropout: processes draw other masks than one process does.
    tiny_bert(path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    # Only some batches have hard negatives; two rows share a positive.
    rows = [dict(pair) for pair in PAIRS]
    rows[2]["negatives"] = ["the sun is cold"]
    rows[7]["positive"] = rows[8]["positive"]
    write_rows(path / "pairs.jsonl", rows)
    return path


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_gradient_cache": True, "learn_temperature": True}],
    ids=["plain", "cached"],
)
def test_a_run_on_two_processes_reports_the_run_on_one(folder, settings, request):
    name = request.node.callspec.id
    one = train(str(folder), {"batch_size": 24, "output_dir": f"{name}-1", **settings})
    two = run_on_processes(
        train, 2, str(folder), {"batch_size": 12, "output_dir": f"{name}-2", **settings}
    )[0]
    assert (one["batch"]["by_process"], two["batch"]["by_process"]) == ([24], [12, 12])
    assert two["candidates"]["local"]["mean"] < 12 < one["candidates"]["local"]["mean"]
    for part in ("negatives", "hard", "masked", "own_text", "few"):
        assert two["candidates"][part] == one["candidates"][part]
    assert one["candidates"]["hard"]["mean"] == 1
    assert one["candidates"]["masked"]["high"] == 1
    assert two["copies"] == one["copies"]
    assert two["loss"]["total"] == pytest.approx(one["loss"]["total"], rel=1e-4)
    for group, gradient in one["gradients"].items():
        assert two["gradients"][group] == pytest.approx(gradient, rel=1e-3)
    assert two["warnings"] == one["warnings"]
