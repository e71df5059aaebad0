"""Try out a run without training: read all the data, look at it, take one step, write nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from vembed.config import TrainConfig
from vembed.data import Inspection, RecordDataset, inspect_records, token_counter
from vembed.training.data_utils import ROLES
from vembed.training.first_step import FirstStepReport, FirstStepWatch, advise
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.run import (
    build_accelerator,
    build_trainer,
    check_mode,
    check_output_dir,
    describe_run,
    raise_problems,
)
from vembed.training.run_data import Rows, load_rows, load_run_data
from vembed.training.training_loop import optimizer_step

OnStage = Callable[[str, float | None], None]
"""`(stage, share)`: what is being done, and how much of it is, from 0 to 1; None when unknown."""

_STREAM_PROGRESS_ROWS = 1000


@dataclass(frozen=True)
class SampleText:
    """One text of a batch, read back from its tokens: prompts and truncation included."""

    role: str
    text: str
    tokens: int


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        facts: Model, sizes, steps and device of the run, by label.
        inspection: What the training rows are like; None for a stream.
        sample: The texts of the first row of the first batch.
        first_step: What one optimizer step was like.
        advice: What looks wrong in it, naming the setting.
        step_seconds: Time of that step, which is longer than that of later ones.
    """

    facts: Mapping[str, str]
    inspection: Inspection | None
    sample: list[SampleText]
    first_step: FirstStepReport
    advice: list[str]
    step_seconds: float


def check_run(config: TrainConfig, on_stage: OnStage) -> CheckResult:
    """Do everything that a run does up to its first step, and that step, in memory.

    Collective: every process must call it with the same config.

    Raises:
        ConfigError: if settings cannot work, together or with the model or the data.
        DataError: about the first row that cannot be used, and how many more there are.
    """
    raise_problems(config)
    check_output_dir(config)
    if config.num_processes is None:
        # One process holds all the weights; how they are shared out changes nothing else.
        config = config.model_copy(update={"distributed_strategy": "ddp"})
    accelerator = build_accelerator(config)
    on_stage("loading the model", None)
    encoder = build_model(config).to(accelerator.device)
    check_mode(encoder, config)
    rows = _read_training_rows(config, on_stage)
    on_stage("reading validation and test rows", None)
    data = load_run_data(config)
    inspection = None
    if isinstance(rows, RecordDataset):
        inspection = inspect_records(
            rows,
            token_counter(encoder.processor),
            max_seq_length=encoder.processor.max_seq_length,
            on_progress=lambda share: on_stage("counting tokens", share),
        )
    on_stage("taking one step", None)
    apply_lora(encoder, config, accelerator)
    trainer = build_trainer(config, accelerator, encoder, data)
    trainer.prepare()
    facts = describe_run(trainer, encoder, data)
    group = list(islice(trainer.dataloader, config.gradient_accumulation_steps))
    sample = _first_row(group[0], encoder.processor.tokenizer)
    started = time.perf_counter()
    watch, reports = FirstStepWatch(trainer), []
    optimizer_step(trainer, group, lambda: reports.append(watch.report()))
    return CheckResult(
        facts=facts,
        inspection=inspection,
        sample=sample,
        first_step=reports[0],
        advice=[advice.text for advice in advise(reports[0])],
        step_seconds=time.perf_counter() - started,
    )


def _read_training_rows(config: TrainConfig, on_stage: OnStage) -> Rows:
    """Check every training row; where they are not streamed, the run finds them in the cache."""
    stage = "reading training rows"
    if not config.streaming:
        whole: Rows = load_rows(
            config, config.data_path, on_progress=lambda share: on_stage(stage, share)
        )
        return whole
    stream: Rows = load_rows(config, config.data_path, streaming=True)
    for number, _ in enumerate(iter(stream), 1):
        if number % _STREAM_PROGRESS_ROWS == 0:
            on_stage(f"{stage}: {number:,}", None)
    return stream


def _first_row(batch: Mapping[str, Any], tokenizer: Any) -> list[SampleText]:
    """The query of the first row with its positives and negatives."""
    counts = {"query": 1}
    for role in ROLES:
        if f"counts_{role}" in batch:
            counts[role] = int(batch[f"counts_{role}"][0])
    texts = []
    for role, count in counts.items():
        ids, mask = batch[f"{role}_input_ids"], batch[f"{role}_attention_mask"]
        texts += [_read_back(role, ids[row], mask[row], tokenizer) for row in range(count)]
    return texts


def _read_back(role: str, ids_T: Tensor, mask_T: Tensor, tokenizer: Any) -> SampleText:  # noqa: N803
    real = ids_T[mask_T.bool()].tolist()
    return SampleText(role, tokenizer.decode(real), len(real))
