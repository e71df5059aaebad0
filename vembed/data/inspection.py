"""What a data set is like: lengths in tokens, what is cut off, images, what is there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from vembed.data.checking import OnProgress
from vembed.data.dataset import RecordDataset
from vembed.data.image_inspection import ImageSummary, ImageTally
from vembed.data.records import FIELDS, Record
from vembed.modes import Item

Role = Literal["query", "document"]
CountTokens = Callable[[Sequence[Item], Role, Sequence[str | None]], Sequence[int]]
"""`(items, role, prompts)` to the tokens of each item before truncation.

Those that `max_seq_length` limits are counted: of most models, prompt and special tokens too.
"""

PERCENTILES = (50, 90, 99, 100)
_BATCH_ROWS = 256


@dataclass(frozen=True)
class LengthSummary:
    """How long the items of one role are, in tokens before truncation.

    Attributes:
        count: Number of items.
        percentiles: Percentile (50, 90, 99, 100) to length.
        truncated: Items longer than `max_seq_length`.
        max_seq_length: Tokens that the model keeps.
        bin_edges: Bounds of the histogram's bins; the lower one belongs to a bin.
        bin_counts: Items in each bin.
    """

    count: int
    percentiles: dict[int, int]
    truncated: int
    max_seq_length: int
    bin_edges: list[int]
    bin_counts: list[int]


@dataclass(frozen=True)
class Finding:
    """How often something was met, and where first.

    Attributes:
        count: Number of rows or items.
        first: `file:line` of the first one, and more where it says so; None when there is none.
    """

    count: int = 0
    first: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_records` found.

    Attributes:
        rows: Number of rows.
        field_counts: Rows that have each field.
        label_count: Number of different labels.
        lengths: Lengths of texts by role: query, positive, negative; roles without are absent.
        images: Images by role.
        broken_images: Images that cannot be decoded; the first with what is wrong.
        copied_images: Images with the bytes of another one: they do not count as duplicates.
        duplicate_rows: Rows that are the same as an earlier one in everything.
        repeated_queries: Rows whose query an earlier row has too.
        repeated_positives: Positives that are there earlier too.
        own_positive: Rows whose query is among their positives.
        positive_as_negative: Rows with an item that is both positive and negative.
    """

    rows: int
    field_counts: dict[str, int]
    label_count: int
    lengths: dict[str, LengthSummary]
    images: dict[str, ImageSummary]
    broken_images: Finding
    copied_images: Finding
    duplicate_rows: Finding
    repeated_queries: Finding
    repeated_positives: Finding
    own_positive: Finding
    positive_as_negative: Finding


class TokenizingProcessor(Protocol):
    """The part of a text processor that counting needs."""

    tokenizer: Any

    def prompt_for(self, role: Role | None) -> str:
        """The text put before an item of this role."""
        ...


def token_counter(processor: TokenizingProcessor) -> CountTokens:
    """Counts the tokens of texts that a processor would make if it did not truncate.

    Args:
        processor: Where `max_seq_length` does not limit prompt, text and special tokens together,
            it has a `count_tokens` of its own.
    """
    own: CountTokens | None = getattr(processor, "count_tokens", None)
    if own is not None:
        return own

    def count(items: Sequence[Item], role: Role, prompts: Sequence[str | None]) -> Sequence[int]:
        own = processor.prompt_for(role)
        texts = [
            (own if prompt is None else prompt) + (item.text or "")
            for item, prompt in zip(items, prompts, strict=True)
        ]
        # verbose=False: transformers would warn about texts longer than the model takes.
        encoded = processor.tokenizer(
            texts, padding=False, truncation=False, return_attention_mask=False, verbose=False
        )
        return [len(ids) for ids in encoded["input_ids"]]

    return count


