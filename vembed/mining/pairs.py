"""Pairs of queries and documents, by their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a document number, sorted by query."""

    queries: Ints
    documents: Ints

    @classmethod
    def of(cls, queries: Ints, documents: Ints) -> Pairs:
        """Each pair once."""
        both = np.unique(np.stack([queries, documents], axis=1), axis=0)
        return cls(both[:, 0], both[:, 1])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.queries)

    def below(self, count: int) -> Pairs:
        """Those with one of the first documents."""
        is_below = self.documents < count
        return Pairs(self.queries[is_below], self.documents[is_below])

    def of_block(self, block: range) -> Pairs:
        """Those of some queries, which are then counted from 0."""
        low, high = np.searchsorted(self.queries, [block.start, block.stop])
        return Pairs(self.queries[low:high] - block.start, self.documents[low:high])
