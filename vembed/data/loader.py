"""From a data set to batches, in this process or in workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vembed.data.batch_plans import build_batch_plan
from vembed.data.collator import Batch
from vembed.data.dataset import RecordDataset, StreamingRecordDataset
from vembed.data.records import Record
from vembed.data.sampler import StatelessBatchSampler, check_shares, own_share
from vembed.data.token_store import TokenCollator
from vembed.errors import ConfigError, DataError

BORROWED = "borrowed"
"""Key of a batch whose process has no rows of its own; see `collate_share`."""

CollateRecords = Callable[[list[Record]], Batch]


class RecordLoader(DataLoader[Any]):
    """A DataLoader whose order is set by epoch, and whose workers' DataErrors arrive unchanged.

    Attributes:
        rows: What batches are made of; `dataset` may hold no more than their numbers.
        process_count: Processes that the rows are already shared among.
        collator: What makes its batches.
        seed: Seed of the run.
    """

    rows: RecordDataset | StreamingRecordDataset
    process_count: int = 1
    collator: CollateRecords
    seed: int = 0
    generator: torch.Generator

    def set_epoch(self, epoch: int, *, start_batch: int = 0) -> None:
        """Choose the epoch (from 0) to iterate over next, and the batch in it to begin with."""
        order: Any = self.dataset if self.batch_sampler is None else self.batch_sampler
        order.set_epoch(epoch, start_batch=start_batch)
        # What workers draw, such as in a collator of the user's, hangs on the epoch, not on how
        # many there were before in this process.
        self.generator.manual_seed(_mixed(self.seed, epoch))

    @property
    def fingerprint(self) -> str:
        """What tells these rows from others; of a stream, where they come from and file sizes."""
        return self.rows.fingerprint

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in self._batches():
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch

    def _batches(self) -> Iterator[Any]:
        if self.num_workers or self.batch_sampler is None:
            return super().__iter__()
        # What torch's iterator does without workers, but for a range of its profiler around each
        # batch, which takes a third as long as a batch of stored tokens.
        rows: Any = self.dataset
        return (self.collate_fn(rows.__getitems__(batch)) for batch in self.batch_sampler)


def build_dataloader(
    dataset: RecordDataset | StreamingRecordDataset,
    collator: CollateRecords,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    drop_last: bool = False,
    shuffle: bool = True,
    shuffle_buffer_size: int = 10_000,
    batch_sampler: str = "random",
    batch_sampler_kwargs: Mapping[str, Any] | None = None,
    tokens: TokenCollator | None = None,
) -> RecordLoader:
    """Batches of a data set for one of several processes.

    The batches do not depend on `num_workers`, and those of all processes together are the batches
    of one process with a `process_count` times larger `batch_size`. No global random state is used.

    Args:
        dataset: Rows. A stream is read whole by every worker of every process, each of which makes
            its own batches only.
        collator: Makes a batch of records; it is called in the workers.
        batch_size: Rows per process.
        seed: Seed of the run.
        process_index: Number of this process, from 0.
        process_count: Processes that train together.
        num_workers: Further processes that make batches ahead of the training step.
        drop_last: Whether to leave out a last batch that is not full.
        shuffle: Whether rows come in random order, a new one in every epoch.
        shuffle_buffer_size: Rows that a stream is shuffled among.
        batch_sampler: How rows are put together: a name of `BATCH_SAMPLERS`, or
            `package.module:Name`. A stream's are put together as they come.
        batch_sampler_kwargs: Further arguments of it.
        tokens: Makes the batches that `collator` would make, of row numbers alone: no row is read.

    Raises:
        ConfigError: if there would not be a single batch, a number is out of range, or the rows do
            not fit the batch sampler.
    """
    check_shares(batch_size, process_index, process_count)
    shares = _Shares(batch_size, process_index, process_count, drop_last)
    lender: Record | int | None = None
    collate: Callable[[list[Any]], Batch] = collator
    rows: Dataset[Any] = dataset
    if isinstance(dataset, StreamingRecordDataset):
        _require_no_plan(batch_sampler)
        buffer_size = shuffle_buffer_size if shuffle else None
        rows = _BatchStream(dataset, shares, seed, buffer_size)
        order: dict[str, Any] = {"batch_size": None}
    else:
        if tokens is not None:
            rows, collate = _RowNumbers(len(dataset)), tokens
        if process_count > 1 and len(dataset):
            lender = rows[0]
        plan = None
        if shuffle and (batch_sampler != "random" or batch_sampler_kwargs):
            of_all = batch_size * process_count
            of_plan = {"seed": seed, "drop_last": drop_last, **(batch_sampler_kwargs or {})}
            plan = build_batch_plan(batch_sampler, dataset, of_all, **of_plan)
        sampler = StatelessBatchSampler(
            len(dataset), **vars(shares), seed=seed, shuffle=shuffle, plan=plan
        )
        # A stream's epoch is set on the object that workers copy, so its workers start anew.
        order = {"batch_sampler": sampler, "persistent_workers": num_workers > 0}
    loader = RecordLoader(
        rows,
        collate_fn=_Collate(collate, lender),
        **_worker_options(num_workers),
        generator=torch.Generator().manual_seed(seed),
        **order,
    )
    loader.rows = dataset
    loader.process_count = process_count
    loader.collator = collator
    loader.seed = seed
    return loader


def _worker_options(num_workers: int) -> dict[str, Any]:
    if num_workers:
        # Tokenizers would warn at every fork; threads of the parent do not live in a worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return {
        "num_workers": num_workers,
        "worker_init_fn": _start_worker if num_workers else None,
    }


def _require_no_plan(batch_sampler: str) -> None:
    if batch_sampler != "random":
        raise ConfigError(
            f"batch_sampler: {batch_sampler} must know all rows, but those of a stream come "
            "one after another. Set streaming: false, or batch_sampler: random"
        )


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way out of a worker, where torch would wrap it in a traceback."""

    message: str


