"""A run that a signal stopped goes on as if it had not been; a run that died is started again."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.launch import ChildFailed, run_on_processes
from tests.unit.training.test_trainer import Bag, make_batches, make_trainer
from vembed.distributed import process_count, process_index
from vembed.errors import exit_status
from vembed.training import supervisor
from vembed.training.rotation import list_checkpoints
from vembed.training.stop_signals import STOPPING
from vembed.training.supervisor import supervise

SETTINGS = {"epochs": 4, "optimizer": "adamw", "logging_steps": 3, "lr": 0.01}
TRIALS = 6


class NoisyBag(Bag):
    """With dropout, whose random numbers must go on, too."""

    def forward(self, input_ids, attention_mask=None):
        return torch.nn.functional.dropout(super().forward(input_ids), 0.3, self.training)


def trainer_of(folder: Path):
    torch.manual_seed(process_index())
    trainer = make_trainer(
        folder, batches=Signalling(make_batches(8)), model=NoisyBag(), **SETTINGS
    )
    torch.manual_seed(10 + process_index())
    return trainer


def fingerprint(trainer, folder: Path) -> str:
    """A hash of weights, optimizer state and every line of the metrics."""
    digest = hashlib.sha256()
    for parameter in trainer.parameters():
        digest.update(parameter.detach().numpy().tobytes())
        for _, value in sorted(trainer.optimizer.state[parameter].items()):
            digest.update(value.numpy().tobytes())
    digest.update((folder / "metrics.jsonl").read_bytes())
    return digest.hexdigest()


class Signalling(list):
    """Batches; some milliseconds after one of them, this process gets a signal."""

    timer: threading.Timer | None = None
    left = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.left -= 1
            if self.left == 0 and self.timer is not None:
                self.timer.start()
            yield batch


def stop_and_go_on(folder: str, trials: int) -> list[tuple[str, int]]:
    """Fingerprint of the whole run; then of each that was stopped, and where it was."""
    whole = trainer_of(Path(folder) / "whole")
    whole.train()
    found = [(fingerprint(whole, Path(folder) / "whole"), whole.state.step)]
    draw = random.Random(0)
    for number in STOPPING:
        # A signal that comes after the last step is the test's own.
        signal.signal(number, lambda *_: None)
    for trial in range(trials):
        path = Path(folder) / str(trial)
        number = STOPPING[trial % len(STOPPING)]
        trainer = trainer_of(path)
        trainer.dataloader.left = draw.randrange(1, whole.state.step)
        timer = threading.Timer(draw.uniform(0, 0.02), os.kill, (os.getpid(), number))
        # Only one of the processes gets it.
        if draw.randrange(process_count()) == process_index():
            trainer.dataloader.timer = timer
        status = exit_status(lambda trainer=trainer: trainer.train() and 0)
        # Now and then it comes after the last step.
        step = whole.state.step
        if status:
            assert status == 128 + number
            (checkpoint,) = list_checkpoints(path)
            step = checkpoint.step
            trainer = trainer_of(path)
            trainer.train(resume_from=checkpoint.path)
        found.append((fingerprint(trainer, path), step))
        if timer.ident is not None:
            timer.join()
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, processes):
    results = run_on_processes(stop_and_go_on, processes, str(tmp_path), TRIALS, timeout=100)
    for (whole, _), *stopped in results:
        assert [same for same, _ in stopped] == [whole] * TRIALS
        assert len({step for _, step in stopped}) >= TRIALS / 2


def train_and_die(settings: dict, dies_at: int) -> None:
    """A whole run, in which the last process is killed in some step of it."""
    from vembed.training.run import run_training
    from vembed.training.trainer import Trainer

    step, left = Trainer.step, [dies_at]

    def dying(self, batch):
        left[0] -= 1
        if left[0] == 0 and process_index() == process_count() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch)

    Trainer.step = dying
    run_training(settings)


def supervise_deaths(
    settings: dict, processes: int, deaths: list[int], *, timeout: float = 60
) -> int:
    """Runs until it comes to its end, dying each time after so many steps; gives the status."""
    left = [*deaths]

    def run(more) -> int:
        asked = dict(zip(more[::2], more[1::2], strict=True))
        own = {**settings, "resume": asked.get("--resume", "never")}
        try:
            dies_at = left.pop(0) if left else 0
            run_on_processes(train_and_die, processes, own, dies_at, timeout=timeout)
        except ChildFailed as error:
            sys.stderr.write(f"{error}\n")
            return 1
        return 0

    status = supervise(
        run, output_dir=settings["output_dir"], resume="auto", max_restarts=len(deaths)
    )
    assert not left
    return status


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_processes_die_comes_to_the_same_end(
    tmp_path, tiny_st_path, pairs_path, monkeypatch, processes
):
    monkeypatch.setattr(supervisor, "_PAUSE_S", 0)
    settings = {
        "model_name": str(tiny_st_path), "data_path": str(pairs_path), "device": "cpu",
        "holdout_ratio": 0, "batch_size": 4, "max_steps": 8, "save_steps": 2, "lr": 0.01,
        "logging_steps": 3, "progress": False,
    }  # fmt: skip
    for name, deaths in (("whole", []), ("run", [1, 4])):
        own = {**settings, "output_dir": str(tmp_path / name)}
        assert supervise_deaths(own, processes, deaths) == 0
    for name in ("metrics.jsonl", "final/model.safetensors"):
        found, expected = ((tmp_path / of / name).read_bytes() for of in ("run", "whole"))
        assert found == expected
