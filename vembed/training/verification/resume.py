"""N steps, a checkpoint, N more steps, beside 2 N steps without a break: the same bits?"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.training.resume_state import STATE
from vembed.training.rotation import METRICS, step_path
from vembed.training.run import build_accelerator, raise_problems, set_up, train
from vembed.training.verification.processes import LocalProcesses
from vembed.training.verification.verify import quiet

OnStage = Callable[[str], None]

_CUT, _WHOLE, _AGAIN = "cut", "whole", "again"


@dataclass(frozen=True)
class PartResult:
    """One kind of thing, compared.

    Attributes:
        name: What it is.
        total: How many there are.
        different: Those that differ, by name.
    """

    name: str
    total: int
    different: tuple[str, ...]


@dataclass(frozen=True)
class ResumeVerification:
    """What was found.

    Attributes:
        steps: Before the break, and after it.
        processes: That trained together.
        facts: What a reader should know, by label.
        parts: The comparison.
        repeats: Whether a second run without a break gives the same bits; None if nobody had to
            ask.
    """

    steps: int
    processes: int
    facts: Mapping[str, str]
    parts: tuple[PartResult, ...]
    repeats: bool | None

    @property
    def passed(self) -> bool:
        """Whether everything is the same."""
        return not any(part.different for part in self.parts)


def verify_resume(
    config: TrainConfig | Mapping[str, Any],
    *,
    steps: int = 3,
    processes: int = 1,
    on_stage: OnStage = lambda what: None,
) -> ResumeVerification:
    """Train `2 * steps` steps in one go, and again with a break in the middle, and compare.

    Model, rows, loss, optimizer, precision and device are those of the settings; nothing is
    validated, measured or tracked. What is written goes into a temporary folder, and is removed.

    Args:
        config: The settings of the run.
        steps: Before the break, and after it.
        processes: 1 trains here, on the device of the settings; several are started, on the CPU.
        on_stage: Told what is being done.

    Raises:
        ConfigError: if settings cannot work, or this process was started by a launcher.
        DataError: if a row cannot be used.
        DistributedError: if a process fails or does not come to an end.
    """
    config = TrainConfig.coerce(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "verifying starts its own processes; run it by itself, without a launcher"
        )
    for name, number in (("steps", steps), ("processes", processes)):
        if number < 1:
            raise ConfigError(f"{name}: must be at least 1. Received: {number}")
    raise_problems(config)
    with tempfile.TemporaryDirectory(prefix="vembed-verify-") as folder:
        root = Path(folder)
        settings = _settings(config, root / _WHOLE, steps, processes)
        if processes == 1:
            parts, repeats = _compare_runs(_run_here, settings, root, steps, on_stage)
        else:
            with LocalProcesses(processes) as group:

                def run(config: TrainConfig, start: Path | None) -> None:
                    group.run(_run_here, config, start, what="training")

                parts, repeats = _compare_runs(run, settings, root, steps, on_stage)
    return ResumeVerification(steps, processes, _facts(config, steps, processes), parts, repeats)


def _compare_runs(
    run: Callable[[TrainConfig, Path | None], None],
    settings: TrainConfig,
    root: Path,
    steps: int,
    on_stage: OnStage,
) -> tuple[tuple[PartResult, ...], bool | None]:
    on_stage(f"{2 * steps} steps without a break")
    run(settings, None)
    on_stage(f"{steps} more steps after a break")
    run(_elsewhere(settings, root / _CUT), step_path(root / _WHOLE, steps))
    parts = _compare(root / _WHOLE, root / _CUT, 2 * steps)
    if not any(part.different for part in parts):
        return parts, None
    on_stage("something differs; once more without a break")
    run(_elsewhere(settings, root / _AGAIN), None)
    again = _compare(root / _WHOLE, root / _AGAIN, 2 * steps)
    return parts, not any(part.different for part in again)


def _settings(config: TrainConfig, folder: Path, steps: int, processes: int) -> TrainConfig:
    """The user's settings, cut down to what is compared."""
    changes: dict[str, Any] = {
        "output_dir": str(folder), "overwrite_output_dir": False, "resume": "never",
        "allow_inexact_resume": False, "max_steps": 2 * steps, "save_steps": steps,
        "save_total_limit": None, "save_top_k": 0, "logging_steps": 1, "val_data_path": None,
        "test_data_path": None, "eval_steps": None, "metric_for_best": None, "report_to": [],
        "progress": False, "num_processes": None,
    }  # fmt: skip
    if config.warmup_steps is not None:
        changes["warmup_steps"] = min(config.warmup_steps, 2 * steps)
    # Parameters that would join later join in the middle, or they would not be looked at.
    changes["unfreeze_at_step"] = {
        pattern: min(step, 2 * steps - 1) for pattern, step in config.unfreeze_at_step.items()
    }
    if processes > 1:
        # Batches do not depend on workers, which these processes may not have.
        changes |= {"device": "cpu", "num_workers": 0}
    return TrainConfig(**{**config.model_dump(), **changes})


