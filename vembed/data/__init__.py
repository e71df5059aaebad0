"""Rows of training data: read and checked, split, batched, inspected."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vembed.data.batch_plans import BATCH_SAMPLERS, BatchPlan, build_batch_plan
    from vembed.data.checking import OnProgress
    from vembed.data.collator import Batch, Collator, Processor
    from vembed.data.dataset import (
        HoldoutSplit,
        RecordDataset,
        StreamingRecordDataset,
        load_dataset_records,
        split_holdout,
    )
    from vembed.data.image_inspection import ImageSummary
    from vembed.data.inspection import (
        Finding,
        Inspection,
        LengthSummary,
        inspect_records,
        token_counter,
    )
    from vembed.data.loader import BORROWED, RecordLoader, build_dataloader, collate_share
    from vembed.data.quarantine import BadRecord, Quarantine
    from vembed.data.records import FIELDS, Record
    from vembed.data.rules import ImageRules
    from vembed.data.sampler import StatelessBatchSampler
    from vembed.data.token_store import TokenCollator, open_token_store

# Resolved on first use: importing this package must not pay for torch and datasets.
_LAZY = {
    "BATCH_SAMPLERS": "batch_plans",
    "BatchPlan": "batch_plans",
    "build_batch_plan": "batch_plans",
    "Batch": "collator",
    "Collator": "collator",
    "Processor": "collator",
    "HoldoutSplit": "dataset",
    "OnProgress": "checking",
    "RecordDataset": "dataset",
    "StreamingRecordDataset": "dataset",
    "load_dataset_records": "dataset",
    "split_holdout": "dataset",
    "Finding": "inspection",
    "ImageSummary": "image_inspection",
    "Inspection": "inspection",
    "LengthSummary": "inspection",
    "inspect_records": "inspection",
    "token_counter": "inspection",
    "BORROWED": "loader",
    "RecordLoader": "loader",
    "collate_share": "loader",
    "build_dataloader": "loader",
    "BadRecord": "quarantine",
    "Quarantine": "quarantine",
    "FIELDS": "records",
    "Record": "records",
    "ImageRules": "rules",
    "StatelessBatchSampler": "sampler",
    "TokenCollator": "token_store",
    "open_token_store": "token_store",
}

__all__ = [
    "BATCH_SAMPLERS",
    "BORROWED",
    "FIELDS",
    "BadRecord",
    "Batch",
    "BatchPlan",
    "Collator",
    "Finding",
    "HoldoutSplit",
    "ImageRules",
    "ImageSummary",
    "Inspection",
    "LengthSummary",
    "OnProgress",
    "Processor",
    "Quarantine",
    "Record",
    "RecordDataset",
    "RecordLoader",
    "StatelessBatchSampler",
    "StreamingRecordDataset",
    "TokenCollator",
    "build_batch_plan",
    "build_dataloader",
    "collate_share",
    "inspect_records",
    "load_dataset_records",
    "open_token_store",
    "split_holdout",
    "token_counter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
