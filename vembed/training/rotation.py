"""The checkpoints of a run: which there are, which can be used, which may go.

Nothing here needs torch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vembed.errors import CheckpointError
from vembed.training.manifest import (
    Damage,
    find_damage,
    read_manifest,
    remove_folder,
    remove_leftovers,
)

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Their folder in `output_dir`."""

BEST = "best"
FINAL = "final"
"""Folders in `output_dir` of the best model by validation, and of the last one."""

STEP_FOLDER = "step-{step:06d}"
DAMAGED = ".damaged"
"""What the name of a checkpoint that cannot be used ends with, once a run has met it."""

REPORT = "report"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"

_STEP_NAME = re.compile(r"step-(\d{6,})(\.damaged)?")
_OUTPUT_NAME = re.compile("|".join(map(re.escape, (
    CHECKPOINTS, BEST, FINAL, REPORT, CONFIG, METRICS
))))  # fmt: skip


@dataclass(frozen=True)
class StepCheckpoint:
    """A checkpoint by its name alone.

    Attributes:
        path: Its folder.
        step: Optimizer steps that were done.
    """

    path: Path
    step: int


def step_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return output_dir / CHECKPOINTS / STEP_FOLDER.format(step=step)


def list_checkpoints(output_dir: Path) -> list[StepCheckpoint]:
    """The checkpoints of a run, whole or not, the newest first."""
    folder = output_dir / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [match for name in names if (match := _STEP_NAME.fullmatch(name)) and not match[2]]
    steps = [int(match[1]) for match in found]
    return [StepCheckpoint(step_path(output_dir, s), s) for s in sorted(steps, reverse=True)]


def newest_checkpoint(output_dir: Path) -> StepCheckpoint | None:
    """The newest checkpoint that is whole; None where there is no checkpoint.

    A warning names the file of each newer one that is damaged.

    Raises:
        CheckpointError: if there are checkpoints, and all are damaged.
    """
    damages: list[Damage] = []
    for checkpoint in list_checkpoints(output_dir):
        damage = find_damage(checkpoint.path)
        if damage is None:
            for worse in damages:
                logger.warning("%s: damaged, so the checkpoint before it is used", worse)
            return checkpoint
        damages.append(damage)
    if damages:
        listed = "\n".join(f"  {damage}" for damage in damages)
        raise CheckpointError(
            f"resume: {output_dir / CHECKPOINTS}: no checkpoint is whole:\n{listed}\n"
            "Restore one from a copy, or set overwrite_output_dir: true and resume: never to start "
            "over"
        )
    return None


def set_damaged_aside(output_dir: Path, newest: StepCheckpoint) -> None:
    """Rename what is damaged: all that is newer than the newest whole checkpoint."""
    for checkpoint in list_checkpoints(output_dir):
        if checkpoint.step > newest.step:
            aside = checkpoint.path.with_name(checkpoint.path.name + DAMAGED)
            if aside.exists():
                remove_folder(aside)
            checkpoint.path.rename(aside)


def rotate(output_dir: Path, *, newest: int | None, best: int = 0) -> None:
    """Remove checkpoints beyond the newest ones and the best ones.

    Call it after a new one was committed. The best model, `best/`, is none of them.

    Args:
        output_dir: Of the run.
        newest: How many of the newest stay; None for all.
        best: How many stay although they are older, or not: those of the best values.
    """
    if newest is None:
        return
    checkpoints = list_checkpoints(output_dir)
    kept = [*checkpoints[:newest], *_best_of(checkpoints, best)]
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            remove_folder(checkpoint.path)


def clean_up(output_dir: Path) -> None:
    """Remove what an interrupted run has left half done. Only one process may call it."""
    remove_leftovers(output_dir, _OUTPUT_NAME)
    remove_leftovers(output_dir / CHECKPOINTS, _STEP_NAME)


def _best_of(checkpoints: Collection[StepCheckpoint], count: int) -> list[StepCheckpoint]:
    """Those of the best values, which must have been measured at their own step."""
    rated = []
    for checkpoint in checkpoints:
        try:
            facts = read_manifest(checkpoint.path).facts
        except CheckpointError:
            continue
        value = facts.get("value")
        if value is not None and not math.isnan(value):
            rated.append((value if facts["larger_is_better"] else -value, checkpoint))
    rated.sort(key=lambda pair: (pair[0], pair[1].step), reverse=True)
    return [checkpoint for _, checkpoint in rated[:count]]
