"""Try out a run without training: read all the data, look at it, take one step, write nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from vembed.config import TrainConfig
from vembed.data import (
    BadRecord,
    Inspection,
    Quarantine,
    Record,
    RecordDataset,
    inspect_records,
    token_counter,
)
from vembed.data.checking import require_images
from vembed.distributed import fail_together
from vembed.errors import ConfigError, DataError
from vembed.models.protocol import Encoder, check_shows_texts
from vembed.modes import Item, RetrievalMode
from vembed.training.data_utils import ROLES
from vembed.training.first_step import FirstStepReport, FirstStepWatch, advise
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.output_dir import check_output_dir
from vembed.training.run import (
    build_accelerator,
    build_trainer,
    check_mode,
    describe_run,
    raise_problems,
    require_taught,
)
from vembed.training.run_data import Rows, RunData, build_quarantine, load_rows, load_run_data
from vembed.training.training_loop import optimizer_step

OnStage = Callable[[str, float | None], None]
"""`(stage, share)`: what is being done, and how much of it is, from 0 to 1; None when unknown."""

_STREAM_WINDOW_ROWS = 256
_LEAVE_OUT = "To leave such rows out: on_bad_record: quarantine and image_check: decode"


@dataclass(frozen=True)
class SampleItem:
    """One item of a batch as the model sees it.

    Attributes:
        role: `query`, `positive` or `negative`.
        text: Read back from its tokens: prompts and truncation included; empty without a text.
        tokens: Tokens of the text.
        image: Where its image is; empty without one, and in a stream.
        shapes: Shapes of its other inputs by name, such as `pixel_values`.
    """

    role: str
    text: str = ""
    tokens: int = 0
    image: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        facts: Model, sizes, steps and device of the run, by label.
        inspection: What the training rows are like; None for a stream.
        bad_records: The rows that are left out.
        warnings: What looks wrong with the rows, though they can be used.
        sample: The items of the first row of the first batch.
        first_step: What one optimizer step was like.
        advice: What looks wrong in it, naming the setting.
        step_seconds: Time of that step, which is longer than that of later ones.
        output_dir_problem: Why `vembed train` would not start yet; empty if it would.
    """

    facts: Mapping[str, str]
    inspection: Inspection | None
    bad_records: list[BadRecord]
    warnings: tuple[str, ...]
    sample: list[SampleItem]
    first_step: FirstStepReport
    advice: list[str]
    step_seconds: float
    output_dir_problem: str = ""


def check_run(config: TrainConfig, on_stage: OnStage) -> CheckResult:
    """Do everything that a run does up to its first step, and that step, in memory.

    Collective: every process must call it with the same config.

    Raises:
        ConfigError: if settings cannot work, together or with the model or the data.
        DataError: about the first row that cannot be used, and how many more there are.
    """
    raise_problems(config)
    if config.num_processes is None:
        # One process holds all the weights; how they are shared out changes nothing else.
        config = config.model_copy(update={"distributed_strategy": "ddp"})
    accelerator = build_accelerator(config)
    on_stage("loading the model", None)
    encoder = build_model(config).to(accelerator.device)
    check_mode(encoder, config)
    if RetrievalMode.parse(config.retrieval_mode).has_texts:
        check_shows_texts(encoder.processor)
    quarantine = build_quarantine(config)
    rows = _read_training_rows(config, quarantine, on_stage)
    on_stage("reading validation and test rows", None)
    data = load_run_data(config, quarantine)
    require_taught(config, data)
    inspection = None
    if isinstance(rows, RecordDataset):
        inspection = _inspect(rows, encoder, config, on_stage)
    on_stage("looking at validation and test images", None)
    _decode_images(_items_measured(data, config))
    on_stage("taking one step", None)
    apply_lora(encoder, config, accelerator)
    trainer = build_trainer(config, accelerator, encoder, data)
    trainer.prepare()
    facts = describe_run(trainer, encoder, data)
    with fail_together(accelerator.device):
        group = list(islice(trainer.dataloader, config.gradient_accumulation_steps))
    sample = _first_row(group[0], encoder.processor, data.train)
    started = time.perf_counter()
    watch, reports = FirstStepWatch(trainer), []
    optimizer_step(trainer, group, lambda: reports.append(watch.report()))
    return CheckResult(
        facts=facts,
        inspection=inspection,
        bad_records=data.bad_records,
        warnings=data.warnings,
        sample=sample,
        first_step=reports[0],
        advice=[advice.text for advice in advise(reports[0])],
        step_seconds=time.perf_counter() - started,
        output_dir_problem=_output_dir_problem(config),
    )


