"""A group of processes on this machine that call the same function together, when told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

from vembed import errors
from vembed.errors import DistributedError, VembedError

_SAFE_PATH = "PYTHONSAFEPATH"
_IMPORTED_ONCE = ["vembed.training.verification.verify"]


def start_importing() -> None:
    """Load torch for the processes of this machine that will be started, while the caller goes on.

    Optional: `LocalProcesses` does it otherwise. Does nothing where processes cannot share imports.
    """
    if _context().get_start_method() != "forkserver":
        return
    resource_tracker.ensure_running()  # it would be started below, and unblock signals
    # Ctrl-C reaches every process of a terminal; this one answers it and ends the others.
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    safe_path = os.environ.get(_SAFE_PATH)
    # Or a datasets.py that lies in the current folder would be taken for the library.
    os.environ[_SAFE_PATH] = "1"
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if safe_path is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = safe_path


def _context() -> ForkServerContext | SpawnContext:
    """Processes are forked by one that has done nothing but imports, which take seconds.

    To fork this one would be unsafe beside its threads and CUDA; fresh ones would each import.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


@dataclass(frozen=True)
class _Failure:
    """What a process says of an exception: its kind if it is one of ours, and a text."""

    kind: str | None
    text: str


class LocalProcesses:
    """Processes of one gloo group, on the CPU. As a context manager it leaves none behind."""

    def __init__(self, count: int, *, threads: int = 1, timeout_s: float = 600.0) -> None:
        """Start them.

        Args:
            count: How many.
            threads: That each computes with.
            timeout_s: How long one call may take.
        """
        self._timeout_s = timeout_s
        # They meet in a file: no port to lose to another program.
        self._meeting = tempfile.TemporaryDirectory(prefix="vembed-verify-")
        start_importing()
        context = _context()
        self._processes, self._pipes = [], []
        for rank in range(count):
            own_end, child_end = context.Pipe()
            meeting = f"file://{self._meeting.name}/group"
            process = context.Process(
                target=_serve,
                args=(child_end, _environment(rank, count, threads), meeting, timeout_s),
                daemon=True,
            )
            process.start()
            child_end.close()
            self._processes.append(process)
            self._pipes.append(own_end)

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._meeting.cleanup()

    def start(self, fn: Callable[..., Any], *args: Any, what: str) -> Call:
        """Have `fn(*args)` called on every process, while the caller goes on. One call at a time.

        Args:
            fn: A function at the top level of a module; results and arguments travel by pickle.
            *args: Its arguments, the same for every process.
            what: What is being done, for messages.
        """
        for pipe in self._pipes:
            pipe.send((fn, args))
        return Call(self._pipes, what, self._timeout_s)

    def run(self, fn: Callable[..., Any], *args: Any, what: str) -> list[Any]:
        """Start it and wait; see `start` and `Call.results`."""
        return self.start(fn, *args, what=what).results()


@dataclass(frozen=True)
class Call:
    """A function that runs on every process of a group."""

    pipes: Sequence[Connection]
    what: str
    timeout_s: float

    def results(self) -> list[Any]:
        """Wait for what each process returned. After an error the group is of no further use.

        Raises:
            VembedError: of the same kind, if one was raised there.
            DistributedError: if a process failed otherwise, died, or took too long.
        """
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DistributedError(
                    f"{self.what}: process {', '.join(map(str, waiting.values()))} did not finish "
                    f"within {self.timeout_s:g} s. A collective that some processes call and "
                    "others do not, as in a loss that gathers only sometimes, waits forever"
                )
            for pipe in self.pipes:
                if pipe in ready:
                    rank = waiting.pop(pipe)
                    results[rank] = _receive(pipe, rank, self.what)
        return [results[rank] for rank in range(len(self.pipes))]


def _receive(pipe: Connection, rank: int, what: str) -> Any:
    try:
        outcome = pipe.recv()
    except EOFError:
        raise DistributedError(f"{what}: process {rank} died; is there enough memory?") from None
    if not isinstance(outcome, _Failure):
        return outcome
    if outcome.kind is None:
        raise DistributedError(f"{what}: process {rank} failed:\n{outcome.text}")
    raise getattr(errors, outcome.kind)(f"{what}: process {rank}: {outcome.text}")


def _environment(rank: int, count: int, threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # launchers' readers require one; the group needs none
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": str(threads),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }


def _serve(pipe: Connection, environment: dict[str, str], meeting: str, timeout_s: float) -> None:
    """What a process does: take a function, call it, send back what it returned, and again."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `start_importing`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":
        # Of its locks, such as tqdm's, nothing is left when a process is killed.
        multiprocessing.set_start_method("fork", force=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    dist.init_process_group(
        "gloo",
        init_method=meeting,
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        # The parent's own limit shall end a call first, because it can say which.
        timeout=timedelta(seconds=2 * timeout_s),
    )
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        try:
            outcome = fn(*args)
        except VembedError as error:
            outcome = _Failure(_kind(error), str(error))
        except Exception:
            outcome = _Failure(None, traceback.format_exc())
        pipe.send(outcome)


def _kind(error: VembedError) -> str:
    """The nearest class that `vembed.errors` has: its constructor takes one text."""
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
