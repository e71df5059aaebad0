"""Two runs cannot write into one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from vembed.cli import main
from vembed.errors import ConfigError
from vembed.training import output_lock
from vembed.training.output_lock import LOCK_NAME, OutputLock
from vembed.training.run import run_training

HOLD = """
import os, sys, time
from pathlib import Path
from vembed.training.output_lock import OutputLock
with OutputLock(Path(sys.argv[1])) as lock:
    lock.take()
    if not os.fork():
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("taken", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold(tmp_path):
    """Another process, with a child as a data worker is, that has the lock of `tmp_path / run`."""
    started = []

    def start(seconds=60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(seconds)],
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "taken\n"
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_another_process_is_kept_out_and_named(hold, tmp_path):
    process = hold()
    with OutputLock(tmp_path / "run") as lock, pytest.raises(ConfigError) as caught:
        lock.take()
    assert f"in use by another run (process {process.pid} on " in str(caught.value)
    assert (tmp_path / "run" / LOCK_NAME).exists()


def test_a_death_frees_it_though_children_live(hold, tmp_path):
    process = hold()
    process.kill()
    process.wait()
    with OutputLock(tmp_path / "run") as lock:
        lock.take()
        assert str(os.getpid()) in (tmp_path / "run" / LOCK_NAME).read_text()


def test_it_waits_for_a_run_that_is_ending(hold, tmp_path, caplog):
    hold(seconds=0.5)
    with OutputLock(tmp_path / "run", wait_s=30) as lock:
        lock.take()
    assert "waiting 30 s for its end" in caplog.text


def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    opened = os.open
    removed = []

    def slow_open(path, *arguments):
        descriptor = opened(path, *arguments)
        if not removed:
            removed.append(path)
            path.unlink()
        return descriptor

    monkeypatch.setattr(output_lock.os, "open", slow_open)
    with OutputLock(tmp_path, wait_s=5) as lock:
        lock.take()
        assert (tmp_path / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_left_only_if_something_is_in_it(tmp_path):
    with OutputLock(tmp_path / "a" / "b") as lock:
        lock.take()
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with OutputLock(tmp_path / "a" / "b") as lock:
        lock.take()
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_no_folder(tmp_path, name):
    (tmp_path / "file").touch()
    with OutputLock(tmp_path / name) as lock, pytest.raises(ConfigError, match="must be a folder"):
        lock.take()


def test_a_disk_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(output_lock.errno.ENOLCK, "no locks")

    monkeypatch.setattr(output_lock.fcntl, "lockf", refuse)
    with OutputLock(tmp_path) as lock:
        lock.take()


def test_a_disk_that_became_read_only_hides_no_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(output_lock.errno.EROFS, "read-only")

    def fail():
        with OutputLock(tmp_path) as lock:
            lock.take()
            monkeypatch.setattr(output_lock.Path, "unlink", refuse)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    monkeypatch.undo()
    with OutputLock(tmp_path) as lock:
        lock.take()


def test_a_run_leaves_the_half_written_checkpoints_of_another_alone(
    hold, tiny_st_path, pairs_path, tmp_path
):
    hold()
    fresh = tmp_path / "run" / "checkpoints" / ".tmp-step-000003"
    fresh.mkdir(parents=True)
    settings = {
        "model_name": str(tiny_st_path), "data_path": str(pairs_path), "max_steps": 1,
        "output_dir": str(tmp_path / "run"), "resume": "auto", "grace_period_s": 0.1,
    }  # fmt: skip
    began = time.monotonic()
    with pytest.raises(ConfigError, match="is in use by another run"):
        run_training(settings)
    assert time.monotonic() - began < 20
    assert fresh.is_dir()


def test_nothing_is_pruned_while_a_run_goes_on(hold, tmp_path, capsys):
    hold()
    assert main(["checkpoints", str(tmp_path / "run"), "--keep", "1"]) == 2
    assert "is in use by another run" in capsys.readouterr().err
