"""The loop: optimizer steps, and between them logging, validation and saving."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from vembed.distributed import fail_together, name_lost_processes
from vembed.errors import ConfigError, LostSaveError, VembedError
from vembed.losses.matryoshka import innermost
from vembed.registry import accepted_arguments
from vembed.training.checkpoint import save_checkpoint
from vembed.training.data_utils import count_rows
from vembed.training.evaluator import Validation
from vembed.training.first_step import FirstStepWatch
from vembed.training.loss_files import loss_state
from vembed.training.recorder import Recorder
from vembed.training.resume import RunIdentity
from vembed.training.rotation import BEST, FINAL, step_path
from vembed.training.step_checkpoints import StepCheckpoints, resume_run
from vembed.training.step_guard import NONFINITE_NAME, StepGuard, Verdict
from vembed.training.stop_signals import StoppedError, StopSignals, catch_stop_signals
from vembed.training.watchdog import Watchdog

if TYPE_CHECKING:
    from vembed.training.trainer import StepOutput, Trainer

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
LOSS = "loss"


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done, with the fraction of the current one.
        passes: Whole passes over the rows before the current one.
        steps_of_pass: Steps done in the current one.
        best_value: Best validation value so far, or None.
        best_step: The step at which it was measured; 0 is the model as it was loaded.
        last_value: The newest validation value, or None.
        last_value_step: The step at which it was measured.
        larger_is_better: Of two such values.
        history: The lines of `metrics.jsonl`, on the main process.
        skipped_steps: Steps that changed nothing, because loss or gradient was not finite.
    """

    step: int = 0
    epoch: float = 0.0
    passes: int = 0
    steps_of_pass: int = 0
    best_value: float | None = None
    best_step: int | None = None
    last_value: float | None = None
    last_value_step: int | None = None
    larger_is_better: bool = True
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

    def identify(self, trainer: Trainer) -> RunIdentity:
        """What must be the same for a run to go on exactly."""
        return RunIdentity.of(trainer, steps=self.total, steps_per_epoch=self.per_epoch)

    def epoch_ends(self, step: int) -> bool:
        """Whether `step` is the last one of its epoch, or of the run."""
        return step == self.total or (self.per_epoch is not None and step % self.per_epoch == 0)


def run_training_loop(trainer: Trainer, start: Path | None = None) -> TrainState:
    """Train to the end; validate, save and log on the way.

    Collective: every process must call it.

    Args:
        trainer: Prepared.
        start: A checkpoint to go on from; None for the beginning.

    Returns:
        Where the run stands at its end.
    """
    config, plan = trainer.config, StepPlan.of(trainer)
    identity = plan.identify(trainer)
    resumed = None if start is None else resume_run(trainer, start, identity)
    state = TrainState() if resumed is None else resumed.state
    with (
        Recorder(trainer.accelerator, config, plan.total, state.history) as recorder,
        catch_stop_signals() as signals,
        Watchdog(config.process_timeout_s) as watchdog,
        name_lost_processes(lambda: f"step {state.step + 1}"),
    ):
        checkpoints = StepCheckpoints(trainer, recorder, identity)
        before_update: Callable[[], object] | None = None
        if resumed is None:
            _validate(trainer, state, recorder)
            before_update = FirstStepWatch(trainer).tell
        else:
            recorder.resume(resumed.own.window, done_steps=state.step)
            resumed.own.random.restore(trainer.accelerator.device)
        guard = StepGuard(trainer, state)
        groups = _step_groups(trainer, plan, state, signals, watchdog)
        for group in islice(groups, plan.total - state.step):
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
                _save_step(trainer, checkpoints, state)
        if not signals.agreed:
            _save_final(trainer, state)
            signals.ask(trainer.accelerator.device)
        if signals.agreed:
            path = _save_step(trainer, checkpoints, state)
            _raise_stopped(signals.agreed, path, f"step {state.step} of {plan.total}")
    if recorder.lost_lines:
        trainer.saves.failed.append(str(recorder.path))
    if state.skipped_steps:
        logger.warning(
            "%d of %d steps changed nothing, because loss or gradient was not finite: %s",
            state.skipped_steps, state.step, Path(config.output_dir) / NONFINITE_NAME,
        )  # fmt: skip
    return state


