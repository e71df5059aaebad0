"""`vembed train`: in this process, or in several that it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vembed.config import RUN_REQUIRES
from vembed.training.config import load_and_parse_config
from vembed.training.local_launch import run_processes
from vembed.training.program import train_program
from vembed.training.supervisor import supervise

PROG = "vembed train"


def main(argv: list[str]) -> int:
    """Train; starts `num_processes` processes unless a launcher already has.

    Raises:
        ConfigError: listing all problems of the settings, before any process is started.
    """
    config = load_and_parse_config(argv, required=RUN_REQUIRES, prog=PROG)
    count = config.num_processes or 1
    if "WORLD_SIZE" in os.environ or (count == 1 and not config.max_restarts):
        return train_program(argv, prog=PROG)

    def run(more: Sequence[str]) -> int:
        command = [sys.executable, str(_entrypoint()), *replace_flags(argv, more)]
        return run_processes(command, count, grace_s=config.grace_period_s)

    if not config.max_restarts:
        return run([])
    return supervise(
        run,
        output_dir=config.output_dir,
        resume=config.resume,
        max_restarts=config.max_restarts,
    )


def replace_flags(argv: Sequence[str], more: Sequence[str]) -> list[str]:
    """Arguments with some flags of other values, wherever they stood.

    Args:
        argv: As the user typed them.
        more: `--KEY VALUE` for each that changes.
    """
    flags = set(more[::2])
    kept: list[str] = []
    skips = False
    for word in argv:
        is_flag = word.startswith("--")
        flag = "--" + word.removeprefix("--").partition("=")[0].replace("-", "_")
        skips = (is_flag and flag in flags) or (skips and not is_flag)
        if not skips:
            kept.append(word)
    return [*kept, *more]


def _entrypoint() -> Path:
    spec = find_spec("vembed.entrypoints")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vembed.entrypoints is missing; is vembed installed completely?")
    return Path(spec.submodule_search_locations[0]) / "train.py"
