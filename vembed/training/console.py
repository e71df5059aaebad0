"""How a run speaks in a terminal: log lines and tables go to stderr, results stay readable in a file."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler


def configure_logging(*, main_process: bool) -> None:
    """Show vembed's log lines, on the main process from INFO up, on others from WARNING up.

    Leaves a logger alone that the caller has configured.
    """
    logger = logging.getLogger("vembed")
    if not main_process:
        logger.setLevel(logging.WARNING)
    if logger.handlers or logging.getLogger().handlers:
        return
    console = Console(stderr=True)
    handler = RichHandler(
        console=console, show_path=False, show_level=False, show_time=False, highlighter=None
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    if main_process:
        logger.setLevel(logging.INFO)
