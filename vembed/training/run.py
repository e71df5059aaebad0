"""A whole run: build the parts, measure, train, measure again, report. Programs only call this."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch.utils.data import DataLoader

from vembed.chunking import chunk_tokens_on
from vembed.config import TrainConfig, check
from vembed.data import Collator, RecordDataset
from vembed.data.quarantine import FILE_NAME as QUARANTINE_FILE
from vembed.distributed import fail_together
from vembed.errors import ConfigError
from vembed.evaluation import EvalResult, EvalTask, ReducedTask, Reduction
from vembed.losses import (
    LOSSES,
    Criterion,
    build_criterion,
    check_embeddings,
    check_row_fields,
    check_scores,
    missing_fields,
)
from vembed.losses.matryoshka import Matryoshka, complete_dims, innermost
from vembed.models import check_layers, load_encoder
from vembed.models.checkpoint_format import NO_POOLING
from vembed.models.protocol import Encoder
from vembed.modes import RetrievalMode, all_modes
from vembed.registry import accepted_arguments, resolve
from vembed.training.console import configure_logging
from vembed.training.evaluator import Evaluator, sharded_encode
from vembed.training.guide import Collate, Guide, build_guide
from vembed.training.image_cache import cache_images
from vembed.training.launch_check import check_process_count, check_strategy, check_supervised
from vembed.training.learned_scale import resolve_temperature
from vembed.training.loss_files import load_losses
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.optimizer_builder import (
    build_optimizer,
    build_scheduler,
    describe_groups,
    resolve_tracker,
)
from vembed.training.outcome import RunResult, prove, report, show
from vembed.training.output_dir import check_output_dir, claim_output_dir
from vembed.training.output_lock import OutputLock
from vembed.training.parts import describe_trainable
from vembed.training.resume import check_same_run, find_start
from vembed.training.rotation import BEST, FINAL
from vembed.training.run_data import (
    RunData,
    build_train_loader,
    build_validation_loader,
    load_run_data,
)
from vembed.training.teaching.build import (
    build_teaching,
    check_distillation_fields,
    fields_of_teacher,
)
from vembed.training.teaching.cache import TeacherCache
from vembed.training.trackers import start_trackers, stop_trackers
from vembed.training.trainer import Trainer
from vembed.training.training_loop import StepPlan

logger = logging.getLogger(__name__)


def run_training(config: TrainConfig | Mapping[str, Any]) -> RunResult:
    """Train as the config says; measure the test set before and after; write the report.

    Collective: every process must call it with the same config.

    Raises:
        ConfigError: if settings cannot work, together or with the model or the data.
        DataError: if a row cannot be used.
    """
    config = TrainConfig.coerce(config)
    raise_problems(config)
    check_supervised(config)
    accelerator = build_accelerator(config)
    configure_logging(main_process=accelerator.is_main_process)
    lock = OutputLock(Path(config.output_dir), wait_s=config.grace_period_s)
    with lock if accelerator.is_main_process else nullcontext():
        return _run(config, accelerator, lock)


def _run(config: TrainConfig, accelerator: Accelerator, lock: OutputLock) -> RunResult:
    check_output_dir(config)
    with fail_together(accelerator.device):
        if accelerator.is_main_process:
            lock.take()
    run = set_up(config, accelerator)
    trainer, encoder, data = run.trainer, run.encoder, run.data
    claim_output_dir(config, accelerator, run.start)
    _tell_bad_records(data, config, accelerator)
    _announce(trainer, encoder, data)
    before = _measure(data.test_task, encoder, accelerator, config)
    seconds = train(trainer, run.start)
    model_path = chosen_model(Path(config.output_dir))
    after = None
    if before is not None:
        trained = load_encoder(
            str(model_path),
            # Of an encoder of the user's own, the folder does not say what reads it.
            encoder_mode=config.encoder_mode,
            trust_remote_code=config.trust_remote_code,
        ).to(accelerator.device)
        after = _measure(data.test_task, trained, accelerator, config)
    result = RunResult(
        model_path,
        trainer.state,
        seconds,
        prove(before, after),
        failed_saves=tuple(trainer.saves.failed),
    )
    if accelerator.is_main_process:
        result = report(result, config, describe_run(trainer, encoder, data))
        show(result)
    accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class Run:
    """The parts of a run that has not begun.

    Attributes:
        trainer: Not prepared yet.
        encoder: What it trains.
        data: Rows and tasks.
        start: The checkpoint that it goes on from; None for the beginning.
    """

    trainer: Trainer
    encoder: Encoder
    data: RunData
    start: Path | None


def set_up(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Build every part of a run, and find where it starts; `output_dir` is not written to yet.

    Collective: every process must call it with the same config.

    Raises:
        ConfigError: if settings cannot work, together or with the model or the data.
        CheckpointError: if the checkpoint to go on from cannot be used.
        DataError: if a row cannot be used.
    """
    check_output_dir(config)
    start = find_start(config, accelerator)
    set_seed(config.seed)
    encoder = build_model(config).to(accelerator.device)
    check_mode(encoder, config)
    data = _load_in_turn(config, accelerator)
    apply_lora(encoder, config, accelerator)
    trainer = build_trainer(config, accelerator, encoder, data)
    if start is not None:
        check_same_run(start, trainer, StepPlan.of(trainer).identify(trainer))
    return Run(trainer, encoder, data, start)


