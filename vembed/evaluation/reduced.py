"""What a task says of a model's vectors when they are cut short or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vembed.errors import ConfigError
from vembed.evaluation.results import Encode, EvalResult, EvalTask, Role
from vembed.evaluation.search import SearchVectors
from vembed.modes import Item
from vembed.quantized_vectors import PRECISIONS, BinaryVectors, Floats, Precision, Ranges

_SAMPLE = 10_000
"""Documents that the ranges of int8 come from, at most."""


Kept = dict[tuple[Role, tuple[Item, ...]], SearchVectors]
"""What was encoded, by role and items."""


@dataclass(frozen=True)
class Reduction:
    """Smaller vectors.

    Attributes:
        dim: Numbers kept of each; None for all.
        precision: How documents are kept, and labelled items. Queries of int8 stay as they are;
            with `binary`, they search by signs and put the first by their numbers (see
            `search_scores`).
    """

    dim: int | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: if a value is out of range.
        """
        if self.dim is not None and self.dim < 1:
            raise ConfigError(f"truncate_dim: expected at least 1. Received: {self.dim}")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision: expected one of {', '.join(PRECISIONS)}. Received: {self.precision!r}"
            )

    @property
    def label(self) -> str:
        """As it stands in the name of a metric: `256`, `binary`, `256 int8`."""
        words = [] if self.dim is None else [str(self.dim)]
        return " ".join(words if self.precision == "float32" else [*words, self.precision])


class ReducedTask:
    """A task, and its main metric on smaller vectors as well; everything is encoded once.

    `ndcg@10` is of the vectors as they come, `ndcg@10[256]` of their first 256 numbers.
    """

    def __init__(self, task: EvalTask, reductions: Sequence[Reduction]) -> None:
        """Assign."""
        self.task = task
        self.reductions = list(reductions)
        self.name = task.name
        self.main_metric = task.main_metric

    @property
    def sides(self) -> Mapping[str, Sequence[Item]]:
        """Those of the task."""
        return self.task.sides

    @property
    def pairs(self) -> Iterable[tuple[Item, Item]]:
        """Those of the task."""
        return self.task.pairs

    def describe(self) -> dict[str, Any]:
        """Sizes of the task."""
        return self.task.describe()

    def all_items(self) -> list[Item]:
        """Those of the task: smaller vectors are made of the same items."""
        return self.task.all_items()

    def evaluate(self, encode: Encode) -> EvalResult:
        """Measure with each kind of vectors.

        Raises:
            ConfigError: if vectors are shorter than asked for, or one for each token.
        """
        kept: Kept = {}

        def remember(items: Sequence[Item], role: Role) -> SearchVectors:
            key = (role, tuple(items))
            if key not in kept:
                kept[key] = encode(items, role)
            return kept[key]

        result = self.task.evaluate(remember)
        for reduction in self.reductions:
            smaller = self.task.evaluate(_Reducer(kept, reduction))
            result = _add(result, smaller, f"{self.main_metric}[{reduction.label}]")
        return result


class _Reducer:
    """Gives what is kept, made smaller."""

    def __init__(self, kept: Kept, reduction: Reduction) -> None:
        self._reduction = reduction
        self._kept = {key: _cut(vectors, reduction.dim) for key, vectors in kept.items()}
        self._ranges = None
        if reduction.precision == "int8":
            documents = [rows for (role, _), rows in self._kept.items() if role == "document"]
            step = -(-sum(map(len, documents)) // _SAMPLE) or 1
            self._ranges = Ranges.of(np.concatenate(documents)[::step])

    def __call__(self, items: Sequence[Item], role: Role) -> SearchVectors:
        vectors = self._kept[role, tuple(items)]
        if self._ranges is not None:
            stored = role == "document"
            return self._ranges.decode(self._ranges.encode(vectors)) if stored else vectors
        return vectors if self._reduction.precision == "float32" else BinaryVectors(vectors)


def _cut(vectors: SearchVectors, dim: int | None) -> Floats:
    if not isinstance(vectors, np.ndarray):
        raise ConfigError(
            "truncate_dim and precision are for models with one vector for each item. Received: "
            "one for each token"
        )
    size = vectors.shape[1]
    if dim is not None and dim > size:
        raise ConfigError(f"truncate_dim: vectors have {size} numbers. Received: {dim}")
    return np.asarray(vectors[:, :dim])


def _add(result: EvalResult, smaller: EvalResult, name: str) -> EvalResult:
    main = smaller.main_metric
    return replace(
        result,
        headline=(*result.headline, name),
        metrics={**result.metrics, name: smaller.metrics[main]},
        per_item={**result.per_item, name: smaller.per_item[main]},
    )
