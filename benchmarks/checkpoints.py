"""Time to save a checkpoint in the middle of a run.

    python benchmarks/checkpoints.py

From the end of one optimizer step to the next batch that is asked for, with `save_steps: 1`.
`peer` is sentence-transformers' trainer; `floor` writes weights and both averages of AdamW, as
plain bytes, to the same disk and waits until they are on it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import (
    WatchedLoader,
    build_peer,
    build_vembed,
    model_folder,
    read_jsonl,
    read_pairs,
    repeat,
    training_settings,
    write_rows,
)

BATCH = 8


def run_vembed(meter: Meter, *, settings: dict[str, Any]) -> None:
    trainer = build_vembed(settings)
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: meter.start())
    trainer.dataloader = WatchedLoader(trainer.dataloader, lambda _given: meter.stop())
    meter.tell(**{"MiB of tensors": tensor_bytes(trainer.model) / 2**20})
    trainer.train()


def run_peer(meter: Meter, *, settings: dict[str, Any]) -> None:
    from transformers import TrainerCallback

    class Saved(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            meter.stop()

    trainer = build_peer(read_jsonl(Path(settings["data_path"])), settings)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: meter.start())
    trainer.add_callback(Saved())
    trainer.train()


def run_floor(meter: Meter, *, settings: dict[str, Any]) -> None:
    import bare

    model, _ = bare.load_bare(settings["model_name"])
    content = os.urandom(tensor_bytes(model))
    file = Path(settings["output_dir"])
    for _ in meter:
        with file.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())


def tensor_bytes(model: Any) -> int:
    """Of the weights and of AdamW's two averages."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters())


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    with tempfile.TemporaryDirectory() as folder:
        rows = repeat(read_pairs(arguments), 4 * BATCH)
        settings = training_settings(
            write_rows(Path(folder) / "rows.jsonl", rows),
            model=model_folder(arguments),
            batch=BATCH,
            tokens=32,
            precision="no",
            steps=bench.rounds + 3,
            output=f"{folder}/run",
        )
        settings |= {"device": arguments.device, "save_steps": 1, "save_total_limit": 2}
        bench.compare(
            "checkpoint",
            [
                Variant(name, run, {"settings": settings | {"output_dir": f"{folder}/{name}"}})
                for name, run in (("vembed", run_vembed), ("peer", run_peer), ("floor", run_floor))
            ],
            units=1,
            unit="checkpoints",
        )


if __name__ == "__main__":
    main()
