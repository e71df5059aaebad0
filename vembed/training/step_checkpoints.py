"""The checkpoints that a run leaves on its way, and how it goes on from one of them."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import set_seed
from torch import nn

from vembed.distributed import any_process, fail_together
from vembed.errors import CheckpointError
from vembed.training.checkpoint import read_run_settings, write_model
from vembed.training.loss_files import loss_state
from vembed.training.manifest import commit_folder, find_damage, fresh_path, start_folder
from vembed.training.optimizer_state import schedule_state
from vembed.training.random_states import RandomStates, undisturbed
from vembed.training.recorder import RecordedWindow
from vembed.training.resume import RunIdentity, check_same_run, tell_versions
from vembed.training.resume_state import (
    STATE,
    OwnState,
    RunFacts,
    load_training_state,
    read_history,
    read_own_state,
    write_own_state,
    write_shared_state,
)
from vembed.training.rotation import BEST, rotate, step_path

if TYPE_CHECKING:
    from vembed.training.recorder import Recorder
    from vembed.training.trainer import Trainer
    from vembed.training.training_loop import TrainState

logger = logging.getLogger(__name__)


class StepCheckpoints:
    """Writes checkpoints of a run into `output_dir/checkpoints`, and removes old ones."""

    def __init__(self, trainer: Trainer, recorder: Recorder, identity: RunIdentity) -> None:
        """Assign.

        Args:
            trainer: Prepared.
            recorder: Of the run.
            identity: What later must be the same to go on exactly.
        """
        self._trainer = trainer
        self._recorder = recorder
        self._identity = identity

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of the step that was just done; draws no random numbers of the run.

        Call it between optimizer steps: gradients are not kept. Collective: every process must
        call it.

        Returns:
            Its folder.

        Raises:
            CheckpointError: if something cannot be kept. Whatever is raised, is raised on every
                process, and nothing of the checkpoint is left.
        """
        trainer, config = self._trainer, self._trainer.config
        accelerator, device = trainer.accelerator, trainer.accelerator.device
        path = step_path(Path(config.output_dir), state.step)
        fresh: Path | None = None
        with undisturbed(device) as random:
            model = trainer.model_to_save()
            try:
                with fail_together(device):
                    if accelerator.is_main_process:
                        fresh = start_folder(path)
                with fail_together(device):
                    own = self._recorder.window()
                    write_own_state(fresh_path(path) / STATE, trainer, random, own)
                with fail_together(device):
                    if fresh is not None:
                        self._write_shared(fresh, model, state)
                        commit_folder(fresh, path, _manifest_facts(state))
                        fresh = None
                        rotate(
                            Path(config.output_dir),
                            newest=config.save_total_limit,
                            best=config.save_top_k,
                        )
            finally:
                if fresh is not None:
                    shutil.rmtree(fresh, ignore_errors=True)
        return path

    def _write_shared(self, fresh: Path, model: nn.Module | None, state: TrainState) -> None:
        trainer = self._trainer
        # What a run recommends is checked; each checkpoint on the way would cost as much.
        write_model(
            fresh,
            trainer.accelerator.unwrap_model(model),
            config=trainer.config,
            losses=loss_state(trainer.criterion, trainer.distillation_loss_fn),
            resumable=True,
            check_merge=False,
            name=str(fresh),
        )
        scaler = trainer.accelerator.scaler
        facts = RunFacts(
            state=_facts_of(state),
            identity=asdict(self._identity),
            schedule=schedule_state(trainer.scheduler),
            loss_scale=None if scaler is None else scaler.state_dict(),
        )
        write_shared_state(fresh / STATE, trainer, facts, self._recorder.lines())


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Attributes:
        state: Where it stands.
        own: What this process goes on with.
    """

    state: TrainState
    own: OwnState


def resume_run(trainer: Trainer, checkpoint: Path, identity: RunIdentity) -> Resumed:
    """Put everything into the place where it was when a checkpoint was written.

    Collective: every process must call it.

    Args:
        trainer: Prepared, with the parts of the run.
        checkpoint: Whole.
        identity: Of the run as it is set up now.

    Raises:
        ConfigError: if settings or rows changed, and `allow_inexact_resume` is off.
        CheckpointError: if it does not fit the model.
    """
    with fail_together(trainer.accelerator.device):
        changes = check_same_run(checkpoint, trainer, identity)
        facts = RunFacts.read(checkpoint)
        before = RunIdentity.read(checkpoint)
        _check_shares(checkpoint, trainer, identity, before)
        load_training_state(checkpoint, trainer, keep_settings=bool(changes))
        state = _state_of(checkpoint, facts)
        if trainer.accelerator.is_main_process:
            state.history[:] = read_history(checkpoint)
        if changes:
            state = _moved(state, before.steps_per_epoch, identity.steps_per_epoch)
        own = _new_own_state(trainer, state) if changes else read_own_state(checkpoint, trainer)
    _forget_lost_best(trainer, state)
    if trainer.accelerator.is_main_process:
        tell_versions(before, identity)
        _tell(checkpoint, state, changes)
    return Resumed(state, own)


def _tell(checkpoint: Path, state: TrainState, changes: list[str]) -> None:
    if not changes:
        logger.info("%-14s from %s, step %d", "resuming", checkpoint, state.step)
        return
    logger.warning(
        "resume: %s is not continued exactly, because this is not as it was: %s. Weights, "
        "optimizer and best value are taken over; learning rates are those of the settings; "
        "random numbers and the open logging window are new; it goes on after step %d of epoch %d",
        checkpoint, "; ".join(changes), state.steps_of_pass, state.passes + 1,
    )  # fmt: skip


def _forget_lost_best(trainer: Trainer, state: TrainState) -> None:
    """Let the next validation save its model, if the best one so far is damaged or gone.

    Collective: every process must call it.
    """
    if not state.best_step:
        return
    damage = None
    if trainer.accelerator.is_main_process:
        damage = find_damage(Path(trainer.config.output_dir) / BEST)
    if any_process(damage is not None, trainer.accelerator.device):
        if damage is not None:
            logger.warning(
                "resume: %s: the best model so far, of step %d, is lost; the next validation "
                "starts anew", damage, state.best_step,
            )  # fmt: skip
        state.best_value = state.best_step = None


def _manifest_facts(state: TrainState) -> dict[str, Any]:
    facts: dict[str, Any] = {"step": state.step, "epoch": round(state.epoch, 4)}
    if state.last_value is not None and state.last_value_step == state.step:
        facts |= {"value": state.last_value, "larger_is_better": state.larger_is_better}
    return facts


def _facts_of(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if name != "history"}


def _state_of(checkpoint: Path, facts: RunFacts) -> TrainState:
    from vembed.training.training_loop import TrainState

    try:
        return TrainState(**facts.state)
    except TypeError as error:
        raise CheckpointError(f"{checkpoint}: of another version of vembed ({error})") from None


def _check_shares(
    checkpoint: Path, trainer: Trainer, now: RunIdentity, before: RunIdentity
) -> None:
    """Shares of weights fit as many processes only, exactly or not."""
    strategy = read_run_settings(checkpoint).get("distributed_strategy", "ddp")
    is_shared = strategy == "fsdp2" or trainer.shares_weights
    if is_shared and (strategy, before.processes) != (
        trainer.config.distributed_strategy, now.processes
    ):  # fmt: skip
        raise CheckpointError(
            f"resume: {checkpoint}: was written by {before.processes} processes with "
            f"distributed_strategy: {strategy}, and shares of weights fit nothing else. Received: "
            f"{now.processes} processes, {trainer.config.distributed_strategy}"
        )


def _moved(state: TrainState, before: int | None, now: int | None) -> TrainState:
    """The same share of the pass, where a pass has another number of steps."""
    if before is None or now is None or before == now:
        return state
    return replace(state, steps_of_pass=min(now, round(state.steps_of_pass / before * now)))


def _new_own_state(trainer: Trainer, state: TrainState) -> OwnState:
    with undisturbed(trainer.accelerator.device):
        seeds = np.random.SeedSequence([trainer.config.seed, state.step])
        set_seed(int(seeds.generate_state(1)[0]) >> 8, device_specific=True)
        random = RandomStates.take(trainer.accelerator.device)
    return OwnState(random, RecordedWindow({}, {"steps": [], "rows": 0}))
