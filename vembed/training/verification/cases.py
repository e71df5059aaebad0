"""What is compared: ways to compute the gradient of the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vembed.config import TrainConfig

Precision = Literal["float64", "float32"]
Step = Literal["plain", "cached"]

TOLERANCES: Mapping[str, float] = {"float64": 1e-12, "float32": 1e-5, "bf16": 2e-2}
"""Largest difference that still counts as the same gradient (see `comparison.GroupDifference`).

Numbers of bf16 lie up to 2**-7 = 8e-3 apart, and a rounding error of float32 in the sums of
another process can flip one to its neighbour.
"""

MAX_PAIRS = 8
"""Pairs per process and micro-batch unless asked for otherwise: exactness does not need many."""

_CHUNKS_PER_ROLE = 3


@dataclass(frozen=True)
class Variation:
    """One condition under which gradients are compared.

    Attributes:
        name: As it is shown.
        meaning: What is different, in a few words.
        setting: The setting to look at first when only this variation fails.
        settings: Laid over those of the run.
        own_dropout: Keep the dropout that the model and its adapters have; otherwise it is off.
        extra_dropout: Probability of dropout that is added to every embedding table, so that
            there is some in a model that has none.
        loss_scale: What fp16 would multiply the loss by; None for no loss scaling.
        uneven: Leave one row out of the last global micro-batch.
    """

    name: str
    meaning: str
    setting: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_dropout: bool = False
    extra_dropout: float = 0.0
    loss_scale: float | None = None
    uneven: bool = False

    @property
    def autocast(self) -> bool:
        """Whether forward and backward run in mixed precision."""
        return "mixed_precision" in self.settings


AS_CONFIGURED = Variation(
    "as configured", "the settings and the model as they are", "model_name", own_dropout=True
)
ACCUMULATION = Variation(
    "accumulation",
    "two micro-batches in one step",
    "gradient_accumulation_steps",
    {"gradient_accumulation_steps": 2},
)
DROPOUT = Variation(
    "dropout",
    "the model's own, and 0.1 after its embedding tables",
    "use_gradient_cache",
    own_dropout=True,
    extra_dropout=0.1,
)
LORA = Variation("LoRA", "adapters train, the model does not", "use_lora", {"use_lora": True})
# bf16 also where fp16 is configured, which CPUs do not have.
AMP = Variation("AMP (bf16)", "mixed precision", "mixed_precision", {"mixed_precision": "bf16"})
LOSS_SCALING = Variation(
    "loss scaling",
    "the loss multiplied by 65536, as for fp16",
    "mixed_precision",
    loss_scale=2.0**16,
)
UNEVEN = Variation(
    "uneven last batch", "one row less, so that processes differ", "drop_last", uneven=True
)

VARIATIONS = (AS_CONFIGURED, ACCUMULATION, DROPOUT, LORA, AMP, LOSS_SCALING, UNEVEN)


@dataclass(frozen=True)
class Case:
    """One gradient to check.

    Attributes:
        variation: The condition.
        step: `plain`: activations of all chunks are kept. `cached`: of the first one only.
        processes: How many processes share the rows.
    """

    variation: Variation
    step: Step
    processes: int

    @property
    def name(self) -> str:
        """For people: `dropout, cached, 2 processes`."""
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{self.variation.name}, {self.step}, {count}"

    @property
    def step_name(self) -> str:
        """The same, shorter, without the variation: `cached x 2`."""
        return self.step if self.processes == 1 else f"{self.step} x {self.processes}"


@dataclass(frozen=True)
class Scope:
    """How much is verified, and in which precision.

    Attributes:
        processes: Processes that the rows are shared among in the cases of several processes.
        precision: Type of weights and computation, but for mixed precision.
        pairs: Rows per process and micro-batch.
    """

    processes: int
    precision: Precision
    pairs: int

    def tolerance(self, variation: Variation) -> float:
        """Largest difference that counts as none."""
        return TOLERANCES["bf16" if variation.autocast else self.precision]

    def dtype_of(self, variation: Variation) -> Precision:
        """Type of the weights: autocast leaves float64 alone, so there it must be float32."""
        return "float32" if variation.autocast else self.precision


def settings_of(config: TrainConfig, scope: Scope, case: Case) -> TrainConfig:
    """The settings of a run that computes its gradient as the case says."""
    settings = {
        "gradient_accumulation_steps": min(config.gradient_accumulation_steps, 2),
        **case.variation.settings,
    }
    plain = case.step == "plain" and settings["gradient_accumulation_steps"] == 1
    flash = config.attn_implementation == "flash_attention_2"
    return config.model_copy(
        update={
            "batch_size": scope.pairs,
            "drop_last": False,
            "device": "cpu",
            "num_processes": None,
            "torch_dtype": "float32",
            "lora_quantization": None,
            "mixed_precision": "no",
            "attn_implementation": None if flash else config.attn_implementation,
            "ddp_static_graph": config.ddp_static_graph and plain,
            "distributed_strategy": config.distributed_strategy if case.processes > 1 else "ddp",
            "use_gradient_cache": case.step == "cached",
            "gradient_cache_chunk_size": chunk_size(config, scope),
            "gradient_cache_chunk_tokens": None,
            "gradient_cache_keep": 1,
            "max_steps": 1,
            "report_to": [],
            **settings,
        }
    )


def chunk_size(config: TrainConfig, scope: Scope) -> int:
    """Items per chunk of the cached step: the configured number, if that makes several chunks."""
    several = -(-scope.pairs // _CHUNKS_PER_ROLE)
    configured = config.gradient_cache_chunk_size
    return min(configured, several) if isinstance(configured, int) else several