@dataclass(frozen=True)
class _Collate:
    """The collator, letting failures of a stream pass and catching its own in workers."""

    collator: Callable[[list[Any]], Batch]
    lender: Record | int | None
    """A row to borrow where this process has none."""

    def __call__(self, records: list[Any] | _Borrowed | _Failure) -> Batch | _Failure:
        if isinstance(records, _Failure):
            return records
        try:
            if isinstance(records, _Borrowed):
                return collate_share(self.collator, [], records.record)
            return collate_share(self.collator, records, self.lender)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return _Failure(str(error))


def collate_share(
    collator: Callable[[list[Any]], Batch],
    records: Sequence[Record | int],
    lender: Record | int | None = None,
) -> Batch:
    """The batch of one process's rows.

    A process without rows takes part in a step all the same, because the others' collectives wait
    for it. Its batch is a borrowed row under the key `borrowed`, which stands for no rows of the
    same kind: it is encoded, and then left out of the loss.

    Args:
        collator: Makes a batch of rows.
        records: The process's rows, or their numbers.
        lender: The row to borrow if there are none.
    """
    if records or lender is None:
        return collator(list(records))
    return {**collator([lender]), BORROWED: True}


class _RowNumbers(Dataset[int]):
    """Rows that are their own numbers."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return range(self._count)[index]

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


@dataclass(frozen=True)
class _Borrowed:
    """No rows of a stream for this process, and a row to borrow."""

    record: Record


@dataclass(frozen=True)
class _Shares:
    """How rows are shared out among processes; see `StatelessBatchSampler`."""

    batch_size: int
    process_index: int
    process_count: int
    drop_last: bool

    def of(self, rows: list[Record]) -> list[Record] | _Borrowed:
        """What this process takes of a global batch."""
        return own_share(rows, self.process_index, self.process_count) or _Borrowed(rows[0])

    @property
    def global_size(self) -> int:
        """Rows of a full global batch."""
        return self.batch_size * self.process_count


class _BatchStream(IterableDataset[Any]):
    """One process's batches of a stream; of several workers, each makes every n-th."""

    def __init__(
        self,
        dataset: StreamingRecordDataset,
        shares: _Shares,
        seed: int,
        buffer_size: int | None,
    ) -> None:
        self._dataset = dataset
        self._shares = shares
        self._seed = seed
        self._buffer_size = buffer_size
        self._epoch = 0
        self._start_batch = 0

    def set_epoch(self, epoch: int, *, start_batch: int = 0) -> None:
        """See `RecordLoader.set_epoch`."""
        self._epoch = epoch
        self._start_batch = start_batch

    def __iter__(self) -> Iterator[list[Record] | _Borrowed | _Failure]:
        worker = get_worker_info()
        if worker is None:
            yield from self._batches(0, 1)
            return
        try:
            yield from self._batches(worker.id, worker.num_workers)
        except DataError as error:
            yield _Failure(str(error))

    def _batches(self, worker: int, workers: int) -> Iterator[list[Record] | _Borrowed]:
        """Every `workers`-th batch; DataLoader asks its workers in turn, which keeps the order."""
        rows = self._rows()
        number = 0
        while group := list(islice(rows, self._shares.global_size)):
            if len(group) < self._shares.global_size and self._shares.drop_last:
                return
            ahead = number - self._start_batch
            if ahead >= 0 and ahead % workers == worker:
                yield self._shares.of(group)
            number += 1

    def _rows(self) -> Iterator[Record]:
        if self._buffer_size is None:
            return iter(self._dataset)
        return self._dataset.shuffled(
            seed=self._seed, epoch=self._epoch, buffer_size=self._buffer_size
        )


def _mixed(seed: int, epoch: int) -> int:
    """A seed of torch that hangs on both."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)


def _start_worker(_worker_id: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Terminals and clusters send a signal to all processes of a job, and the training process needs
    # rows to finish its step with.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End by SIGTERM from the training process, and by nobody else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
