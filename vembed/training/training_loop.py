"""The loop: optimizer steps, and between them logging, validation and saving."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vembed.distributed import fail_together
from vembed.errors import ConfigError, VembedError
from vembed.losses.matryoshka import innermost
from vembed.registry import accepted_arguments
from vembed.training.checkpoint import save_checkpoint
from vembed.training.data_utils import count_rows
from vembed.training.evaluator import Validation
from vembed.training.first_step import FirstStepWatch
from vembed.training.loss_files import loss_state
from vembed.training.recorder import Recorder
from vembed.training.resume import RunIdentity
from vembed.training.rotation import BEST, FINAL
from vembed.training.step_checkpoints import StepCheckpoints, resume_run

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
    with Recorder(trainer.accelerator, config, plan.total, state.history) as recorder:
        checkpoints = StepCheckpoints(trainer, recorder, identity)
        before_update: Callable[[], object] | None = None
        if resumed is None:
            _validate(trainer, state, recorder)
            before_update = FirstStepWatch(trainer).tell
        else:
            recorder.resume(resumed.own.window, done_steps=state.step)
            resumed.own.random.restore(trainer.accelerator.device)
        for group in islice(_step_groups(trainer, plan, state), plan.total - state.step):
            trainer.unfreeze(state.step)
            outputs, grad_norm = optimizer_step(trainer, group, before_update)
            before_update = None
            state.step += 1
            recorder.add(outputs, grad_norm, rows=sum(map(count_rows, group)))
            if state.step % config.logging_steps == 0 or state.step == plan.total:
                recorder.log_step(state.step, state.epoch, _step_facts(trainer))
            if _is_due(config.eval_steps, state.step, plan):
                _validate(trainer, state, recorder)
            if config.save_steps and state.step % config.save_steps == 0:
                checkpoints.save(state)
    _save(trainer, Path(config.output_dir) / FINAL, facts={"step": state.step})
    return state


def optimizer_step(
    trainer: Trainer, group: list[Batch], before_update: Callable[[], object] | None = None
) -> tuple[list[StepOutput], Tensor]:
    """One optimizer update from the mean gradient of some micro-batches.

    Each micro-batch is a contrastive batch of its own: more negatives come from the gradient cache,
    not from accumulation.

    Args:
        trainer: Prepared.
        group: The micro-batches.
        before_update: Called when the gradients are complete, before they are clipped.

    Returns:
        What the step of each micro-batch returned, and the gradient norm before clipping.
    """
    outputs = [trainer.step(batch) for batch in group]
    trainer.reduce_gradients(len(group))
    if before_update is not None:
        before_update()
    grad_norm = trainer.clip_gradients()
    trainer.optimizer.step()
    trainer.after_update()
    if trainer.scheduler is not None and not trainer.accelerator.optimizer_step_was_skipped:
        trainer.scheduler.step()
    trainer.optimizer.zero_grad()
    return outputs, grad_norm


def _step_groups(trainer: Trainer, plan: StepPlan, state: TrainState) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step from where the run stands, epochs without end."""
    size = trainer.config.gradient_accumulation_steps
    for epoch in count(state.passes):
        done = state.steps_of_pass if epoch == state.passes else 0
        batches = _batches_of(trainer, epoch, start_batch=done * size)
        for number in count(done + 1):
            # A row that only one process meets must not leave the others waiting in the step. This
            # one small collective comes where a step waits for others anyway.
            with fail_together(trainer.accelerator.device):
                group = list(islice(batches, size))
            if not group:
                break
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


def _step_facts(trainer: Trainer) -> dict[str, float]:
    """What is logged beside the loss."""
    facts = {"lr": float(trainer.optimizer.param_groups[0]["lr"])}
    loss = innermost(trainer.criterion)
    scale = dict(getattr(loss, "named_parameters", dict)()).get("logit_scale")
    if scale is not None:
        facts["temperature"] = float(torch.exp(-scale.detach()))
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
    state.best_value, state.best_step = value, state.step
    if state.step > 0:
        facts = {"step": state.step, "value": value}
        _save(trainer, Path(trainer.config.output_dir) / BEST, facts=facts)


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


def _save(trainer: Trainer, path: Path, *, facts: dict[str, Any]) -> None:
    save_checkpoint(
        path,
        trainer.model_to_save(),
        trainer.accelerator,
        config=trainer.config,
        losses=loss_state(trainer.criterion, trainer.distillation_loss_fn),
        probe=trainer.adapter_probe(),
        facts=facts,
    )
