"""The loop: optimizer steps, and between them logging, validation and saving."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from vembed.distributed import fail_together, name_lost_processes
from vembed.errors import ConfigError, DiskError, VembedError
from vembed.losses.matryoshka import innermost
from vembed.training.checkpoint import STEP_FOLDER, remove_old_checkpoints, save_checkpoint
from vembed.training.data_utils import count_rows
from vembed.training.evaluator import Validation
from vembed.training.first_step import FirstStepWatch
from vembed.training.loss_files import loss_state
from vembed.training.recorder import Recorder
from vembed.training.step_guard import NONFINITE_NAME, StepGuard, Verdict
from vembed.training.stop_signals import StoppedError, StopSignals, catch_stop_signals
from vembed.training.watchdog import Watchdog

if TYPE_CHECKING:
    from vembed.training.trainer import StepOutput, Trainer

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
LOSS = "loss"
BEST = "best"
FINAL = "final"


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done, with the fraction of the current one.
        best_value: Best validation value so far, or None.
        best_step: The step at which it was measured; 0 is the model as it was loaded.
        history: The lines of `metrics.jsonl`, on the main process.
        skipped_steps: Steps that changed nothing, because loss or gradient was not finite.
    """

    step: int = 0
    epoch: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int = 0


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step leaves behind.

    Attributes:
        outputs: One per micro-batch.
        grad_norm: Norm of the whole gradient before clipping.
        verdict: Whether it changed the weights, and why not.
    """

    outputs: list[StepOutput]
    grad_norm: Tensor
    verdict: Verdict


@dataclass(frozen=True)
class StepPlan:
    """How many optimizer steps there are: the unit of every `*_steps` setting."""

    per_epoch: int | None
    total: int

    @classmethod
    def of(cls, trainer: Trainer) -> StepPlan:
        """Count the steps of a run; `max_steps` wins over `epochs`.

        Raises:
            ConfigError: if the data does not know its length and `max_steps` is not set.
        """
        config = trainer.config
        try:
            batches = len(trainer.dataloader)  # type: ignore[arg-type]
        except TypeError:
            if config.max_steps is None:
                raise ConfigError(
                    "max_steps: required when the data does not know its length (streaming)"
                ) from None
            return cls(None, config.max_steps)
        per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
        return cls(per_epoch, config.max_steps or config.epochs * per_epoch)

    def epoch_ends(self, step: int) -> bool:
        """Whether `step` is the last one of its epoch, or of the run."""
        return step == self.total or (self.per_epoch is not None and step % self.per_epoch == 0)


def run_training_loop(trainer: Trainer) -> TrainState:
    """Train to the end; validate, save and log on the way.

    Collective: every process must call it.

    Returns:
        Where the run stands at its end.
    """
    config, state, plan = trainer.config, TrainState(), StepPlan.of(trainer)
    with (
        Recorder(trainer.accelerator, config, plan.total, state.history) as recorder,
        catch_stop_signals() as signals,
        Watchdog(config.process_timeout_s) as watchdog,
        name_lost_processes(lambda: f"step {state.step + 1}"),
    ):
        _validate(trainer, state, recorder)
        before_update: Callable[[], object] | None = FirstStepWatch(trainer).tell
        guard = StepGuard(trainer, state)
        groups = _step_groups(trainer, plan, state, signals, watchdog)
        for group in islice(groups, plan.total):
            trainer.unfreeze(state.step)
            result = optimizer_step(trainer, group, before_update, guard)
            before_update = None
            state.step += 1
            watchdog.pause()
            recorder.add(result, rows=sum(map(count_rows, group)))
            if state.step % config.logging_steps == 0 or state.step == plan.total:
                recorder.log_step(state.step, state.epoch, _step_facts(trainer, state))
            if _is_due(config.eval_steps, state.step, plan):
                _validate(trainer, state, recorder)
            if config.save_steps and state.step % config.save_steps == 0:
                _save_step(trainer, state.step)
        if not signals.agreed:
            _save_final(trainer)
            signals.ask(trainer.accelerator.device)
        if signals.agreed:
            _stop(trainer, state, plan, signals)
    if state.skipped_steps:
        logger.warning(
            "%d of %d steps changed nothing, because loss or gradient was not finite: %s",
            state.skipped_steps, state.step, Path(config.output_dir) / NONFINITE_NAME,
        )  # fmt: skip
    return state


def _stop(trainer: Trainer, state: TrainState, plan: StepPlan, signals: StopSignals) -> NoReturn:
    """Save, and end the run as a signal asked. Collective."""
    path = _save_step(trainer, state.step)
    name = signal.Signals(signals.agreed).name
    told = f"stopped by {name} after step {state.step} of {plan.total}"
    if path is None:
        raise DiskError(f"{told}, but not saved: the disk did not take the checkpoint")
    raise StoppedError(
        f"{told}; saved in {path}. The same command with --resume auto goes on from there",
        signals.agreed,
    )


def _save_final(trainer: Trainer) -> None:
    path = Path(trainer.config.output_dir) / FINAL
    if not _save(trainer, path):
        raise DiskError(f"{path}: the trained model could not be saved. Make room and train again")


def optimizer_step(
    trainer: Trainer,
    group: list[Batch],
    before_update: Callable[[], object] | None = None,
    guard: StepGuard | None = None,
) -> StepResult:
    """One optimizer update from the mean gradient of some micro-batches.

    Each micro-batch is a contrastive batch of its own: more negatives come from the gradient cache,
    not from accumulation.

    Args:
        trainer: Prepared.
        group: The micro-batches.
        before_update: Called when the gradients are complete, before they are clipped.
        guard: Judges the gradient; without one, every step updates the weights.
    """
    outputs = [trainer.step(batch) for batch in group]
    trainer.reduce_gradients(len(group))
    if before_update is not None:
        before_update()
    grad_norm = trainer.clip_gradients()
    verdict = Verdict.UPDATE if guard is None else guard.judge(group, outputs, grad_norm)
    # fp16's scaler leaves out by itself what overflows, and must hear of every step.
    if verdict is not Verdict.SKIP or trainer.accelerator.scaler is not None:
        trainer.optimizer.step()
        trainer.after_update()
        if trainer.scheduler is not None and not trainer.accelerator.optimizer_step_was_skipped:
            trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    return StepResult(outputs, grad_norm, verdict)


def _step_groups(
    trainer: Trainer, plan: StepPlan, state: TrainState, signals: StopSignals, watchdog: Watchdog
) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, epochs without end, until a signal stops all."""
    size = trainer.config.gradient_accumulation_steps
    for epoch in count():
        _set_epoch(trainer.dataloader, epoch)
        batches = iter(trainer.dataloader)
        for number in count(1):
            # A row that only one process meets must not leave the others waiting in the step, nor a
            # signal that only one got. This one small collective comes where a step waits anyway.
            with fail_together(trainer.accelerator.device, signals.number) as said:
                watchdog.see(state.step + 1, "reading rows")
                group = list(islice(batches, size))
                watchdog.see(state.step + 1, "waiting for the rows of other processes")
            signals.agreed = said.largest
            if signals.agreed:
                return
            if not group:
                break
            watchdog.see(state.step + 1, "computing")
            state.epoch = epoch + number / (plan.per_epoch or plan.total)
            yield group
        if number == 1:
            raise VembedError(f"the dataloader gave no batch in epoch {epoch + 1}")


