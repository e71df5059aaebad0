"""Between the gradient of a step and its update: what is not finite changes no weight.

A loss that is not finite on one process makes its gradient so (`Trainer._backward`), and the
reduction of gradients makes those of all processes so. The norm that clipping computes anyway is
therefore the one number to look at, and the same on every process: they agree without a word.
Reading it is the one time in a step that the host waits for the device.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vembed.data import RecordDataset, RecordLoader
from vembed.distributed import gather_texts, process_count, process_index
from vembed.errors import NonFiniteError
from vembed.training.disk import disk_problem

if TYPE_CHECKING:
    from vembed.training.trainer import StepOutput, Trainer
    from vembed.training.training_loop import TrainState

logger = logging.getLogger(__name__)

NONFINITE_NAME = "nonfinite.jsonl"
_SHOWN_ROWS = 8
_REMEDY = (
    "A smaller lr, mixed_precision: no, or a larger temperature help, and on_nonfinite: skip "
    "leaves such steps out; the last checkpoint is untouched"
)


class Verdict(Enum):
    """What becomes of a step's gradient."""

    UPDATE = "update"
    OVERFLOW = "overflow"
    """The gradient is only too large for fp16: the scaler leaves the step out and scales less."""
    SKIP = "skip"


class StepGuard:
    """Decides about every step of a run, and tells of losses that jump."""

    def __init__(self, trainer: Trainer, state: TrainState) -> None:
        """Assign.

        Args:
            trainer: Prepared. Its config says what to do (`on_nonfinite`, `max_nonfinite_steps`).
            state: Counts the steps that were left out.
        """
        self._trainer = trainer
        self._state = state
        self._spikes = SpikeWatch()

    def judge(
        self,
        group: Sequence[Mapping[str, Any]],
        outputs: Sequence[StepOutput],
        grad_norm: Tensor,
    ) -> Verdict:
        """Whether the step that comes after `state.step` may change the weights.

        Collective where the gradient is not finite: every process must call it.

        Args:
            group: The step's micro-batches.
            outputs: What each of them left.
            grad_norm: Norm of the reduced gradient, the same on every process.

        Raises:
            NonFiniteError: on every process, unless such steps are to be skipped and there were
                not too many.
        """
        loss = torch.stack([output.loss.detach().float() for output in outputs]).mean()
        value, norm = torch.stack([loss, grad_norm.detach().float().to(loss.device)]).tolist()
        if math.isfinite(norm):
            self._tell_spike(value, group)
            return Verdict.UPDATE
        return self._judge_nonfinite(group, outputs, value, norm)

    def _judge_nonfinite(
        self,
        group: Sequence[Mapping[str, Any]],
        outputs: Sequence[StepOutput],
        loss: float,
        norm: float,
    ) -> Verdict:
        device = self._trainer.accelerator.device
        own = {
            "process": process_index(),
            "loss": loss,
            "parts": _mean_parts(outputs),
            "rows": [row for batch in group for row in row_names(self._trainer.dataloader, batch)],
        }
        told = [json.loads(text) for text in gather_texts(json.dumps(own), device)]
        bad = [process for process in told if not math.isfinite(process["loss"])]
        if not bad and self._is_overflow():
            return Verdict.OVERFLOW
        step, config = self._state.step + 1, self._trainer.config
        path = Path(config.output_dir) / NONFINITE_NAME
        self._write(path, {"step": step, "grad_norm": norm, "processes": told})
        complaint = _complaint(step, norm, told, bad, path)
        if config.on_nonfinite == "stop":
            raise NonFiniteError(f"{complaint}. {_REMEDY}")
        self._state.skipped_steps += 1
        skipped, most = self._state.skipped_steps, config.max_nonfinite_steps
        if skipped > most:
            raise NonFiniteError(
                f"{complaint}. {skipped} such steps are more than max_nonfinite_steps: {most} "
                "allows. A smaller lr, mixed_precision: no, or a larger temperature help"
            )
        if self._trainer.accelerator.is_main_process:
            logger.warning("%s. The step is left out, %d of at most %d", complaint, skipped, most)
        return Verdict.SKIP

    def _is_overflow(self) -> bool:
        """Whether fp16's scaler may cure it: not when it scales by less than one already."""
        scaler = self._trainer.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1.0

    def _write(self, path: Path, line: Mapping[str, Any]) -> None:
        if not self._trainer.accelerator.is_main_process:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if disk_problem(error) is None:
                raise
            # What is to be told about the step matters more.
            logger.warning("%s cannot be written: %s", path, disk_problem(error))

    def _tell_spike(self, loss: float, group: Sequence[Mapping[str, Any]]) -> None:
        usual = self._spikes.usual_before(loss)
        if usual is None:
            return
        rows = [row for batch in group for row in row_names(self._trainer.dataloader, batch)]
        logger.warning(
            "step %d: the loss jumped to %.4g%s; the median of the last %d steps is %.4g. Rows: %s",
            self._state.step + 1,
            loss,
            f" on process {process_index()}" if process_count() > 1 else "",
            len(self._spikes),
            usual,
            _shown(rows),
        )


