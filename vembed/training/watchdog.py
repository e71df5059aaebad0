"""Ends a process whose step does not end, and says where it stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from vembed.distributed import process_index

EXIT_HUNG = 6
_POLL_S = 1.0
_WAIT_FOR_OTHERS_S = 2.0


class Watchdog:
    """A thread that looks whether training goes on.

    A process that hangs holds up all others in their next collective. Each of them says what it was
    doing, the one that hangs among them, unless it cannot say anything at all.
    """

    def __init__(self, timeout_s: float) -> None:
        """Assign.

        Args:
            timeout_s: Seconds that may pass between two calls of `see`.
        """
        self._timeout_s = timeout_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vembed-watchdog", daemon=True)
        # Replaced as a whole, so that the thread never sees half of it.
        self._seen: tuple[float, int, str] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def see(self, step: int, what: str) -> None:
        """Training goes on.

        Args:
            step: The step that the process works on.
            what: What it does now, as in `reading rows`.
        """
        self._seen = time.monotonic(), step, what

    def pause(self) -> None:
        """Do not watch until the next `see`: how long a validation takes is not known."""
        self._seen = None

    def _watch(self) -> None:
        while not self._ended.wait(min(_POLL_S, self._timeout_s / 4)):
            seen = self._seen
            if seen is not None and time.monotonic() - seen[0] > self._timeout_s:
                self._end(step=seen[1], what=seen[2])

    def _end(self, *, step: int, what: str) -> None:
        sys.stderr.write(
            f"vembed: process {process_index()} hangs in step {step}: nothing happened for "
            f"{self._timeout_s:g} s (process_timeout_s) while it was {what}. It ends with status "
            f"{EXIT_HUNG}; this is where its threads stand:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)
        # A launcher ends the others when the first one ends; they have something to say, too.
        time.sleep(_WAIT_FOR_OTHERS_S)
        os._exit(EXIT_HUNG)