def _set_epoch(dataloader: Any, epoch: int) -> None:
    """Tell the dataloader which epoch it is; a user's own may have no use for it."""
    set_epoch = getattr(dataloader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


def _step_facts(trainer: Trainer, state: TrainState) -> dict[str, float]:
    """What is logged beside the loss."""
    facts = {"lr": float(trainer.optimizer.param_groups[0]["lr"])}
    loss = innermost(trainer.criterion)
    scale = dict(getattr(loss, "named_parameters", dict)()).get("logit_scale")
    if scale is not None:
        facts["temperature"] = float(torch.exp(-scale.detach()))
    if state.skipped_steps:
        facts["skipped_steps"] = state.skipped_steps
    return facts


def _is_due(every: int | None, step: int, plan: StepPlan) -> bool:
    return plan.epoch_ends(step) if every is None else step % every == 0 or step == plan.total


def _validate(trainer: Trainer, state: TrainState, recorder: Recorder) -> None:
    if trainer.evaluator is None:
        return
    recorder.say("validating")
    with trainer.whole_weights():
        result = trainer.evaluator.validate(trainer.val_dataloader, state.step)
    recorder.log_validation(state.step, state.epoch, result)
    value, larger_is_better = _judge(result, trainer)
    best = state.best_value
    if best is not None and not (value > best if larger_is_better else value < best):
        return
    if state.step == 0 or _save(trainer, Path(trainer.config.output_dir) / BEST):
        state.best_value, state.best_step = value, state.step


def _judge(result: Validation, trainer: Trainer) -> tuple[float, bool]:
    """The value that decides which model is best, and whether larger is better."""
    task = trainer.evaluator.task if trainer.evaluator is not None else None
    name = trainer.config.metric_for_best or (task.main_metric if task is not None else LOSS)
    if name == LOSS and result.loss is not None:
        return result.loss, False
    if name not in result.metrics:
        measured = [*([LOSS] if result.loss is not None else []), *result.metrics]
        raise ConfigError(
            f"metric_for_best: {name!r} is not measured here; measured: {', '.join(measured)}"
        )
    return result.metrics[name], True


def _save_step(trainer: Trainer, step: int) -> Path | None:
    """Write a checkpoint; its folder, or None if the disk does not take it."""
    folder = Path(trainer.config.output_dir) / "checkpoints"
    # What a run recommends is checked; each checkpoint on the way would cost as much.
    path = folder / STEP_FOLDER.format(step=step)
    if not _save(trainer, path, resumable=True, check_merge=False):
        return None
    if trainer.accelerator.is_main_process:
        remove_old_checkpoints(folder, trainer.config.save_total_limit)
    return path


def _save(
    trainer: Trainer, path: Path, *, resumable: bool = False, check_merge: bool = True
) -> bool:
    """Save the model; whether the disk takes it."""

    def save() -> None:
        save_checkpoint(
            path,
            trainer.model_to_save(),
            trainer.accelerator,
            config=trainer.config,
            losses=loss_state(trainer.criterion, trainer.distillation_loss_fn),
            resumable=resumable,
            probe=trainer.adapter_probe(),
            check_merge=check_merge,
        )

    return trainer.saves.attempt(path, save, resumable=resumable)
