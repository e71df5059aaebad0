"""`vembed teach` as a user types it: help at once, killed and gone on with, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_bert, write_rows

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("teacher") / "bert", hidden_size=16, seed=3)


@pytest.fixture
def arguments(tmp_path, teacher_path):
    rows = [{"query": f"query {n}", "positive": f"the answer to {n}"} for n in range(200)]
    return [
        "teach", "--teacher_model_name", str(teacher_path), "--teacher_cache", "cache",
        "--data_path", str(write_rows(tmp_path / "rows.jsonl", rows)), "--device", "cpu",
        "--teacher_chunk_size", "10",
    ]  # fmt: skip


def parts(folder: Path) -> int:
    return len(list(folder.glob("*.keys.npy")))


def keys(folder: Path) -> list[int]:
    return sorted(key for path in folder.glob("*.keys.npy") for key in np.load(path).tolist())


def test_help_and_mistakes_are_answered_without_torch():
    for argv, words in ((["--help"], ""), (["--teacher_model_name", "m"], "teacher_cache")):
        code = (
            "import sys\nfrom vembed.cli import main\n"
            "try:\n status = main(['teach', *sys.argv[1:]])\n"
            "except SystemExit as end:\n status = end.code\n"
            "assert 'torch' not in sys.modules\nsys.exit(status)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
        )
        assert done.returncode == (2 if words else 0), done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert words or "Store what a teacher says" in done.stdout
        assert "Fine-tune an embedding model." not in done.stdout


def test_a_killed_one_is_gone_on_with(vembed, arguments, tmp_path):
    process = subprocess.Popen(
        [BIN / "vembed", *arguments], cwd=tmp_path, env=os.environ, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while parts(tmp_path / "cache") < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = keys(tmp_path / "cache")
    assert 20 <= len(stored) < 400  # in the middle of it
    done = vembed(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr  # bars of transformers
    assert done.stdout.startswith("cache: 400 items x 16 float32; ")
    assert f"; {400 - len(stored):,} computed" in done.stdout
    assert f"{len(stored):,} were there" in done.stdout
    assert len(keys(tmp_path / "cache")) == len(set(keys(tmp_path / "cache"))) == 400


def test_two_processes_share_the_work(vembed, arguments, tmp_path):
    done = vembed(*arguments, "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    computed = [int(line.split("; ")[1].split()[0]) for line in done.stdout.splitlines()]
    assert len(computed) == 2
    assert sum(computed) == 400
    assert len(keys(tmp_path / "cache")) == len(set(keys(tmp_path / "cache"))) == 400