def _output_dir_problem(config: TrainConfig) -> str:
    """Why a run could not write; a check writes nothing, and so need not end for it."""
    try:
        check_output_dir(config)
    except ConfigError as error:
        return str(error)
    return ""


def _inspect(
    rows: RecordDataset, encoder: Encoder, config: TrainConfig, on_stage: OnStage
) -> Inspection:
    """Look at every row, and refuse images that training would stumble over."""
    has_texts = RetrievalMode.parse(config.retrieval_mode).has_texts
    processor = encoder.processor
    inspection = inspect_records(
        rows,
        token_counter(processor) if has_texts else None,
        max_seq_length=processor.max_seq_length if has_texts else 0,
        on_progress=lambda share: on_stage("looking at every row", share),
    )
    broken = inspection.broken_images
    if broken.count:
        others = f"\n  and {broken.count - 1} more images" if broken.count > 1 else ""
        raise DataError(f"{broken.first}{others}\n  {_LEAVE_OUT}")
    return inspection


def _read_training_rows(
    config: TrainConfig, quarantine: Quarantine | None, on_stage: OnStage
) -> Rows:
    """Check every training row; where they are not streamed, the run finds them in the cache."""
    stage = "reading training rows"
    if not config.streaming:
        whole: Rows = load_rows(
            config,
            config.data_path,
            quarantine,
            on_progress=lambda share: on_stage(stage, share),
        )
        return whole
    stream: Rows = load_rows(config, config.data_path, quarantine, streaming=True)
    records, number = iter(stream), 0
    while window := list(islice(records, _STREAM_WINDOW_ROWS)):
        number += len(window)
        on_stage(f"{stage}: {number:,}", None)
        _decode_images(_items_of(window))
    return stream


def _items_measured(data: RunData, config: TrainConfig) -> list[Item]:
    """What validation and test encode, but for held-out rows, which were training rows before."""
    test_task = None if config.test_data_path is None else data.test_task
    tasks = [task for task in (data.validation_task, test_task) if task is not None]
    return [*_items_of(data.validation or []), *(i for task in tasks for i in task.all_items())]


def _items_of(records: Iterable[Record]) -> list[Item]:
    return [item for r in records for item in (r.query, *r.positives, *r.negatives)]


def _decode_images(items: Sequence[Item]) -> None:
    """Raise DataError if an image cannot be decoded."""
    try:
        require_images(items, decode=True)
    except DataError as error:
        raise DataError(f"{error}\n  {_LEAVE_OUT}") from None


def _first_row(batch: Mapping[str, Any], processor: Any, rows: Rows) -> list[SampleItem]:
    """The query of the first row with its positives and negatives."""
    counts = {"query": 1}
    for role in ROLES:
        if f"counts_{role}" in batch:
            counts[role] = int(batch[f"counts_{role}"][0])
    seen = [
        _item_as_seen(role, row, batch, processor)
        for role, count in counts.items()
        for row in range(count)
    ]
    if not isinstance(rows, RecordDataset):
        return seen
    record = rows[batch["row_index"][0]]
    items = (record.query, *record.positives, *record.negatives)
    return [
        replace(sample, image="" if item.image is None else str(item.image))
        for sample, item in zip(seen, items, strict=True)
    ]


def _item_as_seen(role: str, row: int, batch: Mapping[str, Any], processor: Any) -> SampleItem:
    prefix = f"{role}_"
    inputs = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
    mask, ids = inputs.pop("attention_mask", None), inputs.pop("input_ids", None)
    items = len(batch[f"ids_{role}"])
    shapes = {
        # Of inputs that are not one row for each item, such as packed patches, all.
        name: tuple(tensor.shape[1:] if len(tensor) == items else tensor.shape)
        for name, tensor in inputs.items()
        if ids is None or tensor.shape != ids.shape
    }
    if ids is None:
        return SampleItem(role, shapes=shapes)
    # A model that must see its padding has no mask.
    real = (ids[row] if mask is None else ids[row][mask[row].bool()]).tolist()
    return SampleItem(role, processor.tokenizer.decode(real), len(real), shapes=shapes)
