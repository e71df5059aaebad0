"""Training throughput with images: a small CLIP finds pictures of symbols by their names.

    python benchmarks/images.py

`vembed` reads image files as its users have them. `peer` gets the same pictures already open, which
is what its datasets give. `limit` is transformers alone: forward and backward of both towers on
tensors that are ready, and nothing else.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, call_apart, show_machine
from training import run_peer
from workloads import (
    batches_of,
    build_vembed,
    in_rounds,
    read_jsonl,
    training_settings,
    write_rows,
)

DATA = Path("runs/benchmarks/symbols")


def run_vembed(meter: Meter, *, rows: str, settings: dict[str, Any], steps: int) -> None:
    trainer = build_vembed(settings)
    in_rounds(trainer, meter, steps)
    trainer.train()


def run_limit(
    meter: Meter, *, rows: str, settings: dict[str, Any], steps: int, rounds: int
) -> None:
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, device = settings["model_name"], settings["device"]
    model = CLIPModel.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder)

    def prepare(batch: list[dict[str, str]]) -> tuple[Any, Any]:
        texts = tokenizer([row["query"] for row in batch], padding=True, return_tensors="pt")
        pictures = [Image.open(Path(settings["image_root"]) / row["positive"]) for row in batch]
        pixels = images([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {n: texts[n].to(device) for n in names}, pixels["pixel_values"].to(device)

    batches = batches_of(read_jsonl(Path(rows)), settings["batch_size"])
    work = iter([prepare(batch) for batch in islice(batches, steps * (rounds + 1))])
    given = torch.randn(2, settings["batch_size"], model.config.projection_dim, device=device)
    model.train()
    for _ in meter:
        for texts, pixels in islice(work, steps):
            query_BD = model.get_text_features(**texts).pooler_output
            image_BD = model.get_image_features(pixel_values=pixels).pooler_output
            torch.autograd.backward([query_BD, image_BD], list(given))
            model.zero_grad()


def open_pictures(rows: list[dict[str, str]], *, folder: Path) -> list[dict[str, Any]]:
    """The rows with their images open, as the peer's datasets have them."""
    from PIL import Image

    return [
        {"query": row["query"], "positive": Image.open(folder / row["positive"]).convert("RGB")}
        for row in rows
    ]


def make_task(folder: Path, *, quick: bool) -> tuple[list[dict[str, str]], Path]:
    """Names with a picture each, and an untrained CLIP for them."""
    from vembed.quickstart.symbols import build_symbol_search

    file = folder / "train.jsonl"
    if not file.is_file():
        print("drawing symbols ...", flush=True)
        # Arrows and mathematical signs are enough to see that it runs.
        kept = {"keep": lambda character: "\u2190" <= character < "\u2220"} if quick else {}
        build_symbol_search(folder, **kept)
    rows = [{"query": r["query"], "positive": r["positive"][0]} for r in read_jsonl(file)]
    size = {"size": 32, "image_layers": 1} if quick else {}
    call_apart(write_clip, folder / "clip", [row["query"] for row in rows], size)
    return rows, folder / "clip"


def write_clip(folder: Path, texts: list[str], size: dict[str, int]) -> None:
    from vembed.quickstart.glyphs import IMAGE_SIZE
    from vembed.quickstart.small_clip import write_small_clip

    write_small_clip(folder, texts=texts, image_size=IMAGE_SIZE, **size)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--batch", type=int, help="pairs per step (default 64)")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a round")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    batch = arguments.batch or (8 if arguments.quick else 64)
    folder = Path(f"{DATA}-quick") if arguments.quick else DATA
    rows, model = make_task(folder, quick=arguments.quick)
    file = write_rows(folder / "pairs.jsonl", rows)
    settings = training_settings(
        file,
        model=str(model),
        batch=batch,
        tokens=32,
        precision="no",
        steps=arguments.steps * (bench.rounds + 2),
        output=str(folder / "run"),
    )
    settings |= {
        "device": arguments.device,
        "retrieval_mode": "t2i",
        "image_root": str(folder),
        "learn_temperature": False,
    }
    shared = {"rows": str(file), "settings": settings, "steps": arguments.steps}
    bench.compare(
        f"small CLIP, batch {batch}",
        [
            Variant("vembed", run_vembed, shared),
            Variant(
                "peer",
                run_peer,
                shared | {"load": partial(open_pictures, folder=folder), "check": False},
            ),
            Variant("limit", run_limit, shared | {"rounds": bench.rounds}),
        ],
        units=batch * arguments.steps,
        unit="pairs",
    )


if __name__ == "__main__":
    main()
