"""Starts a run again when it dies, from its newest checkpoint. Nothing here needs torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from vembed.training.rotation import list_checkpoints

RESTARTED = (1, 6)
"""Exit statuses that may be of the moment: a process that died or hung.

What settings, rows, a full disk or a loss that is not finite have caused would come again, and who
sent a signal wants the run to end.
"""

_GO_ON = ("--resume", "auto", "--overwrite_output_dir", "false")
_FRUITLESS = 3
_PAUSE_S = 1.0


def supervise(
    run: Callable[[Sequence[str]], int], *, output_dir: str, resume: str, max_restarts: int
) -> int:
    """Run; when it dies, run again with `resume: auto`.

    Args:
        run: Takes further arguments of the command line, and returns the exit status.
        output_dir: Of the run.
        resume: As it was set. A checkpoint that it names is where a run without one of its own
            starts again.
        max_restarts: Most times that it is started again.

    Returns:
        The status of the last one.
    """
    earlier, fruitless = _stamp(output_dir), 0
    for restarts in count():
        before = _newest_step(output_dir)
        # Until the folder is the run's own, there may be another in it, which is to be replaced.
        is_own = _stamp(output_dir) != earlier
        status = run(_further_arguments(resume, has_checkpoint=before > 0) if is_own else [])
        if status not in RESTARTED:
            return status
        step = _newest_step(output_dir)
        fruitless = 0 if step > before else fruitless + 1
        died = f"vembed: the run ended with status {status}"
        if fruitless == _FRUITLESS:
            _say(
                f"{died}, {fruitless} times in a row without a new checkpoint (the newest is of "
                f"step {step}): starting it again would not help. Its own message above says why "
                "it died; if it takes too long to the next checkpoint, lower save_steps"
            )
            return status
        if restarts == max_restarts:
            _say(f"{died}, and was started again {restarts} times (max_restarts: {max_restarts})")
            return status
        _say(f"{died}; restart {restarts + 1} of {max_restarts}, from step {step}")
        time.sleep(_PAUSE_S)
    raise AssertionError("unreachable")


def _further_arguments(resume: str, *, has_checkpoint: bool) -> Sequence[str]:
    return _GO_ON if has_checkpoint or resume in ("auto", "never") else ()


def _newest_step(output_dir: str) -> int:
    checkpoints = list_checkpoints(Path(output_dir))
    return checkpoints[0].step if checkpoints else 0


def _stamp(output_dir: str) -> int | None:
    """When the settings of a run were written there; None without any."""
    config = Path(output_dir) / "config.yaml"
    return config.stat().st_mtime_ns if config.exists() else None


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
