"""What a run will need: memory, the largest chunk, the time of a step, what processes exchange."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PretrainedConfig

from vembed.chunking import chunk_tokens_on, take_rows
from vembed.config import TrainConfig
from vembed.data import Collator, Record, RecordDataset
from vembed.losses.tiling import CPU_TILE_BYTES, TILE_BYTES
from vembed.models.protocol import Encoder
from vembed.training.data_utils import maybe_first, row_lengths, unpack_roles
from vembed.training.gradient_cache import GradientCache
from vembed.training.model_builder import apply_lora, build_model, build_teacher_model
from vembed.training.optimizer_builder import build_optimizer, trainable_parameters
from vembed.training.planning.tracing import ChunkCost, Tracer
from vembed.training.run import check_mode, raise_problems
from vembed.training.run_data import load_rows
from vembed.training.trainer import build_gradient_cache

SAMPLED_BATCHES = 3
CONTEXT_BYTES = 600 * 2**20
"""What a CUDA context and its libraries take before the first tensor."""

_TILES_AT_ONCE = 3  # similarities, their exponentials, their gradient
_BUCKET_BYTES = 32 * 2**20
_KEPT_BY_ALLOCATOR = 0.1
"""Share of the activations, on an accelerator."""

_KEPT_BY_MALLOC = (0.25, 300 * 2**20)
"""Share of the activations on a CPU, and most bytes of it: see benchmarks/plan.py."""

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what takes them; activations and loss at their largest.

    Attributes:
        framework: The program and its libraries, before a model.
        weights: Of the model, and of a teacher beside it.
        gradients: Of everything that trains.
        optimizer: State of the optimizer.
        activations: What forward and backward hold at a time, temporary results included.
        allocator: What the allocator keeps of it beside, because free pieces do not fit.
        loss: Tiles of similarities.
        gathered: Embeddings of all processes, and their gradients.
        exchange: Buffers that gradients are exchanged in.
    """

    framework: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    allocator: int
    loss: int
    gathered: int
    exchange: int

    @property
    def total(self) -> int:
        """All of them together: what the largest step takes."""
        return self.fixed + self.activations + self.allocator

    @property
    def fixed(self) -> int:
        """All but the activations: what no smaller chunk saves."""
        parts = (self.framework, self.weights, self.gradients, self.optimizer)
        return sum(parts) + self.loss + self.gathered + self.exchange


@dataclass(frozen=True)
class LargestChunk:
    """The largest chunk of the longest items that fits.

    Attributes:
        items: For `gradient_cache_chunk_size`; 0 if not even one fits.
        tokens: For `gradient_cache_chunk_tokens`: that many items of `longest` tokens.
        longest: Tokens of the longest item of the sample.
    """

    items: int
    tokens: int
    longest: int


@dataclass(frozen=True)
class Communication:
    """Bytes that one process sends and receives in a step, by ring algorithms.

    Attributes:
        gradient_bytes: For the sum of the gradients.
        embedding_bytes: For gathered columns, and for their gradients back.
        seconds: Time of both where nothing hides it; None without a bandwidth.
    """

    gradient_bytes: int
    embedding_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        model: What it is called.
        processes: How many share the work, one for each GPU.
        memory: Of one process.
        memory_limit: Bytes that one process may take; None if nothing was said.
        chunks: Forward passes of a micro-batch.
        real_tokens: Tokens of a micro-batch, the mean of the sampled ones.
        padded_tokens: The same with padding.
        largest_chunk: What fits with `use_gradient_cache`; None without a limit.
        flops: Floating-point operations of an optimizer step of one process.
        flops_per_second: What they are divided by.
        is_measured: Whether that rate was measured on this machine.
        step_seconds: Time of an optimizer step, communication included where it is known.
        communication: Of an optimizer step; None for one process.
        notes: What the plan leaves out, or takes for granted.
    """

    model: str
    processes: int
    memory: Memory
    memory_limit: int | None
    chunks: int
    real_tokens: int
    padded_tokens: int
    largest_chunk: LargestChunk | None
    flops: float
    flops_per_second: float
    is_measured: bool
    step_seconds: float
    communication: Communication | None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether the settings as they are fit; None without a limit."""
        return None if self.memory_limit is None else self.memory.total <= self.memory_limit


