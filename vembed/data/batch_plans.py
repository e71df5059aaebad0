"""Which rows make up the global batches of an epoch: pure functions of rows, seed and epoch.

Processes share out each global batch, so what is decided here does not depend on their number. That
a run can be resumed anywhere asks for the same: a plan keeps no state between epochs.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vembed.errors import ConfigError
from vembed.registry import construct

if TYPE_CHECKING:
    from vembed.data.dataset import RecordDataset

logger = logging.getLogger(__name__)

BATCH_SAMPLERS = {
    "random": "vembed.data.batch_plans:RandomBatches",
    "class_balanced": "vembed.data.batch_plans:ClassBalancedBatches",
    "no_duplicates": "vembed.data.batch_plans:NoDuplicateBatches",
    "homogeneous": "vembed.data.batch_plans:HomogeneousBatches",
}
"""Ways to make batches, by the name that `batch_sampler` takes."""


class BatchPlan(Protocol):
    """The global batches of every epoch.

    It is built as `Plan(dataset, batch_size, seed=..., drop_last=..., **kwargs)`, with the rows of
    a global batch for `batch_size` and `batch_sampler_kwargs` for `kwargs`.
    """

    def __len__(self) -> int:
        """Batches of an epoch, the same in all: schedules are counted in these."""
        ...

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """The row numbers of each batch of an epoch (from 0); a pure function of the epoch."""
        ...


def build_batch_plan(
    name: str,
    dataset: RecordDataset,
    batch_size: int,
    *,
    seed: int,
    drop_last: bool = False,
    **kwargs: Any,
) -> BatchPlan:
    """The plan that `name` stands for.

    Args:
        name: From `BATCH_SAMPLERS`, or `package.module:Name`.
        dataset: The rows.
        batch_size: Rows of a global batch.
        seed: Seed of the run.
        drop_last: Whether to leave out batches that are not full.
        **kwargs: Passed on as they are.

    Raises:
        ConfigError: if the name is unknown, or the arguments or rows do not fit.
    """
    arguments = {"dataset": dataset, "batch_size": batch_size, "seed": seed, "drop_last": drop_last}
    plan: BatchPlan = construct("batch_sampler", name, BATCH_SAMPLERS, arguments | kwargs)
    return plan


def random_order(count: int, *seeds: int) -> np.ndarray:
    """The numbers below `count` in an order that hangs on the seeds alone."""
    # Sorting raw bits, rather than Generator.permutation: numpy promises that the former never
    # change between its versions, and a run must resume in the same order.
    bits = np.random.Philox(np.random.SeedSequence(seeds))
    return np.argsort(bits.random_raw(count), kind="stable")


class RandomBatches:
    """All rows in random order, a new one in every epoch."""

    def __init__(
        self,
        dataset: Collection[Any],
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = False,
        shuffle: bool = True,
    ) -> None:
        """Assign; with `shuffle` off, rows come in their own order.

        Only the number of rows of the data set is looked at.
        """
        self._rows = len(dataset)
        self._size = batch_size
        self._seed = seed
        self._drop_last = drop_last
        self._shuffle = shuffle

    def __len__(self) -> int:
        return _count_batches(self._rows, self._size, drop_last=self._drop_last)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """See `BatchPlan`."""
        if self._shuffle:
            order = random_order(self._rows, self._seed, epoch)
        else:
            order = np.arange(self._rows)
        for number in range(len(self)):
            yield order[number * self._size : (number + 1) * self._size].tolist()


class ClassBalancedBatches:
    """Of each of several labels, several rows (P x K: Hermans et al., 2017).

    A batch takes `samples_per_class` rows of one label after another, until it is full; one more
    where a single row would be left over. Labels come in random order, every one before any comes
    again, and so do the rows of each: all labels are seen equally often, rare ones by repeating
    their rows in later batches. A batch holds no row twice, and more rows of its labels where there
    are too few labels. Rows that are alone with their label have no partner and are left out.

    An epoch has as many batches as the rows that are left would fill.
    """

    def __init__(
        self,
        dataset: RecordDataset,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = False,
        samples_per_class: int = 4,
    ) -> None:
        """Look at the labels of all rows.

        Args:
            dataset: Rows, each with a label.
            batch_size: Rows of a global batch.
            seed: Seed of the run.
            drop_last: Whether a last batch is made only if the rows would fill it.
            samples_per_class: K, at least 2; of a small batch, at most half.

        Raises:
            ConfigError: if K is out of range, a row has no label, or no label has two rows.
        """
        if isinstance(samples_per_class, bool) or samples_per_class < 2:
            raise ConfigError(
                f"samples_per_class: must be at least 2. Received: {samples_per_class!r}"
            )
        if "label" not in dataset.fields:
            raise ConfigError(
                "batch_sampler: class_balanced needs a label in every row. Received rows with: "
                f"{', '.join(sorted(dataset.fields))}"
            )
        order = np.argsort(dataset.labels, kind="stable")
        starts = np.flatnonzero(np.diff(dataset.labels[order])) + 1
        by_label = [rows.tolist() for rows in np.split(order, starts)]
        self._classes = [rows for rows in by_label if len(rows) > 1]
        if not self._classes:
            raise ConfigError(
                "batch_sampler: class_balanced needs two rows of some label. Received: "
                f"{len(dataset)} rows, all of different labels"
            )
        self._rows = sum(map(len, self._classes))
        if alone := len(dataset) - self._rows:
            logger.warning("%d rows are alone with their label and are left out", alone)
        self._size = min(batch_size, self._rows)
        self._seed = seed
        self._drop_last = drop_last
        # A batch of one label would have no negative.
        self._samples = max(2, min(samples_per_class, self._size // 2))

    def __len__(self) -> int:
        return _count_batches(self._rows, self._size, drop_last=self._drop_last)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """See `BatchPlan`."""
        classes = _Deck(range(len(self._classes)), (self._seed, epoch, 0))
        rows = [
            _Deck(of_class, (self._seed, epoch, 1 + number))
            for number, of_class in enumerate(self._classes)
        ]
        for _ in range(len(self)):
            yield self._draw(classes, rows)

    def _draw(self, classes: _Deck, rows: list[_Deck]) -> list[int]:
        batch: list[int] = []
        taken: list[set[int]] = [set() for _ in rows]
        seen: set[int] = set()
        while len(batch) < self._size:
            if len(seen) == len(rows):  # too few labels: once more around
                seen = {
                    number for number, deck in enumerate(rows) if len(taken[number]) == deck.size
                }
            number = classes.draw(seen)
            seen.add(number)
            left = self._size - len(batch)
            wanted = self._samples if left != self._samples + 1 else left
            for _ in range(min(wanted, left, rows[number].size - len(taken[number]))):
                row = rows[number].draw(taken[number])
                taken[number].add(row)
                batch.append(row)
        return batch


class NoDuplicateBatches:
    """No two rows of a batch share a query, a positive or a negative, by content.

    Rows in random order go into the first batch with room that comes after all batches with any of
    their contents. An epoch has as many batches as without this rule; rows for which there is none
    are left out of it, others in each epoch. That are few, unless some content is in more rows than
    there are batches.
    """

    def __init__(
        self, dataset: RecordDataset, batch_size: int, *, seed: int, drop_last: bool = False
    ) -> None:
        """Look at the contents of all rows.

        Args:
            dataset: The rows.
            batch_size: Rows of a global batch.
            seed: Seed of the run.
            drop_last: Whether to leave out a last batch that the rows would not fill.
        """
        contents = dataset.contents
        ends = contents.ends
        # Numbers of contents, from 0, so that what is known of each is a list.
        known, numbers = np.unique(contents.ids, return_inverse=True)
        self._contents = [part.tolist() for part in np.split(numbers, ends[:-1])]
        self._num_contents = len(known)
        self._size = batch_size
        self._seed = seed
        self._drop_last = drop_last
        if len(self) and (left_out := len(dataset) - sum(map(len, self.batches(0)))):
            logger.warning(
                "no_duplicates leaves %d of %d rows out of the first epoch: their contents are in "
                "every batch that has room",
                left_out,
                len(dataset),
            )

    def __len__(self) -> int:
        return _count_batches(len(self._contents), self._size, drop_last=self._drop_last)

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """See `BatchPlan`."""
        batches: list[list[int]] = [[] for _ in range(len(self))]
        free_from = [0] * self._num_contents
        following = _Following(len(batches))
        for row in random_order(len(self._contents), self._seed, epoch).tolist():
            contents = self._contents[row]
            number = following.find(max(free_from[content] for content in contents))
            if number == len(batches):
                continue
            batches[number].append(row)
            if len(batches[number]) == self._size:
                following.close(number)
            for content in contents:
                free_from[content] = number + 1
        yield from batches


class HomogeneousBatches:
    """Every batch has rows of one data set only; data sets come in turns, by chance.

    The rows of each are in random order and are cut into batches, of which the last may be smaller;
    then all batches are put into random order.
    """

    def __init__(
        self, dataset: RecordDataset, batch_size: int, *, seed: int, drop_last: bool = False
    ) -> None:
        """Look at which data set each row comes from.

        Args:
            dataset: Rows of several data sets; of one, this is `RandomBatches`.
            batch_size: Rows of a global batch.
            seed: Seed of the run.
            drop_last: Whether to leave out the last batch of each data set if it is not full.
        """
        sources = dataset.source_numbers
        self._sets = [np.flatnonzero(sources == number) for number in np.unique(sources)]
        self._size = batch_size
        self._seed = seed
        self._drop_last = drop_last

    def __len__(self) -> int:
        return sum(
            _count_batches(len(rows), self._size, drop_last=self._drop_last) for rows in self._sets
        )

    def batches(self, epoch: int) -> Iterator[list[int]]:
        """See `BatchPlan`."""
        batches: list[list[int]] = []
        for number, rows in enumerate(self._sets):
            order = rows[random_order(len(rows), self._seed, epoch, 1 + number)]
            full = _count_batches(len(rows), self._size, drop_last=self._drop_last)
            batches += [
                order[start * self._size : (start + 1) * self._size].tolist()
                for start in range(full)
            ]
        for place in random_order(len(batches), self._seed, epoch, 0).tolist():
            yield batches[place]


def _count_batches(rows: int, size: int, *, drop_last: bool) -> int:
    full, rest = divmod(rows, size)
    return full + (rest > 0 and not drop_last)


class _Deck:
    """Things in random order, all of which are drawn before any is drawn again."""

    def __init__(self, things: Collection[int], seeds: tuple[int, ...]) -> None:
        self._things = list(things)
        self._seeds = seeds
        self._shuffles = 0
        self._left: list[int] = []
        """The next one is the last: taking it moves no others."""

    @property
    def size(self) -> int:
        """How many different things there are."""
        return len(self._things)

    def draw(self, excluded: Collection[int]) -> int:
        """The next one that is not excluded; those that are keep their place."""
        while True:
            for place in range(len(self._left) - 1, -1, -1):
                if self._left[place] not in excluded:
                    return self._left.pop(place)
            order = random_order(len(self._things), *self._seeds, self._shuffles)
            self._left = [self._things[n] for n in order[::-1].tolist()] + self._left
            self._shuffles += 1


class _Following:
    """The first open one of a row of batches, from some batch on (a disjoint-set forest)."""

    def __init__(self, count: int) -> None:
        self._next = list(range(count + 1))

    def find(self, number: int) -> int:
        """The first open batch from `number` on; their count when there is none."""
        root = number
        while self._next[root] != root:
            root = self._next[root]
        while self._next[number] != root:
            self._next[number], number = root, self._next[number]
        return root

    def close(self, number: int) -> None:
        """A batch is full."""
        self._next[number] = number + 1
