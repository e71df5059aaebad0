"""Labelled items: are the nearest neighbours of an item of its own class?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from vembed.data.records import Record
from vembed.errors import DataError
from vembed.evaluation.results import Encode, EvalResult, encode_checked, mean_result
from vembed.evaluation.search import Judgements, find_neighbours
from vembed.modes import Item

HEADLINE = ("knn@1", "p@10")
MAX_ITEMS = 20_000
"""Comparisons grow with the square: larger sets are sampled down to this."""


class LabelledTask:
    """Leave-one-out: each item looks for its own label among all others.

    `knn@1` is the accuracy of the nearest neighbour's label, `p@10` the share of the ten nearest
    with the right label. An item whose label nobody shares stays among the others but is not
    counted: it cannot be right.
    """

    main_metric = HEADLINE[0]

    def __init__(
        self,
        items: Sequence[Item],
        labels: Sequence[Hashable],
        *,
        name: str = "labelled",
        max_items: int = MAX_ITEMS,
        seed: int = 0,
    ) -> None:
        """Number the labels, and sample down to `max_items` without replacement.

        Raises:
            DataError: if lengths differ, or no label is shared by two of the items.
        """
        if len(items) != len(labels):
            raise DataError(f"{name}: {len(items)} items but {len(labels)} labels")
        chosen = list(range(len(items)))
        if len(items) > max_items:
            rng = np.random.default_rng(seed)
            chosen = sorted(rng.choice(len(items), size=max_items, replace=False).tolist())
        self.name = name
        self.items = [items[row] for row in chosen]
        numbers: dict[Hashable, int] = {}
        self._labels = np.asarray(
            [numbers.setdefault(labels[row], len(numbers)) for row in chosen], dtype=np.int64
        )
        self._shared = np.bincount(self._labels, minlength=1)[self._labels] > 1
        if not self._shared.any():
            raise DataError(
                f"{name}: expected a label that two items share. "
                f"Received: {len(numbers)} labels, each on one item"
            )

    @classmethod
    def from_records(cls, records: Sequence[Record], *, name: str = "labelled") -> LabelledTask:
        """One item per record: its query, with its label."""
        return cls(
            [record.query for record in records], [record.label for record in records], name=name
        )

    @property
    def sides(self) -> dict[str, Sequence[Item]]:
        """The items, under one name."""
        return {"items": self.items}

    @property
    def pairs(self) -> tuple[tuple[Item, Item], ...]:
        """None: a label is not a document."""
        return ()

    def describe(self) -> dict[str, int]:
        """Number of items and labels."""
        return {self._noun: len(self.items), "labels": len(np.unique(self._labels))}

    def all_items(self) -> list[Item]:
        """Everything that `evaluate` encodes."""
        return list(self.items)

    def evaluate(self, encode: Encode) -> EvalResult:
        """Encode all items as documents and look at their neighbours.

        Raises:
            VembedError: if `encode` does not give one finite row per item.
        """
        vectors = encode_checked(encode, self.items, "document")
        found = find_neighbours(vectors, vectors, self._judge, depth=10).documents_QK[self._shared]
        right = (self._labels[found] == self._labels[self._shared, None]) & (found >= 0)
        candidates = min(10, len(self.items) - 1)
        per_item = {
            "knn@1": right[:, 0].astype(np.float64),
            "p@10": right[:, :candidates].mean(axis=1),
        }
        return mean_result(self.name, items=self._noun, headline=HEADLINE, per_item=per_item)

    @property
    def _noun(self) -> str:
        if all(item.image is None for item in self.items):
            return "texts"
        return "images" if all(item.text is None for item in self.items) else "items"

    def _judge(self, block: range) -> Judgements:
        own = np.arange(block.start, block.stop)
        rows, documents = np.nonzero(self._labels[own, None] == self._labels[None, :])
        gains = np.where(documents == own[rows], -1.0, 1.0)
        return Judgements(rows.astype(np.int64), documents.astype(np.int64), gains)
