"""What some queries found before and after, for tasks with images, to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vembed.errors import ConfigError
from vembed.evaluation.results import EvalResult, Rankings
from vembed.modes import Item

ROWS, DEPTH = 12, 5


@dataclass(frozen=True)
class Answer:
    """A document that a query found, and whether it is relevant."""

    document: Item
    is_right: bool


@dataclass(frozen=True)
class GalleryRow:
    """A query and its nearest documents, the nearest first.

    Attributes:
        query: What was asked.
        right: The relevant document that stands highest after; None without one.
        rank_before: Rank of the highest relevant document before, from 1; 0 without one.
        rank_after: The same after.
        before: What was found before.
        after: What was found after.
    """

    query: Item
    right: Item | None
    rank_before: int
    rank_after: int
    before: list[Answer]
    after: list[Answer]


@dataclass(frozen=True)
class Gallery:
    """Rows to draw, and how many queries they stand for."""

    rows: list[GalleryRow]
    query_count: int

    def describe(self) -> str:
        """What the picture shows, in words."""
        before = sum(any(answer.is_right for answer in row.before) for row in self.rows)
        after = sum(any(answer.is_right for answer in row.after) for row in self.rows)
        queries = "query" if self.query_count == 1 else "queries"
        return (
            f"{len(self.rows)} of {self.query_count:,} {queries}, taken at equal distances. The "
            f"{DEPTH} nearest documents hold a right answer for {before} of them before and for "
            f"{after} after; right answers are framed. Beside each query: its right answer, and "
            "the rank of that before and after."
        )


def choose_gallery(
    before: EvalResult, after: EvalResult, *, rows: int = ROWS, depth: int = DEPTH
) -> Gallery | None:
    """Queries at equal distances through the task, so that nobody picked them.

    Returns:
        None where there are no rankings, or no images.

    Raises:
        ConfigError: if the two results are not of the same queries.
    """
    old, new = before.rankings, after.rankings
    if old is None or new is None:
        return None
    if list(old.queries) != list(new.queries):
        raise ConfigError("gallery: expected two results of the same task. Received: two tasks")
    if all(item.image is None for item in (new.queries[0], new.documents[0])):
        return None
    count = len(new.queries)
    chosen = np.unique(((np.arange(rows) + 0.5) * count / rows).astype(int))
    return Gallery(
        [_row(old, new, query, depth) for query in chosen.tolist()],
        count,
    )


def _row(old: Rankings, new: Rankings, query: int, depth: int) -> GalleryRow:
    right = int(new.neighbours.right_document_Q[query])
    return GalleryRow(
        query=new.queries[query],
        right=new.documents[right] if right >= 0 else None,
        rank_before=int(old.neighbours.right_rank_Q[query]),
        rank_after=int(new.neighbours.right_rank_Q[query]),
        before=_answers(old, query, depth),
        after=_answers(new, query, depth),
    )


def _answers(rankings: Rankings, query: int, depth: int) -> list[Answer]:
    found = rankings.neighbours.documents_QK[query, :depth]
    right = set(rankings.relevant[query].tolist())
    return [Answer(rankings.documents[d], d in right) for d in found.tolist() if d >= 0]
