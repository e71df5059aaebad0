"""Saves that a disk may refuse: the run goes on without them, and says so at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vembed.distributed import any_process
from vembed.training.disk import as_size, disk_problem, folder_bytes, free_bytes, mount_of

if TYPE_CHECKING:
    from vembed.training.trainer import Trainer

logger = logging.getLogger(__name__)

_ROOM = 1.05
_ADAM_NUMBERS = 2


class Saves:
    """Makes saves, and knows which of them failed and how long one takes.

    Attributes:
        failed: What could not be saved, the same on every process.
        newest_checkpoint: The last one that was saved; None before.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Assign.

        Args:
            trainer: What is saved; it need not be prepared yet.
        """
        self.failed: list[str] = []
        self.newest_checkpoint: Path | None = None
        self._trainer = trainer
        self._bytes: dict[bool, int] = {}
        self._slow_told = False

    def attempt(self, path: Path, save: Callable[[], object], *, resumable: bool) -> bool:
        """Save, if the disk takes it. Collective: every process must call it.

        Args:
            path: The folder that `save` makes.
            save: Collective. What it raises, it raises on every process, and leaves nothing behind.
            resumable: Whether the optimizer's state is saved, too.

        Returns:
            Whether it is saved. If not, a warning says what was missing.
        """
        accelerator, problem = self._trainer.accelerator, None
        need = self._estimate(resumable=resumable)
        if accelerator.is_main_process and free_bytes(path) < need:
            problem = "no space left"
        if not any_process(problem is not None, accelerator.device):
            started = time.perf_counter()
            try:
                save()
            except Exception as error:
                problem = disk_problem(error)
                if not any_process(problem is not None, accelerator.device):
                    raise
            else:
                if resumable:
                    self.newest_checkpoint = path
                if accelerator.is_main_process:
                    self._bytes[resumable] = folder_bytes(path)
                    self._tell_slow(path, time.perf_counter() - started)
                return True
        self.failed.append(str(path))
        if accelerator.is_main_process:
            logger.warning(
                "%s is not saved: %s on %s: it needs about %s, %s are free. Training goes on, and "
                "the run will end with status 3",
                path, problem or "another process could not write", mount_of(path), as_size(need),
                as_size(free_bytes(path)),
            )  # fmt: skip
        return False

    def _estimate(self, *, resumable: bool) -> float:
        """Bytes of the next save: as the last of its kind, or what its tensors take."""
        if resumable in self._bytes:
            return _ROOM * self._bytes[resumable]
        encoder = self._trainer.accelerator.unwrap_model(self._trainer.model)
        tensors = [*encoder.parameters(), *encoder.buffers()]
        count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if resumable:
            trained = sum(p.numel() * p.element_size() for p in self._trainer.parameters())
            count += (1 + _ADAM_NUMBERS) * trained
        return float(count)

    def _tell_slow(self, path: Path, seconds: float) -> None:
        grace = self._trainer.config.grace_period_s
        if seconds > grace and not self._slow_told:
            self._slow_told = True
            logger.warning(
                "%s took %.0f s to save, but a run that gets SIGTERM is killed after %.0f s "
                "(grace_period_s): what it saves then would be lost. Ask the cluster for a longer "
                "time and set grace_period_s to it, or send SIGUSR1 earlier",
                path, seconds, grace,
            )  # fmt: skip
