"""The long form of tests/distributed/test_stop.py: signals at 50 random steps, 20 deaths.

    python benchmarks/interruptions.py                # forked processes: minutes
    python benchmarks/interruptions.py --launched 20  # deaths of `vembed train --max-restarts`, too

Prints a line for each part, and fails at the first run that ends differently from one that nothing
interrupted: other weights, optimizer state or lines of metrics.jsonl, an orphan, a wrong status.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from tests.distributed.test_stop import stop_and_go_on, supervise_deaths
from tests.launch import run_on_processes
from tests.tiny import tiny_sentence_transformer, write_pairs
from vembed.training import supervisor

NAMES = ("metrics.jsonl", "final/model.safetensors")


def signals(folder: Path, *, processes: int, trials: int) -> None:
    """Runs that a signal stops at a random moment, and that go on."""
    started = time.perf_counter()
    results = run_on_processes(stop_and_go_on, processes, str(folder), trials, timeout=3600)
    for (whole, _), *stopped in results:
        different = [step for same, step in stopped if same != whole]
        assert not different, f"stopped at steps {different}, they end differently"
    steps = len({step for _, step in results[0][1:]})
    print(
        f"{trials} signals at {steps} different steps, {processes} processes: identical, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )


def settings_of(folder: Path, steps: int) -> dict[str, object]:
    """A run of some steps."""
    model, rows = folder / "model", folder / "pairs.jsonl"
    if not rows.exists():
        tiny_sentence_transformer(model)
        write_pairs(rows)
    return {
        "model_name": str(model), "data_path": str(rows), "device": "cpu", "holdout_ratio": 0,
        "batch_size": 4, "max_steps": steps, "save_steps": 2, "lr": 0.01, "logging_steps": 3,
        "progress": False,
    }  # fmt: skip


def same_end(folder: Path) -> bool:
    """Whether the two runs there left the same."""
    return all(
        (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
        for name in NAMES
    )


def deaths(folder: Path, *, processes: int, count: int) -> None:
    """A run, one process of which is killed many times."""
    started, draw = time.perf_counter(), random.Random(processes)
    settings = settings_of(folder, 3 * count)
    # Some die before their first checkpoint, at most two times in a row.
    lives = [draw.choice((1, 3, 4, 5)) if n % 3 else draw.choice((3, 4)) for n in range(count)]
    for name, of_run in (("whole", []), ("run", lives)):
        own = {**settings, "output_dir": str(folder / f"{processes}" / name)}
        assert supervise_deaths(own, processes, of_run, timeout=600) == 0
    assert same_end(folder / f"{processes}"), "they end differently"
    print(
        f"{count} deaths, {processes} processes: identical, {time.perf_counter() - started:.0f} s",
        flush=True,
    )


def launched(folder: Path, *, processes: int, count: int) -> None:
    """`vembed train --max-restarts`, a process of which is killed many times."""
    settings = settings_of(folder, 200 * count)
    folder = folder / f"launched-{processes}"

    def start(name: str) -> subprocess.Popen[bytes]:
        words = [f"{key}={value}" for key, value in settings.items()]
        return subprocess.Popen(
            [Path(sys.executable).with_name("vembed"), "train", "--config_override", *words,
             "save_steps=20", "--num_processes", str(processes), "--max-restarts", str(count),
             "--output_dir", str(folder / name)],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    started, draw, killed = time.perf_counter(), random.Random(0), 0
    assert start("whole").wait() == 0
    program = start("run")
    newest = 0
    while program.poll() is None:
        time.sleep(draw.uniform(0.1, 0.5))
        found = [int(p.name[5:]) for p in (folder / "run" / "checkpoints").glob("step-*")]
        if killed < count and max(found, default=0) > newest:
            newest = max(found)
            time.sleep(draw.uniform(0, 0.5))
            children = psutil.Process(program.pid).children()
            if children:
                draw.choice(children).kill()
                killed += 1
    assert program.returncode == 0, f"status {program.returncode}"
    assert same_end(folder), "they end differently"
    print(
        f"{killed} deaths of vembed train --max-restarts, {processes} processes: identical, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--launched", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    supervisor._PAUSE_S = 0
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if options.signals:
                signals(folder, processes=processes, trials=options.signals)
            if options.deaths:
                deaths(folder, processes=processes, count=options.deaths)
            if options.launched:
                launched(folder, processes=processes, count=options.launched)


if __name__ == "__main__":
    main()
