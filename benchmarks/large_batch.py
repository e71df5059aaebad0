"""Large contrastive batches: memory and time of a step through the gradient cache.

    python benchmarks/large_batch.py --batches 512
    python benchmarks/large_batch.py --batches 4096 --rounds 1 --no-warm-up
    python benchmarks/large_batch.py --batches 256 --variants plain cache keep peer

Variants: `cache` (nothing kept), `auto` (chunk size and kept chunks by the memory there is), `keep`
(everything kept), `plain` (no cache), `peer` (sentence-transformers'
CachedMultipleNegativesRankingLoss with its default mini-batch of 32), and the limit, `packed` or
`sorted` (`bare.py`), which goes forward and back once and knows nothing of a loss.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import training
from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import longest, model_folder, read_pairs, repeat, training_settings, write_rows

OURS = {
    "cache": {"use_gradient_cache": True},
    "auto": {
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": "auto",
        "gradient_cache_keep": "auto",
    },
    "keep": {"use_gradient_cache": True, "gradient_cache_keep": 10**9},
    "plain": {},
}


def run_peer(meter: Meter, **settings: Any) -> None:
    training.run_peer(meter, **settings, make_loss=cached_loss)


def cached_loss(model: Any) -> Any:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="pairs per step (default 512)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--no-warm-up", action="store_true", help="count the first round too")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    model, tokens = model_folder(arguments), longest(arguments, 256)
    ours = ["cache"] if arguments.quick else ["cache", "auto"]
    chosen = bench.only or (*ours, "peer", "sorted")
    for batch in arguments.batches or ([16] if arguments.quick else [512]):
        with tempfile.TemporaryDirectory() as folder:
            columns = ("query", "positive")
            pairs = [{key: row[key] for key in columns} for row in read_pairs(arguments)]
            settings = training_settings(
                write_rows(Path(folder) / "rows.jsonl", repeat(pairs, max(len(pairs), batch))),
                model=model,
                batch=batch,
                tokens=tokens,
                precision=arguments.precision,
                steps=bench.rounds + 2,
                output=f"{folder}/run",
            ) | {"device": arguments.device}
            shared = {"rows": settings["data_path"], "steps": 1}
            variants = {
                name: Variant(name, training.run_vembed, {**shared, "settings": settings | own})
                for name, own in OURS.items()
            }
            shared |= {"settings": settings}
            variants["peer"] = Variant("peer", run_peer, shared)
            variants |= {limit.name: limit for limit in training.limits(shared, bench.rounds)}
            bench.compare(
                f"cached, batch {batch:,}, at most {tokens} tokens",
                [variants[name] for name in chosen],
                units=batch,
                unit="pairs",
                tolerance=training.TOLERANCES[arguments.precision],
                warm_up=not arguments.no_warm_up,
            )


if __name__ == "__main__":
    main()