def plan_run(
    config: TrainConfig,
    *,
    processes: int = 1,
    memory_limit: int | None = None,
    flops_per_second: float | None = None,
    bandwidth: float | None = None,
    on_accelerator: bool | None = None,
) -> Plan:
    """Predict what the settings need, without loading or running the model.

    Args:
        config: The settings.
        processes: How many share the work.
        memory_limit: Bytes that one process may take.
        flops_per_second: Floating-point operations per second that a process reaches; None measures
            what this machine does.
        bandwidth: Bytes per second between processes, one way.
        on_accelerator: Whether it will run on one: the framework takes other memory there. None
            takes what this machine has.

    Raises:
        ConfigError: if settings cannot work, or the model cannot be planned.
        DataError: if a sampled row cannot be used.
    """
    raise_problems(config)
    if on_accelerator is None:
        on_accelerator = config.device != "cpu" and torch.accelerator.is_available()
    tracer = Tracer(autocast=_AUTOCAST[config.mixed_precision])
    encoder, teacher = _build(config, tracer)
    check_mode(encoder, config)
    batches = [_Batch(records, encoder, config) for records in _sample(config)]
    is_measured = flops_per_second is None
    flops_per_second = flops_per_second or measure_rate(encoder, _AUTOCAST[config.mixed_precision])
    parameters = _parameter_bytes(config, encoder, teacher, processes)
    # By now this process has done what it takes to load the libraries that a step needs.
    framework = CONTEXT_BYTES if on_accelerator else psutil.Process().memory_info().rss
    step = _Step(config, encoder, tracer, "accelerator" if on_accelerator else "cpu")
    costs = [step.cost(batch) for batch in batches]
    tile = TILE_BYTES if on_accelerator else CPU_TILE_BYTES
    largest = max(costs, key=lambda cost: cost.activations)
    rows = max(batch.columns for batch in batches)
    memory = Memory(
        framework=framework,
        activations=largest.activations,
        allocator=_kept_by_allocator(largest.activations, on_accelerator),
        loss=_TILES_AT_ONCE * min(4 * config.batch_size * rows * processes, tile),
        gathered=8 * rows * processes * encoder.embedding_dim if processes > 1 else 0,
        **parameters,
    )
    flops = sum(cost.flops for cost in costs) / len(costs) * config.gradient_accumulation_steps
    communication = None
    if processes > 1:
        columns = rows * processes * encoder.embedding_dim * 4
        communication = _communicate(memory.gradients, columns, config, processes, bandwidth)
    waiting = communication.seconds or 0.0 if communication else 0.0
    return Plan(
        model=config.model_label,
        processes=processes,
        memory=memory,
        memory_limit=memory_limit,
        chunks=largest.chunks,
        real_tokens=round(sum(batch.tokens for batch in batches) / len(batches)),
        padded_tokens=round(sum(cost.padded_tokens for cost in costs) / len(costs)),
        largest_chunk=_largest_chunk(step, batches, memory, memory_limit),
        flops=flops,
        flops_per_second=flops_per_second,
        is_measured=is_measured,
        step_seconds=flops / flops_per_second + waiting,
        communication=communication,
        notes=list(_notes(config, bandwidth if processes > 1 else 0.0)),
    )


def measure_rate(encoder: Encoder, autocast: torch.dtype | None, seconds: float = 1.0) -> float:
    """Floating-point operations per second of one layer of the model's size on this machine.

    Forward and backward, with norms and activation function: products alone would be faster than
    any model is.
    """
    size, heads, inner = _layer_sizes(encoder)
    layer = nn.TransformerEncoderLayer(
        size, heads, inner, dropout=0.0, activation="gelu", batch_first=True
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    layer.to(device or "cpu")
    n, width = 32, 32
    rows = torch.randn(n, width, size, device=device or "cpu")
    per_pass = 3 * 2 * n * width * (4 * size * size + 2 * size * inner + 2 * width * size)
    fastest, started = math.inf, time.perf_counter()
    kind = "cpu" if device is None else device.type
    # On a CPU that others use too, the time that this process had.
    clock, share = time.perf_counter, 1
    if device is None:
        clock, share = time.process_time, torch.get_num_threads()
    # The fastest pass is the one that nothing else disturbed; the first sets things up.
    while fastest == math.inf or time.perf_counter() - started < seconds:
        began = clock()
        with torch.autocast(kind, autocast or torch.bfloat16, enabled=autocast is not None):
            value = layer(rows).float().sum()
        value.backward()
        float(value.detach())  # waits for the device
        fastest = min(fastest, (clock() - began) / share)
    return per_pass / fastest


def _layer_sizes(encoder: Encoder) -> tuple[int, int, int]:
    """Width, attention heads and inner width of a layer; of unknown models, what is usual."""
    tower = next(iter(getattr(encoder, "towers", (encoder,))))
    config = getattr(getattr(tower, "backbone", None), "config", None)
    settings = config.get_text_config() if isinstance(config, PretrainedConfig) else config
    size = int(getattr(settings, "hidden_size", encoder.embedding_dim))
    heads = int(getattr(settings, "num_attention_heads", 1))
    return size, heads, int(getattr(settings, "intermediate_size", None) or 4 * size)


def _build(config: TrainConfig, tracer: Tracer) -> tuple[Encoder, Encoder | None]:
    with tracer.building():
        encoder = build_model(config)
        teacher = None
        if config.teacher_cache is None:
            teacher = build_teacher_model(config)
    apply_lora(encoder, config, Accelerator(cpu=True))
    tracer.empty(encoder)
    return encoder, teacher


def _sample(config: TrainConfig) -> list[list[Record]]:
    """Rows of some micro-batches, drawn at random; of a stream, the first ones."""
    rows = load_rows(config, config.data_path, streaming=config.streaming)
    wanted = SAMPLED_BATCHES * config.batch_size
    if not isinstance(rows, RecordDataset):
        records = list(islice(rows, wanted))
    else:
        draw = random.Random(config.seed)
        # Of a data set with few rows, some more than once, so that batches have their size.
        numbers = [draw.randrange(len(rows)) for _ in range(wanted)]
        records = rows.__getitems__(
            draw.sample(range(len(rows)), wanted) if len(rows) >= wanted else numbers
        )
    size = config.batch_size
    return [records[start : start + size] for start in range(0, len(records), size)]


class _Batch:
    """The inputs of one micro-batch."""

    def __init__(self, records: Sequence[Record], encoder: Encoder, config: TrainConfig) -> None:
        batch = Collator(encoder.processor)(list(records))
        self.inputs = unpack_roles(batch, config.retrieval_mode)
        self.lengths = row_lengths(batch, self.inputs)
        self.tokens = sum(sum(of_role) for of_role in self.lengths.values())
        documents = [len(n) for role, n in self.lengths.items() if role != "query"]
        self.columns = sum(documents) or len(self.lengths["query"])


@dataclass(frozen=True)
class _StepCost:
    activations: int
    flops: int
    chunks: int
    padded_tokens: int


class _Step:
    """What a micro-batch takes, from what its chunks take; chunks of one shape are run once."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, tracer: Tracer, device_type: str
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.tracer = tracer
        self.gradients = sum(
            p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad
        )
        tokens = chunk_tokens_on(device_type, config.chunk_tokens)
        self.cache = GradientCache(chunk_tokens=tokens, keep="all")
        if config.use_gradient_cache:
            self.cache = build_gradient_cache(config)
        self._known: dict[Any, ChunkCost] = {}

    def cost(self, batch: _Batch) -> _StepCost:
        """The cost of a micro-batch."""
        plans = self.cache.plan(batch.inputs, batch.lengths)
        costs = [self.chunk(take_rows(batch.inputs[p.role], p.rows, p.longest)) for p in plans]
        kept = len(costs) if self.cache.keep == "all" else 0
        if isinstance(self.cache.keep, int):
            kept = min(self.cache.keep, len(costs))
        again = sum(cost.forward_flops for cost in costs[kept:])
        once = sum(cost.forward_flops + cost.backward_flops for cost in costs)
        padded = sum(plan.padded_tokens for plan in plans)
        return _StepCost(self._most_bytes(costs, kept), once + again, len(costs), padded)

    def chunk(self, inputs: dict[str, Tensor]) -> ChunkCost:
        """The cost of a chunk, whatever its values."""
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if key not in self._known:
            self._known[key] = self.tracer.cost(
                self.encoder, lambda taken: maybe_first(self.encoder(**taken)), inputs
            )
        return self._known[key]

    def _most_bytes(self, costs: list[ChunkCost], kept: int) -> int:
        """Most bytes at a time beside weights and all gradients.

        Gradients come into being in the first backward pass: what lives at its beginning lives
        without them.
        """
        most, held = 0, 0
        for cost in costs[:kept]:
            most = max(most, held + cost.forward_peak - self.gradients)
            held += cost.saved
        bare = max((cost.forward_peak for cost in costs[kept:]), default=0)
        most = max(most, held + bare - self.gradients)
        # Backward begins with the last chunk; the first of all makes the gradients.
        is_first = True
        for cost in reversed(costs[:kept]):
            held -= cost.saved
            most = max(most, held + (cost.peak - self.gradients if is_first else cost.peak), held)
            is_first = False
        for cost in costs[kept:]:
            most = max(most, cost.peak - self.gradients if is_first else cost.peak)
            is_first = False
        return max(most, 0)


def _parameter_bytes(
    config: TrainConfig, encoder: Encoder, teacher: Encoder | None, processes: int
) -> dict[str, int]:
    """Weights, gradients, optimizer state and buffers, by their names in `Memory`."""
    models = [encoder] if teacher is None else [encoder, teacher]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = trainable_parameters(encoder)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer = sum(p.numel() * p.element_size() for p in trained) * _state_per_weight(config)
    exchange = 0
    if processes > 1 and config.distributed_strategy == "fsdp2":
        # Whole during a step, beside each process's share; one flat buffer for the reduction.
        weights += weights // processes
        exchange, optimizer = gradients, optimizer / processes
    elif processes > 1:
        # DDP's own buffers, made when it wraps the model, and the bucket that is being reduced.
        exchange = gradients + min(gradients, _BUCKET_BYTES)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": round(optimizer),
        "exchange": exchange,
    }


def _state_per_weight(config: TrainConfig) -> float:
    """Numbers that the optimizer keeps for each that is trained, seen on a small layer."""
    layer = nn.Linear(256, 256, bias=False)
    optimizer = build_optimizer(layer, _plain_optimizer(config))
    layer(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values()]
    return sum(s.numel() for s in states if isinstance(s, Tensor)) / layer.weight.numel()


def _plain_optimizer(config: TrainConfig) -> TrainConfig:
    """The optimizer of the settings, without what names parameters of the model."""
    changes: dict[str, Any] = {
        "lr_groups": {},
        "layerwise_lr_decay": None,
        "freeze": [],
        "unfreeze_at_step": {},
    }
    return config.model_copy(update=changes)


def _kept_by_allocator(activations: int, on_accelerator: bool) -> int:
    if on_accelerator:
        return round(_KEPT_BY_ALLOCATOR * activations)
    share, most = _KEPT_BY_MALLOC
    return min(round(share * activations), most)


def _largest_chunk(
    step: _Step, batches: Sequence[_Batch], memory: Memory, limit: int | None
) -> LargestChunk | None:
    if limit is None:
        return None
    longest = [
        (max(of_role), role, of_role.index(max(of_role)), batch)
        for batch in batches
        for role, of_role in batch.lengths.items()
    ]
    tokens, role, row, batch = max(longest, key=lambda one: one[0])
    # Bytes grow by the same for each further item: all of a chunk are padded to one length.
    few, many = (
        step.chunk(take_rows(batch.inputs[role], [row] * items, tokens)).peak for items in (1, 9)
    )
    # With what the allocator keeps, in the same proportion.
    grown = 1 + memory.allocator / max(memory.activations, 1)
    each = max((many - few) * grown / 8, 1)
    items = max(int((limit - memory.fixed - few * grown) / each) + 1, 0)
    return LargestChunk(items, items * tokens, tokens)


def _communicate(
    gradients: int, columns: int, config: TrainConfig, processes: int, bandwidth: float | None
) -> Communication:
    share = (processes - 1) / processes
    # An all-reduce is a reduce-scatter and an all-gather; FSDP2 gathers weights instead.
    of_gradients = round(2 * share * gradients)
    of_embeddings = round(2 * share * columns) * config.gradient_accumulation_steps
    seconds = None if bandwidth is None else (of_gradients + of_embeddings) / bandwidth
    return Communication(of_gradients, of_embeddings, seconds)


def _notes(config: TrainConfig, bandwidth: float | None) -> list[str]:
    notes = ["the framework takes what this process took" if config.device == "cpu" else ""]
    if config.use_gradient_cache and config.gradient_cache_keep == "auto":
        notes.append("gradient_cache_keep: auto takes what is left; the plan keeps no chunk")
    if config.use_gradient_cache and config.gradient_cache_chunk_size == "auto":
        notes.append("gradient_cache_chunk_size: auto cuts smaller chunks where memory is short")
    if config.teacher_model_name is not None and config.teacher_cache is None:
        notes.append("of the teacher, weights are counted; its forward pass is not")
    if config.guide_model_name is not None:
        notes.append("the guide is not counted")
    if bandwidth is None:
        notes.append("without --bandwidth, the time of a step leaves communication out")
    return [note for note in notes if note]
