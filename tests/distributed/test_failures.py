"""What one process alone stumbles over ends all of them, with one story."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import run_on_processes
from tests.pictures import flipped_png, mode_rows, write_pictures
from tests.tiny import write_rows
from vembed.distributed import fail_together, process_index
from vembed.errors import DataError, NonFiniteError, VembedError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows of texts and pictures; `bad.jsonl` has one picture that only decoding finds damaged."""
    folder = write_pictures(tmp_path_factory.mktemp("failures"))
    (folder / "flipped.png").write_bytes(flipped_png())
    rows = mode_rows("t2i", negatives=(0,) * 8)
    write_rows(folder / "good.jsonl", rows)
    rows[4]["positives"] = ["flipped.png"]
    write_rows(folder / "bad.jsonl", rows)
    return folder


def train(folder: str, settings: dict[str, str]) -> tuple[str, str, int]:
    from vembed.training.run import run_training

    path = Path(folder)
    data = {"data_path": "good.jsonl", **settings}
    try:
        run_training(
            {
                "model_name": folder,
                "encoder_mode": "tests.own_encoder:load_pictures_encoder",
                "retrieval_mode": "t2i",
                "batch_size": 2,
                "max_steps": 2,
                "holdout_ratio": 0,
                "device": "cpu",
                "progress": False,
                "overwrite_output_dir": True,
                "output_dir": str(path / f"run-{'-'.join(settings)}"),
                **{key: str(path / name) for key, name in data.items()},
            }
        )
    except VembedError as error:
        return type(error).__name__, str(error), error.exit_code
    return "", "", 0


@pytest.mark.parametrize(
    "settings",
    [{"data_path": "bad.jsonl"}, {"val_data_path": "bad.jsonl"}, {"test_data_path": "bad.jsonl"}],
    ids=["training", "validation", "test"],
)
def test_a_damaged_image_ends_every_process(folder, settings):
    outcomes = run_on_processes(train, 2, str(folder), settings, timeout=60)
    assert sorted(kind for kind, _, _ in outcomes) == ["DistributedError", "ImageError"]
    assert [code for _, _, code in outcomes] == [2, 2]
    rank = [kind for kind, _, _ in outcomes].index("ImageError")
    told, other = outcomes[rank][1], outcomes[1 - rank][1]
    assert "bad.jsonl:5: positive[0]: an image must be whole" in told
    assert other == f"process {rank} cannot go on, so that none can: {told}"


def test_whole_images_end_no_process(folder):
    """The rows above are refused for the damage, and nothing else."""
    assert run_on_processes(train, 2, str(folder), {}, timeout=60) == [("", "", 0)] * 2


def fail(ranks: dict[int, Exception]) -> tuple[str, str, int]:
    try:
        with fail_together(CPU):
            if process_index() in ranks:
                raise ranks[process_index()]
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "exit_code", -1)
    return "", "", 0


def test_everyone_knows_who_failed_and_how():
    first, second = run_on_processes(fail, 2, {1: DataError("ä: no")})
    assert first == ("DistributedError", "process 1 cannot go on, so that none can: ä: no", 2)
    assert second == ("DataError", "ä: no", 2)
    first, second = run_on_processes(fail, 2, {0: OSError("disk")})
    assert first == ("OSError", "disk", -1)
    assert second[1:] == ("process 0 cannot go on, so that none can: OSError('disk')", 1)
    assert run_on_processes(fail, 2, {0: DataError("a"), 1: DataError("b")}) == [
        ("DataError", "a", 2),
        ("DataError", "b", 2),
    ]
    assert run_on_processes(fail, 2, {}) == [("", "", 0)] * 2


def test_a_single_process_raises_its_own():
    assert fail({0: DataError("a")}) == ("DataError", "a", 2)
    assert fail({}) == ("", "", 0)


def train_with_a_nan(folder: str, settings: dict[str, Any]) -> tuple[str, int, list[float], int]:
    """A run in which process 1's third loss is not finite."""
    from tests.unit.training.test_step_guard import poisoned
    from tests.unit.training.test_trainer import Criterion, make_trainer

    torch.manual_seed(0)
    criterion = poisoned(float("nan")) if process_index() == 1 else Criterion()
    trainer = make_trainer(Path(folder), criterion=criterion, **settings)
    told, code = "", 0
    try:
        trainer.train()
    except NonFiniteError as error:
        told, code = str(error), error.exit_code
    weights = trainer.accelerator.unwrap_model(trainer.model).words.weight
    return told, code, weights.flatten().tolist(), trainer.state.skipped_steps


def test_a_loss_that_is_not_finite_on_one_process_ends_both_before_the_update(tmp_path):
    first, second = run_on_processes(train_with_a_nan, 2, str(tmp_path), {"epochs": 2})
    assert first == second
    assert first[1] == 5
    assert first[0].startswith("step 3: ")
    assert "loss nan (task nan) on process 1, gradient norm nan" in first[0]
    assert torch.tensor(first[2]).isfinite().all()


def test_both_processes_skip_what_one_cannot_use(tmp_path):
    settings = {"epochs": 2, "on_nonfinite": "skip"}
    first, second = run_on_processes(train_with_a_nan, 2, str(tmp_path), settings)
    assert first == second
    assert (first[1], first[3]) == (0, 1)
