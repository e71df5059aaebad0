"""`vembed train` and `accelerate launch vembed/entrypoints/train.py`, in one process and in two."""

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny import write_rows

ENTRYPOINT = Path(__file__).parents[2] / "vembed" / "entrypoints" / "train.py"


@pytest.fixture
def config_file(tmp_path, tiny_st_path, pairs_path):
    """A config file for a run of two steps in the folder of the shell."""
    settings = {
        "model_name": str(tiny_st_path),
        "data_path": str(pairs_path),
        "device": "cpu",
        "batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "output_dir": "run",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    return "train.yaml"


def steps_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_one_process(vembed, tmp_path, config_file):
    done = vembed("train", "--config", config_file, "--config_override", "lr=1e-3", "--progress",
                  "false", "--gradient_checkpointing")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "lr: 0.001                             # --config_override\n" in saved
    assert "batch_size: 4                         # train.yaml:1\n" in saved
    again = vembed("train", "--config", config_file)
    assert again.returncode == 2
    assert "output_dir: run holds an earlier run" in again.stderr
    assert "Traceback" not in again.stderr


def test_two_processes(vembed, tmp_path, config_file):
    done = vembed("train", "--config", config_file, "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert len(steps_of(tmp_path / "run")) == 2


def test_two_processes_tell_a_data_error_once(vembed, tmp_path, config_file):
    write_rows(
        tmp_path / "rows.jsonl", [{"query": "a", "positive": "b"}, {"query": "", "positive": "c"}]
    )
    done = vembed(
        "train", "--config", config_file, "--data_path", "rows.jsonl", "--num_processes", 2
    )
    assert done.returncode == 2
    assert done.stderr.count("rows.jsonl:2: query: must not be empty") == 1
    assert "Traceback" not in done.stderr


def test_accelerate_launch_with_two_processes_on_cpus(shell, tmp_path, config_file):
    done = shell(
        "accelerate", "launch", "--multi_gpu", "--num_processes", 2, ENTRYPOINT,
        "--config", config_file, "--config_override", "epochs=1", "seed=1",
        "--gradient_checkpointing",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(steps_of(tmp_path / "run")) == 2
    assert "2 processes" in done.stderr


def test_accelerate_launch_that_starts_one_process_for_two_is_refused(shell, tmp_path, config_file):
    done = shell("accelerate", "launch", "--cpu", "--num_processes", 2, ENTRYPOINT,
                 "--config", config_file)  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("vembed: 2 processes were asked for (accelerate launch --num_pro") == 1
    assert "but 1 process runs" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_the_rows_do_not_fit(vembed, tmp_path, config_file):
    done = vembed("train", "--config", config_file, "--loss_type", "arcface")
    assert done.returncode == 2
    assert "ArcFace needs label in every row" in done.stderr
    assert "Losses that fit these rows: infonce, sigmoid, triplet" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
