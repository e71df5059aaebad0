"""Runs that are cut and taken up again, and what they leave: for every test of resuming."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from tests.tiny import PAIRS, tiny_bert, write_rows
from vembed.training.run import run_training

STEPS = 8
# 22 rows in batches of 4 are 6 steps a pass, the last of which is smaller: step 6 ends a pass.
BASE: dict[str, Any] = {
    "model_name": "<bert>", "data_path": "<pairs>", "holdout_ratio": 0, "max_steps": STEPS,
    "batch_size": 4, "lr": 0.01, "logging_steps": 3, "save_steps": 1, "save_total_limit": None,
    "progress": False, "device": "cpu",
}  # fmt: skip

# What a run remembers, in combinations; each with the step after which it is cut.
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "middle of a logging window": (4, {}),
    "end of a pass, adafactor, validation": (
        6, {"optimizer": "adafactor", "val_data_path": "<pairs>", "eval_steps": 2}
    ),
    "bf16, LoRA, cache": (
        4, {"mixed_precision": "bf16", "use_lora": True, "lora_dropout": 0.2,
            "use_gradient_cache": True, "gradient_cache_chunk_size": 2},
    ),
    "bfloat16 weights, frozen layers, projection": (
        7, {"torch_dtype": "bfloat16", "freeze": ["backbone.embeddings.*"], "projection_dim": 8}
    ),
    "LoRA in bfloat16": (4, {"use_lora": True, "torch_dtype": "bfloat16"}),
    "unfreezing, accumulation": (
        3, {"unfreeze_at_step": {"backbone.embeddings.*": 1, "backbone.encoder.layer.1.*": 4},
            "gradient_accumulation_steps": 3, "max_steps": 5},
    ),
    "measured cache, guide": (
        4, {"use_gradient_cache": True, "gradient_cache_chunk_size": "auto",
            "gradient_cache_keep": "auto", "guide_model_name": "<teacher>"},
    ),
    "distillation with a projection, learned temperature": (
        4, {"teacher_model_name": "<teacher>", "learn_temperature": True,
            "distillation_loss": {"similarity_kl": 1, "embedding": 0.5}},
    ),
    "proxies, class_balanced": (
        6, {"loss_type": "arcface", "data_path": "<labelled>", "batch_sampler": "class_balanced"}
    ),
    "homogeneous batches of two sets, workers": (
        4, {"batch_sampler": "homogeneous", "data_path": ["<pairs>", "<more pairs>"],
            "num_workers": 2},
    ),
    "second pass of a stream, workers": (
        7, {"streaming": True, "shuffle_buffer_size": 5, "num_workers": 2}
    ),
    "no_duplicates, matryoshka, sgd": (
        4, {"batch_sampler": "no_duplicates", "use_mrl": True, "optimizer": "sgd",
            "scheduler_type": "constant"},
    ),
    "two towers, one frozen": (
        6, {"text_model_name": "<bert>", "image_model_name": "<vit>", "model_name": None,
            "freeze_towers": ["image"]},
    ),
}  # fmt: skip


def make_places(folder: Path) -> dict[str, str]:
    """What the names in angle brackets stand for."""
    from tests.tiny import tiny_vit

    rows = PAIRS[:22]
    labelled = [{"text": row["query"], "label": n % 5} for n, row in enumerate(rows)]
    more = [{"query": f"more {r['query']}", "positive": r["positive"]} for r in PAIRS[3:13]]
    return {
        "<bert>": str(tiny_bert(folder / "bert")),
        "<teacher>": str(tiny_bert(folder / "teacher", hidden_size=48, seed=7)),
        "<vit>": str(tiny_vit(folder / "vit")),
        "<pairs>": str(write_rows(folder / "pairs.jsonl", rows)),
        "<more pairs>": str(write_rows(folder / "more.jsonl", more)),
        "<labelled>": str(write_rows(folder / "labelled.jsonl", labelled)),
    }


def settings_of(places: dict[str, str], output_dir: Path, **settings: Any) -> dict[str, Any]:
    """`BASE` with some settings, and paths in the place of names."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(one) for one in value]
        return places.get(value, value) if isinstance(value, str) else value

    chosen = {**BASE, **settings, "output_dir": str(output_dir)}
    if not chosen["save_steps"]:
        del chosen["save_total_limit"]
    return {key: resolve(value) for key, value in chosen.items()}


def digests(output_dir: Path) -> dict[str, str]:
    """SHA-256 of everything in which two equal runs are equal: weights, states, metrics."""
    found = {}
    for path in sorted(output_dir.rglob("*")):
        if path.suffix in (".safetensors", ".jsonl"):
            name = path.relative_to(output_dir).as_posix()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_whole(settings: dict[str, Any]) -> dict[str, str]:
    """A run from its beginning to its end; gives its digests."""
    run_training(settings)
    return digests(Path(settings["output_dir"]))


def run_rest(settings: dict[str, Any], output_dir: Path, step: int) -> dict[str, str]:
    """What comes after a step of a run, in another folder; gives its digests."""
    start = Path(settings["output_dir"]) / "checkpoints" / f"step-{step:06d}"
    shutil.rmtree(output_dir, ignore_errors=True)
    run_training({**settings, "output_dir": str(output_dir), "resume": str(start)})
    return digests(output_dir)


def later(found: dict[str, str], step: int) -> dict[str, str]:
    """Those of the digests that a run has which went on after a step."""
    return {
        name: digest
        for name, digest in found.items()
        if not name.startswith("checkpoints/") or int(name.split("/")[1][5:]) > step
    }
