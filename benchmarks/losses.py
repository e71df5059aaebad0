"""The losses alone, forward and backward: in tiles as vembed has them, against the whole matrix.

    python benchmarks/losses.py                       # 1k, 4k, 16k
    python benchmarks/losses.py --sizes 65536 --variants tiled --rounds 1

Vectors are random. Both must give the same loss and the same gradient. What is freed goes back to
the system at once, so that peaks are of what is in use, not of how memory was cut up before.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine

KINDS = {
    "infonce": "InfoNCE",
    "both": "InfoNCE in both directions",
    "sigmoid": "pairwise sigmoid",
}
MMAP_THRESHOLD = -3  # of glibc's malloc.h: as many bytes are asked of the system
LARGEST_DENSE = 16384  # a matrix of 65,536 x 65,536 has 16 GiB, and its backward several


def run_loss(meter: Meter, *, kind: str, size: int, dim: int, device: str, dense: bool) -> None:
    import torch

    from vembed.losses import build_criterion

    if sys.platform == "linux" and device == "cpu":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**20)
    generator = torch.Generator().manual_seed(0)
    query_BD, positive_BD = (
        torch.randn(size, dim, generator=generator).to(device).requires_grad_() for _ in range(2)
    )
    settings = {"bidirectional": True} if kind == "both" else {}
    criterion = build_criterion("sigmoid" if kind == "sigmoid" else "infonce", **settings)

    def step(count: int) -> Any:
        query_BD.grad = positive_BD.grad = None
        rows = query_BD[:count], positive_BD[:count]
        loss = dense_loss(kind, *rows) if dense else criterion(*rows)
        loss.backward()
        return loss

    loss = step(min(size, 1024))
    meter.show("gradient", query_BD.grad[:1024].cpu())
    meter.show("loss", [loss.item()])
    query_BD.grad = positive_BD.grad = None
    for _ in meter:
        step(size)


def dense_loss(kind: str, query_BD: Any, positive_BD: Any) -> Any:
    from torch import arange, eye
    from torch.nn import functional

    device = query_BD.device
    similarity = functional.normalize(query_BD) @ functional.normalize(positive_BD).T
    if kind == "sigmoid":
        signs = 2 * eye(len(query_BD), device=device) - 1
        return -functional.logsigmoid(signs * (similarity * 10 - 10)).sum() / len(query_BD)
    logits, own = similarity / 0.05, arange(len(query_BD), device=device)
    if kind == "infonce":
        return functional.cross_entropy(logits, own)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--sizes", type=int, nargs="+", help="queries, and as many documents")
    parser.add_argument("--dim", type=int, default=384, help="size of a vector")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    sizes = arguments.sizes or ([1024] if arguments.quick else [1024, 4096, 16384])
    kinds = arguments.kinds or (["infonce"] if arguments.quick else list(KINDS))
    for kind in kinds:
        for size in sizes:
            shared = {"kind": kind, "size": size, "dim": arguments.dim, "device": arguments.device}
            variants = [Variant("tiled", run_loss, shared | {"dense": False})]
            if size <= LARGEST_DENSE:
                variants.append(Variant("dense", run_loss, shared | {"dense": True}))
            bench.compare(f"{KINDS[kind]}, {size:,} rows", variants, units=size, unit="rows")


if __name__ == "__main__":
    main()
