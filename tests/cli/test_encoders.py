"""Image models at the command line: the specification's command, modes, the gradient check."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import BIN
from tests.numerics.test_gradient_parity import rows_for
from tests.tiny import write_rows
from tests.unit.models.families import MODALITIES, family_path, pictures, rows_in
from vembed.cli import main
from vembed.models import load_encoder

REPOSITORY = Path(__file__).parents[2]

COMMAND = """accelerate launch vembed/entrypoints/train.py \\
    --config configs/train.yaml \\
    --config_override model_name=openai/clip-vit-base-patch32 \\
    --gradient_checkpointing"""
"""As the specification writes it."""

DISTILLATION = {"teacher_model_name": "openai/clip-vit-large-patch14", "distillation_alpha": 0.5}
"""Likewise."""


@pytest.fixture
def checkout(tmp_path):
    """What the specification's command names, in a folder where a run may leave its own."""
    (tmp_path / "vembed").mkdir()
    for name in ("vembed/entrypoints", "configs", "examples"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def put_in_folder(checkout: Path) -> dict[str, str]:
    for name in ("clip-vit-base-patch32", "clip-vit-large-patch14"):
        shutil.copytree(family_path("clip"), checkout / "openai" / name)
    return {}


def put_in_cache(checkout: Path) -> dict[str, str]:
    """As a download leaves it."""
    home = checkout / "hub"
    model, commit = home / "hub" / "models--openai--clip-vit-base-patch32", "0123456789abcdef" * 2
    shutil.copytree(family_path("clip"), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return {"HF_HOME": str(home)}


@pytest.mark.parametrize(
    ("put", "less"),
    [
        (put_in_cache, ""),
        (
            put_in_folder,
            "--max_steps 1 --holdout_ratio 0 --config_override "
            + " ".join(f"{key}={value}" for key, value in DISTILLATION.items()),
        ),
    ],
    ids=["hub-cache", "folder-and-teacher"],
)
def test_the_command_of_the_specification(checkout, put, less):
    """As it is written; the second time with less to do, and a teacher."""
    program, *arguments = shlex.split(COMMAND.replace("\\\n", "") + f" {less}")
    done = subprocess.run(
        [BIN / program, *arguments],
        cwd=checkout,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **put(checkout)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = checkout / "runs" / "vembed"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model_name"] == "openai/clip-vit-base-patch32"
    assert config["gradient_checkpointing"] is True
    assert load_encoder(str(run / "final")).model_type == "clip"
    assert (run / "report" / "report.html").exists() is not bool(less)
    assert "text_model" in done.stderr
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert ("loss_distillation.similarity_kl" in first) is bool(less)
    if less:
        assert config.items() >= DISTILLATION.items()
        halves = 0.5 * first["loss_task"] + 0.5 * first["loss_distillation.similarity_kl"]
        assert first["loss"] == pytest.approx(halves)
    assert "vision_model frozen" in done.stderr
    for line in ("Traceback", "LOAD REPORT", "[transformers]"):
        assert line not in done.stderr


@pytest.mark.parametrize(
    ("family", "mode"),
    [("bert", "t2i"), ("qwen3", "m2t"), ("vit", "i2t"), ("mae", "m2m"), ("dinov3", "t2t")],
)
@pytest.mark.parametrize("command", ["train", "check", "verify gradients"])
def test_a_mode_that_does_not_fit(tmp_path, capsys, command, family, mode):
    rows = write_rows(tmp_path / "rows.jsonl", rows_in(mode, rows_for("infonce")))
    root = () if mode == "t2t" else ("--image_root", str(pictures()))
    arguments = (
        "--model_name", str(family_path(family)), "--data_path", str(rows), *root,
        "--retrieval_mode", mode, "--device", "cpu", "--output_dir", str(tmp_path / "run"),
        *(("--processes", "1") if command.startswith("verify") else ()),
    )  # fmt: skip
    assert main([*command.split(), *arguments]) == 2
    (letter,) = MODALITIES[family]
    shown = capsys.readouterr()
    assert f"retrieval_mode: {mode} does not fit" in shown.err
    assert re.search(rf"which can do: {letter}2{letter}\b", shown.err)
    assert "Traceback" not in shown.err
    assert not (tmp_path / "run").exists()


def test_the_gradient_check_of_a_config_with_images(shell, tmp_path):
    rows = rows_in("t2i", rows_for("infonce"))
    write_rows(tmp_path / "rows.jsonl", rows)
    settings = {
        "model_name": str(family_path("clip")),
        "data_path": "rows.jsonl",
        "image_root": str(pictures()),
        "retrieval_mode": "t2i",
        "mixed_precision": "bf16",
        "batch_size": 4,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    done = shell("vembed", "verify", "gradients", "--config", "train.yaml", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["processes"] == 2
    towers = {"text_model", "text_projection", "vision_model", "visual_projection"}
    groups = {*towers, "logit_scale"}
    assert all(set(case["groups"]) == groups for case in found["cases"])
