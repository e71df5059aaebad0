"""The user's own model, loss and rows, put together for one case by the code that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional

from vembed.config import TrainConfig
from vembed.data import Record, RecordDataset, StatelessBatchSampler, collate_share
from vembed.data.sampler import own_share
from vembed.errors import ConfigError
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.run import build_accelerator, build_trainer, check_mode
from vembed.training.run_data import Rows, RunData, build_quarantine, load_rows
from vembed.training.trainer import Batch, Trainer
from vembed.training.verification.cases import LORA, Case, Scope, Variation, settings_of

if TYPE_CHECKING:
    from vembed.data import RecordLoader

_ADAPTER_SCALE = 0.02


class DoesNotApplyError(Exception):
    """A case that this model cannot have; the text says why."""


@dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        config: The user's settings.
        scope: How much of it.
        rows: The training rows.
        micro_batches: Two global micro-batches, drawn as a run draws its first ones.
    """

    config: TrainConfig
    scope: Scope
    rows: Rows
    micro_batches: list[list[Record]]

    def records(self, variation: Variation, count: int) -> list[list[Record]]:
        """The first `count` global micro-batches, as the variation has them.

        Raises:
            DoesNotApplyError: if without a row there is none.
        """
        chosen = self.micro_batches[:count]
        if not variation.uneven:
            return chosen
        last = chosen[-1][:-1]
        if not last:
            raise DoesNotApplyError("without one of 1 rows there is none")
        return [*chosen[:-1], last]


@dataclass(frozen=True)
class Prepared:
    """A case, ready to take its step.

    Attributes:
        trainer: Prepared, in the precision of the case.
        records: Global micro-batches.
        collate: The run's own collator.
        seed: Process p draws its random numbers from `seed + p` on.
    """

    trainer: Trainer
    records: list[list[Record]]
    collate: Callable[[list[Record]], dict[str, Any]]
    seed: int

    def whole(self) -> list[Batch]:
        """The global micro-batches."""
        return [self.collate(records) for records in self.records]

    def shares(self, process_index: int, process_count: int) -> list[Batch]:
        """What one of several processes takes of each global micro-batch."""
        return [
            collate_share(
                self.collate, own_share(records, process_index, process_count), records[0]
            )
            for records in self.records
        ]


def load_subject(config: TrainConfig, scope: Scope) -> Subject:
    """Read the rows.

    Raises:
        DataError: if there are no rows, or one cannot be used.
    """
    rows = load_rows(config, config.data_path, build_quarantine(config), streaming=config.streaming)
    size = scope.pairs * scope.processes
    if isinstance(rows, RecordDataset):
        order = StatelessBatchSampler(len(rows), min(size, len(rows)), seed=config.seed)
        micro_batches = [rows.__getitems__(batch) for batch in islice(order, 2)]
    else:
        stream = iter(rows)
        micro_batches = [list(islice(stream, size)) for _ in range(2)]
    first, second = [*micro_batches, []][:2]
    # Of few rows, the second micro-batch is the first one the other way round.
    return Subject(config, scope, rows, [first, second if len(second) == size else first[::-1]])


def prepare(subject: Subject, case: Case) -> Prepared:
    """Build model, loss and Trainer of a case, as a run would. Every process must call it.

    Raises:
        ConfigError: if settings do not fit the model or the rows.
        DoesNotApplyError: if the model cannot be varied in this way.
    """
    config = settings_of(subject.config, subject.scope, case)
    records = subject.records(case.variation, config.gradient_accumulation_steps)
    accelerator = _accelerator(config)
    set_seed(config.seed)
    encoder = build_model(config)
    check_mode(encoder, config)
    try:
        apply_lora(encoder, config, accelerator)
    except ConfigError as error:
        if case.variation is not LORA or subject.config.use_lora:
            raise
        raise DoesNotApplyError(str(error)) from error
    trainer = build_trainer(config, accelerator, encoder, RunData(subject.rows))
    modules = (
        encoder,
        trainer.criterion,
        trainer.teacher_model,
        trainer.distillation_loss_fn,
        None if trainer.guide is None else trainer.guide.encoder,
    )
    dtype = getattr(torch, subject.scope.dtype_of(case.variation))
    for module in modules:
        if isinstance(module, nn.Module):
            module.to(dtype)
    vary(encoder, case.variation)
    if case.variation.loss_scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=case.variation.loss_scale)
    trainer.prepare()
    loader = cast("RecordLoader", trainer.dataloader)
    return Prepared(trainer, records, loader.collator, config.seed)


def vary(encoder: nn.Module, variation: Variation) -> None:
    """Set the dropout of an encoder as the variation says, and give adapters a gradient."""
    for module in encoder.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and not variation.own_dropout:
            module.p = 0.0
        if isinstance(module, nn.Embedding) and variation.extra_dropout:
            module.register_forward_hook(_Dropout(variation.extra_dropout))
    for name, parameter in encoder.named_parameters():
        # LoRA starts with B = 0, where the gradient of A is 0 whatever is done to it.
        if parameter.requires_grad and "lora_" in name and not parameter.any():
            nn.init.normal_(parameter, std=_ADAPTER_SCALE)


class _Dropout:
    """A forward hook that drops elements of a module's output while it trains."""

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def __call__(self, module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, self._probability, training=module.training)


def _accelerator(config: TrainConfig) -> Accelerator:
    # An Accelerator keeps its precision in class attributes, for all that are made later.
    AcceleratorState._reset_state()
    return build_accelerator(config)
