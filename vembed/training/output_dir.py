"""The folder of a run: whose it is, and what a new run may do to what lies there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from vembed.config import TrainConfig
from vembed.data.quarantine import FILE_NAME as QUARANTINE_FILE
from vembed.distributed import fail_together
from vembed.errors import ConfigError
from vembed.training.config import save_config
from vembed.training.manifest import find_damage, read_manifest, remove_folder, replaced_folder
from vembed.training.resume import AUTO, NEVER, changed_settings
from vembed.training.resume_state import RunFacts
from vembed.training.rotation import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    FINAL,
    REPORT,
    list_checkpoints,
    rotate,
)
from vembed.training.step_guard import NONFINITE_NAME

logger = logging.getLogger(__name__)


def check_output_dir(config: TrainConfig) -> None:
    """Raise ConfigError if `output_dir` holds an earlier run that must stay as it is."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder")
    checkpoints = list_checkpoints(folder)
    holds_run = (folder / CONFIG).exists() or bool(checkpoints)
    if not holds_run or config.overwrite_output_dir:
        return
    replace = "set overwrite_output_dir: true to replace it"
    if config.resume == NEVER:
        go_on = (
            f". To go on from its step {checkpoints[0].step}, set resume: auto"
            if checkpoints
            else ""
        )
        raise ConfigError(
            f"output_dir: {folder} holds an earlier run. Name another folder, or {replace}{go_on}"
        )
    if config.resume != AUTO:
        if Path(config.resume).resolve().is_relative_to(folder.resolve()):
            return
        began_there = _read_settings(folder).get("resume") == config.resume
        if began_there and not checkpoints and not (folder / FINAL).exists():
            return
        go_on = "Set resume: auto to go on with it" if began_there else "Name another folder"
        raise ConfigError(
            f"output_dir: {folder} holds another run than the one to go on with, {config.resume}. "
            f"{go_on}"
        )
    if not checkpoints and (folder / FINAL).exists():
        raise ConfigError(
            f"output_dir: {folder} holds a run that came to its end and has no checkpoint to go on "
            f"from. Name another folder, or set resume: never and {replace}"
        )


def claim_output_dir(config: TrainConfig, accelerator: Accelerator, start: Path | None) -> None:
    """Make `output_dir` that of this run, and leave the resolved settings there.

    A run that starts from the beginning removes what an earlier one left in its own places; one
    that goes on keeps all of it. Collective: every process must call it.

    Args:
        config: Resolved.
        accelerator: Says which process writes.
        start: The checkpoint that the run goes on from.
    """
    with fail_together(accelerator.device):
        if accelerator.is_main_process:
            folder = Path(config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if start is None:
                _remove_earlier_run(folder, config)
            else:
                _take_best_along(start, folder)
            if start is not None and config.resume == AUTO:
                # The run may have been killed after a new checkpoint and before this.
                rotate(folder, newest=config.save_total_limit, best=config.save_top_k)
            save_config(config, folder / CONFIG)


def _remove_earlier_run(folder: Path, config: TrainConfig) -> None:
    for name in (CHECKPOINTS, FINAL, BEST, REPORT):
        if name == BEST and config.resume == AUTO and _is_same_run(folder, config):
            # Killed before its first checkpoint: the same steps will find the same best model, and
            # until then it is the only one there is.
            continue
        if (folder / name).is_dir():
            remove_folder(folder / name)
    for name in (QUARANTINE_FILE, NONFINITE_NAME):
        (folder / name).unlink(missing_ok=True)


def _is_same_run(folder: Path, config: TrainConfig) -> bool:
    """Whether the settings that an earlier run has left there decide the same numbers."""
    settings = _read_settings(folder)
    try:
        before = TrainConfig(**settings).redacted()
    except (ValueError, TypeError):
        return False
    return bool(settings) and not changed_settings(before, config)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The settings that an earlier run has left there; empty if they cannot be read."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _take_best_along(start: Path, folder: Path) -> None:
    """Copy the best model of a run that is continued in another folder."""
    source = start.parent.parent / BEST
    if source.resolve() == (folder / BEST).resolve() or not RunFacts.read(start).state["best_step"]:
        return
    if damage := find_damage(source):
        logger.warning("resume: %s: the best model so far cannot be taken along", damage)
        return
    with replaced_folder(folder / BEST, read_manifest(source).facts) as fresh:
        shutil.copytree(source, fresh, dirs_exist_ok=True)
