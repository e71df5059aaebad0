"""The training program, as every launcher starts it."""

from __future__ import annotations

from collections.abc import Sequence

from vembed.config import RUN_REQUIRES
from vembed.errors import DiskError, LostSaveError, VembedError, exit_status
from vembed.training.config import load_and_parse_config
from vembed.training.disk import disk_problem
from vembed.training.launch_check import check_process_count, check_strategy, started_processes
from vembed.training.local_launch import follow_launcher


def train_program(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Read the settings, train, and return the exit status; README has the table of them.

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

        from vembed.distributed import name_lost_processes
        from vembed.training.run import run_training
        from vembed.training.stop_signals import StoppedError

        try:
            with name_lost_processes(lambda: "the beginning or the end of the run"):
                result = run_training(config)
        except OSError as error:
            if not isinstance(error, VembedError) and (problem := disk_problem(error)):
                raise DiskError(f"{error.filename or error}: {problem}") from error
            raise
        except StoppedError:
            PartialState().destroy_process_group()
            raise
        PartialState().destroy_process_group()
        if result.failed_saves:
            raise LostSaveError(
                f"the run came to its end, but not everything could be saved: "
                f"{', '.join(result.failed_saves)}"
            )
        return 0

    return exit_status(train)
