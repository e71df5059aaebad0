"""Run a function on several processes of one gloo group, and get what each of them returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import torch
import torch.distributed as dist


class ChildFailed(RuntimeError):
    """A process raised, died or took too long. The message ends with its traceback."""


def run_on_processes(fn: Callable[..., Any], n: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(*args)` on `n` processes of one gloo group and return the results by process.

    Each process has the environment of a launcher (RANK, WORLD_SIZE, MASTER_ADDR ...), so that an
    Accelerator works in it, and one thread. Whatever happens, no process is left behind.

    Args:
        fn: A function at the top level of a module. Its result travels by pickle.
        n: Number of processes.
        *args: Arguments of `fn`, the same for every process.
        timeout: Seconds for all of it.

    Raises:
        ChildFailed: if a process fails or time is up.
    """
    # The group meets in a file: no port to lose to another program, and a TCP store on this
    # machine now and then takes five seconds to answer.
    meeting = tempfile.TemporaryDirectory(prefix="vembed-gloo-")
    context = multiprocessing.get_context(_start_method())
    processes, pipes = [], []
    try:
        for rank in range(n):
            own_end, child_end = context.Pipe()
            process = context.Process(
                target=_child,
                args=(child_end, _environment(rank, n), f"file://{meeting.name}/group", fn, args),
            )
            process.start()
            child_end.close()
            processes.append(process)
            pipes.append(own_end)
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        meeting.cleanup()


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: its exit status, negative for a signal, and what it said."""

    status: int
    said: str


def run_forked(fn: Callable[..., int | None], *args: Any, timeout: float = 60) -> Ended:
    """Call `fn(*args)` in a forked process, whose exit status is what it returns; 0 for None.

    For what ends processes. `fn` may be any function; its stderr is a file.
    """
    return _run_forked([{}], "", fn, args, timeout)[0]


def run_together(
    fn: Callable[..., int | None], n: int, *args: Any, timeout: float = 60
) -> list[Ended]:
    """As `run_forked`, on `n` processes of one gloo group; gives how each of them ended."""
    with tempfile.TemporaryDirectory(prefix="vembed-gloo-") as meeting:
        environments = [_environment(rank, n) for rank in range(n)]
        return _run_forked(environments, f"file://{meeting}/group", fn, args, timeout)


def _run_forked(
    environments: list[dict[str, str]],
    meeting: str,
    fn: Callable[..., int | None],
    args: tuple[Any, ...],
    timeout: float,
) -> list[Ended]:
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in environments]
        return _wait_for(_start_forked(files, environments, meeting, fn, args), files, timeout)


def _start_forked(
    files: list[IO[bytes]],
    environments: list[dict[str, str]],
    meeting: str,
    fn: Callable[..., int | None],
    args: tuple[Any, ...],
) -> list[Any]:
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_end_with_status, args=(file.fileno(), environment, meeting, fn, args)
        )
        for environment, file in zip(environments, files, strict=True)
    ]
    for process in processes:
        process.start()
    return processes


def _wait_for(processes: list[Any], files: list[IO[bytes]], timeout: float) -> list[Ended]:
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read().decode())
    if late:
        raise ChildFailed(f"{len(late)} processes did not end within {timeout} s: {said}")
    return [Ended(p.exitcode or 0, text) for p, text in zip(processes, said, strict=True)]


def _end_with_status(
    stderr: int,
    environment: dict[str, str],
    meeting: str,
    fn: Callable[..., int | None],
    args: tuple[Any, ...],
) -> None:
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    if meeting:
        _join_group(environment, meeting)
    os._exit(_status_of(fn, args))


def _status_of(fn: Callable[..., int | None], args: tuple[Any, ...]) -> int:
    try:
        return fn(*args) or 0
    except BaseException:
        traceback.print_exc()
        return 99


def _start_method() -> str:
    """`fork` spares the imports, but is unsafe beside CUDA and beside threads that do work."""
    busy = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    safe = sys.platform == "linux" and not torch.cuda.is_available() and not busy
    return "fork" if safe else "spawn"


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for pipe in pipes if pipe not in results]
        ready = wait(waiting, max(0, deadline - time.monotonic()))
        if not ready:
            ranks = [pipes.index(pipe) for pipe in waiting]
            raise ChildFailed(f"processes {ranks} did not finish within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, outcome = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise ChildFailed(f"process {rank} died without a word") from None
            if not succeeded:
                raise ChildFailed(f"process {rank} failed:\n{outcome}")
            results[pipe] = outcome
    return [results[pipe] for pipe in pipes]


def _environment(rank: int, n: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # required by launchers' readers, used by none: the group is up
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
    }


def _child(
    pipe: Connection,
    environment: dict[str, str],
    meeting: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # The threads that OpenMP had before a fork are gone after it; with one, it asks for none.
    torch.set_num_threads(1)
    try:
        _join_group(environment, meeting)
        outcome = True, fn(*args)
    except BaseException:
        outcome = False, traceback.format_exc()
    # Plain pickle: torch's own would share memory that goes away with this process.
    pipe.send_bytes(pickle.dumps(outcome))
    # One that leaves early takes its connections with it, while others may still need them: wait
    # for the parent, which ends all of them together, or for its own end.
    pipe.poll(None)


def _join_group(environment: dict[str, str], meeting: str) -> None:
    os.environ.update(environment)
    if "accelerate.state" in sys.modules:
        # A forked process would believe what its parent's Accelerator found: that it is alone.
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
