"""Every script in `examples/` runs, as its docstring says, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vembed.cli import main as vembed

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_text(tiny_bert_path, tmp_path):
    out = run_example("train_text.py", str(tiny_bert_path), str(tmp_path / "out"))
    assert "'ndcg@10'" in out
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_with_components.py", "steps, 1 of them warm-up"),
        ("custom_step.py", "tokens in 4 steps"),
    ],
)
def test_scripts_that_read_a_config(name, words, tiny_bert_path, tmp_path):
    out = run_example(
        name,
        *("--config", "configs/train.yaml", "--model_name", str(tiny_bert_path)),
        *("--epochs", "1", "--batch_size", "64", "--max_seq_length", "32"),
        *("--warmup_ratio", "0.25", "--output_dir", str(tmp_path / "out")),
    )
    assert words in out


def test_a_loss_of_your_own(tiny_bert_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    arguments = [
        *("train", "--data_path", "examples/data/pairs.jsonl", "--max_steps", "2"),
        *("--model_name", str(tiny_bert_path), "--loss_type", "custom_loss:MarginLoss"),
        *("--loss_kwargs", "{margin: 0.3}", "--output_dir", str(tmp_path / "out")),
    ]
    assert vembed(arguments) == 0
    assert (tmp_path / "out" / "final").exists()


def test_every_example_is_run_here():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {
        "custom_loss.py",
        "custom_step.py",
        "train_text.py",
        "train_with_components.py",
    }
