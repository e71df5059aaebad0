"""The low-level trainer: holds the parts of a run and computes the gradient of a micro-batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vembed.chunking import chunk_tokens_on
from vembed.config import TrainConfig
from vembed.data import RecordLoader
from vembed.distributed import reduce_gradients
from vembed.errors import ConfigError
from vembed.losses.matryoshka import layers_of
from vembed.training.adapter_gate import AdapterWatch, Probe
from vembed.training.compiling import compile_layers
from vembed.training.data_utils import (
    Inputs,
    embed,
    maybe_first,
    own_rows,
    place_batch,
    row_keys,
    row_lengths,
    teacher_batch,
    teacher_vectors,
    unpack_extras,
    unpack_roles,
)
from vembed.training.evaluator import Evaluator
from vembed.training.freezing import Unfreezing
from vembed.training.gradient_cache import GradientCache
from vembed.training.guide import Guide
from vembed.training.learned_scale import keep_in_model
from vembed.training.model_builder import enable_static_graph
from vembed.training.objective import Embeddings, Objective, StepLoss
from vembed.training.optimizer_builder import trainable_parameters
from vembed.training.saves import Saves
from vembed.training.sharding import ShardedEncoder, adopt_shares, clip_gradients, own_parts
from vembed.training.table_gradients import large_tables, merged_table_gradients
from vembed.training.training_loop import TrainState, run_training_loop

Batch = Mapping[str, Any]

logger = logging.getLogger(__name__)

_DEFAULT_CHUNK_SIZE = 32
_SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves behind beside the gradients: detached scalars of this process.

    Attributes:
        loss: What was differentiated.
        parts: Its terms by name.
        weights: What each term is multiplied by.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Runs optimizer steps over a dataloader.

    Subclass it and override `_step_standard` to change how one micro-batch is trained on. (For the
    three-line Python API see `vembed.trainer.VEmbedFactoryTrainer`.)

    Model, optimizer and a dataloader that is not sharded yet are prepared by the Accelerator when
    training starts; the scheduler is not, because Accelerate would advance it once per process.
    """

    def __init__(  # noqa: PLR0917 - the documented constructor
        self,
        model: nn.Module,
        optimizer: Optimizer,
        dataloader: Iterable[Batch],
        criterion: Callable[..., Tensor],
        accelerator: Accelerator,
        config: TrainConfig | Mapping[str, Any],
        scheduler: LRScheduler | None = None,
        teacher_model: nn.Module | None = None,
        distillation_loss_fn: Callable[..., Tensor] | None = None,
        evaluator: Evaluator | None = None,
        val_dataloader: Iterable[Batch] | None = None,
        *,
        guide: Guide | None = None,
    ) -> None:
        """Assign and check.

        Args:
            model: The encoder: `model(**inputs) -> [B, D]`.
            optimizer: Over the trainable parameters of the model and of the criterion.
            dataloader: Batches as `vembed.data.Collator` makes them.
            criterion: The loss; see `vembed.losses`.
            accelerator: Device, processes, precision. Its own gradient accumulation must be 1.
            config: Settings of the run, or a plain dict of them.
            scheduler: Advanced once per optimizer step; None keeps the learning rate.
            teacher_model: Frozen encoder to distil from.
            distillation_loss_fn: `fn(student, teacher, **extras)`; required with a teacher. Without
                one, batches bring the teacher's embeddings or `teacher_scores`.
            evaluator: Measures the model during training.
            val_dataloader: Batches for the evaluator's loss.
            guide: Embeds each batch for a guided criterion; batches must bring its inputs.

        Raises:
            ConfigError: if the parts do not fit together.
        """
        self.config = TrainConfig.coerce(config)
        _check_accelerator(accelerator)
        _check_optimizer_covers(
            optimizer, model=model, criterion=criterion, distillation_loss_fn=distillation_loss_fn
        )
        self._check_step_and_teacher(teacher_model, distillation_loss_fn)
        self.model = model
        self.optimizer = optimizer
        self.dataloader = dataloader
        self.criterion = criterion
        self.accelerator = accelerator
        self.scheduler = scheduler
        self.teacher_model = teacher_model
        self.distillation_loss_fn = distillation_loss_fn
        self.evaluator = evaluator
        self.val_dataloader = val_dataloader
        self.guide = guide
        self.state = TrainState()
        alpha = self.config.distillation_alpha if distillation_loss_fn is not None else 1.0
        self.objective = Objective(criterion, distillation_loss_fn, alpha)
        tokens = chunk_tokens_on(accelerator.device.type, self.config.chunk_tokens)
        self.plain_step = GradientCache(chunk_tokens=tokens, keep="all")
        self.gradient_cache = build_gradient_cache(self.config)
        self._clamp = getattr(criterion, "clamp", None)
        self._unfreezing = Unfreezing(model, criterion, self.config.unfreeze_at_step)
        self._adapter_watch = AdapterWatch(model)
        self._sharded: ShardedEncoder | None = None
        self._tables: list[nn.Embedding] = []
        self._unwrapped: tuple[nn.Module, nn.Module] | None = None
        self.saves = Saves(self)

    def prepare(self) -> None:
        """Place every part on its device and process; `train` does it, and a second call is free.

        Collective: every process must call it.
        """
        accelerator = self.accelerator
        if self._sharded is None:
            self._prepare_model()
        if self._sharded is None and not self._reduces_in_backward:
            self._tables = large_tables(self.encoder)
        compile_layers(self.encoder, self.config)
        self.optimizer = accelerator.prepare(self.optimizer)
        if accelerator.num_processes > 1 and not isinstance(self.dataloader, RecordLoader):
            self.dataloader = accelerator.prepare(self.dataloader)
        if self.teacher_model is not None:
            self.teacher_model.requires_grad_(False).eval().to(accelerator.device)
        if self.guide is not None:
            self.guide.encoder.to(accelerator.device)
        for function in (self.criterion, self.distillation_loss_fn):
            if isinstance(function, nn.Module):
                function.to(accelerator.device)
        enable_static_graph(self.model, self.config, accelerator)
        self.unfreeze(self.state.step)

    def train(self, *, resume_from: str | Path | None = None) -> TrainState:
        """Train to the end of the last epoch, or for `max_steps`.

        Collective: every process must call it.

        Args:
            resume_from: A checkpoint (`checkpoints/step-...`) of a run with the same parts, to go
                on from as if it had never ended.

        Returns:
            Where the run stands at its end; also in `self.state`.
        """
        self.prepare()
        start = None if resume_from is None else Path(resume_from)
        self.state = run_training_loop(self, start)
        return self.state

    def step(self, batch: Batch) -> StepOutput:
        """Add the gradient of one micro-batch to the parameters' `.grad`.

        Args:
            batch: As the dataloader gives it, on any device.
        """
        placed = place_batch(batch, self.accelerator.device)
        if self._sharded is not None:
            self._sharded.gather()
        if self.config.use_gradient_cache:
            return self._step_cached(placed)
        output = self._step_standard(placed)
        if not isinstance(output, StepOutput):
            raise TypeError(
                "_step_standard must return a StepOutput, with backward already done. "
                f"Received: {type(output).__name__}"
            )
        return output

    def reduce_gradients(self, micro_batches: int = 1) -> None:
        """Average gradients over micro-batches and processes: once per optimizer step.

        DDP's own reduction depends on which parameters the last backward pass used; this does not.

        Collective: every process must call it.

        Args:
            micro_batches: How many calls of `step` the gradients are the sum of.

        Raises:
            ConfigError: if a trainable parameter got no gradient anywhere and
                `ddp_find_unused_parameters` is off.
        """
        reduced: set[int] = set()
        if self._sharded is not None:
            self._sharded.reduce_gradients()
            reduced = {id(p) for p in self.encoder.parameters() if p.ndim}
        elif self._reduces_in_backward:
            reduced = {id(p) for p in self.encoder.parameters()}
        trained = self.parameters()
        reduce_gradients(p for p in trained if id(p) not in reduced)
        grads = [p.grad for p in trained if p.grad is not None]
        if micro_batches > 1:
            torch._foreach_div_(own_parts(grads), micro_batches)
        if len(grads) < len(trained) and not self.config.ddp_find_unused_parameters:
            self._require_gradients()

    def clip_gradients(self) -> Tensor:
        """Scale the reduced gradients to a norm of at most `max_grad_norm`.

        Collective: every process must call it.

        Returns:
            The norm of all gradients before.
        """
        limit = self.config.max_grad_norm or math.inf
        if self._sharded is not None:
            return clip_gradients(self.parameters(), limit)
        return torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters(), limit))

    def after_update(self) -> None:
        """Bring parameters with a range, such as a temperature, back into it."""
        # Where gradients overflowed, fp16 leaves the step out.
        if not self.accelerator.optimizer_step_was_skipped:
            self._adapter_watch.see_update(self.encoder, self.optimizer)
        if self._clamp is not None:
            self._clamp()

    def unfreeze(self, step: int) -> None:
        """Train what trains after `step` optimizer steps, and nothing else (`unfreeze_at_step`).

        Call it between steps, before the one that follows.
        """
        self._unfreezing.apply(self.encoder, self.criterion, step)

    def describe_unfreezing(self) -> str:
        """How many parameters join at which steps, in words; empty for none."""
        return self._unfreezing.describe(self.encoder, self.criterion)

    def adapter_probe(self) -> Probe | None:
        """What to compare on when adapters are merged; None before the first step."""
        return self._adapter_watch.probe

    @property
    def encoder(self) -> nn.Module:
        """The model without what stands around it for several processes."""
        # Accelerate looks for this at every module, and for a package on the disk: 0.4 ms, which
        # is much for every chunk of a step.
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return self._unwrapped[1]

    def parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter: of the model, the criterion and the distillation loss."""
        return trainable_parameters(self.encoder, self.criterion, self.distillation_loss_fn)

    @property
    def shares_weights(self) -> bool:
        """Whether each process holds a share of the weights only."""
        return self._sharded is not None

    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, the encoder can run on some processes only, or not equally often on all of them.

        Collective: every process must enter it, between steps.
        """
        return nullcontext() if self._sharded is None else self._sharded.whole()

    def model_to_save(self) -> nn.Module | None:
        """The encoder for `save_checkpoint`; with shared-out weights, None off the main process.

        Collective: every process must call it.
        """
        model = self.model if self._sharded is None else self._sharded.plain_copy()
        if model is not None:
            keep_in_model(self.criterion, self.accelerator.unwrap_model(model))
        return model

    def _step_standard(self, batch: Batch) -> StepOutput:
        """One micro-batch: forward, loss, backward. Override it to change the step.

        Add to the gradients with `self.accelerator.backward` and return a StepOutput. The loop
        divides by the number of micro-batches, reduces, clips, steps and logs.
        """
        return self._step_through(self.plain_step, batch)

    def _step_cached(self, batch: Batch) -> StepOutput:
        """One micro-batch through the gradient cache: the same gradient in less memory."""
        return self._step_through(self.gradient_cache, batch)

    def _prepare_model(self) -> None:
        """Place the model, and share its weights or its gradients among processes."""
        accelerator = self.accelerator
        if self.config.distributed_strategy == "ddp":
            self.model = accelerator.prepare(self.model)
            return
        if accelerator.num_processes == 1:
            raise ConfigError(
                f"distributed_strategy: {self.config.distributed_strategy} shares weights out "
                "among processes. Received: one process. Start several, or set ddp"
            )
        # `evaluation_mode` keeps Accelerate from wrapping it; on a CPU it has nothing but DDP.
        self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
        before = list(self.model.parameters())
        self._sharded = ShardedEncoder(self.model, device=accelerator.device)
        adopt_shares(self.optimizer, before, self.model)

    def _step_through(self, cache: GradientCache, batch: Batch) -> StepOutput:
        inputs = unpack_roles(batch, self.config.retrieval_mode)
        lengths = row_lengths(batch, inputs)
        self._adapter_watch.see_batch(inputs, lengths)
        teacher = self._teacher_embeddings(cache, batch)
        extras = self.extras_of(batch)

        def objective(student: Embeddings) -> StepLoss:
            return self.objective(own_rows(student, batch), extras, teacher)

        with merged_table_gradients(self._tables):
            loss = cache.backward(
                encode=self._embed,
                inputs=inputs,
                lengths=lengths,
                keys=row_keys(batch),
                objective=objective,
                backward=self._backward,
            )
        return StepOutput(loss.total, loss.parts, loss.weights)

    def _backward(self, loss: Tensor) -> None:
        """Differentiate the loss; one that is not finite gives gradients that are not.

        Not every function does that by itself (a term may be constant). So the reduced gradient,
        which is the same on every process, tells each of them of a loss that is not finite
        anywhere, and no process has to ask. A finite loss is multiplied by one.
        """
        self.accelerator.backward(loss * (1 + 0 * loss.detach()))

    def extras_of(self, batch: Batch) -> dict[str, Any]:
        """What the objective is told of a batch beside embeddings, a guide's judgement among it.

        Args:
            batch: On the device of the run.
        """
        return unpack_extras(batch) | ({} if self.guide is None else self.guide.embed(batch))

    def _embed(self, inputs: Inputs) -> Tensor:
        """Model inputs of n rows to embeddings [n, D]: the one place that calls the encoder.

        Of a criterion that compares fewer layers too, [n, L, D].
        """
        # Without the DDP wrapper: it would expect every forward to be followed by a reduction.
        encoder = self.model if self._reduces_in_backward else self.encoder
        return embed(encoder, inputs, layers_of(self.criterion))

    @torch.no_grad()
    def _teacher_embeddings(self, cache: GradientCache, batch: Batch) -> Embeddings | None:
        teacher = self.teacher_model
        if given := teacher_vectors(batch):
            return given
        if teacher is None:
            return None
        own = teacher_batch(batch)
        inputs = unpack_roles(own, self.config.retrieval_mode)
        embeddings = cache.embed(
            encode=lambda inputs: maybe_first(teacher(**inputs)),
            inputs=inputs,
            lengths=row_lengths(own, inputs),
            keys=row_keys(batch),
        )
        return own_rows(embeddings, batch)

    @property
    def _reduces_in_backward(self) -> bool:
        return self.config.ddp_static_graph and isinstance(self.model, DistributedDataParallel)

    def _check_step_and_teacher(
        self, teacher_model: nn.Module | None, distillation_loss_fn: Callable[..., Tensor] | None
    ) -> None:
        if teacher_model is not None and distillation_loss_fn is None:
            raise ConfigError(
                "teacher_model has no use without distillation_loss_fn. Received: only "
                "teacher_model"
            )
        overridden = type(self)._step_standard is not Trainer._step_standard
        if self.config.use_gradient_cache and overridden:
            raise ConfigError(
                f"{type(self).__name__} overrides _step_standard, which use_gradient_cache: true "
                "never calls. Turn the cache off, or override _step_cached"
            )

    def _require_gradients(self) -> None:
        named = self.encoder.named_parameters()
        unused = [name for name, p in named if p.requires_grad and p.grad is None]
        if unused:
            shown = ", ".join(unused[:3]) + (" ..." if len(unused) > 3 else "")
            raise ConfigError(
                f"{len(unused)} trainable parameters got no gradient in a step: {shown}. "
                "Freeze them, or set ddp_find_unused_parameters: true to allow it"
            )


