"""Retrieval: rank a corpus for every query and compare with what is known to be relevant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vembed.data import ImageRules
from vembed.data.records import Record
from vembed.errors import DataError
from vembed.evaluation.beir import Qrels, read_beir
from vembed.evaluation.metrics import compute_metrics, parse_metric
from vembed.evaluation.results import Encode, EvalResult, Rankings, encode_checked, mean_result
from vembed.evaluation.search import Judgements, Neighbours, find_neighbours
from vembed.modes import Item, RetrievalMode

HEADLINE = ("ndcg@10", "mrr@10", "recall@1", "recall@10")
RETRIEVAL_METRICS = (
    *HEADLINE,
    "recall@100",
    "hit_rate@1",
    "hit_rate@10",
    "map@100",
    "precision@10",
    "capped_recall@10",
)


class RetrievalTask:
    """Rank all documents for each query, by cosine or, of token vectors, MaxSim.

    A document whose id is the query's own id is no candidate for that query (the rule of BEIR's
    evaluation), unless it is judged relevant to it: then the ids are two separate numberings.
    """

    main_metric = HEADLINE[0]

    def __init__(
        self,
        queries: Mapping[str, Item],
        corpus: Mapping[str, Item],
        qrels: Mapping[str, Mapping[str, float]],
        *,
        name: str = "retrieval",
    ) -> None:
        """Index the ids.

        Args:
            queries: Id to query. One with no relevant document is left out: its recall is
                undefined.
            corpus: Id to document.
            qrels: Query id to document id to relevance grade, 0 or less for not relevant. Ids must
                be known.
            name: Name for logs and reports.

        Raises:
            DataError: if no query has a relevant document.
        """
        self.name = name
        column = {document_id: number for number, document_id in enumerate(corpus)}
        self.documents = list(corpus.values())
        self.queries: list[Item] = []
        self._relevant: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._own_document: list[int] = []
        for query_id, query in queries.items():
            grades = {column[key]: float(g) for key, g in qrels.get(query_id, {}).items() if g > 0}
            if not grades:
                continue
            own = column.get(query_id, -1)
            self.queries.append(query)
            self._own_document.append(-1 if own in grades else own)
            self._relevant.append(
                (
                    np.fromiter(grades, dtype=np.int64),
                    np.fromiter(grades.values(), dtype=np.float64),
                )
            )
        if not self.queries:
            raise DataError(
                f"{name}: expected at least one query with a relevant document. Received: none"
            )

    @classmethod
    def from_beir(
        cls,
        folder: str | Path,
        *,
        split: str = "test",
        name: str | None = None,
        retrieval_mode: str | RetrievalMode = "t2t",
        images: ImageRules = ImageRules(),  # noqa: B008 - frozen
    ) -> RetrievalTask:
        """A task from a BEIR folder; see `read_beir` for the layout and its errors."""
        data = read_beir(folder, split=split, retrieval_mode=retrieval_mode, images=images)
        return cls(data.queries, data.corpus, data.qrels, name=name or Path(folder).name)

    @classmethod
    def from_records(cls, records: Sequence[Record], *, name: str = "retrieval") -> RetrievalTask:
        """A task whose corpus is every positive and negative of `records`, each content once.

        Rows with the same query are one query with all their positives. Ids are made of the
        content, so a query that is also some row's document does not find itself.
        """
        queries: dict[str, Item] = {}
        corpus: dict[str, Item] = {}
        qrels: Qrels = {}
        for record in records:
            query_id = _content_key(record.query)
            queries.setdefault(query_id, record.query)
            for item in (*record.positives, *record.negatives):
                corpus.setdefault(_content_key(item), item)
            grades = qrels.setdefault(query_id, {})
            grades.update((_content_key(item), 1.0) for item in record.positives)
        return cls(queries, corpus, qrels, name=name)

    @property
    def sides(self) -> dict[str, Sequence[Item]]:
        """Queries and documents."""
        return {"queries": self.queries, "documents": self.documents}

    @property
    def pairs(self) -> Iterator[tuple[Item, Item]]:
        """Each query with each of its relevant documents."""
        for query, (documents, _) in zip(self.queries, self._relevant, strict=True):
            yield from ((query, self.documents[number]) for number in documents.tolist())

    def describe(self) -> dict[str, int]:
        """Number of queries, documents and relevant pairs."""
        pairs = sum(len(documents) for documents, _ in self._relevant)
        return {
            "queries": len(self.queries),
            "documents": len(self.documents),
            "relevant pairs": pairs,
        }

    def all_items(self) -> list[Item]:
        """Everything that `evaluate` encodes."""
        return [*self.queries, *self.documents]

    def evaluate(self, encode: Encode) -> EvalResult:
        """Encode both sides, rank, and measure.

        Raises:
            VembedError: if `encode` does not give one finite row per item.
        """
        queries = encode_checked(encode, self.queries, "query")
        documents = encode_checked(encode, self.documents, "document")
        depth = max(parse_metric(metric)[1] for metric in RETRIEVAL_METRICS)
        neighbours = find_neighbours(queries, documents, self._judge, depth=depth)
        per_item = compute_metrics(self._gains(neighbours), self._ideal(), RETRIEVAL_METRICS)
        return mean_result(
            self.name,
            items="queries",
            headline=HEADLINE,
            per_item=per_item,
            rankings=Rankings(
                self.queries,
                self.documents,
                neighbours,
                relevant=[documents for documents, _ in self._relevant],
            ),
        )

    def _judge(self, block: range) -> Judgements:
        relevant = [self._relevant[query] for query in block]
        own = np.asarray(self._own_document[block.start : block.stop])
        excluded = np.flatnonzero(own >= 0)
        rows = np.repeat(np.arange(len(block)), [len(documents) for documents, _ in relevant])
        return Judgements(
            rows=np.concatenate([rows, excluded]),
            documents=np.concatenate([*(documents for documents, _ in relevant), own[excluded]]),
            gains=np.concatenate([*(gains for _, gains in relevant), np.full(len(excluded), -1.0)]),
        )

    def _gains(self, neighbours: Neighbours) -> NDArray[np.float64]:
        ranked_QK = np.zeros(neighbours.documents_QK.shape)
        for row, (documents, gains) in enumerate(self._relevant):
            hit_RK = neighbours.documents_QK[row] == documents[:, None]
            ranked_QK[row] = gains @ hit_RK
        return ranked_QK

    def _ideal(self) -> NDArray[np.float64]:
        ideal_QR = np.zeros((len(self._relevant), max(len(gains) for _, gains in self._relevant)))
        for row, (_, gains) in enumerate(self._relevant):
            ideal_QR[row, : len(gains)] = gains
        return ideal_QR


def _content_key(item: Item) -> str:
    return f"{item.content_id:016x}"
