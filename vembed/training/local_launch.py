"""Run one program as several processes on this machine.

Instead of torchrun, which answers every failure with status 1 and a traceback of its own, and needs
torch to be imported before it starts anything.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

_FAILURE_GRACE_S = 1.0
_POLL_S = 0.05
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LAUNCHERS = (
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun",
    "torch.distributed.run",
)  # fmt: skip
_LAUNCHER_PID = "VEMBED_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1

Process = subprocess.Popen[bytes]


def run_processes(command: Sequence[str], count: int, *, grace_s: float = 30.0) -> int:
    """Run `command` `count` times, with the environment that torch.distributed reads.

    When one process fails the others are ended. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on.

    Args:
        command: The program and its arguments.
        count: How many processes; a single one is told nothing of others.
        grace_s: Seconds after a signal until processes that have not ended are killed.

    Returns:
        The exit status of the process that failed first, or 0. A process that a signal ended counts
        as 1; after a signal that was passed on, 1 becomes 128 + the signal.
    """
    port = _free_port()
    processes = [
        # A session of its own, so that Ctrl-C in the terminal arrives once: through this process.
        subprocess.Popen(command, env=_environment(rank, count, port), start_new_session=True)
        for rank in range(count)
    ]
    try:
        with _signals_passed_on(processes) as received:
            status = _wait(processes, received, grace_s)
    finally:
        _kill(processes)
    # What a process says of itself, that it could not save for example, is more than the signal.
    return 128 + received[0] if received and status == 1 else status


def follow_launcher() -> None:
    """In a process that a launcher started: get SIGTERM if the launcher dies (Linux).

    `accelerate launch` of one process, and torchrun after SIGUSR1 or SIGKILL, die without a word to
    the processes that they started, which would go on training for nobody.
    """
    launcher = os.environ.get(_LAUNCHER_PID)
    if sys.platform != "linux" or (launcher is None and not _is_launcher(os.getppid())):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if launcher is not None and os.getppid() != int(launcher):
        sys.exit(1)


def is_supervised() -> bool:
    """Whether `run_processes` started this process."""
    return _LAUNCHER_PID in os.environ


def _is_launcher(pid: int) -> bool:
    try:
        words = psutil.Process(pid).cmdline()[:4]
    except psutil.Error:
        return False
    return any(Path(word).name in _LAUNCHERS for word in words)


def _wait(processes: Sequence[Process], received: Sequence[int], grace_s: float) -> int:
    """Wait for all to end; returns the first failure's status."""
    status, deadline = 0, math.inf
    while None in [process.poll() for process in processes]:
        status = status or _first_failure(processes, quiet=bool(received))
        if math.isinf(deadline) and (status or received):
            # After a failure the others can only wait for it; some have a word to say.
            grace = grace_s if received else _FAILURE_GRACE_S
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            if received:
                sys.stderr.write(f"vembed: killed what had not ended after {grace_s:g} s\n")
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
    """Pass the first signal on to the processes, and collect all; Ctrl-C as a later one kills."""
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _send(processes, number)
        elif number == signal.SIGINT:
            _kill(processes)

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
    launcher = {_LAUNCHER_PID: str(os.getpid())}
    if count == 1:
        return {**os.environ, **launcher}
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
        **launcher,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
