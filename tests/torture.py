"""Kill runs at the worst moments and take them up again. Also used by `benchmarks/torture.py`.

Processes are forked from this one, which has imported torch: a start takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

from tests.unit.training.resuming import digests
from vembed.training import manifest, resume_state
from vembed.training.run import run_training

_OPERATIONS = (
    (os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "write_text"),
    (manifest, "_exchange"), (resume_state, "save_file"),
)  # fmt: skip
"""What changes the disk: between any two of them, a kill leaves something else there."""


@dataclass(frozen=True)
class Kill:
    """When to kill.

    Attributes:
        operation: Before this one of the main process's changes of the disk, from 1.
        after_s: So long after the start, if no operation is given.
        rank: The first to be killed; None for all at once.
    """

    operation: int | None = None
    after_s: float | None = None
    rank: int | None = None


@dataclass
class Torture:
    """A run that is killed and restarted by the same command until it comes to its end.

    Attributes:
        settings: Of the run; `resume: auto` is added.
        processes: That train together.
        kills: How often it was killed so far.
        completions: How often it came to its end.
        leftovers: How often a kill left a folder half written.
        expected: Digests of the run that nobody killed.
    """

    settings: dict[str, Any]
    processes: int = 1
    kills: int = 0
    completions: int = 0
    leftovers: int = 0
    expected: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.settings["output_dir"])
        self.settings = {**self.settings, "resume": "auto"}
        if not self.start(None):
            raise RuntimeError("the run did not come to its end")
        self.expected = digests(self.output_dir)
        shutil.rmtree(self.output_dir)

    def go_on(self, kill: Kill) -> bool:
        """Start or restart the run, kill it; whether it came to its end before that.

        Raises:
            AssertionError: if it failed by itself, or ended with other bits.
        """
        if not self.start(kill):
            self.kills += 1
            self.leftovers += any(self.output_dir.rglob(".tmp-*"))
            return False
        found = digests(self.output_dir)
        different = {n for n in self.expected.keys() | found.keys()} - {
            name
            for name in self.expected.keys() & found.keys()
            if self.expected[name] == found[name]
        }
        assert not different, f"after {self.kills} kills, these differ: {sorted(different)}"
        left = [path.name for path in self.output_dir.rglob(".*-*")]
        assert not left, f"left behind: {left}"
        self.completions += 1
        shutil.rmtree(self.output_dir)
        return True

    def finish(self) -> None:
        """Let it come to its end."""
        assert self.go_on(Kill())

    def start(self, kill: Kill | None) -> bool:
        """One life of the run; whether it came to its end."""
        kill = kill or Kill()
        with tempfile.TemporaryDirectory(prefix="vembed-torture-") as meeting:
            lives = [
                _Life(self.settings, rank, self.processes, Path(meeting), kill)
                for rank in range(self.processes)
            ]
            try:
                return _watch(lives, kill)
            finally:
                for life in lives:
                    life.end()


class _Life:
    """One forked process."""

    def __init__(
        self, settings: dict[str, Any], rank: int, count: int, meeting: Path, kill: Kill
    ) -> None:
        self.log = meeting / f"log-{rank}"
        self.done, told = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(told)
            return
        try:
            _say_into(self.log)
            if count > 1:
                _join(rank, count, meeting)
            if rank == 0 and kill.operation is not None:
                _die_before(kill.operation)
            _live(settings)
            os.write(told, b"k")
            time.sleep(600)  # one that leaves early takes its connections with it
        finally:
            os._exit(1)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self.done)


def _watch(lives: list[_Life], kill: Kill) -> bool:
    deadline = time.monotonic() + (120.0 if kill.after_s is None else kill.after_s)
    waiting = {life.done: life for life in lives}
    while waiting:
        ready, _, _ = select.select([*waiting], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            assert kill.after_s is not None, "hangs:\n" + _logs(lives)
            for life in lives if kill.rank is None else [lives[kill.rank]]:
                life.kill()
            if kill.rank is not None:
                time.sleep(0.05)  # the others meet its absence
            return False
        for pipe in ready:
            life = waiting.pop(pipe)
            if os.read(pipe, 1) == b"k":
                continue
            _, status = os.waitpid(life.pid, 0)
            assert os.WIFSIGNALED(status), "\n" + _logs(lives)
            assert kill.operation is not None, "\n" + _logs(lives)
            return False
    return True


def _logs(lives: list[_Life]) -> str:
    return "\n".join(life.log.read_text(errors="replace")[-3000:] for life in lives)


def _say_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)  # noqa: SIM115 - until its end


def _live(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        run_training(settings)
    except BaseException:
        traceback.print_exc()
        raise


def _join(rank: int, count: int, meeting: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=count
    )


def _die_before(number: int) -> None:
    """Let this process be killed right before its n-th change of the disk."""
    count = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name in _OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
