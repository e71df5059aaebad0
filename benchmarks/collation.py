"""The data pipeline alone: rows to batches that a model takes, without the model.

    python benchmarks/collation.py

`vembed` is the dataloader of a run, `in the step` is what tokenising the same rows for each batch
costs, and `peer` the dataloader of sentence-transformers' trainer. The batches hold the same ids.
"""

from __future__ import annotations

import tempfile
from itertools import count, islice
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import (
    build_peer,
    build_vembed,
    longest,
    model_folder,
    read_jsonl,
    read_pairs,
    repeat,
    training_settings,
    write_rows,
)


def run_vembed(meter: Meter, *, settings: dict[str, Any], batches: int) -> None:
    loader = build_vembed(settings).dataloader
    show_ids(meter, next(iter(loader)))
    draw(meter, epochs_of(loader), batches)


def run_peer(meter: Meter, *, settings: dict[str, Any], batches: int) -> None:
    loader = build_peer(read_jsonl(Path(settings["data_path"])), settings).get_train_dataloader()
    show_ids(meter, next(iter(loader)))
    draw(meter, epochs_of(loader), batches)


def epochs_of(loader: Any) -> Any:
    for epoch in count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader


def show_ids(meter: Meter, batch: Any) -> None:
    meter.show("ids", batch["query_input_ids"])


def draw(meter: Meter, stream: Any, batches: int) -> None:
    for _ in meter:
        for _batch in islice(stream, batches):
            pass


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--batches", type=int, help="of a round (default 50)")
    parser.add_argument("--batch", type=int, help="pairs per batch (default 64)")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    batch = arguments.batch or (8 if arguments.quick else 64)
    batches = arguments.batches or (2 if arguments.quick else 50)
    with tempfile.TemporaryDirectory() as folder:
        pairs = [{k: row[k] for k in ("query", "positive")} for row in read_pairs(arguments)]
        rows = repeat(pairs, max(len(pairs), 2 * batch))
        settings = training_settings(
            write_rows(Path(folder) / "rows.jsonl", rows),
            model=model_folder(arguments),
            batch=batch,
            tokens=longest(arguments, 256),
            precision="no",
            steps=10,
            output=f"{folder}/run",
        ) | {"device": "cpu"}
        shared = {"settings": settings, "batches": batches}
        in_step = settings | {"token_cache": False}
        bench.compare(
            f"batches of {batch} pairs",
            [
                Variant("vembed", run_vembed, shared),
                Variant("in the step", run_vembed, shared | {"settings": in_step}),
                Variant("peer", run_peer, shared),
            ],
            units=batches,
            unit="batches",
        )


if __name__ == "__main__":
    main()
