"""How a run speaks in a terminal: what it is doing goes to stderr, what it found to stdout."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import transformers

from vembed.redaction import RedactingFormatter

if TYPE_CHECKING:
    from rich.console import Console


def stderr_terminal() -> Console | None:
    """Shared by log lines and progress bar, so that rich prints the lines above the bar.

    Returns:
        None where stderr is no terminal, or rich is not installed.
    """
    if find_spec("rich") is None:
        return None
    console = _stderr()
    return console if console.is_terminal else None


@cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def configure_logging(*, main_process: bool) -> None:
    """Show vembed's log lines, on the main process from INFO up, on others from WARNING up.

    transformers' own bars about loading weights are silenced: a run has its own. Leaves a logger
    alone that the caller has configured.
    """
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("vembed")
    if not main_process:
        logger.setLevel(logging.WARNING)
    if logger.handlers or logging.getLogger().handlers:
        return
    logger.addHandler(_handler())
    logger.propagate = False
    if main_process:
        logger.setLevel(logging.INFO)


def _handler() -> logging.Handler:
    console = stderr_terminal()
    handler: logging.Handler
    if console is None:
        # Rich would break lines at 80 columns in a file.
        handler = logging.StreamHandler()
    else:
        from rich.logging import RichHandler

        handler = RichHandler(
            console=console, show_path=False, show_level=False, show_time=False, highlighter=None
        )
    handler.setFormatter(RedactingFormatter())
    return handler
