"""A run that is asked to end: it finishes its step, saves, and says so.

SIGTERM is what clusters and launchers send before they kill, SIGINT is Ctrl-C, and SIGUSR1 is what
`sbatch --signal=USR1@120` sends some time before the limit. All of them do the same; the exit
status (128 + the signal) tells a job script which it was, so that it can queue the job again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
import torch

from vembed.distributed import fail_together, process_index
from vembed.errors import VembedError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_SAME_S = 1.0
"""A Ctrl-C reaches a process up to twice, by the terminal and by its launcher."""


class StoppedError(VembedError, SystemExit):
    """A run that ended because a signal asked it to, after it was saved.

    Also a SystemExit: a script that lets it through ends with the status that clusters look for.
    """

    is_shared = True
    may_end_others = False

    def __init__(self, message: str, number: int) -> None:
        """Assign; `number` is the signal's."""
        super().__init__(message)
        self.exit_code = self.code = 128 + number


class StopSignals:
    """What a process was asked; asking again with Ctrl-C ends it at once.

    Attributes:
        agreed: The signal for which all processes stop; 0 until they agree.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self._number = 0
        self._since = 0.0
        self._pid = os.getpid()

    def number(self) -> int:
        """The signal that this process got first; 0 for none."""
        return self._number

    def ask(self, device: torch.device) -> int:
        """The signal that any process got. Collective: every process must call it.

        Args:
            device: Where the process group communicates from.
        """
        with fail_together(device, self.number) as said:
            pass
        self.agreed = said.largest
        return self.agreed

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler; processes that this one forks may inherit it."""
        if os.getpid() != self._pid:
            return
        now = time.monotonic()
        if not self._number:
            self._number, self._since = number, now
            if process_index() == 0:
                name = signal.Signals(number).name
                _say(f"\nvembed: {name}: ends after this step; Ctrl-C ends at once, unsaved\n")
        elif number == signal.SIGINT and now - self._since > _SAME_S:
            _leave(128 + number)


@contextmanager
def catch_stop_signals() -> Iterator[StopSignals]:
    """Inside, signals do not end this process, but are noted. Others of its handlers come back.

    Only in the main thread of a program; elsewhere nothing is noted, and nothing changes. A signal
    that is ignored, as SIGINT in the background of a shell, stays ignored.
    """
    signals = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    caught = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in caught:
        signal.signal(number, signals.receive)
    try:
        yield signals
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    # Neither logging nor sys.stderr may be entered twice, which a handler could do.
    os.write(2, text.encode())


def _leave(status: int) -> None:
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(status)
