"""Whether a run may go on from a checkpoint: what must be as it was, and what may change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from vembed.config import TrainConfig
from vembed.data import RecordLoader
from vembed.distributed import fail_together, gather_numbers
from vembed.errors import CheckpointError, ConfigError
from vembed.training.checkpoint import read_run_settings
from vembed.training.manifest import find_damage
from vembed.training.resume_state import RunFacts
from vembed.training.rotation import (
    CHECKPOINTS,
    clean_up,
    list_checkpoints,
    newest_checkpoint,
    set_damaged_aside,
    step_path,
)

if TYPE_CHECKING:
    from vembed.training.trainer import Trainer

logger = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"

FREE_KEYS = frozenset({
    # where things lie and what is told
    "output_dir", "overwrite_output_dir", "resume", "allow_inexact_resume", "report_to",
    "project_name", "run_name", "tags", "progress", "test_data_path", "logging_steps",
    # when it ends
    "process_timeout_s", "grace_period_s", "max_restarts", "on_nonfinite", "max_nonfinite_steps",
    # what is kept
    "save_steps", "save_total_limit", "save_top_k", "save_adapter", "eval_steps",
    # who makes the batches; `processes` and `device` are compared as they are found
    "num_workers", "num_processes", "device", "teacher_chunk_size", "image_cache", "token_cache",
    # rows are compared by their content, steps by their number
    "image_root", "epochs", "max_steps",
})  # fmt: skip
"""Settings that may change between a run and its continuation: no weight depends on them."""

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")


@dataclass(frozen=True)
class RunIdentity:
    """What decides every number of a run, beside its settings.

    Attributes:
        processes: How many train together.
        device: Type of device.
        rows: Fingerprint of the training rows; None if they cannot be known.
        validation_rows: Of the validation rows.
        steps: Optimizer steps of the whole run.
        steps_per_epoch: None for a stream.
        versions: Of the packages that compute.
    """

    processes: int
    device: str
    rows: str | None
    validation_rows: str | None
    steps: int
    steps_per_epoch: int | None
    versions: dict[str, str]

    @classmethod
    def of(cls, trainer: Trainer, *, steps: int, steps_per_epoch: int | None) -> RunIdentity:
        """That of a run as it is set up."""
        return cls(
            processes=trainer.accelerator.num_processes,
            device=trainer.accelerator.device.type,
            rows=_fingerprint(trainer.dataloader),
            validation_rows=_fingerprint(trainer.val_dataloader),
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            versions={name: version(name) for name in _PACKAGES},
        )

    @classmethod
    def read(cls, checkpoint: Path) -> RunIdentity:
        """That of the run that wrote a checkpoint.

        Raises:
            CheckpointError: if another version wrote it.
        """
        try:
            return cls(**RunFacts.read(checkpoint).identity)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint}: of another version of vembed ({error})") from None


def find_start(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint that a run starts from, all of it as it was written; None for the beginning.

    Removes what an interrupted run has left half done. Collective: every process must call it.

    Raises:
        ConfigError: if `resume` names no checkpoint.
        CheckpointError: if the checkpoints that there are cannot be used.
    """
    step, is_folder = -1, False
    with fail_together(accelerator.device):
        if accelerator.is_main_process:
            clean_up(Path(config.output_dir))
            step, is_folder = _choose(config)
    (step, is_named), *_ = gather_numbers([step, is_folder], accelerator.device)
    if step < 0:
        return None
    if config.resume == AUTO:
        return step_path(Path(config.output_dir), step)
    return Path(config.resume) if is_named else step_path(Path(config.resume), step)


def _choose(config: TrainConfig) -> tuple[int, bool]:
    """The step to start from, -1 for none, and whether `resume` names that checkpoint itself."""
    if config.resume == NEVER:
        return -1, False
    named = None if config.resume == AUTO else Path(config.resume)
    if named is not None and not named.is_dir():
        raise ConfigError(f"resume: {named} is no folder. Expected auto, never, or a checkpoint")
    if named is not None and list_checkpoints(named.resolve().parent) and named.name == CHECKPOINTS:
        raise ConfigError(
            f"resume: {named} holds the checkpoints of a run. Name one of them, or {named.parent}, "
            "which starts from the newest"
        )
    if named is not None and not (named / CHECKPOINTS).is_dir():
        damage = find_damage(named)
        if damage is not None:
            raise CheckpointError(f"resume: {damage}. Name another checkpoint")
        return int(RunFacts.read(named).state["step"]), True
    output_dir = named or Path(config.output_dir)
    newest = newest_checkpoint(output_dir)
    if newest is None:
        if named is not None:
            raise ConfigError(f"resume: {named} holds no checkpoint; its run had save_steps: 0?")
        return -1, False
    if named is None:
        set_damaged_aside(output_dir, newest)
    return newest.step, False


