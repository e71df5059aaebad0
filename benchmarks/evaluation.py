"""Evaluation of a retrieval set: encode queries and corpus, search, compute the metrics.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --texts 2000

`search` is what comes after encoding, on random vectors. Both must find the same nDCG@10.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness import Bench, Meter, Variant, build_parser, show_machine
from workloads import Rows, longest, model_folder, read_pairs, repeat, write_rows

METRIC = "ndcg@10"


def write_beir(folder: Path, rows: Rows) -> Path:
    """Each positive is a document that its query alone asks for."""
    ids = range(len(rows))
    texts = [row["positive"] for row in rows]
    corpus = [{"_id": f"d{i}", "title": "", "text": texts[i]} for i in ids]
    write_rows(folder / "corpus.jsonl", corpus)
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": rows[i]["query"]} for i in ids])
    judgements = "".join(f"q{i}\td{i}\t1\n" for i in ids)
    qrels = folder / "qrels" / "test.tsv"
    qrels.parent.mkdir()
    qrels.write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")
    return folder


def run_vembed(meter: Meter, *, folder: str, model: str, tokens: int, device: str) -> None:
    from vembed import Predictor
    from vembed.evaluation import load_eval_task

    predictor = Predictor(model, device=device, max_seq_length=tokens)
    task = load_eval_task(folder)
    meter.count_tokens(predictor.encoder.backbone)
    for _ in meter:
        result = task.evaluate(predictor.encode_items)
        meter.tell(**{METRIC: result.metrics[METRIC]})


def run_peer(meter: Meter, *, folder: str, model: str, tokens: int, device: str) -> None:
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(model, device=device)
    peer.max_seq_length = tokens
    evaluate = build_peer_evaluator(folder)
    meter.count_tokens(peer[0].model)
    for _ in meter:
        meter.tell(**{METRIC: evaluate(peer)["cosine_ndcg@10"]})


def build_peer_evaluator(folder: str, **settings: Any) -> Any:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from vembed.evaluation.beir import read_beir

    data = read_beir(folder)
    return InformationRetrievalEvaluator(
        queries={key: item.text for key, item in data.queries.items()},
        corpus={key: item.text for key, item in data.corpus.items()},
        relevant_docs={key: set(judged) for key, judged in data.qrels.items()},
        write_csv=False,
        **settings,
    )


def run_vembed_search(meter: Meter, *, folder: str) -> None:
    from vembed.evaluation import load_eval_task

    task = load_eval_task(folder)
    for _ in meter:
        task.evaluate(lambda items, _role: random_vectors(len(items)))


def run_peer_search(meter: Meter, *, folder: str) -> None:
    import torch
    from sentence_transformers.util import cos_sim

    class Model:
        """As much of a model as the evaluator asks for."""

        def encode_query(self, sentences: list[str], **_: Any) -> Any:
            return torch.from_numpy(random_vectors(len(sentences)))

        encode_document = encode_query

    evaluator = build_peer_evaluator(folder, score_functions={"cosine": cos_sim})
    model: Any = Model()
    for _ in meter:
        evaluator.compute_all_metrics(model)


def random_vectors(count: int) -> Any:
    import numpy as np

    vectors = np.random.default_rng(count).standard_normal((count, 384), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--texts", type=int, help="queries, and as many documents (default 400)")
    parser.add_argument("--vectors", type=int, help="for the search alone (default 10,000)")
    arguments = parser.parse_args(argv)
    bench = Bench.of(arguments)
    show_machine(bench)
    count = arguments.texts or (24 if arguments.quick else 400)
    rows = read_pairs(arguments)
    with tempfile.TemporaryDirectory() as folder:
        task = write_beir(Path(folder) / "task", repeat(rows, count))
        shared = {
            "folder": str(task),
            "model": model_folder(arguments),
            "tokens": longest(arguments, 256),
            "device": arguments.device,
        }
        found = bench.compare(
            f"evaluation, {count:,} queries and documents",
            [Variant("vembed", run_vembed, shared), Variant("peer", run_peer, shared)],
            units=2 * count,
            unit="texts",
        )
        values = [facts[METRIC] for facts in found.facts.values()]
        if max(values) - min(values) > 1e-3:
            raise SystemExit(f"evaluation: the metrics differ: {values}")
        count = arguments.vectors or (100 if arguments.quick else 10_000)
        task = write_beir(Path(folder) / "search", repeat(rows, count))
        shared = {"folder": str(task)}
        bench.compare(
            f"search and metrics alone, {count:,} queries and documents",
            [
                Variant("vembed", run_vembed_search, shared),
                Variant("peer", run_peer_search, shared),
            ],
            units=count,
            unit="queries",
        )


if __name__ == "__main__":
    main()
