"""Two processes on two cores: how much of their time is lost to each other, and in what calls.

    python benchmarks/two_processes.py

All train on the same global batches. `one` is one process of one thread, `two threads` one process
of two; `two` are two processes of one thread each, `peer` two of sentence-transformers with
`gather_across_devices`. Their CPU time is the sum of both. The gradients of `one` and `two` must be
the same; `collectives` counts what gloo is asked to do in a step.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import (
    TEMPERATURE,
    batches_of,
    build_vembed,
    gradient_of,
    longest,
    model_folder,
    read_jsonl,
    read_pairs,
    repeat,
    training_settings,
    write_rows,
)

_of_process: dict[str, Any] = {}
"""What a process keeps between calls: its trainer and its batches."""


def run_one(meter: Meter, *, settings: dict[str, Any], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    meter.show("gradient", set_up(settings))
    for _ in meter:
        step()


def run_two(meter: Meter, *, settings: dict[str, Any], peer: bool = False) -> None:
    from vembed.training.verification.processes import LocalProcesses

    shares = {**settings, "batch_size": settings["batch_size"] // 2}
    with LocalProcesses(2) as processes:
        gradients = processes.run(set_up_peer if peer else set_up, shares, what="set-up")
        if not peer:
            meter.show("gradient", gradients[0])
        meter.tell(collectives=processes.run(count_collectives, what="counting")[0])
        for _ in meter:
            meter.add_cpu(sum(processes.run(timed_step, what="a step")))


def set_up(settings: dict[str, Any]) -> Any:
    """Build the trainer; the gradient of the first global batch, without dropout."""
    trainer = build_vembed(settings)
    trainer.model.eval()
    trainer.step(next(iter(trainer.dataloader)))
    trainer.reduce_gradients()
    gradient = gradient_of(trainer.accelerator.unwrap_model(trainer.model))
    trainer.optimizer.zero_grad()
    trainer.model.train()

    def work(batch: Any) -> None:
        from vembed.training.training_loop import optimizer_step

        optimizer_step(trainer, [batch])

    _of_process.update(work=work, batches=endless(trainer.dataloader))
    return gradient


def set_up_peer(settings: dict[str, Any]) -> None:
    """What its trainer does in a step, with the same rows for each process as vembed's."""
    import torch
    import torch.distributed as dist
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.nn.parallel import DistributedDataParallel

    model = SentenceTransformer(settings["model_name"], device="cpu")
    model.max_seq_length = settings["max_seq_length"]
    model.train()
    for name, parameter in model.named_parameters():
        # The pooler of a BERT gets no gradient, which DDP would wait for.
        parameter.requires_grad_("pooler" not in name)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    loss = MultipleNegativesRankingLoss(wrapped, scale=1 / TEMPERATURE, gather_across_devices=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], fused=True)
    size, rank = settings["batch_size"], dist.get_rank()

    def work(rows: Any) -> None:
        own = rows[rank * size : (rank + 1) * size]
        features = [model.preprocess([row[c] for row in own]) for c in ("query", "positive")]
        loss(features, None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    batches = batches_of(read_jsonl(Path(settings["data_path"])), 2 * size)
    _of_process.update(work=work, batches=batches)


def endless(loader: Any) -> Any:
    while True:
        yield from loader


def step() -> None:
    _of_process["work"](next(_of_process["batches"]))


def timed_step() -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    step()
    return time.process_time() - started


def count_collectives() -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    names = (event.name for event in found.events() if event.name.startswith("gloo:"))
    counts = Counter(name.removeprefix("gloo:") for name in names)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--batch", type=int, help="pairs of a global batch (default 64)")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    batch = arguments.batch or (8 if arguments.quick else 64)
    with tempfile.TemporaryDirectory() as folder:
        pairs = [{k: row[k] for k in ("query", "positive")} for row in read_pairs(arguments)]
        settings = training_settings(
            write_rows(Path(folder) / "rows.jsonl", repeat(pairs, max(len(pairs), 2 * batch))),
            model=model_folder(arguments),
            batch=batch,
            tokens=longest(arguments, 128),
            precision="no",
            steps=10**6,
            output=f"{folder}/run",
        ) | {"device": "cpu"}
        shared = {"settings": settings}
        variants = [
            Variant("one", run_one, shared | {"threads": 1}),
            Variant("two", run_two, shared),
            Variant("two threads", run_one, shared | {"threads": 2}),
            Variant("peer", run_two, shared | {"peer": True}),
        ]
        bench.compare(
            f"global batch {batch}",
            variants[:2] if arguments.quick else variants,
            units=batch,
            unit="pairs",
        )


if __name__ == "__main__":
    main()
