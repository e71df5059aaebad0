"""Graded pairs: does the cosine of two texts rise with the score that people gave them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vembed.data.records import Record
from vembed.errors import DataError
from vembed.evaluation.correlation import pearson, spearman
from vembed.evaluation.results import Encode, EvalResult, encode_checked
from vembed.evaluation.search import paired_cosines
from vembed.modes import Item

HEADLINE = ("spearman", "pearson")


class GradedPairsTask:
    """Correlation of cosine and score over pairs.

    The first text of a pair is encoded as a query, the second as a document.
    """

    main_metric = HEADLINE[0]

    def __init__(
        self,
        first: Sequence[Item],
        second: Sequence[Item],
        scores: Sequence[float],
        *,
        name: str = "graded pairs",
    ) -> None:
        """Assign.

        Raises:
            DataError: if lengths differ, or there are fewer than three pairs or only one score.
        """
        if not len(first) == len(second) == len(scores):
            raise DataError(f"{name}: both sides and the scores must be equally many")
        if len(scores) < 3 or len(set(scores)) < 2:
            raise DataError(
                f"{name}: a correlation needs three pairs and two different scores. "
                f"Received: {len(scores)} pairs, {len(set(scores))} different scores"
            )
        self.name = name
        self.first, self.second = list(first), list(second)
        self.scores = np.asarray(scores, dtype=np.float64)

    @classmethod
    def from_records(
        cls, records: Sequence[Record], *, name: str = "graded pairs"
    ) -> GradedPairsTask:
        """One pair per record: its query, its first positive and its score."""
        return cls(
            [record.query for record in records],
            [record.positives[0] for record in records],
            [record.score for record in records if record.score is not None],
            name=name,
        )

    @property
    def sides(self) -> dict[str, Sequence[Item]]:
        """The first and the second of each pair, in the roles of queries and documents."""
        return {"queries": self.first, "documents": self.second}

    @property
    def pairs(self) -> Iterator[tuple[Item, Item]]:
        """The pairs, whatever their score."""
        return zip(self.first, self.second, strict=True)

    def describe(self) -> dict[str, int]:
        """Number of pairs."""
        return {"pairs": len(self.scores)}

    def all_items(self) -> list[Item]:
        """Everything that `evaluate` encodes."""
        return [*self.first, *self.second]

    def evaluate(self, encode: Encode) -> EvalResult:
        """Encode both sides and correlate.

        Raises:
            VembedError: if `encode` does not give one finite row per item.
        """
        cosines = paired_cosines(
            encode_checked(encode, self.first, "query"),
            encode_checked(encode, self.second, "document"),
        )
        columns = np.stack([cosines, self.scores], axis=1)
        metrics = {"spearman": float(spearman(columns)), "pearson": float(pearson(columns))}
        return EvalResult(self.name, "pairs", HEADLINE, metrics, dict.fromkeys(HEADLINE, columns))
