from __future__ import annotations

import logging

import pytest

from vembed.errors import CheckpointError
from vembed.training.manifest import replaced_folder
from vembed.training.rotation import (
    clean_up,
    list_checkpoints,
    newest_checkpoint,
    rotate,
    set_damaged_aside,
    step_path,
)


def write(output_dir, step, **facts):
    with replaced_folder(step_path(output_dir, step), {"step": step, **facts}) as folder:
        (folder / "a").write_text(str(step))


def steps(output_dir):
    return [one.step for one in list_checkpoints(output_dir)]


def test_the_newest_come_first_also_beyond_six_digits(tmp_path):
    for step in (7, 1234567, 999999):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000008.damaged").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert steps(tmp_path) == [1234567, 999999, 7]
    assert newest_checkpoint(tmp_path).step == 1234567
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_rotation_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    rotate(tmp_path, newest=None)
    assert steps(tmp_path) == [5, 4, 3, 2, 1]
    rotate(tmp_path, newest=2)
    assert steps(tmp_path) == [5, 4]


@pytest.mark.parametrize(("larger", "kept"), [(True, [5, 4, 3]), (False, [5, 4, 1])])
def test_rotation_keeps_the_best_too(tmp_path, larger, kept):
    values = {1: 0.1, 2: None, 3: 0.9, 4: 0.5, 5: float("nan")}
    for step, value in values.items():
        facts = {} if value is None else {"value": value, "larger_is_better": larger}
        write(tmp_path, step, **facts)
    rotate(tmp_path, newest=2, best=1)
    assert steps(tmp_path) == kept


def test_what_is_damaged_is_told_and_set_aside(tmp_path, caplog):
    for step in (1, 2, 3):
        write(tmp_path, step)
    for step in (2, 3):
        (step_path(tmp_path, step) / "a").unlink()
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(tmp_path)
    assert newest.step == 1
    assert [text.split(": ")[1] for text in caplog.messages] == ["is missing"] * 2
    for _ in range(2):  # the second time, over the first
        set_damaged_aside(tmp_path, newest)
        assert steps(tmp_path) == [1]
        write(tmp_path, 3)


def test_all_damaged(tmp_path, caplog):
    for step in (1, 2):
        write(tmp_path, step)
        (step_path(tmp_path, step) / "a").write_text("x" * 5)
    with pytest.raises(CheckpointError, match="no checkpoint is whole:\n.*\n.*\nRestore one"):
        newest_checkpoint(tmp_path)
    assert not caplog.messages  # none is used, so none is said to be


def test_clean_up_looks_in_both_folders(tmp_path):
    write(tmp_path, 1)
    for name in (".tmp-best", ".trash-report", "checkpoints/.tmp-step-000001"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-metrics.jsonl").write_text("half")
    (tmp_path / ".tmp-notes").mkdir()  # the user's
    clean_up(tmp_path)
    assert [path.name for path in tmp_path.rglob(".t*")] == [".tmp-notes"]
