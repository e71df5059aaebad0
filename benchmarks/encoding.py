"""Encoding throughput: `Predictor.encode`, `SentenceTransformer.encode` and the limit.

    python benchmarks/encoding.py
    python benchmarks/encoding.py documents --texts 4000

Both encoders take texts, so tokenising counts; `packed` and `sorted` are `bare.py` on tokens that
are ready. The embeddings must be the same.
"""

from __future__ import annotations

from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import longest, model_folder, read_pairs, repeat

CASES = {
    "documents": ("mixed lengths", "positive", "no"),
    "queries": ("short texts", "query", "no"),
    "bf16": ("mixed lengths, bf16 weights", "positive", "bf16"),
}


def run_vembed(
    meter: Meter, *, model: str, texts: list[str], tokens: int, device: str, precision: str
) -> None:
    from vembed import Predictor

    dtype = {"torch_dtype": "bfloat16"} if precision == "bf16" else {}
    predictor = Predictor(model, device=device, max_seq_length=tokens, **dtype)
    meter.show("embeddings", predictor.encode(texts[:32]))
    meter.count_tokens(predictor.encoder.backbone)
    for _ in meter:
        predictor.encode(texts)


def run_peer(
    meter: Meter, *, model: str, texts: list[str], tokens: int, device: str, precision: str
) -> None:
    from sentence_transformers import SentenceTransformer

    dtype = {"model_kwargs": {"dtype": "bfloat16"}} if precision == "bf16" else {}
    peer = SentenceTransformer(model, device=device, **dtype)
    peer.max_seq_length = tokens
    meter.show("embeddings", peer.encode(texts[:32], show_progress_bar=False))
    meter.count_tokens(peer[0].model)
    for _ in meter:
        peer.encode(texts, show_progress_bar=False)


def run_limit(
    meter: Meter,
    *,
    model: str,
    texts: list[str],
    tokens: int,
    device: str,
    precision: str,
    arrangement: str,
) -> None:
    import bare
    import torch

    arrange = bare.ARRANGEMENTS[arrangement]
    encoder, tokenizer = bare.load_bare(model, device)
    encoder.eval()
    if precision == "bf16":
        encoder.to(torch.bfloat16)
    ids = bare.tokenize(tokenizer, texts, tokens)
    meter.tell(real_tokens=sum(map(len, ids)))

    def encode(passes: Any) -> Any:
        with torch.no_grad():
            vectors = torch.cat([bare.embed(encoder, packed) for packed in passes])
        return vectors[torch.cat([packed.texts for packed in passes]).argsort()].cpu()

    meter.show("embeddings", encode(arrange(ids[:32], device)))
    passes = arrange(ids, device)
    meter.count_tokens(encoder)
    for _ in meter:
        encode(passes)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--texts", type=int, help="how many (default 512)")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    model = model_folder(arguments)
    count = arguments.texts or (32 if arguments.quick else 512)
    for name in arguments.cases or (["documents"] if arguments.quick else CASES):
        title, column, precision = CASES[name]
        settings = {
            "model": model,
            "texts": [row[column] for row in repeat(read_pairs(arguments), count)],
            "tokens": longest(arguments, 256),
            "device": arguments.device,
            "precision": precision,
        }
        bench.compare(
            f"{title}, {count:,} texts",
            [
                Variant("vembed", run_vembed, settings),
                Variant("peer", run_peer, settings),
                *(
                    Variant(name, run_limit, settings | {"arrangement": name})
                    for name in ("packed", "sorted")
                ),
            ],
            units=count,
            unit="texts",
            tolerance=0.05 if precision == "bf16" else 1e-4,
        )


if __name__ == "__main__":
    main()