def _elsewhere(settings: TrainConfig, folder: Path) -> TrainConfig:
    return TrainConfig(**{**settings.model_dump(), "output_dir": str(folder)})


def _run_here(config: TrainConfig, start: Path | None) -> None:
    """One run on this process, one of one or several."""
    # An Accelerator keeps its precision in class attributes, for all that are made later.
    AcceleratorState._reset_state()
    # What is drawn before a run must make no difference.
    torch.rand(17)
    if start is not None:
        config = TrainConfig(**{**config.model_dump(), "resume": str(start)})
    with quiet():
        run = set_up(config, build_accelerator(config))
        train(run.trainer, run.start)


def _compare(whole: Path, other: Path, step: int) -> tuple[PartResult, ...]:
    folders = [step_path(one, step) / STATE for one in (whole, other)]
    lines = [_lines(one) for one in (whole, other)]
    names = {
        "weights": "*weights.safetensors",
        "optimizer": "*optimizer.safetensors",
        "random states": "process-*[0-9].safetensors",
    }
    found = [
        _compare_tensors(name, *(_tensors(folder, pattern) for folder in folders))
        for name, pattern in names.items()
    ]
    different = [
        f"step {one.get('step', '?')}"
        for one, two in zip(*lines, strict=False)
        if json.dumps(one) != json.dumps(two)
    ]
    if len(lines[0]) != len(lines[1]):
        different.append(f"{len(lines[1])} lines, not {len(lines[0])}")
    return (*found, PartResult(f"lines of {METRICS}", len(lines[0]), tuple(different)))


def _compare_tensors(
    name: str, whole: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> PartResult:
    names = sorted(whole.keys() | other.keys())
    different = tuple(
        name
        for name in names
        if name not in whole or name not in other or not _same_bits(whole[name], other[name])
    )
    return PartResult(name, len(names), different)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # NaN is not equal to itself, and 0 is equal to -0.
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _tensors(folder: Path, pattern: str) -> dict[str, Tensor]:
    return {
        f"{file.stem}: {name}": tensor
        for file in sorted(folder.glob(pattern))
        for name, tensor in load_file(file).items()
    }


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def _facts(config: TrainConfig, steps: int, processes: int) -> dict[str, str]:
    several = f"{processes} processes (gloo, {config.distributed_strategy})"
    return {
        "model": f"{config.model_label}, loss_type {config.loss_type}",
        "compared": f"{2 * steps} steps without a break; {steps} steps, a checkpoint, {steps} more",
        "batch": f"{config.batch_size} pairs per process, "
        f"{config.gradient_accumulation_steps} micro-batches per step",
        "where": f"{'one process' if processes == 1 else several}, device "
        f"{config.device if processes == 1 else 'cpu'}, mixed precision {config.mixed_precision}",
    }
