"""Rows and pictures of the image sets, as vembed reads them, from the shared folder's archives."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from PIL import Image

Row = dict[str, Any]
TURNS = (90, 180, 270)
SHIFTS = (1, 7)
"""Drawers of a character are paired with those this much further on."""


def write_emoji_texts(source: Path, folder: Path) -> None:
    """`emoji-t2i`: name and keywords to Noto's picture; EmojiTwo's too to train on."""
    _unpack(source / "images.zip", folder)
    rows = defaultdict(list)
    for emoji in _read(source / "emoji.jsonl"):
        pictures = [emoji[key] for key in ("image", "image_emojitwo") if emoji[key]]
        text = f"{emoji['name']}: {', '.join(emoji['keywords'])}"
        if emoji["split"] == "train":
            rows["train"] += [{"query": text, "positive": picture} for picture in pictures]
        else:
            rows[emoji["split"]].append({"query": text, "positive": pictures[0]})
    _write_splits(folder, rows)


def write_emoji_artists(source: Path, folder: Path) -> None:
    """`emoji-i2i`: Noto's picture to EmojiTwo's."""
    _unpack(source / "images.zip", folder)
    rows = defaultdict(list)
    for emoji in _read(source / "emoji.jsonl"):
        if emoji["image_emojitwo"]:
            rows[emoji["split"]].append(
                {"query": emoji["image"], "positive": emoji["image_emojitwo"]}
            )
    _write_splits(folder, rows)


def write_omniglot(source: Path, folder: Path) -> None:
    """`omniglot`: pairs of drawings of a character to train on, labelled drawings to measure.

    A character turned by 90, 180 and 270 degrees is a new one (Santoro et al., 2016). The runs of
    the official one-shot test are `oneshot/run01.jsonl` and so on.
    """
    _unpack(source / "images.zip", folder)
    _unpack(source / "oneshot_runs.zip", folder / "oneshot")
    rows, drawings = defaultdict(list), defaultdict(list)
    for row in _read(source / "omniglot.jsonl"):
        if row["split"] == "train":
            drawings[row["label"]].append(row["image"])
        else:
            rows[row["split"]].append({"image": row["image"], "label": row["label"]})
    characters = list(drawings.values())
    for degrees in TURNS:
        characters += [[_turned(folder, image, degrees) for image in c] for c in drawings.values()]
    rows["train"] = [
        {"query": image, "positive": character[(number + shift) % len(character)]}
        for character in characters
        for number, image in enumerate(character)
        for shift in SHIFTS
    ]
    _write_splits(folder, rows)
    runs = defaultdict(list)
    for row in _read(source / "oneshot_runs.jsonl"):
        runs[row["run"]].append({"query": row["query"], "positive": row["positive"]})
    _write_splits(folder / "oneshot", runs)


def _turned(folder: Path, image: str, degrees: int) -> str:
    """Write a turned copy of a picture; returns its path."""
    path = Path(f"turned{degrees}") / image
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    with Image.open(folder / image) as drawing:
        drawing.rotate(degrees).save(folder / path)
    return str(path)


def _unpack(archive: Path, folder: Path) -> None:
    with ZipFile(archive) as zipped:
        zipped.extractall(folder)


def _read(path: Path) -> Iterable[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_splits(folder: Path, splits: dict[str, list[Row]]) -> None:
    for name, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )
