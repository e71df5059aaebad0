"""`vembed verify gradients`, as a user types it."""

import json
import logging
import os
import signal
import subprocess
import time

import psutil
import pytest

from tests.cli.conftest import BIN
from tests.tiny import PAIRS, write_rows
from vembed.cli import main
from vembed.training.verification.cases import VARIATIONS


@pytest.fixture
def settings(tmp_path, tiny_bert_path) -> list[str]:
    path = write_rows(tmp_path / "rows.jsonl", PAIRS)
    return ["--model_name", str(tiny_bert_path), "--data_path", str(path), "--batch_size", "4"]


def test_two_processes(vembed, settings, tmp_path):
    (tmp_path / "datasets.py").write_text("raise RuntimeError('not the library')")
    done = vembed("verify", "gradients", *settings, "--learn_temperature", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["passed"]
    assert (found["processes"], found["precision"], found["pairs"]) == (2, "float64", 4)
    assert len(found["cases"]) == 28
    assert {case["step"] for case in found["cases"]} == {"plain", "cached"}
    for case in found["cases"]:
        assert set(case["groups"]) == {"backbone", "logit_scale"}
        for group in case["groups"].values():
            assert group["difference"] <= case["tolerance"]
            assert group["ratio"] == pytest.approx(1, abs=0.01)
    written = {path.name for path in tmp_path.iterdir()} - {"rows.jsonl", "datasets.py"}
    assert not written


def test_a_loss_without_a_gather(settings, tmp_path, capsys, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "def rank(query, positive):\n"
        "    return torch.nn.functional.cross_entropy(query @ positive.T, "
        "torch.arange(len(query)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["verify", "gradients", *settings, "--loss_type", "my_losses:rank"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "wrong: plain x 2, cached x 2 (every condition) the same rows give the right" in shown
    assert shown.count("Look at: loss_type") == 1
    assert shown.count(" 2 of 4") == len(VARIATIONS)
    assert "14 of 28 cases" in shown


def test_a_gradient_of_zero_is_said_to_show_nothing(settings, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", PAIRS[:1])
    assert main(["verify", "gradients", *settings, "--processes", "1"]) == 0
    assert "which shows nothing" in capsys.readouterr().out


@pytest.mark.parametrize("learned", [[], ["--learn_temperature"]], ids=["fixed", "learned"])
def test_a_line_for_each_condition_and_group(settings, capsys, learned):
    arguments = ["--processes", "1", "--pairs", "3", *learned]
    assert main(["verify", "gradients", *settings, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "14 of 14 cases give the gradient of the whole batch" in shown
    assert "3 per process and micro-batch (batch_size: 4)" in shown
    for variation in VARIATIONS:
        assert variation.name in shown
    assert shown.count("2 of 2") == len(VARIATIONS) * (1 + len(learned))
    assert "1e-12" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_every_case(settings, capsys):
    assert main(["verify", "gradients", *settings, "--processes", "1", "--every_case"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " backbone " in line]
    assert [line.split()[-1] for line in lines] == ["plain", "cached"] * len(VARIATIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gradient"], "unknown topic 'gradient' (did you mean 'gradients'?)"),
        (["gradients", "--precision", "half"], "--precision"),
        (["gradients", "--processes", "0"], "processes: must be at least 1. Received: 0"),
        (["gradients", "--processes", "many"], "--processes"),
        (["gradients", "--lr", "x"], "--lr: expected a number"),
        (["gradients", "--loss_type", "cosent", "--processes", "1"], "score"),
    ],
)
def test_mistakes(settings, capsys, arguments, message):
    status = main(["verify", *arguments, *(settings if arguments[0] == "gradients" else [])])
    shown = capsys.readouterr()
    assert status == 2
    assert message in shown.err
    assert shown.out == ""


def test_it_leaves_logging_as_it_was(settings, capsys):
    before = logging.getLogger("vembed").level
    assert main(["verify", "gradients", *settings, "--processes", "1", "--pairs", "2"]) == 0
    assert logging.getLogger("vembed").level == before


def test_help(capsys):
    assert main(["verify", "gradients", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--processes N" in shown
    assert "float64 1e-12, float32 1e-05" in " ".join(shown.split())
    assert main(["verify"]) == 2


@pytest.fixture
def answers_ctrl_c():
    """Programs that are started here do, also where a shell has the tests themselves ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("answers_ctrl_c")
@pytest.mark.parametrize(
    ("ended_by", "while_running"),
    # A resource tracker and a process that imports; later, two more.
    [(signal.SIGINT, 2), (signal.SIGTERM, 4)],
    ids=["ctrl-c-while-loading", "sigterm-while-comparing"],
)
def test_nothing_is_left_behind_when_it_is_interrupted(settings, tmp_path, ended_by, while_running):
    command = [BIN / "vembed", "verify", "gradients", *settings]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    program = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started = wait_for(lambda: psutil.Process(program.pid).children(recursive=True), while_running)
    if ended_by == signal.SIGINT:
        os.killpg(program.pid, ended_by)  # as a terminal does
    else:
        program.send_signal(ended_by)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130
    assert said.strip() == "vembed: interrupted"
    deadline = time.monotonic() + 20
    while (left := [process for process in started if runs(process)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not left
    assert not list(scratch.iterdir())


def runs(process: psutil.Process) -> bool:
    """Orphans stay zombies where the first process, as in many containers, reaps nobody."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(find, count: int) -> list:
    deadline = time.monotonic() + 120
    while len(found := find()) < count:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.05)
    return found
