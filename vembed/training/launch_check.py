"""Stop when fewer processes run than were asked for.

Launchers do that in silence: `accelerate launch --cpu --num_processes 2` starts one process, which
would train with half the batch that its user believes in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from vembed.config import TrainConfig
from vembed.errors import ConfigError, DistributedError
from vembed.training.local_launch import is_supervised

_LAUNCHER_STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_LAUNCHER_NAMES = ("accelerate", "accelerate-launch", "accelerate.commands.launch")


def check_process_count(config: TrainConfig | Mapping[str, Any], running: int) -> None:
    """Raise DistributedError unless as many processes train together as were asked for.

    Args:
        config: Reads `num_processes`.
        running: Processes that take part, as `accelerator.num_processes` says; before there is an
            Accelerator, `started_processes()`.
    """
    config = TrainConfig.coerce(config)
    if running < started_processes():
        raise DistributedError(
            f"the launcher started {started_processes()} processes, but this one trains with "
            f"{running}: each would train alone and write over the others. In Python, an "
            "Accelerator that was made before the processes were started causes this"
        )
    if config.num_processes is not None and running != config.num_processes:
        origin = config.origins.get("num_processes", "num_processes")
        raise DistributedError(_complaint(config.num_processes, origin, running))
    asked, source = _asked_of_launcher(_parent_command())
    if asked is not None and running < asked:
        raise DistributedError(_complaint(asked, source, running))


def check_supervised(config: TrainConfig | Mapping[str, Any]) -> None:
    """Raise ConfigError if a run shall be started again, but nobody is there to do it.

    Args:
        config: Reads `max_restarts`.
    """
    config = TrainConfig.coerce(config)
    if config.max_restarts and not is_supervised():
        raise ConfigError(
            f"max_restarts: {config.max_restarts}: only `vembed train` starts a run again. Start "
            "with it, or set max_restarts: 0 and let what started this process do it, with resume: "
            "auto"
        )


def check_strategy() -> None:
    """Raise DistributedError if the launcher was asked for more than to start processes.

    Accelerate passes such a wish on in the environment, and on a CPU drops it without a word.
    """
    for variable, name in _LAUNCHER_STRATEGIES.items():
        if os.environ.get(variable, "").lower() in {"1", "true", "yes"}:
            raise DistributedError(
                f"the launcher was asked for {name}, which vembed does not leave to it. Start with "
                "`vembed train --num_processes N` or `accelerate launch --multi_gpu`; to share out "
                "weights and optimizer state, set distributed_strategy: fsdp2"
            )


def started_processes() -> int:
    """Processes that the launcher has started, as it says in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _complaint(asked: int, source: str, running: int) -> str:
    counts = f"{asked} {'process was' if asked == 1 else 'processes were'} asked for ({source})"
    runs = "1 process runs" if running == 1 else f"{running} processes run"
    several = " --multi_gpu" if asked > 1 else ""
    return (
        f"{counts}, but {runs}. Start with `vembed train --num_processes {asked} ...`, or with "
        f"`accelerate launch{several} --num_processes {asked} vembed/entrypoints/train.py ...`"
        f"{several and ' (on CPUs too: without --multi_gpu, accelerate starts one process there)'}"
    )


def _parent_command() -> list[str]:
    """The command line of the process that started this one; empty when it cannot be read."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _asked_of_launcher(command: Sequence[str]) -> tuple[int | None, str]:
    """The number of processes on `accelerate launch`'s command line or in its config file."""
    if not any(Path(word).name in _LAUNCHER_NAMES for word in command[:4]):
        return None, ""
    asked = _option(command, "num_processes")
    if asked is not None and asked.isdecimal():
        return int(asked), f"accelerate launch --num_processes {asked}"
    file = Path(_option(command, "config_file") or default_config_file())
    if not file.is_file():
        return None, ""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    asked_in_file = settings.get("num_processes") if isinstance(settings, dict) else None
    return (asked_in_file, f"{file}") if isinstance(asked_in_file, int) else (None, "")


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, with hyphens or underscores."""
    for position, word in enumerate(command):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value if equals else next(iter(command[position + 1 :]), None)
    return None


def default_config_file() -> Path:
    """Where `accelerate config` saves."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(os.environ.get("HF_HOME", cache)).expanduser()
    return home / "accelerate" / "default_config.yaml"
