"""Several processes of one program: environment, exit status, signals, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vembed.training.local_launch import run_processes

ROOT = Path(__file__).parents[3]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, signal\n{code}"]


def test_each_process_gets_its_place(tmp_path):
    code = f"""
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
with open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w") as file:
    file.write(" ".join(os.environ[name] for name in names))
"""
    assert run_processes(python(code), 3) == 0
    places = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:5] for place in places] == [
        [str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)
    ]
    assert len({place[5] for place in places}) == 1


def test_threads_are_shared_out_unless_set(tmp_path, monkeypatch):
    code = f"open({str(tmp_path / 'threads')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    run_processes(python(code), 2)
    assert (tmp_path / "threads").read_text() == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_processes(python(code), 2)
    assert (tmp_path / "threads").read_text() == "7"


@pytest.mark.parametrize("status", [1, 2, 130])
def test_the_first_failure_decides_and_ends_the_others(status):
    code = f"sys.exit({status}) if os.environ['RANK'] == '1' else time.sleep(60)"
    started = time.monotonic()
    assert run_processes(python(code), 3) == status
    assert time.monotonic() - started < 20


def test_a_killed_process_counts_as_a_failure(capsys):
    code = "os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(60)"
    assert run_processes(python(code), 2) == 1
    assert "process 0 was ended by SIGKILL" in capsys.readouterr().err


LAUNCHER = """
import sys
from vembed.training.local_launch import run_processes
sys.exit(run_processes([sys.executable, "-c", sys.argv[1]], 2, grace_s=3))
"""
WORKER = r"""
import os, signal, sys, time
from vembed.training.local_launch import follow_launcher
def stop(number, frame):
    os.write(1, b"stopping\n")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGUSR1, stop)
follow_launcher()
os.write(1, b"ready\n")
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.05)  # briefly: a signal that comes right before it is handled after it
"""


def launch(worker: str) -> subprocess.Popen:
    """The launcher of two workers, both of which are ready."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, worker], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    return launcher


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGINT, 128 + signal.SIGINT),
        (signal.SIGUSR1, 128 + signal.SIGUSR1),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_signals_are_passed_on_and_nothing_is_left_behind(number, status):
    launcher = launch(WORKER)
    launcher.send_signal(number)
    assert launcher.wait(30) == status
    # The pipe closes when the last process that could write to it has ended.
    assert launcher.stdout.read().count("stopping") == 2


SAVES = r"""
import os, signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
os.write(1, b"ready\n")
time.sleep(GRACE)
os.write(1, b"saved\n")
os._exit(138)
"""


def test_who_saves_has_its_time_and_a_second_signal_of_a_cluster_does_not_take_it():
    launcher = launch(SAVES.replace("GRACE", "1.5"))
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        launcher.send_signal(number)
        time.sleep(0.1)
    assert launcher.wait(30) == 128 + signal.SIGUSR1
    assert launcher.stdout.read().count("saved") == 2


def test_what_a_process_says_of_its_end_counts():
    """Not 143, with which a job script would take it for saved."""
    launcher = launch(WORKER.replace("sys.exit(1)", "sys.exit(3)"))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 3


def test_the_grace_period_has_an_end():
    launcher = launch(SAVES.replace("GRACE", "60"))
    started = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 143
    assert 1 < time.monotonic() - started < 20
    assert "saved" not in launcher.stdout.read()


def test_ctrl_c_twice_ends_at_once():
    launcher = launch(SAVES.replace("GRACE", "60"))
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.2)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(30) == 130
    assert "saved" not in launcher.stdout.read()


def test_a_single_process_is_told_of_no_group(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    code = f"open({str(tmp_path / 'env')!r}, 'w').write(' '.join(os.environ))"
    assert run_processes(python(code), 1) == 0
    names = (tmp_path / "env").read_text().split()
    assert "VEMBED_LAUNCHER_PID" in names
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & {*names}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ["accelerate", "torchrun"])
def test_other_launchers_leave_nothing_behind_either(tmp_path, name, number):
    """They start processes, and die of a signal without passing it on."""
    script = tmp_path / name
    script.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])")
    launcher = subprocess.Popen(
        [sys.executable, script, WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(number)
    assert launcher.stdout.read() == "stopping\n"
    assert launcher.wait(30) == -number


def test_who_is_started_by_anything_else_outlives_it(tmp_path):
    script = tmp_path / "nohup"
    script.write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])")
    worker = WORKER.replace("+ 60", "+ 1") + "os.write(1, b'done\\n')"
    launcher = subprocess.Popen(
        [sys.executable, script, worker], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    assert launcher.stdout.read() == "done\n"
    launcher.wait(30)