class SpikeWatch:
    """Knows a loss that has nothing to do with those before it.

    A spike exceeds the median of the last steps by ten robust standard deviations (1.4826 times the
    median absolute deviation), by five times the largest excess among them, and by half of where
    the losses of the run began. The second keeps quiet about losses with rare hard batches, the
    third about a model that is nearly done, whose losses are all close to zero. A spike joins the
    last steps, so that a run that stays up there is told of once.
    """

    def __init__(self, window: int = 100, least: int = 20) -> None:
        """Assign.

        Args:
            window: Steps to compare with.
            least: Steps before the first comparison.
        """
        self._recent: deque[float] = deque(maxlen=window)
        self._least = least
        self._start = 0.0

    def __len__(self) -> int:
        return len(self._recent)

    def usual_before(self, loss: float) -> float | None:
        """The median of the last losses if this one is a spike, else None. Takes the loss in."""
        median = self._median_if_spike(loss)
        if math.isfinite(loss):
            self._recent.append(loss)
        if len(self._recent) == self._least and not self._start:
            self._start = abs(statistics.median(self._recent))
        return median

    def _median_if_spike(self, loss: float) -> float | None:
        if len(self._recent) < self._least or loss <= max(self._recent):
            return None
        median = statistics.median(self._recent)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self._recent)
        largest = max(self._recent) - median
        limit = max(10 * deviation, 5 * largest, 0.5 * self._start)
        return median if loss - median > limit else None


def row_names(dataloader: Any, batch: Mapping[str, Any]) -> list[str]:
    """The rows of a batch as `file:line`, or by number where the data does not know its lines."""
    indices = [int(index) for index in batch.get("row_index", [])]
    rows = dataloader.rows if isinstance(dataloader, RecordLoader) else None
    if not isinstance(rows, RecordDataset):
        return [f"row {index}" for index in indices]
    return [record.where for record in rows.__getitems__(indices)]


def _mean_parts(outputs: Sequence[StepOutput]) -> dict[str, float]:
    return {
        name: float(torch.stack([output.parts[name].float() for output in outputs]).mean())
        for name in outputs[0].parts
    }


def _complaint(
    step: int,
    norm: float,
    told: Sequence[Mapping[str, Any]],
    bad: Sequence[Mapping[str, Any]],
    path: Path,
) -> str:
    """What is not finite, on which processes, and with which rows."""
    several = len(told) > 1
    losses = []
    for process in bad or told:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in process["parts"].items())
        losses.append(
            f"loss {process['loss']:.4g} ({parts})"
            + (f" on process {process['process']}" if several else "")
        )
    rows = "; ".join(
        (f"process {process['process']}: " if several else "") + _shown(process["rows"])
        for process in bad or told
    )
    return (
        f"step {step}: loss and gradients must be finite. Received: {', '.join(losses)}, gradient "
        f"norm {norm:.4g}. Rows: {rows} ({path} has all)"
    )


def _shown(rows: Sequence[str]) -> str:
    if not rows:
        return "unknown"
    more = f" and {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return ", ".join(rows[:_SHOWN_ROWS]) + more
