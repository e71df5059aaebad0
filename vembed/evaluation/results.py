"""What an evaluation task is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vembed.errors import VembedError
from vembed.evaluation.search import Neighbours, SearchVectors
from vembed.modes import Item
from vembed.quantized_vectors import BinaryVectors
from vembed.token_vectors import TokenVectors

Role = Literal["query", "document"]
Encode = Callable[[Sequence[Item], Role], SearchVectors]
"""Items and their role to vectors `[n, D]`, token vectors or binary ones, in the items' order."""


@dataclass(frozen=True)
class Rankings:
    """Which documents each query found: to show, and to follow a query from model to model.

    Attributes:
        queries: What was asked.
        documents: What could be found.
        neighbours: What was found, by document number.
        relevant: For each query, the numbers of the documents that are relevant.
    """

    queries: Sequence[Item]
    documents: Sequence[Item]
    neighbours: Neighbours
    relevant: Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one model on one task, with what is needed to say how sure they are.

    Attributes:
        task: Name of the task.
        items: What is counted, in the plural: `"queries"`, `"pairs"`, `"texts"`.
        headline: Names of the metrics to show, the main one first.
        metrics: Every metric by name.
        per_item: By metric, one row per item. The metric is the mean of the column; for `spearman`
            and `pearson` it is the correlation of the two columns, cosine and score.
        rankings: What was found, for retrieval; otherwise None.
    """

    task: str
    items: str
    headline: tuple[str, ...]
    metrics: dict[str, float]
    per_item: dict[str, NDArray[np.float64]]
    rankings: Rankings | None = None

    @property
    def main_metric(self) -> str:
        """The metric that stands for the task."""
        return self.headline[0]

    def __len__(self) -> int:
        """Number of items that were counted."""
        return len(self.per_item[self.main_metric])


def count_items(count: int, items: str) -> str:
    """`1 query`, `1,203 queries`: a number with what is counted, given in the plural."""
    if count == 1:
        items = f"{items[:-3]}y" if items.endswith("ies") else items.removesuffix("s")
    return f"{count:,} {items}"


@runtime_checkable
class EvalTask(Protocol):
    """Something that a model can be measured on."""

    name: str
    main_metric: str

    @property
    def sides(self) -> Mapping[str, Sequence[Item]]:
        """What is encoded, by its name in the plural: those in the role of queries first."""
        ...

    @property
    def pairs(self) -> Iterable[tuple[Item, Item]]:
        """Each query with a document that belongs to it; none where there are no such pairs."""
        ...

    def evaluate(self, encode: Encode) -> EvalResult:
        """Measure the model behind `encode`. Every item counts once."""
        ...

    def describe(self) -> dict[str, Any]:
        """Sizes of the task, by what they count; for reports and logs."""
        ...

    def all_items(self) -> list[Item]:
        """Everything that `evaluate` encodes."""
        ...


def mean_result(
    task: str,
    *,
    items: str,
    headline: tuple[str, ...],
    per_item: Mapping[str, NDArray[np.float64]],
    rankings: Rankings | None = None,
) -> EvalResult:
    """An EvalResult whose metrics are the means of their per-item values."""
    metrics = {name: float(values.mean()) for name, values in per_item.items()}
    return EvalResult(task, items, headline, metrics, dict(per_item), rankings)


def encode_checked(encode: Encode, items: Sequence[Item], role: Role) -> SearchVectors:
    """Encode, and refuse what cannot be ranked.

    Raises:
        VembedError: if there is not one row per item, or a vector holds NaN or infinity.
    """
    vectors = encode(items, role)
    if isinstance(vectors, BinaryVectors):
        return vectors  # made of vectors that were looked at
    if isinstance(vectors, TokenVectors):
        shape, finite_S = [len(vectors)], np.isfinite(vectors.flat_SD).all(axis=1)
        broken = np.searchsorted(vectors.offsets, np.flatnonzero(~finite_S), side="right") - 1
        broken = np.unique(broken)
    else:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        shape, broken = list(vectors.shape), np.flatnonzero(~np.isfinite(vectors).all(axis=-1))
    if shape[:1] != [len(items)] or (len(shape) != 2 and not isinstance(vectors, TokenVectors)):
        raise VembedError(
            f"evaluation: encode must give one row per item, [{len(items)}, D]. "
            f"Received: shape {shape}"
        )
    if len(broken):
        shown = repr(str(items[broken[0]])[:80])
        raise VembedError(
            f"evaluation: the model gave NaN or infinity for {len(broken)} of {len(items)} items, "
            f"the first is {shown}; the weights have diverged, or the precision is too low"
        )
    return vectors