def build_gradient_cache(config: TrainConfig) -> GradientCache:
    """The gradient cache that the settings ask for."""
    size, tokens = config.gradient_cache_chunk_size, config.gradient_cache_chunk_tokens
    if size is None and tokens is None:
        size = _DEFAULT_CHUNK_SIZE
    if config.use_gradient_cache and size == 1:
        logger.info(
            "gradient_cache_chunk_size: 1 is exact and slow; a larger one gives the same gradient, "
            "and auto takes what fits into memory"
        )
    return GradientCache(chunk_size=size, chunk_tokens=tokens, keep=config.gradient_cache_keep)


def _check_accelerator(accelerator: Accelerator) -> None:
    if accelerator.distributed_type not in _SUPPORTED:
        raise ConfigError(
            f"the launcher asked for {accelerator.distributed_type.value}, which vembed does not "
            "run; use plain data parallelism (DDP)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            "the Accelerator was built with gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}; set it in vembed's config instead, so "
            "that the loss is divided once"
        )


def _check_optimizer_covers(optimizer: Optimizer, **parts: Any) -> None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for what, module in parts.items():
        missing = sum(id(p) not in owned for p in trainable_parameters(module))
        if missing:
            raise ConfigError(
                f"the optimizer does not hold {missing} trainable parameters of the {what}; "
                "build it with build_optimizer(model, config, criterion, distillation_loss_fn)"
            )
