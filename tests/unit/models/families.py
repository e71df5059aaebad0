"""Tiny models of every family, what they embed, and the real Trainer on a batch of it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from tests import tiny
from vembed.data import Collator, Record
from vembed.inference import encode_items
from vembed.losses import build_criterion
from vembed.models import load_encoder
from vembed.modes import Item, RetrievalMode
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.optimizer_builder import build_optimizer
from vembed.training.trainer import Trainer

MODALITIES = {
    "bert": "t",
    "modernbert": "t",
    "qwen3": "t",
    "clip": "tim",
    "siglip": "tim",
    "siglip2": "tim",
    "vit": "i",
    "dinov2": "i",
    "dinov2_with_registers": "i",
    "dinov3": "i",
    "mae": "i",
    "composed": "tim",
    "qwen2_vl": "tim",
    "qwen2_5_vl": "tim",
    "qwen3_vl": "tim",
    "llava": "tim",
}
"""Each family with the letters of what it embeds."""

FAMILY_MODALITY = [(family, letter) for family, letters in MODALITIES.items() for letter in letters]
FAMILY_MODE = [
    (family, f"{query}2{document}")
    for family, letters in MODALITIES.items()
    for query in letters
    for document in letters
]

TELLING_MODES = [
    (family, mode)
    for family, mode in FAMILY_MODE
    if mode in ("t2i", "m2m") or len(MODALITIES[family]) == 1
]
"""Modes in which both towers are in use, one on each side or both on each."""


def whole_mode(family: str) -> str:
    """A mode in which every part of a model is in use."""
    return f"{MODALITIES[family][0]}2{MODALITIES[family][-1]}"


def other_size(family: str) -> int | None:
    """A projection_dim that adds a projection; None where a model has its own already."""
    return None if family == "composed" else 8


FLOAT32_INSIDE = {"qwen3", "siglip2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"}
"""Families that compute norms or positions in float32, whatever the type of their weights."""

_SCRATCH = tempfile.TemporaryDirectory(prefix="vembed-families-")
_QUIET = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
_MOST_TEXTS = 64


@functools.cache
def family_path(family: str) -> Path:
    """A tiny model of this family, built once, without dropout."""
    build = getattr(tiny, f"tiny_{family}")
    path: Path = build(Path(_SCRATCH.name) / family, **_QUIET.get(family, {}))
    return path


@functools.cache
def pictures() -> Path:
    """A folder with a picture for each of the first texts that rows may have, as `NUMBER.png`."""
    folder = Path(_SCRATCH.name) / "pictures"
    folder.mkdir()
    for number, image in enumerate(tiny.tiny_images(_MOST_TEXTS)):
        (folder / f"{number}.png").write_bytes(image.data)
    return folder


def rows_in(mode: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of texts in another mode: instead of a text, or beside it, its picture.

    Equal texts have the same picture. Paths are relative to `pictures()`.
    """
    letters = RetrievalMode.parse(mode)
    numbers: dict[str, int] = {}

    def cell(text: str, letter: str) -> Any:
        image = f"{numbers.setdefault(text, len(numbers))}.png"
        return {"t": text, "i": image, "m": {"text": text, "image": image}}[letter]

    made = []
    for row in rows:
        item = {**row, "query": cell(row["query"], letters.query)}
        item["positive"] = cell(row["positive"], letters.document)
        if "negatives" in row:
            item["negatives"] = [cell(text, letters.document) for text in row["negatives"]]
        made.append(item)
    return made


@functools.cache
def items(letter: str, count: int = 4, offset: int = 0) -> tuple[Item, ...]:
    """`count` items of one modality, of different lengths and shapes."""
    pairs = list(enumerate(tiny.PAIRS[offset : offset + count]))
    texts = [pair["positive" if offset or number % 2 else "query"] for number, pair in pairs]
    images = tiny.tiny_images(count + offset)[offset:]
    made = {
        "t": [Item(text=text) for text in texts],
        "i": [Item(image=image) for image in images],
        "m": [Item(text=t, image=i) for t, i in zip(texts, images, strict=True)],
    }
    return tuple(made[letter])


def vectors(encoder: Any, of: Any, role: Any = None, **options: Any) -> np.ndarray:
    return encode_items(encoder, of, role=role, **options)


def batch_for(encoder: Any, mode: str, count: int = 4) -> dict[str, Any]:
    """What the collator makes of `count` rows of queries and positives."""
    letters = RetrievalMode.parse(mode)
    pairs = zip(items(letters.query, count), items(letters.document, count, 4), strict=True)
    records = [
        Record(query=query, positives=(positive,), row_index=row)
        for row, (query, positive) in enumerate(pairs)
    ]
    return Collator(encoder.processor)(records)


def make_trainer(model: str | Path | None, mode: str, tmp_path: Path, **settings: Any) -> Trainer:
    """The real Trainer of a real encoder, in a run of three steps on one batch."""
    config = {
        "model_name": None if model is None else str(model),
        "retrieval_mode": mode,
        "output_dir": str(tmp_path),
        "lr": 0.01,
        "optimizer": "sgd",
        "max_steps": 3,
        "logging_steps": 1,
        "progress": False,
        **settings,
    }
    torch.manual_seed(0)
    encoder = build_model(config)
    accelerator = Accelerator(cpu=True, mixed_precision=settings.get("mixed_precision", "no"))
    apply_lora(encoder, config, accelerator)
    criterion = build_criterion(
        settings.get("loss_type", "infonce"),
        learn_temperature=settings.get("learn_temperature", False),
    )
    optimizer = build_optimizer(encoder, config, criterion)
    batch = batch_for(encoder, mode)
    return Trainer(encoder, optimizer, [batch], criterion, accelerator, config)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of one step, in float64; a trainable parameter without one is an error."""
    trainer.model.double()
    trainer.prepare()
    torch.manual_seed(1)
    trainer.step(trainer.dataloader[0])
    trainer.reduce_gradients()
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def load(path: str | Path, **options: Any) -> Any:
    return load_encoder(str(path), **options)
