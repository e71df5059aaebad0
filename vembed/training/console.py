"""How a run speaks in a terminal: what it is doing goes to stderr, what it found to stdout."""

from __future__ import annotations

import logging

import transformers
from rich.console import Console
from rich.logging import RichHandler

from vembed.redaction import RedactingFormatter

STDERR = Console(stderr=True)
"""Shared by log lines and progress bar, so that rich prints the lines above the bar."""


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
    # Rich would break lines at 80 columns in a file.
    handler = (
        logging.StreamHandler()
        if not STDERR.is_terminal
        else RichHandler(
            console=STDERR, show_path=False, show_level=False, show_time=False, highlighter=None
        )
    )
    handler.setFormatter(RedactingFormatter())
    return handler
