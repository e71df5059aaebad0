"""`vembed train`: in this process, or in several that it starts."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from vembed.config import RUN_REQUIRES
from vembed.training.config import load_and_parse_config
from vembed.training.local_launch import run_processes
from vembed.training.program import train_program

PROG = "vembed train"


def main(argv: list[str]) -> int:
    """Train; starts `num_processes` processes unless a launcher already has.

    Raises:
        ConfigError: listing all problems of the settings, before any process is started.
    """
    config = load_and_parse_config(argv, required=RUN_REQUIRES, prog=PROG)
    count = config.num_processes or 1
    if count == 1 or "WORLD_SIZE" in os.environ:
        return train_program(argv, prog=PROG)
    return run_processes([sys.executable, str(_entrypoint()), *argv], count)


def _entrypoint() -> Path:
    spec = find_spec("vembed.entrypoints")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vembed.entrypoints is missing; is vembed installed completely?")
    return Path(spec.submodule_search_locations[0]) / "train.py"
