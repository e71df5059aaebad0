"""`vembed train` that a signal stops, as a user or a cluster does."""

import json
import os
import signal
import subprocess
import time

import psutil

from tests.cli.conftest import BIN
from tests.cli.test_verify import runs, wait_for


def steps_of(folder) -> list[int]:
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_two_processes_and_their_workers_stop_with_nothing_left(tmp_path, tiny_st_path, pairs_path):
    command = [
        BIN / "vembed", "train", "--model_name", tiny_st_path, "--data_path", pairs_path,
        "--device", "cpu", "--holdout_ratio", "0", "--batch_size", "2", "--num_workers", "1",
        "--logging_steps", "1", "--max_steps", "100000", "--num_processes", "2",
        "--output_dir", "run",
    ]  # fmt: skip
    with (tmp_path / "stderr").open("w") as stderr:
        program = subprocess.Popen(command, cwd=tmp_path, stderr=stderr, start_new_session=True)
        wait_for(lambda: steps_of(tmp_path / "run"), 3)
        # Two processes that train, each of which has a worker.
        started = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)
        assert program.wait(60) == 130
    said = (tmp_path / "stderr").read_text()
    assert said.count("vembed: stopped by SIGINT after step ") == 1
    assert "Traceback" not in said
    assert len(started) >= 4
    deadline = time.monotonic() + 20
    while any(map(runs, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in started if runs(process)]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps_of(tmp_path / 'run')[-1]:06d}"
