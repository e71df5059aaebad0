"""The training program, as every launcher starts it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vembed.config import RUN_REQUIRES
from vembed.errors import DiskError, LostSaveError, VembedError, exit_status
from vembed.training.config import load_and_parse_config
from vembed.training.disk import disk_problem
from vembed.training.launch_check import check_process_count, check_strategy, started_processes
from vembed.training.local_launch import follow_launcher

_SHOWN_PATHS = 4


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
        with _imports():
            # Both are imported later anyway, by what reads rows and by what makes the schedule.
            import datasets  # noqa: F401
            import transformers.optimization  # noqa: F401
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
                f"{_listed(result.failed_saves)}"
            )
        return 0

    return exit_status(train)


def _listed(paths: Sequence[str]) -> str:
    """The first few: a disk that stays full refuses every checkpoint of a long run."""
    more = f" and {len(paths) - _SHOWN_PATHS} more" if len(paths) > _SHOWN_PATHS else ""
    return ", ".join(paths[:_SHOWN_PATHS]) + more


@contextmanager
def _imports() -> Iterator[None]:
    """Without garbage collection, which looks through all that was imported again and again.

    It took 0.5 of 4.3 CPU seconds (torch, a BERT of transformers). What was imported stays, so that
    later collections need not look at it either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
