"""`vembed doctor`: a table, or JSON; status 1 when there is a problem; no torch, and soon."""

import json
import sys

import pytest

from vembed.cli import main


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch, tmp_path):
    """Nothing of this machine that could be a problem."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")


def test_a_table(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Python" in shown
    assert "0 problems" in shown
    assert "offline by HF_HUB_OFFLINE" in shown


def test_a_problem_is_the_status(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "1 problem," in shown
    assert "unset RANK" in shown


def test_json(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    healthy = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["doctor", "--json", "--num_workers", "2"]) == 1
    ill = json.loads(capsys.readouterr().out)
    assert healthy["ok"] is True
    assert ill["ok"] is False
    (problem,) = [f for f in ill["findings"] if f["level"] == "problem"]
    assert problem["name"] == "variables of a launcher"
    assert set(problem) == {"name", "level", "found", "remedy"}
    (tokenizers,) = [f for f in ill["findings"] if f["name"] == "tokenizers"]
    assert "2 workers" in tokenizers["found"]


def test_settings_are_those_of_training(tmp_path, capsys):
    (tmp_path / "train.yaml").write_text("output_dir: /proc/none\n")
    assert main(["doctor", "--config", "train.yaml"]) == 1
    assert "/proc" in capsys.readouterr().out
    assert main(["doctor", "--config", "train.yaml", "--lr", "x"]) == 2
    assert "--lr: expected a number" in capsys.readouterr().err


def test_it_does_not_import_torch(shell):
    code = (
        "import sys; from vembed.cli import main; main(['doctor', '--json']);"
        "assert not {'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    shown = capsys.readouterr().out
    assert "--json" in shown
    assert "launchers that start one process" in shown
