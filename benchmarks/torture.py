"""Kill a run hundreds of times, at random and at every change of the disk; it must end the same.

    python -m benchmarks.torture --kills 200 --seconds 1200

The short form is `tests/unit/training/test_torture.py`. A row of the table: kills, how often the
run came to its end all the same (each time with the bits of the run that nobody killed), and how
often a kill left a folder half written.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.conftest import _SCRATCH  # noqa: F401 - caches of its own, no network
from tests.tiny import PAIRS, write_rows
from tests.torture import Kill, Torture
from tests.unit.training.resuming import make_places, settings_of

SETTINGS = {
    "max_steps": 12, "save_steps": 1, "save_total_limit": 2, "save_top_k": 1, "logging_steps": 5,
    "val_data_path": "<few>", "eval_steps": 2,
}  # fmt: skip
SCENARIOS = {
    "one process": (1, {}),
    "one process, LoRA, bf16, cache, workers": (
        1,
        {"use_lora": True, "mixed_precision": "bf16", "use_gradient_cache": True, "num_workers": 2},
    ),
    "two processes": (2, {}),
    "two processes, fsdp2": (2, {"distributed_strategy": "fsdp2"}),
}


def main() -> None:
    """Torture each scenario for its share of the kills or of the time, whichever ends first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all (default: 200)")
    parser.add_argument("--seconds", type=float, default=3600, help="at most (default: 3600)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    print("| scenario | kills | came to the end | half-written folders | seconds |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="vembed-torture-") as folder:
        places = make_places(Path(folder))
        places["<few>"] = str(write_rows(Path(folder) / "few.jsonl", PAIRS[22:]))
        for number, (name, (processes, changes)) in enumerate(SCENARIOS.items()):
            settings = settings_of(places, Path(folder) / str(number), **{**SETTINGS, **changes})
            share = len(SCENARIOS)
            deadline = time.monotonic() + arguments.seconds / share
            started = time.monotonic()
            torture = Torture(settings, processes)
            torment(torture, chance, kills=-(-arguments.kills // share), deadline=deadline)
            print(
                f"| {name} | {torture.kills} | {torture.completions} | {torture.leftovers} | "
                f"{time.monotonic() - started:.0f} |",
                flush=True,
            )


def torment(torture: Torture, chance: random.Random, *, kills: int, deadline: float) -> None:
    """Kill until there were enough kills or time is up, then let the run end."""
    started = time.monotonic()
    torture.finish()
    seconds = time.monotonic() - started
    operation = 1
    while torture.kills < kills and time.monotonic() < deadline:
        # Every other kill at the next change of the disk in turn, the others at random.
        if chance.random() < 0.5:
            torture.go_on(Kill(operation=operation))
            operation = operation % 60 + 1
        else:
            rank = chance.choice([None, *range(torture.processes)])
            torture.go_on(Kill(after_s=chance.uniform(0.1, 1.0) * seconds, rank=rank))
    if torture.output_dir.exists():
        torture.finish()


if __name__ == "__main__":
    main()