def check_same_run(checkpoint: Path, trainer: Trainer, identity: RunIdentity) -> list[str]:
    """Raise ConfigError unless going on from a checkpoint gives what the run would have given.

    Args:
        checkpoint: Whole.
        trainer: With the settings of now, resolved.
        identity: Of the run as it is set up now.

    Returns:
        What differs, in words, if `allow_inexact_resume` allows it; else nothing.
    """
    config, facts = trainer.config, RunFacts.read(checkpoint)
    before = RunIdentity.read(checkpoint)
    if int(facts.state["step"]) > identity.steps:
        raise ConfigError(
            f"resume: {checkpoint} is at step {facts.state['step']}, but this run has "
            f"{identity.steps} steps. Raise max_steps or epochs"
        )
    changes = [
        *changed_settings(read_run_settings(checkpoint), config),
        *_changed_facts(before, identity, config),
    ]
    if not changes:
        return changes
    if config.allow_inexact_resume:
        _require_no_future(checkpoint, config)
        return changes
    listed = "\n".join(f"  {change}" for change in changes)
    raise ConfigError(
        f"resume: {checkpoint} cannot be continued exactly, because this is not as it was:\n"
        f"{listed}\n"
        "Set it back, or set allow_inexact_resume: true to go on all the same, or name another "
        "output_dir to start anew"
    )


def _require_no_future(checkpoint: Path, config: TrainConfig) -> None:
    """Checkpoints after this one would be of another run than those to come."""
    newer = [one for one in list_checkpoints(Path(config.output_dir)) if one.path != checkpoint]
    step = int(RunFacts.read(checkpoint).state["step"])
    if newer and newer[0].step > step:
        raise ConfigError(
            f"resume: {config.output_dir} holds checkpoints after step {step}, of the run as it "
            "was. To go on inexactly from there, name another output_dir"
        )


def changed_settings(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Settings that decide numbers and have another value than in an earlier run.

    Args:
        before: The settings of that run.
        config: Those of now.
    """
    # As they are written down: no folder of a run tells a secret, nor that it changed.
    now, defaults = config.redacted(), TrainConfig().redacted()
    # Of a stream nothing is known but where it comes from.
    free = FREE_KEYS if config.streaming else FREE_KEYS | {"data_path"}
    return [
        f"{key}: {_shown(value)}, was {_shown(before.get(key, defaults[key]))}"
        for key, value in now.items()
        if key not in free and value != before.get(key, defaults[key])
    ]


def _changed_facts(before: RunIdentity, now: RunIdentity, config: TrainConfig) -> list[str]:
    changes = []
    if before.processes != now.processes:
        changes.append(f"processes: {now.processes}, were {before.processes}")
    if before.device != now.device:
        changes.append(f"device: {now.device}, was {before.device}")
    if before.rows != now.rows:
        changes.append("data_path: the training rows are other ones, or in another order")
    if before.validation_rows != now.validation_rows:
        changes.append("val_data_path: the validation rows are other ones")
    reason = _why_steps_matter(config)
    if before.steps != now.steps and reason is not None:
        changes.append(f"steps (max_steps, epochs): {now.steps}, were {before.steps}; {reason}")
    return changes


def _why_steps_matter(config: TrainConfig) -> str | None:
    """Why another number of steps gives other learning rates; None if it does not."""
    if config.scheduler_type == "constant":
        return None
    if config.scheduler_type != "constant_with_warmup":
        return f"scheduler_type {config.scheduler_type} depends on their number"
    if config.warmup_steps is None and config.warmup_ratio:
        return "warmup_ratio is a share of them; warmup_steps is not"
    return None


def tell_versions(before: RunIdentity, now: RunIdentity) -> None:
    """Warn of packages that may compute other numbers than before."""
    others = [
        f"{name} {found} (was {before.versions.get(name)})"
        for name, found in now.versions.items()
        if before.versions.get(name) != found
    ]
    if others:
        logger.warning(
            "resume: other versions than before may compute other numbers: %s", ", ".join(others)
        )


def _fingerprint(dataloader: Any) -> str | None:
    """What tells the rows of one of our loaders from others; None of another's."""
    return dataloader.fingerprint if isinstance(dataloader, RecordLoader) else None


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
