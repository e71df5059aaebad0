"""How processes are started: what a launcher was told, and what a shell still remembers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from vembed.training.environment.finding import Finding
from vembed.training.launch_check import default_config_file

_LAUNCH = "launcher"
_OWN = "Start with `vembed train --num_processes N`, which needs no configuration"
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_launcher(file: Path | None = None) -> Finding:
    """What `accelerate config` has saved, and whether it starts as many processes as it says.

    Args:
        file: Where it is saved; None for where Accelerate looks.
    """
    file = file or default_config_file()
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        return Finding(_LAUNCH, "problem", f"{file} cannot be read: {reason}", "Remove the file")
    if not isinstance(settings, dict) or not settings:
        return Finding(_LAUNCH, "ok", "nothing saved by `accelerate config`")
    count, kind = settings.get("num_processes"), settings.get("distributed_type")
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        return Finding(
            _LAUNCH,
            "problem",
            f"{file}: distributed_type {kind}, which vembed does not leave to the launcher",
            f"{_OWN}; weights are shared out by distributed_strategy: fsdp2",
        )
    if isinstance(count, int) and count > 1 and not _starts_several(kind):
        return Finding(
            _LAUNCH,
            "problem",
            f"{file}: num_processes {count}, of which `accelerate launch` starts one with "
            f"distributed_type {kind}",
            f"{_OWN}, or give `accelerate launch --multi_gpu`, on CPUs too",
        )
    return Finding(_LAUNCH, "ok", f"{file}: {count} processes, distributed_type {kind}")


def _starts_several(kind: object) -> bool:
    """Whether `accelerate launch` starts several processes for a distributed_type (1.15)."""
    # MULTI_CPU is none of these: it takes the launcher of one process.
    return isinstance(kind, str) and kind.startswith("MULTI_") and kind != "MULTI_CPU"


def check_leftovers(environment: Mapping[str, str] = os.environ) -> Finding:
    """Variables of a launcher in a shell: a program would wait for processes that there are not.

    Args:
        environment: The variables.
    """
    name = "variables of a launcher"
    size = environment.get("WORLD_SIZE", "1")
    left = [f"{key}={environment[key]}" for key in _RANKS if key in environment]
    if size != "1":
        return Finding(
            name,
            "problem",
            f"{', '.join(left)}: a run would wait for {size} processes",
            f"Unless a launcher sets them: unset {' '.join(_RANKS)}",
        )
    return Finding(name, "ok", ", ".join(left) or "none are set")
