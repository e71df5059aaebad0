"""The data of a run: which rows train, which validate, what the proof is measured on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader

from vembed.config import TrainConfig
from vembed.data import (
    BadRecord,
    Collator,
    ImageRules,
    OnProgress,
    Quarantine,
    RecordDataset,
    StreamingRecordDataset,
    TokenCollator,
    build_dataloader,
    load_dataset_records,
    open_token_store,
    split_holdout,
)
from vembed.data.file_names import data_folder, file_name_warning, is_image_name
from vembed.evaluation import EvalTask, load_eval_task, task_from_records
from vembed.models.processor import TextProcessor
from vembed.modes import Item, RetrievalMode
from vembed.training.overlap import find_overlap

_SAMPLE_ROWS = 500

Rows = RecordDataset | StreamingRecordDataset


@dataclass(frozen=True)
class RunData:
    """Rows and tasks of a run.

    Attributes:
        train: Rows to train on.
        validation: Rows for the validation loss, or None.
        validation_task: What to measure during training, or None.
        test_task: What to measure before and after, or None.
        test_source: Where the test set comes from, for the reader.
        quarantine: What took the bad records of all of them; None where they end the run.
        warnings: What looks wrong with the rows, though they can be used.
    """

    train: Rows
    validation: RecordDataset | None = None
    validation_task: EvalTask | None = None
    test_task: EvalTask | None = None
    test_source: str = ""
    quarantine: Quarantine | None = None
    warnings: tuple[str, ...] = ()

    @property
    def bad_records(self) -> list[BadRecord]:
        """The rows that were left out."""
        return [] if self.quarantine is None else self.quarantine.records


def load_run_data(config: TrainConfig, quarantine: Quarantine | None = None) -> RunData:
    """Read and check every row that the run will need.

    The test set is `test_data_path`, or a share of the training rows that is then not trained on.

    Args:
        config: The settings.
        quarantine: Takes bad records; None makes one if the settings ask for it.

    Raises:
        DataError: if a row cannot be used.
    """
    quarantine = quarantine or build_quarantine(config)
    train = load_rows(config, config.data_path, quarantine, streaming=config.streaming)
    validation, validation_task, test_task, source = None, None, None, ""
    if config.val_data_path is not None:
        validation = load_rows(config, config.val_data_path, quarantine, split="dev")
        validation_task = load_task(config, config.val_data_path, quarantine, split="dev")
    if config.test_data_path is not None:
        test_task = load_task(config, config.test_data_path, quarantine)
        source = config.test_data_path
    elif config.holdout_ratio > 0:
        train, holdout = split_holdout(train, config.holdout_ratio)
        test_task = task_from_records(list(holdout), "held-out rows")
        source = f"{len(holdout)} rows held out of {config.data_path}"
    if config.max_train_samples is not None:
        train = train.select(range(min(len(train), config.max_train_samples)))
    data = RunData(train, validation, validation_task, test_task, source, quarantine)
    return replace(data, warnings=tuple(_warnings(config, data)))


def _warnings(config: TrainConfig, data: RunData) -> Iterator[str]:
    """What looks wrong with the rows; a stream is not looked at."""
    if not isinstance(data.train, RecordDataset):
        return
    if warning := _file_names(config, data.train):
        yield warning
    for key, task in (
        ("val_data_path", data.validation_task),
        ("test_data_path", data.test_task),
    ):
        # Held-out rows share no query with the others.
        if task is None or config[key] is None:
            continue
        folder = config.image_root or data_folder(config[key])
        mode = RetrievalMode.parse(config.retrieval_mode)
        for warning in (
            file_name_warning(key, mode, task.sides, folder),
            find_overlap(data.train, task).describe(f"{key}: {config[key]}"),
        ):
            if warning is not None:
                yield warning


def _file_names(config: TrainConfig, train: RecordDataset) -> str | None:
    """The warning of `file_name_warning` about rows all over the data set."""
    numbers = np.unique(np.linspace(0, len(train) - 1, _SAMPLE_ROWS, dtype=np.int64))
    sides: dict[str, list[Item]] = {"queries": [], "positives": []}
    for record in train.__getitems__(numbers.tolist()):
        folder = config.image_root or os.path.dirname(record.where)
        for side, items in (("queries", (record.query,)), ("positives", record.positives)):
            sides[side] += [
                Item(os.path.join(folder, item.text or "")) if is_image_name(item.text) else item
                for item in items
                if item.image is None
            ]
    return file_name_warning("data_path", RetrievalMode.parse(config.retrieval_mode), sides)


def build_quarantine(config: TrainConfig) -> Quarantine | None:
    """What takes bad records; None where they end the run."""
    if config.on_bad_record == "fail":
        return None
    cap = config.max_bad_records
    return Quarantine() if cap is None else Quarantine(cap)


def image_rules(config: TrainConfig) -> ImageRules:
    """Where images are, and what they are held to."""
    return ImageRules(
        root=config.image_root,
        max_pixels=config.max_image_pixels,
        hosts=tuple(config.image_hosts),
        check=config.image_check,
    )


def load_rows(
    config: TrainConfig,
    path: Any,
    quarantine: Quarantine | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    on_progress: OnProgress | None = None,
) -> Any:
    """The rows of a data path, read as the config says."""
    return load_dataset_records(
        path,
        retrieval_mode=config.retrieval_mode,
        column_mapping=config.column_mapping,
        images=image_rules(config),
        quarantine=quarantine,
        split=split,
        streaming=streaming,
        on_progress=on_progress,
    )


def load_task(
    config: TrainConfig, path: str, quarantine: Quarantine | None = None, *, split: str = "test"
) -> EvalTask:
    """The evaluation task of a data path, read as the config says."""
    return load_eval_task(
        path,
        column_mapping=config.column_mapping,
        retrieval_mode=config.retrieval_mode,
        images=image_rules(config),
        quarantine=quarantine,
        split=split,
    )


def token_collator(config: TrainConfig, rows: Rows, collate: Any) -> TokenCollator | None:
    """What makes batches of stored tokens; None where they are made from rows.

    Stored are the tokens of texts that are not streamed, where batches hold nothing but what the
    model that trains reads of them.

    Raises:
        DataError: if a text gives no token, or tokens cannot be stored.
    """
    # Collators of another type add what a teacher or a guide reads.
    if not config.token_cache or type(collate) is not Collator:
        return None
    processor = collate.processor
    if not (isinstance(processor, TextProcessor) and processor.can_store_tokens):
        return None
    if not isinstance(rows, RecordDataset):
        return None
    return TokenCollator(open_token_store(rows, processor), processor.padding, rows)


def build_train_loader(
    config: TrainConfig,
    data: RunData,
    collate: Callable[..., Any],
    accelerator: Accelerator,
    *,
    batch_sampler: str = "random",
) -> DataLoader[Any]:
    """Batches to train on: this process's share of every global batch.

    Args:
        config: The settings.
        data: The rows.
        collate: Makes a batch of records.
        accelerator: Says which of how many processes this is.
        batch_sampler: How rows are put together; see `vembed.data.BATCH_SAMPLERS`.
    """
    return build_dataloader(
        data.train,
        collate,
        tokens=token_collator(config, data.train, collate),
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=accelerator.process_index,
        process_count=accelerator.num_processes,
        num_workers=config.num_workers,
        drop_last=config.drop_last,
        shuffle_buffer_size=config.shuffle_buffer_size,
        batch_sampler=batch_sampler,
        batch_sampler_kwargs=config.batch_sampler_kwargs,
    )


def build_validation_loader(
    config: TrainConfig, data: RunData, collate: Callable[..., Any], accelerator: Accelerator
) -> DataLoader[Any] | None:
    """Batches for the validation loss, in file order; None without validation rows."""
    if data.validation is None:
        return None
    return build_dataloader(
        data.validation,
        collate,
        tokens=token_collator(config, data.validation, collate),
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=accelerator.process_index,
        process_count=accelerator.num_processes,
        num_workers=0,
        drop_last=False,
        shuffle=False,
    )
