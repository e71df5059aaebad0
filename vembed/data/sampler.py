"""Which rows make up which batch: a pure function of seed, epoch, batch size and process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TypeVar

from torch.utils.data import Sampler

from vembed.data.batch_plans import BatchPlan, RandomBatches
from vembed.errors import ConfigError

_T = TypeVar("_T")


class StatelessBatchSampler(Sampler[list[int]]):
    """Batches of row numbers for one of several processes.

    The global batches of a plan have `batch_size * process_count` rows, and process p takes the
    p-th slice of each: several processes see, together, just what one process with a larger batch
    sees. Nothing but the arguments and the epoch decides, so that a run can be resumed anywhere.

    A global batch may be smaller, as the last one of an epoch is; then slices differ by one row at
    most, and are empty for some processes where it has fewer rows than there are processes.

    Attributes:
        process_count: Processes that the rows are shared among.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        drop_last: bool = False,
        shuffle: bool = True,
        plan: BatchPlan | None = None,
    ) -> None:
        """Assign and check.

        Args:
            num_rows: Rows of the data set.
            batch_size: Rows per process.
            seed: Seed of the run.
            process_index: Number of this process, from 0.
            process_count: Processes that train together.
            drop_last: Whether to leave out a last batch that is not full.
            shuffle: Whether rows come in random order, a new one in every epoch.
            plan: Global batches to share out, in the place of those that `drop_last` and `shuffle`
                describe.

        Raises:
            ConfigError: if there would not be a single batch, or a number is out of range.
        """
        check_shares(batch_size, process_index, process_count)
        self.process_index = process_index
        self.process_count = process_count
        self._plan = plan or RandomBatches(
            range(num_rows),
            batch_size * process_count,
            seed=seed,
            drop_last=drop_last,
            shuffle=shuffle,
        )
        self._epoch = 0
        self._start_batch = 0
        if not len(self):
            raise ConfigError(
                f"batch_size: {num_rows} rows do not make one batch of {batch_size} for each of "
                f"{process_count} processes{' with drop_last' if drop_last else ''}. Add rows, use "
                "fewer processes, or lower batch_size"
            )

    def set_epoch(self, epoch: int, *, start_batch: int = 0) -> None:
        """Choose the epoch (from 0) to iterate over, and the batch in it to begin with."""
        self._epoch = epoch
        self._start_batch = start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever iteration begins: schedules are counted in these."""
        return len(self._plan)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in islice(self._plan.batches(self._epoch), self._start_batch, None):
            yield own_share(rows, self.process_index, self.process_count)


def own_share(rows: Sequence[_T], process_index: int, process_count: int) -> list[_T]:
    """The slice of a global batch that one process takes; slices differ by one row at most."""
    size, extra = divmod(len(rows), process_count)
    start = process_index * size + min(process_index, extra)
    return list(rows[start : start + size + (process_index < extra)])


def check_shares(batch_size: int, process_index: int, process_count: int) -> None:
    """Raise ConfigError unless the numbers can share rows out."""
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be at least 1. Received: {batch_size}")
    if not 0 <= process_index < process_count:
        raise ConfigError(
            f"process_index: must be from 0 to {process_count - 1}. Received: {process_index}"
        )
