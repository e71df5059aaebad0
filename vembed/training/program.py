"""The training program, as every launcher starts it."""

from __future__ import annotations

from collections.abc import Sequence

from vembed.config import RUN_REQUIRES
from vembed.errors import exit_status
from vembed.training.config import load_and_parse_config
from vembed.training.launch_check import check_process_count, check_strategy, started_processes
from vembed.training.local_launch import follow_launcher


def train_program(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Read the settings, train, and return the exit status: 0, 2 (settings or data), 1 (else).

    Args:
        argv: Arguments without the program's name; None takes those of this process.
        prog: Name of the program in `--help`.
    """

    def train() -> int:
        follow_launcher()
        config = load_and_parse_config(argv, required=RUN_REQUIRES, prog=prog)
        check_strategy()
        check_process_count(config, started_processes())
        # After the checks, because they import torch.
        from accelerate import PartialState

        from vembed.training.run import run_training

        run_training(config)
        PartialState().destroy_process_group()
        return 0

    return exit_status(train)
