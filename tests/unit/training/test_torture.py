"""A run that is killed at any moment, and started again by the same command, ends the same.

`benchmarks/torture.py` does it for longer.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.torture import Kill, Torture
from tests.unit.training.resuming import make_places, settings_of

# A window of 3 steps is open at most saves, and the best model is replaced now and then.
SETTINGS = {
    "max_steps": 5, "save_steps": 1, "save_total_limit": 2, "logging_steps": 3,
    "val_data_path": "<few>", "eval_steps": 2,
}  # fmt: skip
RANDOM_KILLS = 6


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    from tests.tiny import PAIRS, write_rows

    return {**make_places(folder), "<few>": str(write_rows(folder / "few.jsonl", PAIRS[22:]))}


def test_a_kill_at_every_point_of_saving_and_rotating(places, tmp_path):
    torture = Torture(settings_of(places, tmp_path / "run", **SETTINGS))
    operation, ended = 1, 0
    # From some number on, a life ends before its operation comes.
    while ended < 2 and operation < 60:
        ended = ended + 1 if torture.go_on(Kill(operation=operation)) else 0
        operation += 1
    if torture.output_dir.exists():
        torture.finish()
    assert torture.kills > 20
    assert torture.completions > 1
    assert torture.leftovers > 3


@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_times(places, tmp_path, processes):
    settings = settings_of(places, tmp_path / "run", **SETTINGS)
    torture = Torture(settings, processes)
    started = time.monotonic()
    torture.finish()
    seconds = time.monotonic() - started
    chance = random.Random(processes)
    for _ in range(RANDOM_KILLS):
        rank = chance.choice([None, *range(processes)])
        torture.go_on(Kill(after_s=chance.uniform(0.2, 1.0) * seconds, rank=rank))
    if torture.output_dir.exists():
        torture.finish()
    assert torture.kills > 0
