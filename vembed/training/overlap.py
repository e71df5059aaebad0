"""What of a test set is trained on: its numbers then tell of memory, not of search."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vembed.data import RecordDataset
from vembed.evaluation import EvalTask
from vembed.images import ImageFile, ImageFolder
from vembed.modes import Item


@dataclass(frozen=True)
class Shared:
    """How many of some things are also there in training.

    Attributes:
        count: Those that are.
        total: All of them.
    """

    count: int
    total: int

    def __str__(self) -> str:
        return f"{self.count:,} of {self.total:,}"


@dataclass(frozen=True)
class Overlap:
    """What a test set shares with the training rows, each content counted once.

    Attributes:
        pairs: Queries with their document.
        queries: Queries, or labelled items.
        documents: Documents that belong to a query.
        images: Whether documents have images.
    """

    pairs: Shared
    queries: Shared
    documents: Shared
    images: bool = False

    def describe(self, name: str) -> str | None:
        """What to tell the user about the data set of that name; None where all is well.

        Text documents alone may be the same: many data sets have one corpus for all queries. So
        may the words for pictures that are all unseen.
        """
        telling = self.documents if self.images else self.queries
        if not telling.count:
            return None
        parts = {"pairs": self.pairs, "queries": self.queries, "documents": self.documents}
        counted = ", ".join(f"{part} {what}" for what, part in parts.items() if part.total)
        return (
            f"{name}: rows of it are also trained on: {counted}. Its numbers will look better than "
            "they are; take these rows out of one of the two"
        )


def find_overlap(train: RecordDataset, task: EvalTask) -> Overlap:
    """Compare by content: texts by their words, image files by their path on this disk."""
    trained = train.pair_ids
    folders = train.image_folders
    queries = _ids(next(iter(task.sides.values())), folders)
    pairs = list(task.pairs)
    asked = _ids([query for query, _ in pairs], folders)
    found = _ids([document for _, document in pairs], folders)
    return Overlap(
        pairs=_shared(_both(asked, found), _both(trained.queries, trained.positives)),
        queries=_shared(queries, train.query_ids),
        documents=_shared(found, trained.positives),
        images=any(document.image is not None for _, document in pairs),
    )


def _ids(items: Iterable[Item], folders: Sequence[ImageFolder]) -> np.ndarray:
    """`[items]` int64, the content ids that the items would have as training rows."""
    known: dict[Item, int] = {}
    for item in items:
        if item not in known:
            known[item] = _as_trained(item, folders).content_id
    return np.fromiter((known[item] for item in items), dtype=np.int64)


def _as_trained(item: Item, folders: Sequence[ImageFolder]) -> Item:
    """The same item, its image file named from the folder of training images that it lies in.

    Paths count from the folder of a data set, so that equal ones in two folders are two images.
    """
    if not isinstance(item.image, ImageFile):
        return item
    path = os.path.join(item.image.root, item.image.path)
    for folder in folders:
        inside = os.path.relpath(path, folder.root)
        if inside.split(os.sep)[0] != os.pardir:
            return replace(item, image=ImageFile(inside, folder.root, folder.prefix))
    return replace(item, image=ImageFile(path, item.image.root))


def _both(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """One id for each pair; an odd factor, so that the order of the two counts."""
    mixed = queries.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    joined: np.ndarray = mixed ^ documents.astype(np.uint64)
    return joined


def _shared(ids: np.ndarray, trained: np.ndarray) -> Shared:
    distinct = np.unique(ids)
    return Shared(int(np.isin(distinct, trained).sum()), len(distinct))