def _raise_stopped(number: int, path: Path | None, where: str) -> NoReturn:
    """End a run that a signal stopped at `where`, and that is saved in `path`, if it is."""
    told = f"stopped by {signal.Signals(number).name} after {where}"
    if path is None:
        raise LostSaveError(f"{told}, but not saved: the disk did not take the checkpoint")
    raise StoppedError(
        f"{told}; saved in {path}. The same command with --resume auto goes on from there", number
    )


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
    """The micro-batches of each optimizer step from where the run stands, until a signal stops it.

    Epochs are without end.
    """
    size = trainer.config.gradient_accumulation_steps
    for epoch in count(state.passes):
        done = state.steps_of_pass if epoch == state.passes else 0
        batches = _batches_of(trainer, epoch, start_batch=done * size)
        for number in count(done + 1):
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
            state.passes, state.steps_of_pass = epoch, number
            yield group
        if number == 1:
            raise VembedError(f"the dataloader gave no batch in epoch {epoch + 1}")


def _batches_of(trainer: Trainer, epoch: int, *, start_batch: int) -> Iterator[Batch]:
    """The batches of an epoch from one of them on; those before are not read, where possible."""
    dataloader: Any = trainer.dataloader
    set_epoch = getattr(dataloader, "set_epoch", None)  # a user's own may have no use for it
    place = {"start_batch": start_batch}
    if start_batch and set_epoch is not None and accepted_arguments(set_epoch, place):
        set_epoch(epoch, **place)
        return iter(dataloader)
    if set_epoch is not None:
        set_epoch(epoch)
    is_exact = isinstance(dataloader, Sequence)
    if start_batch and not (is_exact or trainer.config.allow_inexact_resume):
        raise ConfigError(
            "resume: needs a dataloader that can start anywhere in an epoch, in the same order as "
            "before: set_epoch(epoch, start_batch=N), as vembed's own has. Received: "
            f"{type(dataloader).__name__}. Set allow_inexact_resume: true to read and skip"
        )
    return islice(iter(dataloader), start_batch, None)


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
    state.last_value, state.last_value_step = value, state.step
    state.larger_is_better = larger_is_better
    best = state.best_value
    if best is not None and not (value > best if larger_is_better else value < best):
        return
    path, facts = Path(trainer.config.output_dir) / BEST, {"step": state.step, "value": value}
    if state.step == 0 or _save(trainer, path, facts=facts):
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


def _save_step(trainer: Trainer, checkpoints: StepCheckpoints, state: TrainState) -> Path | None:
    """Write a checkpoint, if it is not there yet; its folder, or None if the disk is full."""
    path = step_path(Path(trainer.config.output_dir), state.step)
    if path == trainer.saves.newest_checkpoint:
        return path
    saved = trainer.saves.attempt(path, lambda: checkpoints.save(state), resumable=True)
    return path if saved else None


def _save_final(trainer: Trainer, state: TrainState) -> None:
    path = Path(trainer.config.output_dir) / FINAL
    if not _save(trainer, path, facts={"step": state.step}):
        raise LostSaveError(
            f"{path}: the trained model could not be saved. Make room and go on with it"
        )


def _save(trainer: Trainer, path: Path, *, facts: dict[str, Any]) -> bool:
    """Save the model; whether the disk takes it."""

    def save() -> None:
        save_checkpoint(
            path,
            trainer.model_to_save(),
            trainer.accelerator,
            config=trainer.config,
            losses=loss_state(trainer.criterion, trainer.distillation_loss_fn),
            probe=trainer.adapter_probe(),
            facts=facts,
        )

    return trainer.saves.attempt(path, save, resumable=False)
