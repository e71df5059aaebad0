"""What a run tells: `metrics.jsonl`, trackers, and a progress bar or, without a terminal, lines."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from vembed.config import TrainConfig
from vembed.distributed import all_reduce_mean
from vembed.errors import NonFiniteError
from vembed.training.console import stderr_terminal
from vembed.training.disk import disk_problem
from vembed.training.evaluator import Validation
from vembed.training.manifest import write_text_safely
from vembed.training.rotation import METRICS
from vembed.training.step_guard import Verdict
from vembed.training.trackers import log_to_trackers

if TYPE_CHECKING:
    from rich.console import Console

    from vembed.training.training_loop import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedWindow:
    """Steps that are not written down yet.

    Attributes:
        tensors: Losses, their parts and gradient norms, scalars of this process.
        facts: What else it takes, as JSON can hold it.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Recorder:
    """Collects the numbers of the steps and writes them down at logging steps.

    Between logging steps nothing is read back from the device. The lines of `metrics.jsonl` hold no
    times, so that two runs of the same work write the same file; speed goes to the progress bar and
    the trackers.

    Attributes:
        path: The file.
        lost_lines: Whether the disk did not take some lines, which are tried again with the next.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        total_steps: int,
        history: list[dict[str, Any]],
    ) -> None:
        """Assign.

        Args:
            accelerator: Processes and trackers.
            config: Reads `output_dir` and `progress`.
            total_steps: Optimizer steps of the run.
            history: Receives every line, on the main process.
        """
        self.accelerator = accelerator
        self.history = history
        self.path = Path(config.output_dir) / METRICS
        self.lost_lines = False
        terminal = stderr_terminal() if config.progress and accelerator.is_main_process else None
        self._bar = None if terminal is None else _Bar(terminal, total_steps)
        self._total_steps = total_steps
        self._prints_lines = config.progress and self._bar is None
        self._window: list[StepResult] = []
        self._rows = 0
        self._since = time.perf_counter()

    def __enter__(self) -> Self:
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Of a run that goes on, the lines up to there; what it wrote after that comes again.
            write_text_safely(self.path, self.lines())
        if self._bar is not None:
            self._bar.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.progress.stop()

    def lines(self) -> str:
        """What `metrics.jsonl` holds."""
        return "".join(json.dumps(line) + "\n" for line in self.history)

    def window(self) -> RecordedWindow:
        """The steps since the last logging step, for a checkpoint between two of them."""
        tensors: dict[str, Tensor] = {}
        steps = []
        for step, result in enumerate(self._window):
            tensors[f"{step}.grad_norm"] = result.grad_norm
            for number, output in enumerate(result.outputs):
                tensors[f"{step}.{number}.loss"] = output.loss
                for name, part in output.parts.items():
                    tensors[f"{step}.{number}.parts.{name}"] = part
            outputs = [{"parts": [*o.parts], "weights": o.weights} for o in result.outputs]
            steps.append({"verdict": result.verdict.value, "outputs": outputs})
        return RecordedWindow(tensors, {"steps": steps, "rows": self._rows})

    def resume(self, window: RecordedWindow, *, done_steps: int) -> None:
        """Go on in the middle of a window.

        Args:
            window: What it held.
            done_steps: Optimizer steps that the run has done.
        """
        from vembed.training.trainer import StepOutput
        from vembed.training.training_loop import StepResult

        of = window.tensors
        self._rows = window.facts["rows"]
        self._window = [
            StepResult(
                [
                    StepOutput(
                        of[f"{step}.{number}.loss"],
                        {name: of[f"{step}.{number}.parts.{name}"] for name in output["parts"]},
                        output["weights"],
                    )
                    for number, output in enumerate(result["outputs"])
                ],
                of[f"{step}.grad_norm"],
                Verdict(result["verdict"]),
            )
            for step, result in enumerate(window.facts["steps"])
        ]
        if self._bar is not None:
            self._bar.update(completed=done_steps)

    def say(self, what: str) -> None:
        """Name what the run is doing, beside the bar."""
        if self._bar is not None:
            self._bar.update(description=what)

    def add(self, result: StepResult, *, rows: int) -> None:
        """Take in one optimizer step.

        Args:
            result: What it left. A step that was left out counts for no mean.
            rows: Queries of this process in the step.
        """
        if result.verdict is not Verdict.SKIP:
            self._window.append(result)
        self._rows += rows
        if self._bar is not None:
            self._bar.update(advance=1, description="training")

    def log_step(self, step: int, epoch: float, facts: Mapping[str, float]) -> None:
        """Write the means since the last call (loss, its parts, gradient norm) and `facts`.

        Collective: every process must call it.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; on every process alike.
        """
        line = {"step": step, "epoch": round(epoch, 4), **self._means(), **facts}
        speed = self._rows * self.accelerator.num_processes / (time.perf_counter() - self._since)
        self._window, self._rows = [], 0
        _require_finite(line)
        loss = f"loss {line['loss']:.4f}" if "loss" in line else "no loss"
        numbers = f"{loss}  lr {line['lr']:.2e}  {speed:.1f} examples/s"
        if self._bar is not None:
            self._bar.update(numbers=numbers)
        self._write(line, f"step {step}/{self._total_steps}  {numbers}")
        log_to_trackers(
            self.accelerator, {**_named(line), "train/examples_per_second": speed}, step
        )
        self._since = time.perf_counter()

    def log_validation(self, step: int, epoch: float, result: Validation) -> None:
        """Write the result of a validation."""
        values = result.as_log()
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._write(
            {"step": step, "epoch": round(epoch, 4), **values},
            f"step {step}/{self._total_steps}  {numbers}",
            above_bar=True,
        )
        self._since = time.perf_counter()

    def _write(self, line: Mapping[str, Any], text: str, *, above_bar: bool = False) -> None:
        if not self.accelerator.is_main_process:
            return
        self.history.append(dict(line))
        self._write_newest()
        if self._prints_lines:
            logger.info(text)
        elif above_bar and self._bar is not None:
            self._bar.progress.console.print(text, highlight=False)

    def _write_newest(self) -> None:
        """Write the last line of the history, and those that a full disk did not take."""
        try:
            if self.lost_lines:
                write_text_safely(self.path, self.lines())
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(self.history[-1]) + "\n")
        except OSError as error:
            problem = disk_problem(error)
            if problem is None:
                raise
            if not self.lost_lines:
                logger.warning("%s cannot be written: %s. Training goes on", self.path, problem)
            self.lost_lines = True
        else:
            self.lost_lines = False

    def _means(self) -> dict[str, float]:
        """Means over the window and over processes; one read from the device.

        Empty if every step of the window was left out. A gradient that overflowed in fp16 has no
        norm; its loss counts.
        """
        outputs = [output for result in self._window for output in result.outputs]
        if not outputs:
            return {}
        names = list(outputs[0].parts)
        columns = [torch.stack([output.loss.float() for output in outputs]).mean()]
        columns += [torch.stack([o.parts[n].float() for o in outputs]).mean() for n in names]
        means = all_reduce_mean(torch.stack(columns)).tolist()
        norms = [r.grad_norm.float() for r in self._window if r.verdict is Verdict.UPDATE]
        parts = {f"loss_{n}": m for n, m in zip(names, means[1:], strict=True)}
        weights = {f"weight_{name}": weight for name, weight in outputs[-1].weights.items()}
        return {
            "loss": means[0],
            **(parts | weights if len(parts) > 1 else {}),
            **({"grad_norm": float(torch.stack(norms).mean())} if norms else {}),
        }


class _Bar:
    """The progress bar of a terminal."""

    def __init__(self, console: Console, total_steps: int) -> None:
        # Here, because a run without a terminal needs none of it.
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self.progress.add_task("training", total=total_steps, numbers="")

    def update(self, **changes: Any) -> None:
        """Change what the bar shows."""
        self.progress.update(self._task, **changes)


def _named(line: Mapping[str, float]) -> dict[str, float]:
    return {f"train/{name}": value for name, value in line.items() if name != "step"}


def _require_finite(line: Mapping[str, float]) -> None:
    bad = [name for name, value in line.items() if not math.isfinite(value)]
    if bad:
        values = ", ".join(f"{name} {line[name]}" for name in bad)
        raise NonFiniteError(
            f"step {line['step']}: not finite since the last logging step: {values}. A smaller lr, "
            "mixed_precision: no, or a larger temperature help; the last checkpoint is untouched"
        )
