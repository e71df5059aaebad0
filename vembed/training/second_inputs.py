"""The inputs of a second model, a teacher or a guide, beside those of the one that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vembed.data import Collator, Record
from vembed.training.data_utils import ROLES

_KEPT = (*(f"{role}_" for role in ROLES), "lengths_")


class SecondInputsCollator:
    """Adds a second model's own inputs and lengths to a batch: it may have another tokenizer."""

    def __init__(
        self, collate: Callable[[list[Record]], Any], second: Collator, *, prefix: str
    ) -> None:
        """Assign.

        Args:
            collate: Makes the batch of the model that trains.
            second: Makes that of the other.
            prefix: What the keys of the other's inputs begin with.
        """
        self._collate = collate
        self._second = second
        self._prefix = prefix

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """The batch, with both models' inputs."""
        records = list(records)
        added = {k: v for k, v in self._second(records).items() if k.startswith(_KEPT)}
        return {
            **self._collate(records),
            **{f"{self._prefix}{key}": value for key, value in added.items()},
        }
