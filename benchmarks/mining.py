"""Mining of hard negatives: `mine_hard_negatives` here and in sentence-transformers.

    python benchmarks/mining.py
    python benchmarks/mining.py --texts 2000 --vectors 20000

Rows, model, range and margin are the same; from the folder of the model to the rows with their
negatives. `given vectors` is what comes after encoding, on random vectors. Both must choose the
same negatives: what is compared is the numbers of the documents of each query, of which one in
thousands may differ where similarities are equal to rounding.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import Rows, longest, model_folder, read_jsonl, read_pairs, write_rows

NEGATIVES = 3
RANKS = 50
MARGIN = 0.05
TOLERANCE = 0.02


def run_vembed(meter: Meter, *, rows: str, model: str, tokens: int, device: str) -> None:
    from vembed.mining.vectors import ModelChoice

    choice = ModelChoice(model, max_seq_length=tokens, device=device)
    run(meter, lambda: mine(rows, model=choice), rows)


def run_peer(meter: Meter, *, rows: str, model: str, tokens: int, device: str) -> None:
    from sentence_transformers import SentenceTransformer

    def work() -> list[dict[str, Any]]:
        peer = SentenceTransformer(model, device=device)
        peer.max_seq_length = tokens
        return mine_with_peer(rows, peer)

    run(meter, work, rows)


def run_vembed_search(meter: Meter, *, rows: str) -> None:
    import numpy as np

    queries, documents = random_vectors(rows)
    folder = Path(rows).parent
    np.save(folder / "queries.npy", queries)
    np.save(folder / "documents.npy", documents)
    files = {f"{side}_vectors": folder / f"{name}.npy" for side, name in SIDES}
    run(meter, lambda: mine(rows, **files), rows)


SIDES = (("query", "queries"), ("corpus", "documents"))


def run_peer_search(meter: Meter, *, rows: str) -> None:
    import torch
    from sentence_transformers.util import cos_sim, pairwise_cos_sim

    queries, documents = random_vectors(rows)

    class Model:
        """As much of a model as mining asks for."""

        device = torch.device("cpu")
        similarity = staticmethod(cos_sim)
        similarity_pairwise = staticmethod(pairwise_cos_sim)
        encode_query = staticmethod(lambda *_, **__: queries)
        encode_document = staticmethod(lambda *_, **__: documents)

    run(meter, lambda: mine_with_peer(rows, Model()), rows)


def run(meter: Meter, work: Callable[[], list[dict[str, Any]]], rows: str) -> None:
    """Show what is chosen, then work once for each round."""
    import numpy as np

    listed = read_jsonl(Path(rows))
    queries = {row["query"]: n for n, row in enumerate(listed)}
    documents = {row["positive"]: n for n, row in enumerate(listed, 1)}
    chosen: list[list[int]] = [[] for _ in listed]
    for row in work():
        chosen[queries[row["query"]]] += [documents[text] for text in row["negatives"]]
    padded = [sorted([*numbers, 0, 0, 0][:NEGATIVES]) for numbers in chosen]
    meter.show("negatives", np.asarray(padded))
    meter.tell(negatives=sum(map(len, chosen)))
    for _ in meter:
        work()


def mine(rows: str, **options: Any) -> list[dict[str, Any]]:
    from vembed.mining import MiningRules, mine_hard_negatives

    rules = MiningRules(num_negatives=NEGATIVES, range_max=RANKS, relative_margin=MARGIN)
    output = Path(rows).with_name("mined.jsonl")
    mine_hard_negatives(rows, output=output, rules=rules, overwrite=True, **options)
    lines = output.read_text(encoding="utf-8").splitlines()
    return [{"negatives": [], **json.loads(line)} for line in lines]


def mine_with_peer(rows: str, model: Any) -> list[dict[str, Any]]:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    triplets = mine_hard_negatives(
        Dataset.from_list(read_jsonl(Path(rows))),
        model,
        range_max=RANKS,
        relative_margin=MARGIN,
        num_negatives=NEGATIVES,
        verbose=False,
    )
    return [{"query": row["query"], "negatives": [row["negative"]]} for row in triplets]


def random_vectors(rows: str) -> list[Any]:
    """Of queries and documents, of which those of a row are similar."""
    import numpy as np

    generator = np.random.default_rng(0)
    shape = (len(read_jsonl(Path(rows))), 384)
    documents = generator.standard_normal(shape, dtype=np.float32)
    queries = documents + generator.standard_normal(shape, dtype=np.float32)
    return [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, documents)]


def distinct(rows: Rows, count: int) -> Rows:
    """So many rows, no text twice: names go before those that come again."""
    seen: set[str] = set()
    found = []
    for number in range(count):
        row = {k: rows[number % len(rows)][k] for k in ("query", "positive")}
        if seen & {*row.values()}:
            row = {k: f"{number} {text}" for k, text in row.items()}
        seen |= {*row.values()}
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--texts", type=int, help="queries, and as many documents (default 400)")
    parser.add_argument("--vectors", type=int, help="for given vectors (default 10,000)")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    count = arguments.texts or (64 if arguments.quick else 400)
    rows = read_pairs(arguments)
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "rows": str(write_rows(Path(folder) / "rows.jsonl", distinct(rows, count))),
            "model": model_folder(arguments),
            "tokens": longest(arguments, 256),
            "device": arguments.device,
        }
        bench.compare(
            f"mining, {count:,} queries and documents",
            [Variant("vembed", run_vembed, shared), Variant("peer", run_peer, shared)],
            units=count,
            unit="rows",
            tolerance=TOLERANCE,
        )
        count = arguments.vectors or (100 if arguments.quick else 10_000)
        file = write_rows(Path(folder) / "given" / "rows.jsonl", distinct(rows, count))
        shared = {"rows": str(file)}
        bench.compare(
            f"given vectors, {count:,} queries and documents",
            [
                Variant("vembed", run_vembed_search, shared),
                Variant("peer", run_peer_search, shared),
            ],
            units=count,
            unit="rows",
            tolerance=TOLERANCE,
        )


if __name__ == "__main__":
    main()
