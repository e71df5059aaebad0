"""A disk that is full or cannot be written to costs a run its checkpoints, and nothing else."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch

from tests.launch import run_forked
from tests.unit.training.test_trainer import lines, make_trainer
from vembed.errors import DiskError
from vembed.training.disk import as_size, disk_problem, free_bytes, mount_of
from vembed.training.program import train_program
from vembed.training.rotation import list_checkpoints
from vembed.training.trainer import Trainer

MB = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB, where the user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Disturbed(Trainer):
    """Calls `disturb(steps done)` after every update."""

    done = 0

    def after_update(self):
        super().after_update()
        self.done += 1
        type(self).disturb(self.done)

    @staticmethod
    def disturb(step):
        raise NotImplementedError


def fill(folder: Path, *, leave: int = 0) -> None:
    with (folder / "filler").open("wb") as file:
        file.write(bytes(free_bytes(folder) - leave))


def full_between(folder, *, first, last):
    @staticmethod
    def disturb(step):
        if step == first:
            fill(folder)
        if step == last:
            (folder / "filler").unlink()

    return disturb


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_training_goes_on_without_the_checkpoints_that_do_not_fit(
    small_disk, tmp_path, caplog, monkeypatch, is_foreseen
):
    monkeypatch.setattr(
        Disturbed, "disturb", full_between(small_disk, first=3, last=7), raising=False
    )
    trainer = make_trainer(
        small_disk / "run", trainer_class=Disturbed, epochs=3, save_steps=2, logging_steps=2
    )
    if not is_foreseen:
        monkeypatch.setattr(trainer.saves, "_estimate", lambda **_: 0)
    trainer.train()
    saves = [f"step-{step:06d}" for step in (4, 6)]
    assert [Path(path).name for path in trainer.saves.failed] == saves
    told = [m for m in caplog.messages if "is not saved" in m]
    reason = "no space left" if is_foreseen else "No space left on device"
    assert f"step-000004 is not saved: {reason} on {small_disk}: it needs about" in told[0]
    assert "status 3" in told[0]
    assert [c.step for c in list_checkpoints(small_disk / "run")] == [12, 10]
    assert not list(small_disk.rglob(".*"))
    assert [line["step"] for line in lines(small_disk / "run")] == [2, 4, 6, 8, 10, 12]
    other = make_trainer(tmp_path / "other", epochs=3)
    other.train()
    assert torch.equal(trainer.model.words.weight, other.model.words.weight)
    assert (small_disk / "run" / "final" / "bag.pt").exists()


def test_a_read_only_disk(small_disk, caplog, monkeypatch):
    @staticmethod
    def disturb(step):
        options = {3: "remount,ro", 7: "remount,rw"}
        if step in options:
            subprocess.run(["mount", "-o", options[step], str(small_disk)], check=True)

    monkeypatch.setattr(Disturbed, "disturb", disturb)
    trainer = make_trainer(small_disk / "run", trainer_class=Disturbed, epochs=3, save_steps=2)
    trainer.train()
    assert len(trainer.saves.failed) == 2
    assert "is not saved: Read-only file system on" in caplog.text
    assert "metrics.jsonl cannot be written: Read-only file system" in caplog.text
    # Also the lines that the disk did not take at first.
    assert [line["step"] for line in lines(small_disk / "run")] == [*range(1, 13)]


def test_a_final_model_that_does_not_fit_is_an_error(small_disk, monkeypatch):
    monkeypatch.setattr(
        Disturbed, "disturb", lambda step: step == 4 and fill(small_disk), raising=False
    )
    trainer = make_trainer(small_disk / "run", trainer_class=Disturbed)
    with pytest.raises(DiskError, match="final: the trained model could not be saved") as caught:
        trainer.train()
    assert caught.value.exit_code == 3


def train_with_small_files(arguments: list[str]) -> int:
    """A whole run in which no file may grow beyond what a model takes: its optimizer's does."""
    before = Trainer.after_update

    def limit(self):
        before(self)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = max(p.numel() * 4 for p in self.parameters())
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * size, hard))

    Trainer.after_update = limit
    return train_program(arguments)


def test_the_program_ends_with_status_3_and_the_rest_of_its_work_done(
    tmp_path, tiny_st_path, pairs_path
):
    arguments = [
        "--model_name", str(tiny_st_path), "--data_path", str(pairs_path), "--device", "cpu",
        "--batch_size", "4", "--max_steps", "7", "--save_steps", "1", "--output_dir",
        str(tmp_path / "run"), "--progress", "false",
    ]  # fmt: skip
    ended = run_forked(train_with_small_files, arguments)
    assert ended.status == 3, ended.said
    assert "vembed: the run came to its end, but not everything could be saved: " in ended.said
    assert "step-000001, " in ended.said
    assert "step-000004 and 3 more\n" in ended.said
    assert "Traceback" not in ended.said
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_slow_saves_are_told_once(tmp_path, caplog):
    make_trainer(tmp_path, save_steps=1, grace_period_s=1e-6).train()
    told = [m for m in caplog.messages if "grace_period_s" in m]
    assert len(told) == 1
    assert (
        "step-000001 took 0 s to save, but a run that gets SIGTERM is killed after 0 s" in told[0]
    )


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(28, "x"), "No space left on device"),
        (OSError(30, "x"), "Read-only file system"),
        (RuntimeError("I/O error: no space (os error 28)"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"),
         "the file could not be written whole"),
        (OSError(2, "x"), None),
        (RuntimeError("x (os error 2)"), None),
        (ValueError("x"), None),
    ],
)  # fmt: skip
def test_what_a_disk_says(error, problem):
    assert disk_problem(error) == problem


def test_sizes_and_mounts(tmp_path):
    assert [as_size(n) for n in (12, 1200, 3.4e9, 5e15)] == [
        "12 bytes",
        "1.2 kB",
        "3.4 GB",
        "5000.0 TB",
    ]
    assert mount_of(tmp_path / "not" / "there") == mount_of(tmp_path)
    assert os.path.ismount(mount_of(tmp_path))
    assert free_bytes(tmp_path / "not" / "there") > 0
