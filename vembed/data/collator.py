"""From records to the model inputs of a batch.

# Shapes: B queries, M positives and K negatives of the batch, T tokens of the longest in a role
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vembed.chunking import count_tokens
from vembed.data.records import Record
from vembed.modes import Item

Batch = dict[str, Any]


class Processor(Protocol):
    """Turns items into padded model inputs; every encoder brings its own."""

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Literal["query", "document"],
        prompts: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """Model inputs, one row for each item; a prompt of None stands for the role's own."""
        ...


class Collator:
    """Makes batches: all queries, all positives, all negatives, and what is known about them.

    The batch is one flat dict; roles that no row has are absent, and so is anything that only some
    of the rows have:

    - `query_*` `[B, ...]`, `positive_*` `[M, ...]`, `negative_*` `[K, ...]`: model inputs.
      Positives and negatives are in the order of their queries.
    - `lengths_query`, `lengths_positive`, `lengths_negative`: what each item costs to encode, as
      `count_tokens` says it: its tokens, those of its image included. Lists, counted here and not
      on the device.
    - `counts_positive`, `counts_negative` `[B]` int64: how many of them each query has.
    - `ids_query`, `ids_positive`, `ids_negative` int64: equal where the content is equal.
    - `labels` `[B]` int64; `scores` `[B]` float32.
    - `teacher_scores` `[B, C]` float32, C = most candidates of a row; a row's positives, then its
      negatives, then `-inf`, which a softmax over candidates gives no weight.
    - `row_index`: position of each row in its data set, as a list.
    """

    def __init__(
        self, processor: Processor, roles: Collection[str] = ("query", "positive", "negative")
    ) -> None:
        """Assign.

        Args:
            processor: Makes model inputs.
            roles: Those that the batch shall have; others are left out with all about them.
        """
        self.processor = processor
        self.roles = frozenset(roles)

    def __call__(self, records: Sequence[Record]) -> Batch:
        """The batch of these records."""
        batch: Batch = {"row_index": [record.row_index for record in records]}
        batch |= self._role("query", records, lambda r: (r.query,), lambda r: r.query_prompt)
        batch |= self._role("positive", records, lambda r: r.positives, lambda r: r.document_prompt)
        batch |= self._role("negative", records, lambda r: r.negatives, lambda r: r.document_prompt)
        batch.pop("counts_query", None)
        return batch | _row_facts(records)

    def _role(
        self,
        role: Literal["query", "positive", "negative"],
        records: Sequence[Record],
        items_of: Callable[[Record], Sequence[Item]],
        prompt_of: Callable[[Record], str | None],
    ) -> Batch:
        items = [item for record in records for item in items_of(record)]
        if not items or role not in self.roles:
            return {}
        prompts = [prompt_of(record) for record in records for _ in items_of(record)]
        inputs = self.processor(
            items,
            role="query" if role == "query" else "document",
            prompts=None if all(prompt is None for prompt in prompts) else prompts,
        )
        return {
            **{f"{role}_{name}": tensor for name, tensor in inputs.items()},
            f"lengths_{role}": count_tokens(inputs),
            f"counts_{role}": torch.tensor([len(items_of(record)) for record in records]),
            f"ids_{role}": torch.tensor([item.content_id for item in items]),
        }


def _row_facts(records: Sequence[Record]) -> Batch:
    facts: Batch = {}
    labels = [record.label for record in records if record.label is not None]
    if len(labels) == len(records):
        facts["labels"] = torch.tensor(labels, dtype=torch.int64)
    scores = [record.score for record in records if record.score is not None]
    if len(scores) == len(records):
        facts["scores"] = torch.tensor(scores, dtype=torch.float32)
    teacher = [r.teacher_scores for r in records if r.teacher_scores is not None]
    if len(teacher) == len(records):
        facts["teacher_scores"] = _padded(teacher)
    return facts


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    padded = torch.full((len(rows), max(len(row) for row in rows)), float("-inf"))
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
    return padded
