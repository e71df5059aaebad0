"""`vembed checkpoints` and `vembed verify resume`, as a user types them."""

from __future__ import annotations

import json

import pytest

from vembed.cli import main
from vembed.training.manifest import replaced_folder
from vembed.training.rotation import step_path


@pytest.fixture
def run(tmp_path):
    """The folder of a run: three checkpoints, the second of which is the best."""
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
        facts = {"step": step, "epoch": step / 2, "value": value, "larger_is_better": True}
        with replaced_folder(step_path(tmp_path, step), facts) as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
    with replaced_folder(tmp_path / "best", {"step": 2, "value": 0.9}) as folder:
        (folder / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path


def damage(run, step):
    (step_path(run, step) / "model.safetensors").write_bytes(bytes(600))


def test_lists(run, capsys):
    assert main(["checkpoints", str(run)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.strip().endswith("whole")]
    assert rows[1] == ["step-000002", "2", "1.0", "0.9000", "0.0", "whole"]
    assert rows[3][0] == "best"
    assert f"resume: auto goes on from {step_path(run, 3)}" in shown


def test_names_the_damaged_file(run, capsys):
    damage(run, 3)
    assert main(["checkpoints", str(run)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.safetensors: has 600 bytes, but 1,000 were written" in shown
    assert f"goes on from {step_path(run, 2)}" in shown


def test_json(run, capsys):
    damage(run, 3)
    assert main(["checkpoints", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["whole"] for one in found["folders"]] == [True, True, False, True]
    assert found["resume"] == str(step_path(run, 2))


def test_keeps_the_newest_whole_and_the_best(run, capsys):
    for step in (4, 5):
        with replaced_folder(step_path(run, step), {"step": step}) as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
    damage(run, 5)
    (run / "checkpoints" / "step-000000.damaged").mkdir()
    assert main(["checkpoints", str(run), "--keep", "1"]) == 0
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-000002", "step-000004"]
    assert (run / "best").is_dir()
    assert main(["checkpoints", str(run), "--keep", "1", "--keep_best", "0"]) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]


def test_removes_nothing_where_nothing_is_whole(run, capsys):
    for step in (1, 2, 3):
        damage(run, step)
    assert main(["checkpoints", str(run), "--keep", "1"]) == 2
    assert "no checkpoint is whole, so none is removed" in capsys.readouterr().err
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert main(["checkpoints", str(run)]) == 1
    assert "nothing to go on from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "expected the output_dir of a run. Received: nowhere"),
        (["."], "holds no model and no checkpoint of a run. Name the output_dir, not"),
        ([".", "--keep", "0"], "expected a number of at least 1"),
        ([".", "--keep", "1", "--keep_best", "-1"], "expected a number of at least 0"),
        ([".", "--kep", "1"], "unrecognized arguments: --kep"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoints", *argv]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main(["checkpoints", "--help"]) == 0
    assert "--keep N" in capsys.readouterr().out
    assert main(["checkpoints"]) == 2


@pytest.fixture
def arguments(tiny_bert_path, pairs_path):
    return ["--model_name", str(tiny_bert_path), "--data_path", str(pairs_path),
            "--batch_size", "4", "--device", "cpu", "--steps", "1"]  # fmt: skip


class TestVerifyResume:
    def test_table(self, arguments, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["verify", "resume", *arguments]) == 0
        shown = capsys.readouterr().out
        assert "1 + 1 steps are 2 steps, bit by bit" in shown
        assert "lines of metrics.jsonl 2 of 2" in " ".join(shown.split())
        assert not list(tmp_path.iterdir())

    def test_json_on_two_processes(self, arguments, capsys):
        assert main(["verify", "resume", *arguments, "--processes", "2", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["passed"]
        assert found["processes"] == 2

    def test_mistakes(self, capsys):
        assert main(["verify", "resume", "--stepps", "2"]) == 2
        assert "--stepps" in capsys.readouterr().err
        assert main(["verify", "resume", "--steps", "many"]) == 2
        assert main(["verify", "resume"]) == 2
        assert main(["verify", "resume", "--help"]) == 0
