"""`vembed plan`: what a run needs, as a table and as JSON; bad input is told like elsewhere."""

import json
import sys

import pytest

from vembed.cli import main
from vembed.errors import ConfigError

PROBE = """
import sys
from vembed.cli import main
status = main(["plan", *sys.argv[1:]])
print("torch" in sys.modules)
sys.exit(status)
"""


@pytest.fixture
def run(tiny_st_path, pairs_path, capsys, monkeypatch):
    """Runs the command; gives status and stdout."""
    monkeypatch.setenv("COLUMNS", "160")
    base = ["--model_name", str(tiny_st_path), "--data_path", str(pairs_path), "--device", "cpu"]

    def start(*options: str):
        status = main(["plan", *base, "--tflops", "0.01", *options])
        return status, capsys.readouterr().out

    return start


def test_table(run):
    status, shown = run("--gpus", "2", "--memory", "8", "--bandwidth", "10", "--batch_size", "4")
    assert status == 0
    for part in ("weights", "gradients", "optimizer state", "together", "communication",
                 "largest chunk", "as stated", "It fits."):  # fmt: skip
        assert part in shown
    assert "measured here" not in shown


def test_json_and_the_status_of_what_does_not_fit(run):
    status, shown = run("--memory", "0.001", "--json", "--use_gradient_cache")
    found = json.loads(shown)
    assert status == 1
    assert found["fits"] is False
    parts = [value for name, value in found["memory"].items() if name != "total"]
    assert sum(parts) == found["memory"]["total"]
    assert found["flops_per_second"] == 1e10
    assert found["communication"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "argument --gpus: expected a whole number of at least 1. Received: 0"),
        (["--memory", "x"], "argument --memory: expected a number above 0. Received: x"),
        (["--tflops", "-1"], "argument --tflops: expected a number above 0. Received: -1"),
        (["--bandwidth"], "argument --bandwidth: expected one argument"),
    ],
)
def test_mistakes(options, message, capsys):
    assert main(["plan", "--model_name", "m", "--data_path", "d", *options]) == 2
    assert capsys.readouterr().err == f"vembed: vembed plan: {message}\n"


def test_a_wrong_setting_does_not_wait_for_torch(shell, tmp_path):
    done = shell(sys.executable, "-c", PROBE, "--modle_name", "m", "--memory", "8")
    assert done.returncode == 2
    assert "--modle_name: unknown setting (did you mean 'model_name' or" in done.stderr
    assert done.stdout == "False\n"


def test_help(capsys):
    assert main(["plan", "--help"]) == 0
    assert "--bandwidth GB/s" in capsys.readouterr().out
    assert main(["plan"]) == 2


def test_errors_are_config_errors():
    from vembed.cli.plan import main as plan

    with pytest.raises(ConfigError):
        plan(["--memory", "none"])
