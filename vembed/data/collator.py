"""From records to the model inputs of a batch.

# Shapes: B queries, M positives and K negatives of the batch, T tokens of the longest in a role
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vembed.chunking import count_tokens
from vembed.data.records import Record
from vembed.modes import Item

Batch = dict[str, Any]
Side = Literal["query", "document"]


class Processor(Protocol):
    """Turns items into padded model inputs; every encoder brings its own."""

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Side,
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
    - `keys_query`, `keys_positive`, `keys_negative`: lists of small numbers, equal where the model
      input is equal: the same content under the same prompt. A query and a document have none in
      common.
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
        of_query, of_document = attrgetter("query_prompt"), attrgetter("document_prompt")
        batch |= self._role("query", records, lambda r: (r.query,), of_query)
        batch |= self._role("positive", records, attrgetter("positives"), of_document)
        batch |= self._role("negative", records, attrgetter("negatives"), of_document)
        batch.pop("counts_query", None)
        return _with_keys(batch) | _row_facts(records)

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
        side: Side = "query" if role == "query" else "document"
        inputs = self.processor(
            items,
            role=side,
            prompts=None if all(prompt is None for prompt in prompts) else prompts,
        )
        ids = [item.content_id for item in items]
        return {
            **{f"{role}_{name}": tensor for name, tensor in inputs.items()},
            f"lengths_{role}": count_tokens(inputs),
            f"counts_{role}": torch.tensor([len(items_of(record)) for record in records]),
            f"ids_{role}": torch.tensor(ids),
            f"keys_{role}": [(side, *of_item) for of_item in zip(prompts, ids, strict=True)],
        }


def _with_keys(batch: Batch) -> Batch:
    """The batch, with the inputs that its `keys_...` tell apart numbered."""
    return batch | number_keys({k: v for k, v in batch.items() if k.startswith("keys_")})


def number_keys(keys: Mapping[str, Sequence[Hashable]]) -> dict[str, list[int]]:
    """Equal numbers for equal keys, from 0 in the order in which they come."""
    number: dict[Hashable, int] = {}
    return {
        name: [number.setdefault(key, len(number)) for key in of_role]
        for name, of_role in keys.items()
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
        facts["teacher_scores"] = pad_scores(teacher)
    return facts


def pad_scores(rows: Sequence[Sequence[float]]) -> Tensor:
    """Scores of rows of different lengths, filled up with `-inf`."""
    padded = torch.full((len(rows), max(len(row) for row in rows)), float("-inf"))
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row)
    return padded
