"""A group of fresh processes on this machine that call the same function together, when told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from vembed import errors
from vembed.errors import DistributedError, VembedError

_GRACE_S = 10.0


@dataclass(frozen=True)
class _Failure:
    """What a process says of an exception: its kind if it is one of ours, and a text."""

    kind: str | None
    text: str


class LocalProcesses:
    """Processes of one gloo group, on the CPU. As a context manager it leaves none behind."""

    def __init__(self, count: int, *, timeout_s: float = 600.0) -> None:
        """Start them; they load torch while the caller goes on.

        Args:
            count: How many.
            timeout_s: How long one call may take.
        """
        self._timeout_s = timeout_s
        # They meet in a file: no port to lose to another program.
        self._meeting = tempfile.TemporaryDirectory(prefix="vembed-verify-")
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(count):
            own_end, child_end = context.Pipe()
            meeting = f"file://{self._meeting.name}/group"
            process = context.Process(
                target=_serve,
                args=(child_end, _environment(rank, count), meeting, timeout_s),
                daemon=True,
            )
            process.start()
            child_end.close()
            self._processes.append(process)
            self._pipes.append(own_end)

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            for pipe in self._pipes:
                pipe.send(None)
            for process in self._processes:
                process.join(_GRACE_S)
        for process in self._processes:
            process.kill()
            process.join()
        self._meeting.cleanup()

    def run(self, fn: Callable[..., Any], *args: Any, what: str) -> list[Any]:
        """Call `fn(*args)` on every process. After an error the group is of no further use.

        Args:
            fn: A function at the top level of a module; results and arguments travel by pickle.
            *args: Its arguments, the same for every process.
            what: What is being done, for messages.

        Returns:
            The results, by process.

        Raises:
            VembedError: of the same kind, if one was raised there.
            DistributedError: if a process failed otherwise, died, or took too long.
        """
        for pipe in self._pipes:
            pipe.send((fn, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(results) < len(self._pipes):
            waiting = [rank for rank in range(len(self._pipes)) if rank not in results]
            left_s = max(0.0, deadline - time.monotonic())
            ready = wait([self._pipes[rank] for rank in waiting], left_s)
            if not ready:
                raise DistributedError(
                    f"{what}: process {', '.join(map(str, waiting))} did not finish within "
                    f"{self._timeout_s:g} s. A collective that some processes call and others do "
                    "not, as in a loss that gathers only sometimes, waits forever"
                )
            for rank in waiting:
                if self._pipes[rank] in ready:
                    results[rank] = _receive(self._pipes[rank], rank, what)
        return [results[rank] for rank in range(len(self._pipes))]


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


def _environment(rank: int, count: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // count)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # launchers' readers require one; the group needs none
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }


def _serve(pipe: Connection, environment: dict[str, str], meeting: str, timeout_s: float) -> None:
    """What a process does: take a function, call it, send back what it returned, and again."""
    os.environ.update(environment)
    # Ctrl-C reaches every process of the terminal; the parent answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
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
    while (call := pipe.recv()) is not None:
        fn, args = call
        try:
            outcome = fn(*args)
        except VembedError as error:
            outcome = _Failure(_kind(error), str(error))
        except Exception:
            outcome = _Failure(None, traceback.format_exc())
        pipe.send(outcome)
    dist.destroy_process_group()


def _kind(error: VembedError) -> str:
    """The nearest class that `vembed.errors` has: its constructor takes one text."""
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
