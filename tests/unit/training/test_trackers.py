"""Real trackers, offline; and trackers that fail."""

from __future__ import annotations

import logging

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from vembed.training.optimizer_builder import resolve_tracker
from vembed.training.trackers import log_to_trackers, start_trackers, stop_trackers

SETTINGS = {"lr": 1e-3, "model_name": "m", "tags": ["a", "b"], "max_steps": None, "progress": True}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab"])
def test_a_real_tracker_writes_files(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    log_with, init_kwargs = resolve_tracker(name, run_name="run", output_dir=str(tmp_path / "out"))
    accelerator = Accelerator(cpu=True, log_with=log_with, project_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    start_trackers(accelerator, project_name="project", settings=SETTINGS, init_kwargs=init_kwargs)
    assert [tracker.name for tracker in accelerator.trackers] == [name]
    log_to_trackers(accelerator, {"train/loss": 1.5}, step=1)
    assert len(accelerator.trackers) == 1
    stop_trackers(accelerator)
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert written, f"{name} wrote nothing under the output folder"


class Broken(GeneralTracker):
    name = "broken"
    requires_logging_directory = False

    def __init__(self, fails_at: str) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.logged: list[dict] = []

    def _maybe_fail(self, where: str) -> None:
        if where == self.fails_at:
            raise RuntimeError(f"no network at {where}")

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self._maybe_fail("start")

    def store_init_configuration(self, values: dict) -> None:
        self._maybe_fail("config")

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        self._maybe_fail("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._maybe_fail("finish")


@pytest.mark.parametrize("fails_at", ["config", "log", "finish"])
def test_a_failing_tracker_is_dropped_and_the_other_goes_on(fails_at, caplog):
    broken, sound = Broken(fails_at), Broken("never")
    accelerator = Accelerator(cpu=True, log_with=[broken, sound])
    with caplog.at_level(logging.WARNING, logger="vembed"):
        start_trackers(accelerator, project_name="p", settings=SETTINGS, init_kwargs={})
        log_to_trackers(accelerator, {"x": 1.0}, step=1)
        stop_trackers(accelerator)
    assert sound.logged == [{"x": 1.0}]
    assert [fails_at in record.getMessage() for record in caplog.records] == [True]
