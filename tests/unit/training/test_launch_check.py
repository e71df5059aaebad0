"""Fewer processes than were asked for must not train in silence."""

import pytest

from vembed.errors import ConfigError, DistributedError
from vembed.training import launch_check
from vembed.training.config import load_and_parse_config
from vembed.training.launch_check import (
    check_process_count,
    check_strategy,
    check_supervised,
    started_processes,
)

SCRIPT = ["vembed/entrypoints/train.py", "--config", "train.yaml"]


@pytest.fixture
def parent(monkeypatch, tmp_path):
    """Sets the command line of the parent process; no config file of accelerate's is there."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def set_command(*command: str) -> None:
        monkeypatch.setattr(launch_check, "_parent_command", lambda: list(command))

    set_command("bash")
    return set_command


def test_without_a_wish_any_number_is_fine(parent):
    check_process_count({}, 1)
    check_process_count({}, 4)


@pytest.mark.parametrize("running", [1, 4])
def test_the_setting_is_exact(parent, running):
    check_process_count({"num_processes": 2}, 2)
    with pytest.raises(
        DistributedError, match=r"2 processes were asked for \(num_processes\), but"
    ):
        check_process_count({"num_processes": 2}, running)


def test_the_place_of_the_setting_is_named(parent):
    config = load_and_parse_config(["--num_processes", "2"])
    with pytest.raises(
        DistributedError, match=r"asked for \(--num_processes\), but 1 process runs"
    ):
        check_process_count(config, 1)


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "2", *SCRIPT],
        ["python3", "/venv/bin/accelerate", "launch", "--num-processes=2", "--cpu", *SCRIPT],
        ["/venv/bin/accelerate-launch", "--num_processes", "2", *SCRIPT],
        ["python3", "-m", "accelerate.commands.launch", "--num_processes=2", *SCRIPT],
    ],
)
def test_the_launcher_is_taken_at_its_word(parent, command):
    parent(*command)
    check_process_count({}, 2)
    message = r"\(accelerate launch --num_processes 2\), but 1 process runs. .*--multi_gpu --num_pr"
    with pytest.raises(DistributedError, match=message):
        check_process_count({}, 1)


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "/venv/bin/accelerate", "launch", *SCRIPT],
        ["python3", "/venv/bin/accelerate", "launch", "--num_processes", *SCRIPT],
        ["make", "train", "--num_processes", "2"],
        [],
    ],
)
def test_other_parents_ask_for_nothing(parent, command):
    parent(*command)
    check_process_count({}, 1)


@pytest.mark.parametrize("place", ["named", "default"])
def test_the_launchers_config_file_counts_too(parent, tmp_path, place):
    default = tmp_path / "accelerate" / "default_config.yaml"
    file = default if place == "default" else tmp_path / "own.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    option = [] if place == "default" else ["--config_file", str(file)]
    parent("accelerate", "launch", *option, *SCRIPT)
    with pytest.raises(DistributedError, match=rf"asked for \({file}\), but 1 process runs"):
        check_process_count({}, 1)
    parent("accelerate", "launch", "--num_processes", "1", *option, *SCRIPT)
    check_process_count({}, 1)


def test_the_parent_is_really_read():
    assert launch_check._parent_command()


def test_processes_that_do_not_train_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="started 2 processes, but this one trains with 1"):
        check_process_count({}, 1)
    check_process_count({}, 2)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_strategy_that_the_launcher_would_drop_is_refused(monkeypatch, name):
    check_strategy()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(DistributedError, match="set distributed_strategy: fsdp2"):
        check_strategy()
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    check_strategy()


def test_started_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert started_processes() == 3


def test_restarts_need_somebody_who_starts_again(monkeypatch):
    check_supervised({})
    with pytest.raises(ConfigError, match="max_restarts: 2: only `vembed train` starts"):
        check_supervised({"max_restarts": 2})
    monkeypatch.setenv("VEMBED_LAUNCHER_PID", "1")
    check_supervised({"max_restarts": 2})