def _load_in_turn(config: TrainConfig, accelerator: Accelerator) -> RunData:
    """Read the data on the main process first: the others then find it in the cache.

    Unlike `accelerator.main_process_first()`, a process that raises ends the others too, instead of
    leaving them with a broken connection.
    """
    data = None
    with fail_together(accelerator.device):
        if accelerator.is_main_process:
            data = _load(config)
    with fail_together(accelerator.device):
        return data or _load(config)


def _load(config: TrainConfig) -> RunData:
    """The rows, all of which the teacher has taught where `teacher_cache` is set."""
    data = load_run_data(config)
    require_taught(config, data)
    return data


def raise_problems(config: TrainConfig) -> None:
    """Raise ConfigError with everything that is wrong with the settings, as far as they tell."""
    problems = check(config)
    if problems:
        raise ConfigError("\n".join(problems))


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator that the settings ask for.

    Raises:
        ConfigError: if the precision cannot be had on this device.
        DistributedError: if fewer processes take part than were asked for or launched, or the
            launcher was asked for a strategy that is not vembed's to run.
    """
    check_strategy()
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and config.mixed_precision == "fp16":
        raise ConfigError("mixed_precision: fp16 needs an accelerator; on a CPU use bf16 or no")
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=config.ddp_find_unused_parameters, broadcast_buffers=False
    )
    # The watchdog knows more of a step that hangs, and speaks first.
    timeout = timedelta(seconds=config.process_timeout_s + 5)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=config.mixed_precision,
        log_with=_trackers(config).log_with or None,
        project_dir=config.output_dir,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=timeout)],
    )
    check_process_count(config, accelerator.num_processes)
    return accelerator


def check_mode(encoder: Encoder, config: TrainConfig, label: str | None = None) -> None:
    """Raise ConfigError unless the encoder can embed both sides of the retrieval mode.

    Args:
        encoder: The model to train, or another that sees the same rows.
        config: The settings.
        label: What that other is called.
    """
    mode = RetrievalMode.parse(config.retrieval_mode)
    if not {mode.query, mode.document} <= encoder.modalities:
        fitting = ", ".join(str(m) for m in all_modes(encoder.modalities))
        raise ConfigError(
            f"retrieval_mode: {mode} does not fit {label or config.model_label!r} (model_type "
            f"{encoder.model_type}), which can do: {fitting}"
        )


def require_taught(config: TrainConfig, data: RunData) -> None:
    """Raise ConfigError if `teacher_cache` lacks an item of the training rows."""
    if config.teacher_cache is not None:
        TeacherCache.open(config).require(data.train)


def build_trainer(
    config: TrainConfig, accelerator: Accelerator, encoder: Encoder, data: RunData
) -> Trainer:
    """Every part of a run, put together.

    Raises:
        ConfigError: if the loss does not fit the encoder, or needs row fields that the data does
            not have.
    """
    resolve_temperature(config, encoder)
    cache_images(encoder, config)
    criterion = build_matryoshka(config, encoder, build_loss(config, encoder, data))
    data = _with_training_labels(data, criterion)
    guide = build_guide(config, accelerator.device)
    teaching = build_teaching(config, encoder, criterion)
    check_distillation_fields(teaching, data.train.fields)
    if config.adapter_path is not None:
        load_losses(config.adapter_path, criterion, teaching.loss, missing_ok=True)
    collate: Collate = teaching.collator(encoder)
    val_collate: Collate = Collator(encoder.processor)
    if guide is not None:
        check_mode(guide.encoder, config, label=config.guide_model_name)
        collate, val_collate = guide.collator(collate), guide.collator(val_collate)
    train_loader = build_train_loader(
        config, data, collate, accelerator, batch_sampler=choose_batch_sampler(config, criterion)
    )
    optimizer = build_optimizer(encoder, config, criterion, teaching.loss)
    trainer = Trainer(
        model=encoder,
        optimizer=optimizer,
        dataloader=train_loader,
        criterion=criterion,
        accelerator=accelerator,
        config=config,
        teacher_model=teaching.model,
        distillation_loss_fn=teaching.loss,
        evaluator=_build_evaluator(config, accelerator, encoder, criterion, data, guide=guide),
        val_dataloader=_build_validation_loader(config, data, val_collate, accelerator, criterion),
        guide=guide,
    )  # fmt: skip
    plan = StepPlan.of(trainer)
    trainer.scheduler, _ = build_scheduler(
        optimizer, config, num_epochs=1, steps_per_epoch=plan.total
    )
    for line in describe_groups(optimizer):
        logger.info("%-14s %s", "optimizer", line)
    for pattern, step in config.unfreeze_at_step.items():
        if step >= plan.total:
            logger.warning(
                "unfreeze_at_step: %s stays frozen, because the run has %d steps",
                pattern,
                plan.total,
            )
    return trainer


def build_loss(config: TrainConfig, encoder: Encoder, data: RunData) -> Criterion:
    """The loss that the settings ask for, which fits the rows.

    Raises:
        ConfigError: if it needs row fields that neither the data has nor a teacher adds, or other
            scores.
    """
    rows = data.train
    fields, tokens = rows.fields | fields_of_teacher(config), encoder.pooling_method == NO_POOLING
    gaps = rows.gaps if isinstance(rows, RecordDataset) else None
    loss = resolve("loss_type", config.loss_type, LOSSES)
    check_row_fields(loss, fields, tokens=tokens, gaps=gaps)
    criterion = build_criterion(
        config.loss_type,
        temperature=config.temperature,
        learn_temperature=config.learn_temperature,
        bidirectional=config.loss_bidirectional,
        tile_size=config.loss_tile_size,
        guided=config.guide_model_name is not None,
        num_classes=len(rows.label_names) or None if isinstance(rows, RecordDataset) else None,
        embedding_dim=getattr(encoder, "embedding_dim", None),
        **config.loss_kwargs,
    )
    check_embeddings(criterion, tokens=tokens)
    # Which fields it needs may hang on its arguments.
    check_row_fields(criterion, fields, tokens=tokens, gaps=gaps)
    uses_scores = "score" in getattr(criterion, "required_fields", ())
    if "score" not in rows.fields:
        return criterion
    if not uses_scores:
        logger.warning(
            "every row has a score, which loss_type %s does not look at: pairs of a low score "
            "train as positives too. loss_type: cosent uses it",
            config.loss_type,
        )
    elif isinstance(rows, RecordDataset):
        check_scores(criterion, **rows.score_bounds._asdict())
    return criterion


def build_matryoshka(config: TrainConfig, encoder: Encoder, criterion: Criterion) -> Criterion:
    """The loss, on prefixes of the embeddings too where the settings say so (`use_mrl`).

    Raises:
        ConfigError: if the dimensions do not fit the model, or the loss has no such form.
    """
    if not config.use_mrl:
        return criterion
    weights = complete_dims(
        config.mrl_dims, config.mrl_weights, embedding_dim=encoder.embedding_dim
    )
    if config.mrl_dims is not None and len(weights) > len(config.mrl_dims):
        logger.info(
            "mrl_dims lacks the whole size of the vectors, %d: it is trained too, with weight 1",
            encoder.embedding_dim,
        )
    layers = config.mrl_layers or []
    if layers:
        check_layers(encoder, layers)
    return Matryoshka(criterion, [*weights], [*weights.values()], layers)


def at_dimensions(task: EvalTask, encoder: Encoder, config: TrainConfig) -> EvalTask:
    """The task, with its main metric at each dimension that a Matryoshka trains."""
    if not config.use_mrl:
        return task
    whole = encoder.embedding_dim
    dims = complete_dims(config.mrl_dims, config.mrl_weights, embedding_dim=whole)
    return ReducedTask(task, [Reduction(dim) for dim in dims if dim < whole])


def choose_batch_sampler(config: TrainConfig, criterion: Criterion) -> str:
    """How rows are put into batches: as the user says, or as the loss needs it."""
    if config.batch_sampler != "auto":
        return config.batch_sampler
    needed = getattr(innermost(criterion), "batch_sampler", "random")
    if config.streaming and needed != "random":
        logger.warning(
            "loss_type %s wants batches that are %s, which a stream cannot give: they are made of "
            "rows as they come",
            config.loss_type,
            needed,
        )
        return "random"
    return str(needed)


def _with_training_labels(data: RunData, criterion: Criterion) -> RunData:
    """Validation rows with the class numbers of the training rows, for a loss that has classes.

    Raises:
        DataError: if a label of the validation rows is not among those of the training rows.
    """
    has_classes = bool(accepted_arguments(type(innermost(criterion)), {"num_classes": None}))
    if data.validation is None or not has_classes or not isinstance(data.train, RecordDataset):
        return data
    return replace(data, validation=data.validation.with_labels_of(data.train))


def chosen_model(output_dir: Path) -> Path:
    """The model folder that a run recommends: the best by validation, else the final one."""
    best = output_dir / BEST
    return best if best.is_dir() else output_dir / FINAL


def describe_run(trainer: Trainer, encoder: Encoder, data: RunData) -> dict[str, str]:
    """The facts of a run, for its first log lines and its report."""
    config, accelerator = trainer.config, trainer.accelerator
    plan = StepPlan.of(trainer)
    per_step = config.batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    trainable = sum(p.numel() for p in trainer.parameters())
    rows = f"{len(data.train):,} rows" if isinstance(data.train, RecordDataset) else "a stream"
    joining = trainer.describe_unfreezing()
    encoder_facts = ", ".join(f"{name} {value}" for name, value in encoder.describe().items())
    return {
        "model": f"{config.model_label} ({encoder_facts})",
        "parameters": describe_trainable(encoder, trainable),
        **({"frozen at first": joining} if joining else {}),
        "training data": f"{rows} from {config.data_path}",
        "test data": data.test_source or "none",
        "batch": f"{per_step} pairs per step = {config.batch_size} x "
        f"{accelerator.num_processes} processes x "
        f"{config.gradient_accumulation_steps} micro-batches",
        "steps": f"{plan.total:,}",
        "device": f"{accelerator.device}, mixed precision {config.mixed_precision}"
        + (f", {config.distributed_strategy}" if accelerator.num_processes > 1 else ""),
    }


def _build_evaluator(
    config: TrainConfig,
    accelerator: Accelerator,
    encoder: Encoder,
    criterion: Any,
    data: RunData,
    *,
    guide: Guide | None,
) -> Evaluator | None:
    if data.validation is None:
        return None
    task = data.validation_task
    return Evaluator(
        encoder,
        criterion,
        accelerator,
        retrieval_mode=config.retrieval_mode,
        log_with=config.report_to or None,
        task=task and at_dimensions(task, encoder, config),
        chunk_tokens=chunk_tokens_on(accelerator.device.type, config.chunk_tokens),
        guide=guide,
    )


def _build_validation_loader(
    config: TrainConfig, data: RunData, collate: Any, accelerator: Accelerator, criterion: Any
) -> DataLoader[Any] | None:
    """Batches for the validation loss; None where the rows can be measured, but not by the loss.

    Pairs may well be judged by labelled rows, or the other way round.
    """
    loader = build_validation_loader(config, data, collate, accelerator)
    if data.validation is None:
        return loader
    missing = missing_fields(criterion, data.validation.fields)
    if missing:
        logger.warning(
            "val_data_path: its rows have no %s, which loss_type %s needs: metrics are measured, "
            "the validation loss is not",
            " and ".join(missing),
            config.loss_type,
        )
    return None if missing else loader


def _tell_bad_records(data: RunData, config: TrainConfig, accelerator: Accelerator) -> None:
    """Write down what was left out; from then on, streams add to it."""
    if data.quarantine is None or not accelerator.is_main_process:
        return
    path = Path(config.output_dir) / QUARANTINE_FILE
    data.quarantine.write(path)
    if bad := data.bad_records:
        logger.warning(
            "%d rows cannot be used and are left out (%s), the first: %s: %s: %s",
            len(bad), path, bad[0].where, bad[0].field, bad[0].reason,
        )  # fmt: skip


def _announce(trainer: Trainer, encoder: Encoder, data: RunData) -> None:
    for name, fact in describe_run(trainer, encoder, data).items():
        logger.info("%-14s %s", name, fact)
    for warning in data.warnings if trainer.accelerator.is_main_process else ():
        logger.warning("%s", warning)


def _measure(
    task: EvalTask | None, encoder: Encoder, accelerator: Accelerator, config: TrainConfig
) -> EvalResult | None:
    if task is None:
        return None
    task = at_dimensions(task, encoder, config)
    logger.info("measuring %s", task.name)
    tokens = chunk_tokens_on(accelerator.device.type, config.chunk_tokens)
    return task.evaluate(sharded_encode(encoder, accelerator, tokens))


def train(trainer: Trainer, start: Path | None) -> float:
    """Train with the trackers running, from a checkpoint or the beginning; returns the seconds."""
    config, accelerator = trainer.config, trainer.accelerator
    start_trackers(
        accelerator,
        project_name=config.project_name,
        settings=config.model_dump(mode="json"),
        init_kwargs=_trackers(config).init_kwargs,
    )
    # Dropout of one process must not repeat another's.
    set_seed(config.seed, device_specific=True)
    started = time.perf_counter()
    try:
        trainer.train(resume_from=start)
    finally:
        stop_trackers(accelerator)
    return time.perf_counter() - started


def _trackers(config: TrainConfig) -> Any:
    return resolve_tracker(
        config.report_to,
        run_name=config.run_name or Path(config.output_dir).name,
        tags=config.tags,
        output_dir=config.output_dir,
    )
