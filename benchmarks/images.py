"""Training throughput with images: a small CLIP on pictures of symbols, from their names.

    python benchmarks/images.py

`vembed` and `peer` read image files, as their users have them; `limit` is transformers alone,
forward and backward of both towers on tensors that are ready.
"""

from __future__ import annotations

from typing import Any

from harness import Meter
from workloads import WatchedLoader, build_vembed

CHECKED_ROWS = 8


def run_vembed(meter: Meter, *, settings: dict[str, Any], steps: int) -> None:
    trainer = build_vembed(settings)
    rounds, started = iter(meter), []

    def on_ask() -> None:
        if trainer.state.step % steps == 0 and trainer.state.step not in started:
            started.append(trainer.state.step)
            next(rounds)

    trainer.dataloader = WatchedLoader(trainer.dataloader, on_ask)
    trainer.train()
