from __future__ import annotations

import json
from dataclasses import replace

import torch

from tests.unit.training.first_step.batches import hand_made, healthy, report_on
from vembed.losses.cosent import CoSENT
from vembed.losses.distillation.similarity import SimilarityKL
from vembed.losses.info_nce import InfoNCE
from vembed.losses.supcon import SupervisedContrastive
from vembed.training.first_step.report import (
    BatchSize,
    FirstStepReport,
    GradientNorm,
    Memory,
    RoleChunks,
)


def test_the_table_of_a_contrastive_batch():
    report = report_on(
        *hand_made([0, 1, 2, 3]),
        InfoNCE(0.5),
        micro_batches=2,
        gradients={"backbone": GradientNorm(3, 0.25), "loss": GradientNorm(1, 2.0)},
        chunks={"query": RoleChunks(4, 2, 1, 20, 15)},
        memory=Memory(3 * 2**20, 5 * 2**30),
    )
    lines = dict(report.lines())
    assert lines["first batch"] == (
        "4 queries = 4 x 1 process; 2 such micro-batches a step, each with its own negatives"
    )
    assert lines["negatives"] == (
        "5.5 (5 to 6) per query: 3.25 (3 to 4) of its process, 0 of other processes, "
        "2.25 (2 to 3) hard; masked as relevant: 1.25 (0 to 2)"
    )
    assert lines["copies"] == "0 of 4 queries; 1 of 5 positives"
    assert lines["loss"].endswith("at chance 1.8688 (mean ln of the candidates)")
    assert lines["temperature"] == "0.5, fixed"
    assert lines["gradient norm"] == "backbone 0.25; loss 2"
    assert lines["chunks"] == "queries 4 in 2, 1 kept, 20 tokens with 25% padding"
    assert lines["memory"] == "3.0 MB of activations expected at a time; 5.00 GB at the peak"
    assert not {"labels", "scores", "teacher"} & set(lines)


def test_processes_of_different_sizes_are_told_apart():
    one = report_on(*healthy(), InfoNCE(0.1))
    lines = [
        dict(replace(one, batch=BatchSize(sizes, 1)).lines())["first batch"]
        for sizes in ((8, 8), (8, 7))
    ]
    assert lines == ["16 queries = 8 x 2 processes", "15 queries = 8 + 7"]


def test_the_table_of_labels_scores_and_a_teacher():
    student, extras = healthy()
    labels = report_on({"query": student["query"]}, extras, SupervisedContrastive())
    assert dict(labels.lines())["labels"] == (
        "4 different on 16 items; partners of an item: 3; without any: 0"
    )
    assert "negatives" not in dict(labels.lines())
    scores = report_on(student, extras, CoSENT())
    assert dict(scores.lines())["scores"] == "16 different on 16 pairs: 0.5 (0 to 1)"
    assert dict(scores.lines())["loss"].endswith("(chance is not defined for this loss)")
    taught = report_on(
        student, extras, InfoNCE(0.1), distillation=SimilarityKL(0.1), teacher=student
    )
    line = dict(taught.lines())["teacher"]
    assert line.startswith("ranks like the student: Spearman 1.000, same best document 100%")
    assert "distillation 0.0000; total" in dict(taught.lines())["loss"]


def test_the_file_is_valid_json_even_of_a_broken_batch(tmp_path):
    student, extras = healthy()
    student["query"] = student["query"] * torch.nan
    report_on(student, extras, InfoNCE(0.1)).write(tmp_path, ["look out"])

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = (tmp_path / "first_step.json").read_text()
    written = json.loads(text, parse_constant=refuse)
    assert written["loss"]["total"] is None
    assert written["candidates"]["negatives"]["mean"] == 15
    assert written["warnings"] == ["look out"]


def test_an_empty_report_has_an_empty_table():
    assert FirstStepReport().lines() == []
