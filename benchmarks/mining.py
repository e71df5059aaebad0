"""Mining of hard negatives: `mine_hard_negatives` here and in sentence-transformers.

    python benchmarks/mining.py
    python benchmarks/mining.py --texts 2000 --vectors 20000

Rows, model, range and margin are the same; from the folder of the model to the rows with their
negatives. `given vectors` is what comes after encoding, on random vectors. Before timing, both must
choose the same negatives, but for a few whose similarities are equal to rounding.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, call_apart, show_machine
from workloads import Rows, longest, model_folder, read_jsonl, read_pairs, write_rows

NEGATIVES = 3
RANKS = 50
MARGIN = 0.05

SAME = 0.95
"""Share of the negatives that both must choose."""

Pairs = set[tuple[str, str]]
"""Queries with their negatives."""


def run_vembed(meter: Meter, **settings: Any) -> None:
    for _ in meter:
        mine(**settings)


def run_peer(meter: Meter, **settings: Any) -> None:
    for _ in meter:
        mine_with_peer(**settings)


def mine(*, rows: str, model: str | None, tokens: int, device: str) -> Pairs:
    from vembed.mining import MiningRules, mine_hard_negatives
    from vembed.mining.vectors import ModelChoice

    rules = MiningRules(num_negatives=NEGATIVES, range_max=RANKS, relative_margin=MARGIN)
    folder = Path(rows).parent
    given = {f"{side}_vectors": folder / f"{side}.npy" for side in ("query", "corpus")}
    choice = {"model": model and ModelChoice(model, max_seq_length=tokens, device=device)}
    output = folder / "mined.jsonl"
    mine_hard_negatives(
        rows, output=output, rules=rules, overwrite=True, **(choice if model else given)
    )
    mined = read_jsonl(output)
    return {(row["query"], text) for row in mined for text in row.get("negatives", [])}


def mine_with_peer(*, rows: str, model: str | None, tokens: int, device: str) -> Pairs:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    peer: Any = Given(Path(rows).parent)
    if model is not None:
        peer = SentenceTransformer(model, device=device)
        peer.max_seq_length = tokens
    triplets = mine_hard_negatives(
        Dataset.from_list(read_jsonl(Path(rows))),
        peer,
        range_max=RANKS,
        relative_margin=MARGIN,
        num_negatives=NEGATIVES,
        verbose=False,
    )
    return set(zip(triplets["query"], triplets["negative"], strict=True))


class Given:
    """Vectors in a folder: as much of a model as the peer asks for."""

    def __init__(self, folder: Path) -> None:
        import torch
        from sentence_transformers.util import cos_sim, pairwise_cos_sim

        self.device = torch.device("cpu")
        self.similarity = cos_sim
        self.similarity_pairwise = pairwise_cos_sim
        self._folder = folder

    def encode_query(self, *_: Any, **__: Any) -> Any:
        import numpy as np

        return np.load(self._folder / "query.npy")

    def encode_document(self, *_: Any, **__: Any) -> Any:
        import numpy as np

        return np.load(self._folder / "corpus.npy")


def check_choice(settings: dict[str, Any]) -> None:
    """Say how many negatives are those of the peer; most must be.

    vembed leaves out what is within rounding of the margin, too.
    """
    try:
        theirs = mine_with_peer(**settings)
    except ImportError:
        return
    ours = mine(**settings)
    same = len(ours & theirs)
    print(f"\nnegatives: vembed {len(ours):,}, peer {len(theirs):,}, the same {same:,}", flush=True)
    if same < SAME * max(len(ours), len(theirs)):
        raise SystemExit("mining: these do not do the same work")


def write_vectors(folder: Path, count: int) -> None:
    """Of queries and documents, of which those of a row are similar."""
    import numpy as np

    generator = np.random.default_rng(0)
    documents = generator.standard_normal((count, 384), dtype=np.float32)
    queries = documents + generator.standard_normal((count, 384), dtype=np.float32)
    for name, vectors in (("query", queries), ("corpus", documents)):
        np.save(folder / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


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
    options = {"tokens": longest(arguments, 256), "device": arguments.device}
    with tempfile.TemporaryDirectory() as name:
        file = write_rows(Path(name) / "texts" / "rows.jsonl", distinct(rows, count))
        compare(bench, "mining", file, count, {"model": model_folder(arguments), **options})
        count = arguments.vectors or (100 if arguments.quick else 10_000)
        file = write_rows(Path(name) / "vectors" / "rows.jsonl", distinct(rows, count))
        write_vectors(file.parent, count)
        compare(bench, "given vectors", file, count, {"model": None, **options})


def compare(bench: Bench, title: str, file: Path, count: int, settings: dict[str, Any]) -> None:
    settings = {"rows": str(file), **settings}
    call_apart(check_choice, settings)
    bench.compare(
        f"{title}, {count:,} queries and documents",
        [Variant("vembed", run_vembed, settings), Variant("peer", run_peer, settings)],
        units=count,
        unit="rows",
    )


if __name__ == "__main__":
    main()
