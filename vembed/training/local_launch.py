"""Run one program as several processes on this machine.

Instead of torchrun, which answers every failure with status 1 and a traceback of its own, and needs
torch to be imported before it starts anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_GRACE_S = 30.0
_POLL_S = 0.05
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAUNCHER_PID = "VEMBED_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1

Process = subprocess.Popen[bytes]


def run_processes(command: Sequence[str], count: int) -> int:
    """Run `command` `count` times, with the environment that torch.distributed reads.

    When one process fails the others are ended. SIGINT, SIGTERM and SIGHUP are passed on; processes
    that do not end within 30 seconds are killed.

    Returns:
        The exit status of the process that failed first, or 0. A process ended by a signal that did
        not come through here counts as 1; otherwise 128 + the signal.
    """
    port = _free_port()
    processes = [
        # A session of its own, so that Ctrl-C in the terminal arrives once: through this process.
        subprocess.Popen(command, env=_environment(rank, count, port), start_new_session=True)
        for rank in range(count)
    ]
    try:
        with _signals_passed_on(processes) as received:
            status = _wait(processes, received)
    finally:
        _kill(processes)
    return 128 + received[0] if received and status else status


def follow_launcher() -> None:
    """In a process started by `run_processes`: end if the launcher dies without a word (Linux)."""
    launcher = os.environ.get(_LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):
        sys.exit(1)


def _wait(processes: Sequence[Process], received: Sequence[int]) -> int:
    """Wait for all to end; returns the first failure's status."""
    status, deadline = 0, None
    while None in [process.poll() for process in processes]:
        status = status or _first_failure(processes, quiet=bool(received))
        if (status or received) and deadline is None:
            deadline = time.monotonic() + _GRACE_S
            if not received:
                _send(processes, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _kill(processes)
        time.sleep(_POLL_S)
    return status or _first_failure(processes, quiet=bool(received))


def _first_failure(processes: Sequence[Process], *, quiet: bool) -> int:
    for rank, process in enumerate(processes):
        if process.returncode is not None and process.returncode > 0:
            return process.returncode
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            if not quiet:
                sys.stderr.write(f"vembed: process {rank} was ended by {name}\n")
            return 1
    return 0


@contextmanager
def _signals_passed_on(processes: Sequence[Process]) -> Iterator[list[int]]:
    """Pass signals on to the processes, and collect them; a second one kills."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            _kill(processes)
        else:
            _send(processes, number)

    earlier = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _send(processes: Sequence[Process], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _kill(processes: Sequence[Process]) -> None:
    """Kill those that still run, with their data workers: each is the leader of its session."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // count)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        _LAUNCHER_PID: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