def inspect_records(
    dataset: RecordDataset,
    count_tokens: CountTokens | None = None,
    *,
    max_seq_length: int = 0,
    on_progress: OnProgress | None = None,
) -> Inspection:
    """Read every row, decode every image, and tell what the data set is like.

    Args:
        dataset: Checked rows.
        count_tokens: Tokens of items with a text; see `token_counter`. None leaves lengths out.
        max_seq_length: Tokens that the model keeps of an item.
        on_progress: Told the share of rows that is read.
    """
    tally = _Tally(count_tokens)
    for start in range(0, len(dataset), _BATCH_ROWS):
        rows = range(start, min(start + _BATCH_ROWS, len(dataset)))
        tally.add(dataset.__getitems__(rows))
        if on_progress is not None:
            on_progress(rows.stop / len(dataset))

    def repeats(ids: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray) -> Finding:
        return _repeats(dataset, np.asarray(ids), np.asarray(rows))

    row_numbers = np.arange(len(dataset))
    return Inspection(
        rows=len(dataset),
        field_counts={name: tally.fields[name] for name in sorted(FIELDS) if tally.fields[name]},
        label_count=len(dataset.label_names),
        lengths={
            role: _summarise(lengths, max_seq_length)
            for role, lengths in tally.lengths.items()
            if lengths
        },
        images=tally.images.summaries(),
        broken_images=_finding(tally.images.broken),
        copied_images=_finding(tally.images.copies),
        duplicate_rows=repeats(dataset.content_hashes, row_numbers),
        repeated_queries=repeats(dataset.query_ids, row_numbers),
        repeated_positives=repeats(tally.positive_ids, tally.positive_rows),
        own_positive=_finding(tally.own_positive),
        positive_as_negative=_finding(tally.positive_as_negative),
    )


class _Tally:
    """What is counted row by row."""

    def __init__(self, count_tokens: CountTokens | None) -> None:
        self._count_tokens = count_tokens
        self.images = ImageTally()
        self.fields: Counter[str] = Counter()
        self.lengths: dict[str, list[int]] = {"query": [], "positive": [], "negative": []}
        self.positive_ids: list[int] = []
        self.positive_rows: list[int] = []
        self.own_positive: list[str] = []
        self.positive_as_negative: list[str] = []

    def add(self, records: Sequence[Record]) -> None:
        """Count some more rows."""
        for record in records:
            self.fields.update(record.fields)
            self.positive_ids += [item.content_id for item in record.positives]
            self.positive_rows += [record.row_index] * len(record.positives)
            if record.query in record.positives:
                self.own_positive.append(record.where)
            if set(record.positives) & set(record.negatives):
                self.positive_as_negative.append(record.where)
        self._measure("query", "query", ((r.query, r.query_prompt) for r in records))
        self._measure(
            "positive", "document", ((i, r.document_prompt) for r in records for i in r.positives)
        )
        self._measure(
            "negative", "document", ((i, r.document_prompt) for r in records for i in r.negatives)
        )

    def _measure(self, name: str, role: Role, pairs: Iterable[tuple[Item, str | None]]) -> None:
        listed = list(pairs)
        self.images.add(name, (item.image for item, _ in listed if item.image is not None))
        texts = [(item, prompt) for item, prompt in listed if item.text is not None]
        if texts and self._count_tokens is not None:
            items = [item for item, _ in texts]
            prompts = [prompt for _, prompt in texts]
            self.lengths[name] += self._count_tokens(items, role, prompts)


def _summarise(lengths: Sequence[int], max_seq_length: int) -> LengthSummary:
    values = np.asarray(lengths)
    longest = int(values.max())
    # Doubling bins: lengths of texts spread over orders of magnitude.
    edges = [0, 8]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    at = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return LengthSummary(
        count=len(values),
        percentiles={p: int(length) for p, length in zip(PERCENTILES, at, strict=True)},
        truncated=int((values > max_seq_length).sum()),
        max_seq_length=max_seq_length,
        bin_edges=edges,
        bin_counts=[int(n) for n in np.histogram(values, [*edges[:-1], edges[-1] - 0.5])[0]],
    )


def _repeats(dataset: RecordDataset, ids: np.ndarray, rows: np.ndarray) -> Finding:
    """Ids that are there earlier too; `rows` are the rows they belong to."""
    is_first = np.zeros(len(ids), dtype=bool)
    is_first[np.unique(ids, return_index=True)[1]] = True
    again = np.flatnonzero(~is_first)
    if not len(again):
        return Finding()
    return Finding(len(again), dataset[int(rows[again[0]])].where)


def _finding(places: Sequence[str]) -> Finding:
    return Finding(len(places), places[0] if places else None)
