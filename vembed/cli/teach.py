"""`vembed teach`: what a teacher says about the training rows, computed once and stored."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from vembed.cli.terminal import progress_bar
from vembed.config import TEACH_REQUIRES
from vembed.training.config import load_and_parse_config
from vembed.training.local_launch import follow_launcher, run_processes

if TYPE_CHECKING:
    from vembed.training.teaching.teach import TeachResult

ABOUT = "Store what a teacher says about the rows of data_path; nothing is trained."


def main(argv: list[str]) -> int:
    """Compute what is missing; in several processes where `num_processes` says so.

    Raises:
        ConfigError: listing all problems of the settings; or if the cache is another teacher's.
        DataError: if a row cannot be used.
    """
    follow_launcher()
    config = load_and_parse_config(argv, required=TEACH_REQUIRES, prog="vembed teach", about=ABOUT)
    count = config.num_processes or 1
    if count > 1 and "WORLD_SIZE" not in os.environ:
        return run_processes([sys.executable, "-m", "vembed.cli", "teach", *argv], count)
    # After the settings are checked, because it imports torch.
    from vembed.training.console import configure_logging
    from vembed.training.teaching.teach import teach

    configure_logging(main_process=os.environ.get("RANK", "0") == "0")
    shown = 0.0
    with progress_bar("teaching", 1.0) as advance:

        def show(share: float) -> None:
            nonlocal shown
            advance(share - shown)
            shown = share

        result = teach(config, show)
    sys.stdout.write(_summary(result))
    return 0


def _summary(result: TeachResult) -> str:
    others = result.items - result.computed
    return (
        f"{result.folder}: {result.items:,} items x {result.size} float32; {result.computed:,} "
        f"computed in {result.seconds:.1f} s"
        + (f", {others:,} were there or another process's" if others else "")
        + "\n"
    )
