"""Every setting of a run, declared once: name, type, default, bound, unit, meaning.

A YAML key, a command-line flag and an attribute are one word. Nothing here imports torch or
transformers, so that a mistake is answered before the seconds that those imports take.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from vembed.errors import ConfigError, did_you_mean, find_control_character, shorten
from vembed.image_urls import read_host
from vembed.images import MOST_PIXELS
from vembed.redaction import redact

ALIASES = {"learning_rate": "lr", "model_name_or_path": "model_name"}
"""Other spellings that are accepted, each with the key that it stands for."""

SECTIONS = {
    "model": "model_name",
    "data": "data_path",
    "loss": "loss_type",
    "optimisation": "epochs",
    "memory and processes": "chunk_tokens",
    "reporting": "output_dir",
}
"""Groups of settings, each with its first key, in the order of `TrainConfig`."""

RUN_REQUIRES = ("model_name", "data_path")
"""Settings without a default that a whole run needs."""

TEACH_REQUIRES = ("teacher_model_name", "teacher_cache", "data_path")
"""Settings without a default that storing a teacher's embeddings needs."""

PoolingMethod = Literal[
    "cls", "mean", "max", "mean_sqrt_len", "weighted_mean", "last_token", "pooler", "none"
]
TorchDtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["wandb", "tensorboard", "swanlab"]


def _no_bool(value: Any) -> Any:
    """Pydantic would read `true` as 1; a number that is a boolean is always a mistake."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


def _split_trackers(value: Any) -> Any:
    """`"wandb, swanlab"`, `"all"`, `"none"` and null as lists of names; anything else untouched."""
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value
    words = [word.strip() for name in names for word in name.split(",") if word.strip()]
    if words == ["none"]:
        return []
    return list(get_args(Tracker)) if words == ["all"] else list(dict.fromkeys(words))


MOST = 2**31 - 1
"""The highest number that a setting counts to."""

Int = Annotated[int, BeforeValidator(_no_bool), Field(le=MOST)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Beta = Annotated[Float, Field(ge=0, lt=1)]


def _read_digits(value: Any) -> Any:
    """The number that a text of digits is; anything else untouched."""
    is_number = isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,10}\s*", value)
    return int(value) if is_number else value


def _whole_or_auto(least: int) -> Callable[[Any], Any]:
    """A reader of `auto`, null, or a whole number from `least` up."""

    def read(value: Any) -> Any:
        if value is None or value == "auto":
            return value
        value = _read_digits(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise ValueError(f"expected auto or a whole number of at least {least}")
        return value

    return read


def _one_or_more(value: Any) -> Any:
    """A single name as a list of one; a list whose bracket is not closed stays what it is."""
    return [value] if isinstance(value, str) and not value.startswith("[") else value


def _read_lr_choice(value: Any) -> Any:
    """A factor of `lr`, or `{lr: value}` for a learning rate that does not depend on it."""
    rule = "expected a factor of lr above 0, as in 0.1, or a learning rate, as in {lr: 1e-4}"
    if isinstance(value, Mapping) and set(value) != {"lr"}:
        raise ValueError(rule)
    number = value["lr"] if isinstance(value, Mapping) else value
    try:
        number = float(_no_bool(number))
    except (TypeError, ValueError):
        raise ValueError(rule) from None
    if not 0 < number < math.inf:
        raise ValueError(rule)
    return {"lr": number} if isinstance(value, Mapping) else number


def _to_lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


LowerCase = Annotated[str, BeforeValidator(_to_lower)]
Patterns = Annotated[list[str], BeforeValidator(_one_or_more)]
Towers = Annotated[list[Literal["text", "image"]], BeforeValidator(_one_or_more)]
LrChoice = Annotated[float | dict[str, float], BeforeValidator(_read_lr_choice)]
PositiveOrAuto = Annotated[int | Literal["auto"] | None, BeforeValidator(_whole_or_auto(1))]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_whole_or_auto(0))]
Hosts = Annotated[list[Annotated[str, AfterValidator(read_host)]], BeforeValidator(_one_or_more)]
TileSize = Annotated[int | Literal["auto"], BeforeValidator(_whole_or_auto(1))]


def _number_or_numbers(value: Any) -> Any:
    """A whole number from 1 up, a list of them from 0 up, or null."""
    if value is None:
        return value
    several, rule = isinstance(value, list), "expected a whole number of at least 1, or a list"
    least = 0 if several else 1
    numbers = [_read_digits(n) for n in (value if several else [value])]
    for n in numbers:
        if isinstance(n, bool) or not isinstance(n, int) or not least <= n <= MOST:
            raise ValueError(f"{rule} of whole numbers, as in [0, 2, 4]")
    return numbers if several else numbers[0]


def _two_or_more(value: int | None) -> int | None:
    """The newest checkpoint alone would be lost with a bad disk, and with it the run."""
    if value is not None and value < 2:
        raise ValueError(
            "must be at least 2, so that there is another one if the newest is damaged"
        )
    return value


def _kinds(value: Any) -> Any:
    """A name, names with weights above 0, or null."""
    if value is None or (isinstance(value, str) and value and value[0] not in "{["):
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError("expected a name, or names with weights, as in {embedding: 1}")
    weights = {}
    for name, weight in value.items():
        try:
            weights[name] = float(_no_bool(weight))
        except (TypeError, ValueError):
            raise ValueError(f"expected a number as the weight of {name}") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError("expected weights above 0")
    return weights


DistillationKinds = Annotated[str | dict[str, float] | None, BeforeValidator(_kinds)]
KeepLayers = Annotated[int | list[int] | None, BeforeValidator(_number_or_numbers)]


class Setting(NamedTuple):
    """A value for a key, as written, and where: `train.yaml:3`, `--lr`, or `` in Python."""

    key: str
    value: Any
    origin: str = ""


class Problem(NamedTuple):
    """A broken rule. `keys[0]` is the setting it is about; the others are those it depends on."""

    keys: tuple[str, ...]
    rule: str

    def located(self, origin: str | None) -> str:
        """The problem as one line that starts with where the value came from."""
        path = self.keys[0]
        if not origin:
            return f"{path}: {self.rule}"
        return (
            f"{origin}: {self.rule}" if origin == f"--{path}" else f"{origin}: {path}: {self.rule}"
        )


class SettingsError(ConfigError):
    """Several settings that are unknown or do not fit."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return problem_list([problem.located(None) for problem in self.problems])


class DatasetSpec(BaseModel):
    """One of several training sets, with prompts and column names of its own."""

    model_config = ConfigDict(extra="forbid")

    path: str
    split: str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    column_mapping: dict[str, str] | None = None
    image_root: str | None = None


class TrainConfig(BaseModel):
    """All settings of a training run; also a mapping (`config["lr"]`, `"lr" in config`).

    A value that does not fit, given here or assigned later, raises ConfigError.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        protected_namespaces=(),
        # Else an infinity in the arguments of a loss would be saved as null.
        ser_json_inf_nan="constants",
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    # --- model
    model_name: str | None = Field(
        None,
        description="Hub id, local folder, or package:NAME[/subdir] for weights in a package",
    )
    encoder_mode: str = Field(
        "auto",
        description="auto (from the checkpoint's model_type), text, dual, vision, vlm, composed, "
        "or package.module:Name",
    )
    text_model_name: str | None = Field(
        None,
        description="Instead of model_name, with image_model_name: text encoder of a composed one",
    )
    image_model_name: str | None = Field(
        None, description="Image encoder, which a new projection brings into one space with texts"
    )
    revision: str | None = Field(
        None, description="Hub revision (commit, tag or branch) of the model"
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with the model or its teacher; of a hub model, the "
        "revision must be a commit",
    )
    pooling_method: PoolingMethod | None = Field(
        None,
        description="Tokens to one vector, pooler being the model's own head; none keeps a vector "
        "for each (loss_type: maxsim); null takes the checkpoint's own",
    )
    normalize_embeddings: bool | None = Field(
        None, description="Unit-length vectors; null takes the checkpoint's own"
    )
    projection_dim: Int | None = Field(
        None,
        gt=0,
        description="Size of the vectors; a model of another size gets a linear layer to train",
    )
    keep_layers: KeepLayers = Field(
        None,
        description="Layers of the model to keep, for a smaller student: how many, evenly chosen, "
        "or which, as in [0, 2, 4]; null: all",
    )
    freeze_towers: Towers = Field(
        default_factory=list,
        description="Halves of a model for texts and images that are not trained: text, image",
    )
    max_seq_length: Int | None = Field(
        None, gt=0, description="Tokens kept of a text; null takes the checkpoint's own"
    )
    query_prompt: str | None = Field(
        None, description="Text put before every query; null takes the checkpoint's own"
    )
    document_prompt: str | None = Field(
        None, description="Text put before every document; null takes the checkpoint's own"
    )
    torch_dtype: TorchDtype = Field(
        "float32", description="Type of the weights in memory; auto keeps the checkpoint's"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="Attention kernel; null lets transformers choose"
    )
    dropout: Float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Probability of every dropout in the model; null takes the checkpoint's own",
    )
    use_lora: bool = Field(
        False, description="Train low-rank adapters instead of the backbone's weights"
    )
    lora_r: Int = Field(16, gt=0, description="LoRA rank")
    lora_alpha: Float = Field(
        32, gt=0, description="LoRA scale: updates are multiplied by lora_alpha / lora_r"
    )
    lora_dropout: Float = Field(0.05, ge=0, lt=1, description="Dropout on the LoRA input")
    lora_target_modules: Patterns | None = Field(
        None, description="Names of the layers to adapt; null: all linear layers"
    )
    use_dora: bool = Field(
        False, description="DoRA: adapters that learn a weight's length apart from its direction"
    )
    use_rslora: bool = Field(
        False, description="rsLoRA: divide lora_alpha by the root of lora_r instead of lora_r"
    )
    lora_quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="QLoRA: hold the frozen weights in 4 or 8 bits; needs a GPU, bitsandbytes"
    )
    adapter_path: str | None = Field(
        None, description="Adapter to go on training: the adapter/ folder of a saved LoRA model"
    )

    # --- data
    data_path: str | list[str | DatasetSpec] | None = Field(
        None,
        description="Training rows: file, tar shards, Arrow folder or hub id; or a list of "
        "{path: ...}",
    )
    val_data_path: str | None = Field(
        None, description="Rows for validation during training: a file or a BEIR folder"
    )
    test_data_path: str | None = Field(
        None, description="Rows for the before/after table: a file or a BEIR folder"
    )
    holdout_ratio: Float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of data_path held out as test set when test_data_path is null",
    )
    retrieval_mode: LowerCase = Field(
        "t2t",
        pattern="^[tim]2[tim]$",
        description="Modality of query and document: t text, i image, m both, as in t2i",
    )
    column_mapping: dict[str, str] | None = Field(
        None,
        description="Our field name to your column name, as in {query: question, positive: answer}",
    )
    image_root: str | None = Field(
        None,
        description="Folder that image paths are relative to, and must stay under; null: that of "
        "the data file",
    )
    image_hosts: Hosts = Field(
        [],
        description="Hosts that images may be fetched from, as in [example.org]; fetched once, "
        "while rows are read; none: URLs are refused",
    )
    max_image_pixels: Int = Field(
        50_000_000,
        gt=0,
        le=MOST_PIXELS,
        description="An image of more pixels is a bad record, found before it is decoded",
    )
    image_check: Literal["header", "decode"] = Field(
        "header",
        description="How images are looked at while rows are read: header and end of the file, or "
        "every pixel",
    )
    image_cache: str | None = Field(
        None,
        description="Folder to keep images in as the model's processor resizes them, so that "
        "later epochs decode nothing; null: none",
    )
    on_bad_record: Literal["fail", "quarantine"] = Field(
        "fail",
        description="What becomes of a row that cannot be used: it ends the run, or goes to "
        "quarantine.jsonl in output_dir",
    )
    max_bad_records: Float | None = Field(
        None,
        gt=0,
        description="Most rows of a data set for the quarantine: below 1 a share, from 1 a number; "
        "null: 0.01",
    )
    streaming: bool = Field(
        False, description="Read rows as they come instead of indexing the file first"
    )
    shuffle_buffer_size: Int = Field(10_000, gt=0, description="Rows that streaming shuffles among")
    num_workers: Int = Field(
        0, ge=0, description="Processes that tokenise and decode images ahead of the step"
    )
    token_cache: bool = Field(
        True,
        description="Tokenise rows of texts once, before the first step, and keep the ids in the "
        "cache of datasets; not those of a stream, nor beside a teacher or guide",
    )
    max_train_samples: Int | None = Field(
        None, gt=0, description="Use only this many training rows; null: all"
    )
    drop_last: bool = Field(False, description="Drop the last, smaller batch of an epoch")
    batch_sampler: str = Field(
        "auto",
        description="Which rows make a batch: random, class_balanced, no_duplicates, homogeneous, "
        "package.module:Name; auto: what the loss needs",
    )
    batch_sampler_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the batch sampler, as in {samples_per_class: 4}",
    )

    # --- loss
    loss_type: str = Field(
        "infonce",
        description="infonce, sigmoid, triplet, margin_mse, cosent, angle, cosine_mse, "
        "contrastive, online_contrastive, supcon, label_triplet, arcface, normalized_softmax, "
        "maxsim (also called colbert), or package.module:Name",
    )
    loss_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the loss"
    )
    temperature: Float | None = Field(
        None,
        gt=0,
        description="Similarities are divided by it; null: that of a CLIP or SigLIP if the loss "
        "can train it, else the loss's own, mostly 0.05",
    )
    learn_temperature: bool | None = Field(
        None,
        description="Train the temperature; null: where temperature is null, if it is of a CLIP or "
        "SigLIP, or the loss is sigmoid",
    )
    loss_bidirectional: bool = Field(
        False, description="Also rank the queries for each positive, and average"
    )
    loss_tile_size: TileSize = Field(
        "auto",
        description="Rows and columns of similarities held at once; auto: 8 MB on a CPU, else 32",
    )
    guide_model_name: str | None = Field(
        None,
        description="Frozen model that judges which candidates are too similar to be negatives; "
        "named like model_name",
    )
    use_mrl: bool = Field(
        False,
        description="Matryoshka: train the first numbers of each vector to be good alone, too",
    )
    mrl_dims: list[Annotated[Int, Field(gt=0)]] | None = Field(
        None,
        description="How many numbers, as in [256, 128, 64]; the whole is always among them; null: "
        "the whole, and halves of it down to a sixteenth",
    )
    mrl_weights: list[Annotated[Float, Field(gt=0)]] | None = Field(
        None, description="Weights of the losses of mrl_dims, in their order; null: 1 each"
    )
    mrl_layers: list[Annotated[Int, Field(gt=0)]] | None = Field(
        None,
        description="Numbers of the model's first layers that are to be good alone, too, as in "
        "[2, 4]; null: all layers only",
    )
    teacher_model_name: str | None = Field(
        None, description="Model to distil from; named like model_name"
    )
    teacher_revision: str | None = Field(
        None, description="Hub revision (commit, tag or branch) of the teacher"
    )
    teacher_dtype: TorchDtype | None = Field(
        None, description="Type of the teacher's weights; null: torch_dtype"
    )
    teacher_cache: str | None = Field(
        None,
        description="Folder of what the teacher says, written by vembed teach and read in its "
        "place; null: the teacher runs in every step",
    )
    teacher_chunk_size: Int = Field(
        1024,
        gt=0,
        description="Items that vembed teach stores at a time: what an interruption costs at most",
    )
    distillation_loss: DistillationKinds = Field(
        None,
        description="similarity_kl, embedding, relational, score, or package.module:Name; or "
        "several with weights, as in {embedding: 1, relational: 0.5}; null: similarity_kl with a "
        "teacher, else none",
    )
    distillation_kwargs: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further arguments of the distillation losses by kind, as in {embedding: "
        "{distance: mse}}",
    )
    distillation_alpha: Float = Field(
        0.5, ge=0, le=1, description="Weight of the task loss; the teacher's gets the rest"
    )
    distillation_temperature: Float = Field(
        0.05, gt=0, description="Divides teacher and student similarities alike"
    )

    # --- optimisation
    epochs: Int = Field(3, gt=0, description="Passes over the training rows")
    max_steps: Int | None = Field(
        None, gt=0, description="Stop after this many optimizer steps; null: epochs decide"
    )
    batch_size: Int = Field(32, gt=0, description="Pairs per process per micro-batch")
    gradient_accumulation_steps: Int = Field(
        1, gt=0, description="Micro-batches per optimizer step, each with its own negatives"
    )
    lr: Float = Field(5e-5, ge=0, description="Peak learning rate, reached after warm-up")
    optimizer: str = Field(
        "adamw", description="adamw, adam, sgd, adafactor, or package.module:Name"
    )
    optimizer_betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Decay rates of Adam's two averages"
    )
    optimizer_eps: Float = Field(
        1e-8, gt=0, description="Term that keeps Adam's denominator from zero"
    )
    optimizer_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the optimizer"
    )
    weight_decay: Float = Field(
        0.01,
        ge=0,
        description="Decay of weights; biases, norms, class tokens and the temperature are spared",
    )
    lr_groups: dict[str, LrChoice] = Field(
        default_factory=dict,
        description="Parameters with another lr, as in {projections.*: 10, loss.*: {lr: 1e-3}}: "
        "a factor or a value; the last pattern that matches wins",
    )
    layerwise_lr_decay: Float | None = Field(
        None, gt=0, le=1, description="Factor on lr for each layer further from the top"
    )
    freeze: Patterns = Field(
        default_factory=list,
        description="Parameters that are not trained, by name, as in [backbone.embeddings.*]",
    )
    unfreeze_at_step: dict[str, Annotated[Int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Parameters frozen at first, with the optimizer steps until they train, as in "
        "{backbone.*: 100}; the last pattern that matches wins",
    )
    scheduler_type: str = Field(
        "linear", description="Learning-rate schedule: any name transformers knows"
    )
    scheduler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the schedule"
    )
    warmup_ratio: Float = Field(
        0.1, ge=0, le=1, description="Share of optimizer steps spent warming up"
    )
    warmup_steps: Int | None = Field(
        None, ge=0, description="Optimizer steps of warm-up; wins over warmup_ratio"
    )
    max_grad_norm: Float = Field(
        1.0, ge=0, description="Gradient norm is clipped to this; 0 does not clip"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What becomes of a step whose loss or gradient is not finite: it ends the run, "
        "or changes no weight and is counted",
    )
    max_nonfinite_steps: Int = Field(
        10, gt=0, description="Most steps of a run that on_nonfinite: skip leaves out"
    )
    seed: Annotated[int, BeforeValidator(_no_bool)] = Field(
        42, ge=0, le=2**32 - 1, description="Seed of everything random"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Autocast type of forward and backward"
    )

    # --- memory and processes
    chunk_tokens: Int | None = Field(
        None,
        gt=0,
        description="Padded tokens per forward; null: 2048 on a CPU, else 4096; how a batch is cut "
        "changes no gradient",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute layers in backward: less memory, more time"
    )
    torch_compile: bool = Field(
        False, description="Compile the model's layers, once for all lengths: slow to start"
    )
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = Field(
        "inductor", description="What compiles them; aot_eager and eager only trace, to find errors"
    )
    use_gradient_cache: bool = Field(
        False, description="Encode in chunks and recompute them: large batches in little memory"
    )
    gradient_cache_chunk_size: PositiveOrAuto = Field(
        None,
        description="Items per chunk of the gradient cache; auto: what fits into memory; null: 32, "
        "or any number where gradient_cache_chunk_tokens is set",
    )
    gradient_cache_chunk_tokens: Int | None = Field(
        None, gt=0, description="Padded tokens per chunk of the gradient cache; null: no limit"
    )
    gradient_cache_keep: CountOrAuto = Field(
        0, description="Chunks not encoded a second time; auto: as many as fit into memory"
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="auto takes an accelerator when there is one"
    )
    num_processes: Int | None = Field(
        None, gt=0, description="Processes that must take part; null: as many as were started"
    )
    process_timeout_s: Float = Field(
        1800,
        gt=0,
        description="Seconds that a step, or a process that others wait for, may take; then the "
        "run ends and says where it stands",
    )
    grace_period_s: Float = Field(
        30,
        gt=0,
        description="Seconds from SIGTERM to the kill, as your cluster has it: vembed train waits "
        "so long, and a save that takes longer is warned of",
    )
    max_restarts: Int = Field(
        0,
        ge=0,
        description="Times that vembed train starts a run again that died, from its newest "
        "checkpoint",
    )
    distributed_strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="What processes share: ddp gradients; fsdp2 also weights and optimizer state",
    )
    ddp_find_unused_parameters: bool = Field(
        False,
        description="Allow trainable parameters without a gradient; otherwise an error names them",
    )
    ddp_static_graph: bool = Field(
        False, description="Let DDP overlap reduction with backward; the graph must not change"
    )

    # --- reporting
    output_dir: str = Field(
        "runs/vembed",
        min_length=1,
        description="Folder for the model, checkpoints, metrics and report",
    )
    overwrite_output_dir: bool = Field(
        False, description="Allow output_dir to hold an earlier run, which is replaced"
    )
    logging_steps: Int = Field(
        10, gt=0, description="Optimizer steps between lines of metrics.jsonl"
    )
    eval_steps: Int | None = Field(
        None, gt=0, description="Optimizer steps between validations; null: after each epoch"
    )
    save_steps: Int = Field(
        0,
        ge=0,
        description="Optimizer steps between checkpoints; 0: only the final and the best model",
    )
    save_total_limit: Annotated[Int | None, AfterValidator(_two_or_more)] = Field(
        2, description="Newest checkpoints kept, at least 2; null: all"
    )
    save_top_k: Int = Field(
        0,
        ge=0,
        description="Checkpoints kept because of their validation value, however old; needs "
        "val_data_path",
    )
    resume: str = Field(
        "never",
        min_length=1,
        description="auto: go on from the newest whole checkpoint in output_dir, or start; or a "
        "checkpoint's path; never: start",
    )
    allow_inexact_resume: bool = Field(
        False,
        description="Go on although settings, rows or processes changed, and results may differ",
    )
    save_adapter: bool = Field(
        True, description="With LoRA, keep the adapter by itself, too: adapter/ beside the model"
    )
    metric_for_best: str | None = Field(
        None, description="Validation metric that picks the best model; null: the task's main one"
    )
    report_to: Annotated[list[Tracker], BeforeValidator(_split_trackers)] = Field(
        default_factory=list, description="Trackers: wandb, tensorboard, swanlab, all, none"
    )
    project_name: str = Field("vembed", description="Project name in the trackers")
    run_name: str | None = Field(
        None, description="Run name in the trackers; null: the output folder's name"
    )
    tags: Patterns = Field(default_factory=list, description="Tags in the trackers that have them")
    progress: bool = Field(True, description="Show progress bars")

    @field_validator("*", mode="before")
    @classmethod
    def _check_characters(cls, value: Any) -> Any:
        if (character := _find_control_character(value)) is not None:
            raise ValueError(f"must not contain the character {character}")
        return value

    def __init__(self, **settings: Any) -> None:
        values, problems = merge_spellings(Setting(*item) for item in settings.items())
        try:
            super().__init__(**{key: setting.value for key, setting in values.items()})
        except ValidationError as error:
            problems += _reworded(error)
        if problems:
            raise SettingsError(problems) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise SettingsError(_reworded(error)) from None
        if name in type(self).model_fields:
            self._origins.pop(name, None)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        # Where the values came from makes no difference.
        return isinstance(other, TrainConfig) and self.model_dump() == other.model_dump()

    @property
    def origins(self) -> Mapping[str, str]:
        """Where values came from (`train.yaml:3`, `--lr`), for keys set in a file or by flag."""
        return self._origins

    # --- a mapping, where the documented interface needs one
    def __getitem__(self, key: str) -> Any:
        try:
            return getattr(self, self._field(key))
        except KeyError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, self._field(key), value)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and ALIASES.get(key, key) in type(self).model_fields

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(type(self).model_fields)

    def keys(self) -> list[str]:
        """The names of all settings."""
        return list(type(self).model_fields)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` when there is no such setting."""
        name = ALIASES.get(key, key)
        return getattr(self, name) if name in type(self).model_fields else default

    @classmethod
    def _field(cls, key: str) -> str:
        name = ALIASES.get(key, key)
        if name not in cls.model_fields:
            raise KeyError(key)
        return name

    def redacted(self) -> dict[str, Any]:
        """Every setting as JSON has it, without secrets: what may be written down or sent away."""
        settings: dict[str, Any] = redact(self.model_dump(mode="json"))
        return settings

    @property
    def model_label(self) -> str:
        """The model as people call it: its name, or the names of the two that are put together."""
        if self.text_model_name is None:
            return str(self.model_name)
        return f"{self.text_model_name} + {self.image_model_name}"

    @classmethod
    def coerce(cls, config: TrainConfig | Mapping[str, Any]) -> TrainConfig:
        """A TrainConfig from itself (the same object) or from a plain dict of settings.

        Raises:
            ConfigError: listing every unknown key and unfit value.
        """
        return config if isinstance(config, TrainConfig) else cls(**config)


def _find_control_character(value: Any) -> str | None:
    """The first one in a text, or in the texts of a list or mapping; see `vembed.errors`."""
    if isinstance(value, str):
        return find_control_character(value)
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if not isinstance(value, list | tuple):
        return None
    return next((c for c in map(_find_control_character, value) if c is not None), None)


def merge_spellings(settings: Iterable[Setting]) -> tuple[dict[str, Setting], list[Problem]]:
    """Settings by their real name: the last one wins, unless two spellings of one key disagree."""
    found: dict[str, Setting] = {}
    problems = []
    for setting in settings:
        name = ALIASES.get(setting.key, setting.key)
        other = found.get(name)
        if other is not None and other.key != setting.key and other.value != setting.value:
            rule = (
                f"is another spelling of {other.key!r}, which has another value"
                f"{f' ({other.origin})' if other.origin else ''}: "
                f"{setting.value!r} and {other.value!r}. Keep one of them"
            )
            problems.append(Problem((setting.key, name), rule))
        found[name] = setting
    return found, problems


def problem_list(lines: Sequence[str]) -> str:
    """The message that lists all problems of a configuration."""
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{count} in the configuration:\n" + "\n".join(f"  {line}" for line in lines)


def check(
    config: TrainConfig | Mapping[str, Any], *, required: Collection[str] = RUN_REQUIRES
) -> list[str]:
    """Problems between settings that are each fine on their own, one line each; empty when sound.

    A plain function, because pydantic keeps a value that a model validator refused.

    Args:
        config: The settings.
        required: Keys that must not be null; the default is what a whole run needs.
    """
    config = TrainConfig.coerce(config)
    problems = find_conflicts(config, required)
    return [problem.located(config.origins.get(problem.keys[0])) for problem in problems]


def find_conflicts(config: TrainConfig, required: Collection[str] = ()) -> list[Problem]:
    """What `check` reports, with the keys involved."""
    composed = config.text_model_name is not None or config.image_model_name is not None
    missing = [
        Problem((key,), "required, but not set")
        for key in required
        if not config[key] and not (key == "model_name" and composed)
    ]
    return [
        *missing,
        *_settings_without_use(config),
        *_model_conflicts(config),
        *_composed_conflicts(config),
        *_lora_conflicts(config),
        *_loss_conflicts(config),
        *_matryoshka_conflicts(config),
        *_token_conflicts(config),
        *_data_conflicts(config),
        *_distillation_conflicts(config),
        *_optimisation_conflicts(config),
        *_checkpoint_conflicts(config),
    ]


class _Need(NamedTuple):
    """Settings that change nothing unless another setting lets them."""

    keys: tuple[str, ...]
    of: str
    is_met: Callable[[TrainConfig], object]
    rule: str


_NEEDS = (
    _Need(
        ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora",
         "lora_quantization", "adapter_path", "save_adapter"),
        "use_lora", lambda c: c.use_lora, "without adapters. Set use_lora: true",
    ),
    _Need(
        ("gradient_cache_chunk_size", "gradient_cache_chunk_tokens", "gradient_cache_keep"),
        "use_gradient_cache", lambda c: c.use_gradient_cache,
        "without the gradient cache. Set use_gradient_cache: true",
    ),
    _Need(
        ("torch_compile_backend",), "torch_compile", lambda c: c.torch_compile,
        "without torch_compile. Set it to true",
    ),
    _Need(
        ("mrl_dims", "mrl_weights", "mrl_layers"), "use_mrl", lambda c: c.use_mrl,
        "without Matryoshka. Set use_mrl: true",
    ),
    _Need(
        ("teacher_revision", "teacher_dtype", "teacher_cache"), "teacher_model_name",
        lambda c: c.teacher_model_name is not None, "without a teacher. Set teacher_model_name",
    ),
    _Need(
        ("teacher_chunk_size",), "teacher_cache", lambda c: c.teacher_cache is not None,
        "where nothing is stored. Set teacher_cache",
    ),
    _Need(
        ("distillation_alpha", "distillation_temperature", "distillation_kwargs"),
        "teacher_model_name",
        lambda c: c.teacher_model_name is not None or c.distillation_loss is not None,
        "without distillation. Set teacher_model_name, or distillation_loss: score",
    ),
    _Need(
        ("eval_steps", "metric_for_best"), "val_data_path",
        lambda c: c.val_data_path is not None, "without validation. Set val_data_path",
    ),
    _Need(
        ("holdout_ratio",), "test_data_path",
        lambda c: c.test_data_path is None or c.holdout_ratio == 0,
        "beside test_data_path, which is the test set. Remove one of them",
    ),
    _Need(
        ("max_bad_records",), "on_bad_record", lambda c: c.on_bad_record != "fail",
        "where a bad record ends the run. Set on_bad_record: quarantine",
    ),
    _Need(
        ("shuffle_buffer_size",), "streaming", lambda c: c.streaming,
        "where all rows are shuffled. Set streaming: true",
    ),
    _Need(
        ("batch_sampler_kwargs",), "streaming", lambda c: not c.streaming,
        "with a stream, whose rows make batches as they come. Set streaming: false",
    ),
    _Need(
        ("save_total_limit",), "save_steps", lambda c: c.save_steps,
        "without checkpoints on the way. Set save_steps",
    ),
    _Need(
        ("save_top_k",), "save_steps", lambda c: c.save_steps,
        "without checkpoints on the way. Set save_steps",
    ),
    _Need(
        ("save_top_k",), "val_data_path", lambda c: c.val_data_path is not None,
        "without checkpoints that are rated. Set val_data_path",
    ),
    _Need(
        ("allow_inexact_resume",), "resume", lambda c: c.resume != "never",
        "where nothing is resumed. Set resume: auto",
    ),
    _Need(
        ("max_nonfinite_steps",), "on_nonfinite", lambda c: c.on_nonfinite == "skip",
        "where the first such step ends the run. Set on_nonfinite: skip",
    ),
    _Need(
        ("project_name", "run_name", "tags"), "report_to", lambda c: c.report_to,
        "without a tracker. Set report_to",
    ),
    _Need(
        ("ddp_static_graph",), "num_processes", lambda c: c.num_processes != 1,
        "with one process, which exchanges nothing. Set num_processes to more",
    ),
    _Need(
        ("revision",), "model_name", lambda c: not _is_local(c.model_name),
        "with a model on this machine. Name one of the hub",
    ),
    _Need(
        ("teacher_revision",), "teacher_model_name", lambda c: not _is_local(c.teacher_model_name),
        "with a teacher on this machine. Name one of the hub",
    ),
    _Need(
        ("image_root", "image_hosts", "max_image_pixels", "image_check", "image_cache"),
        "retrieval_mode",
        lambda c: set(c.retrieval_mode) & {"i", "m"},
        "where retrieval_mode has no image. Remove it, or choose a mode with i or m",
    ),
    _Need(
        ("max_seq_length",), "retrieval_mode", lambda c: c.retrieval_mode != "i2i",
        "where retrieval_mode has no text. Remove it, or choose a mode with t or m",
    ),
    _Need(
        ("query_prompt",), "retrieval_mode", lambda c: c.retrieval_mode[0] != "i",
        "where queries are images. Remove it, or choose a mode with queries of t or m",
    ),
    _Need(
        ("document_prompt",), "retrieval_mode", lambda c: c.retrieval_mode[-1] != "i",
        "where documents are images. Remove it, or choose a mode with documents of t or m",
    ),
    _Need(
        ("optimizer_betas",), "optimizer",
        lambda c: c.optimizer not in ("sgd", "rmsprop", "adafactor"),
        "with an optimizer other than Adam's. Set optimizer: adamw",
    ),
    _Need(
        ("optimizer_eps",), "optimizer", lambda c: c.optimizer not in ("sgd", "adafactor"),
        "with an optimizer that has no such term. Set optimizer: adamw",
    ),
    _Need(
        ("warmup_ratio", "warmup_steps"), "scheduler_type",
        lambda c: c.scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy"),
        "with a schedule that has no warm-up. Set scheduler_type: constant_with_warmup",
    ),
    _Need(
        ("scheduler_kwargs",), "scheduler_type",
        lambda c: c.scheduler_type not in ("constant", "constant_with_warmup"),
        "with a schedule that takes no arguments. Choose another scheduler_type",
    ),
)  # fmt: skip


def _settings_without_use(config: TrainConfig) -> Iterator[Problem]:
    """Settings other than their defaults that the others leave without effect.

    `max_steps` beside `epochs`, and `warmup_steps` beside `warmup_ratio`, are no such case: each
    says that it wins, so that a file with the one can be tried out with the other.
    """
    for need in _NEEDS:
        if need.is_met(config):
            continue
        for key in need.keys:
            default = type(config).model_fields[key].get_default(call_default_factory=True)
            if config[key] != default:
                yield Problem((key, need.of), f"has no use {need.rule}")


def _is_local(model_name: str | None) -> bool:
    return model_name is not None and (
        model_name.startswith("package:") or os.path.isdir(model_name)
    )


def _model_conflicts(config: TrainConfig) -> Iterator[Problem]:
    if config.trust_remote_code:
        yield from _remote_code_conflicts(config)
    if config.attn_implementation == "flash_attention_2" and (
        config.torch_dtype == "float32" and config.mixed_precision == "no"
    ):
        yield Problem(
            ("attn_implementation", "torch_dtype", "mixed_precision"),
            "flash_attention_2 computes in 16 bits only. "
            "Set mixed_precision: bf16, or torch_dtype: bfloat16",
        )


_REVISIONS = {
    "model_name": "revision",
    "teacher_model_name": "teacher_revision",
    "text_model_name": None,
    "image_model_name": None,
}
"""Models whose code `trust_remote_code` lets run, with the setting that says which code."""


def is_commit(revision: str | None) -> bool:
    """Whether a revision is the name of one commit; branches and tags move."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _remote_code_conflicts(config: TrainConfig) -> Iterator[Problem]:
    """Code of the hub runs only where a commit says which code."""
    composed = config.text_model_name is not None or config.image_model_name is not None
    for key, revision in _REVISIONS.items():
        name = config[key]
        if name is None and (key != "model_name" or composed):
            continue
        if name is not None and (name.startswith("package:") or os.path.isdir(name)):
            continue
        if revision is None:
            yield Problem(
                ("trust_remote_code", key),
                f"runs code from the hub, but no setting says which revision of {key}. Download "
                "the model, and name its folder",
            )
        elif not is_commit(config[revision]):
            yield Problem(
                ("trust_remote_code", revision, key),
                f"runs code from the hub, so it needs a revision that fixes which code. Set "
                f"{revision} to a commit, of 40 letters and digits",
            )


def _lora_conflicts(config: TrainConfig) -> Iterator[Problem]:
    if config.lora_quantization is None:
        return
    if find_spec("bitsandbytes") is None:
        yield Problem(
            ("lora_quantization",),
            f"{config.lora_quantization} needs the package bitsandbytes, which is not installed. "
            "Install it (pip install bitsandbytes), or set lora_quantization: null",
        )
    if config.device == "cpu":
        yield Problem(
            ("lora_quantization", "device"),
            "quantized weights need a GPU, but device is cpu. Set lora_quantization: null",
        )
    if config.distributed_strategy == "fsdp2":
        yield Problem(
            ("lora_quantization", "distributed_strategy"),
            "quantized weights cannot be shared out. Set distributed_strategy: ddp",
        )


def _composed_conflicts(config: TrainConfig) -> Iterator[Problem]:
    names = ("text_model_name", "image_model_name")
    given = [name for name in names if config[name] is not None]
    if not given:
        return
    if len(given) == 1:
        (absent,) = set(names) - set(given)
        yield Problem((given[0], absent), f"has no use alone. Set {absent}, or model_name")
    if config.encoder_mode not in ("auto", "composed"):
        yield Problem(
            ("encoder_mode", given[0]),
            f"two models make a composed encoder, not {config.encoder_mode}. Set auto",
        )
    for key in ("model_name", "revision", "pooling_method", "keep_layers", "mrl_layers"):
        if config[key] is not None:
            yield Problem(
                (key, given[0]), f"is about one model, but {given[0]} names one of two. Remove it"
            )


POOLED_LOSSES = (
    "infonce", "sigmoid", "triplet", "margin_mse", "cosent", "angle", "cosine_mse", "contrastive",
    "online_contrastive", "supcon", "label_triplet", "arcface", "normalized_softmax",
)  # fmt: skip
"""Losses by name that compare one vector for each item. They say so themselves, but need torch."""

TOKEN_LOSSES = ("maxsim", "colbert")
"""Those that compare a vector for each token."""


def _token_conflicts(config: TrainConfig) -> Iterator[Problem]:
    """What needs one vector per item, beside settings that keep one for each token."""
    keeps = config.pooling_method == "none"
    if keeps and config.loss_type in POOLED_LOSSES:
        yield Problem(
            ("loss_type", "pooling_method"),
            f"{config.loss_type} compares one vector for each item, but pooling_method none keeps "
            f"one for each token. Set loss_type: {TOKEN_LOSSES[0]}",
        )
    if config.pooling_method not in (None, "none") and config.loss_type in TOKEN_LOSSES:
        yield Problem(
            ("loss_type", "pooling_method"),
            f"{config.loss_type} compares a vector for each token, but pooling_method "
            f"{config.pooling_method} leaves one for each item. Set pooling_method: none",
        )
    if not keeps and config.loss_type not in TOKEN_LOSSES:
        return
    for key, clashes, rule in (
        ("normalize_embeddings", config.normalize_embeddings is False,
         "MaxSim adds up cosines, so vectors of tokens have unit length. Remove it"),
        *((key, config[key] is not None,
           "distillation compares one vector for each item, not one for each token. Remove it")
          for key in ("teacher_model_name", "distillation_loss")),
        ("encoder_mode", config.encoder_mode in ("dual", "composed"),
         f"the towers of a {config.encoder_mode} encoder meet in one vector. Use text, vision or "
         "vlm, or a pooling_method other than none with loss_type: infonce"),
        ("use_mrl", config.use_mrl,
         "Matryoshka cuts one vector for each item, not one for each token. Remove it"),
    ):  # fmt: skip
        if clashes:
            yield Problem((key, "pooling_method", "loss_type"), rule)


def _matryoshka_conflicts(config: TrainConfig) -> Iterator[Problem]:
    dims, weights = config.mrl_dims, config.mrl_weights
    if not config.use_mrl:
        return
    if dims is not None and (not dims or len(set(dims)) < len(dims)):
        yield Problem(("mrl_dims",), f"expected different numbers. Received: {dims}")
    layers = config.mrl_layers
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        yield Problem(("mrl_layers",), f"expected different numbers. Received: {layers}")
    if weights is not None and dims is None:
        yield Problem(("mrl_weights", "mrl_dims"), "says nothing without mrl_dims. Set both")
    elif weights is not None and dims is not None and len(weights) != len(dims):
        yield Problem(
            ("mrl_weights", "mrl_dims"),
            f"expected one for each of the {len(dims)} mrl_dims. Received: {len(weights)}",
        )


def _data_conflicts(config: TrainConfig) -> Iterator[Problem]:
    if not set(config.retrieval_mode) & {"i", "m"}:
        sets = config.data_path if isinstance(config.data_path, list) else []
        if any(isinstance(one, DatasetSpec) and one.image_root is not None for one in sets):
            rule = f"image_root has no use: retrieval_mode {config.retrieval_mode} has no image"
            yield Problem(("data_path", "retrieval_mode"), rule)
    if not config.streaming:
        return
    if config.batch_sampler not in ("auto", "random"):
        yield Problem(
            ("batch_sampler", "streaming"),
            f"{config.batch_sampler} must know all rows, but those of a stream come one after "
            "another. Set streaming: false, or batch_sampler: random",
        )
    if config.max_train_samples is not None:
        yield Problem(
            ("max_train_samples", "streaming"),
            "a stream has no first rows to choose. Set max_steps instead",
        )
    if config.max_steps is None:
        yield Problem(
            ("streaming", "max_steps"),
            "a stream has no known length, so epochs cannot be planned. Set max_steps",
        )
    if config.test_data_path is None and config.holdout_ratio > 0:
        yield Problem(
            ("streaming", "test_data_path", "holdout_ratio"),
            "nothing can be held out of a stream. Set test_data_path, or holdout_ratio: 0",
        )


def _checkpoint_conflicts(config: TrainConfig) -> Iterator[Problem]:
    if config.resume != "never" and config.overwrite_output_dir:
        yield Problem(
            ("overwrite_output_dir", "resume"),
            f"replaces an earlier run, but resume: {config.resume} goes on with one. Set false, or "
            "resume: never",
        )


def _distillation_conflicts(config: TrainConfig) -> Iterator[Problem]:
    kinds = config.distillation_loss
    names = [kinds] if isinstance(kinds, str) else list(kinds or {})
    for name, arguments in config.distillation_kwargs.items():
        if "temperature" in arguments:
            yield Problem(
                ("distillation_kwargs",),
                f"{name}: temperature is a setting of its own. Set distillation_temperature",
            )
    if config.teacher_model_name is not None:
        return
    if lacking := [name for name in names if name in ("similarity_kl", "embedding", "relational")]:
        yield Problem(
            ("distillation_loss", "teacher_model_name"),
            f"{', '.join(lacking)} needs a teacher's embeddings. Set teacher_model_name, or take "
            "score, which can do with teacher_scores in the rows",
        )


_LOSS_SETTINGS = {
    "temperature": "temperature",
    "learn_temperature": "learn_temperature",
    "bidirectional": "loss_bidirectional",
    "tile_size": "loss_tile_size",
    "guided": "guide_model_name",
}
_LOSS_FACTS = {"num_classes": "the labels of the data", "embedding_dim": "the model"}


def _loss_conflicts(config: TrainConfig) -> Iterator[Problem]:
    for key, setting in _LOSS_SETTINGS.items():
        if key in config.loss_kwargs:
            yield Problem(("loss_kwargs",), f"{key} is a setting of its own. Set {setting}")
    for key, source in _LOSS_FACTS.items():
        if key in config.loss_kwargs:
            yield Problem(("loss_kwargs",), f"{key} is taken from {source}. Remove it")


def _optimisation_conflicts(config: TrainConfig) -> Iterator[Problem]:
    steps, warmup = config.max_steps, config.warmup_steps
    if steps is not None and warmup is not None and warmup > steps:
        yield Problem(
            ("warmup_steps", "max_steps"),
            f"the learning rate would never be reached: {warmup} steps of warm-up, "
            f"but max_steps is {steps}",
        )
    for pattern, step in config.unfreeze_at_step.items():
        if steps is not None and step >= steps:
            yield Problem(
                ("unfreeze_at_step", "max_steps"),
                f"{pattern} would never be trained: it is frozen for {step} steps, "
                f"but max_steps is {steps}",
            )
    if config.mixed_precision == "fp16" and config.device == "cpu":
        yield Problem(
            ("mixed_precision", "device"),
            "fp16 needs an accelerator, but device is cpu. Use bf16 or no",
        )
    if config.mixed_precision == "fp16" and config.torch_dtype == "float16":
        yield Problem(
            ("mixed_precision", "torch_dtype"),
            "fp16 scales the loss, which needs weights in float32. Set torch_dtype: float32",
        )
    if config.torch_compile and config.gradient_checkpointing:
        yield Problem(
            ("torch_compile", "gradient_checkpointing"),
            "compiled layers that are computed again draw other dropout masks than uncompiled "
            "ones. Set one of them to false; use_gradient_cache: true saves memory, too",
        )
    if config.ddp_static_graph:
        yield from _static_graph_conflicts(config)
    if config.distributed_strategy == "fsdp2":
        yield from _fsdp2_conflicts(config)


def _static_graph_conflicts(config: TrainConfig) -> Iterator[Problem]:
    """DDP with a static graph must reduce in every backward pass, or dies of an internal assert."""
    steps = config.gradient_accumulation_steps
    for key, clashes in (
        ("use_gradient_cache", config.use_gradient_cache),
        ("gradient_accumulation_steps", steps > 1),
        ("unfreeze_at_step", bool(config.unfreeze_at_step)),
    ):
        if clashes:
            yield Problem(
                ("ddp_static_graph", key),
                f"does not work with {key}: {str(config[key]).lower()}, because DDP with a static "
                "graph must reduce the same gradients in every backward pass. "
                "Turn one of them off",
            )


def _fsdp2_conflicts(config: TrainConfig) -> Iterator[Problem]:
    if config.ddp_static_graph:
        yield Problem(
            ("ddp_static_graph", "distributed_strategy"),
            "is a setting of DDP, but distributed_strategy is fsdp2. Set it to false",
        )
    if config.mixed_precision == "fp16":
        yield Problem(
            ("mixed_precision", "distributed_strategy"),
            "fp16 scales the loss by what all gradients allow, but with distributed_strategy: "
            "fsdp2 a process sees its share only. Use bf16 or no",
        )
    if config.torch_compile:
        yield Problem(
            ("torch_compile", "distributed_strategy"),
            "compiled layers cannot be shared out here. Set torch_compile: false, or "
            "distributed_strategy: ddp",
        )
    if config.num_processes == 1:
        yield Problem(
            ("distributed_strategy", "num_processes"),
            "fsdp2 shares weights out among processes, but num_processes is 1. Set ddp",
        )


# Names that pydantic puts into an error's location for the alternatives of `data_path`.
_UNION_BRANCH = re.compile(r"str$|DatasetSpec$|list\[")

_RULES = {
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing_size": "expected a smaller whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "string_too_short": "expected text that is not empty",
    "string_pattern_mismatch": "expected two of t (text), i (image), m (both) around a 2, such as "
    "t2i",
    "list_type": "expected a list, as in [a, b]",
    "tuple_type": "expected a list, as in [a, b]",
    "dict_type": "expected keys with values, as in {{a: b}}",
    "model_type": "expected keys with values, as in {{path: file}}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:.15g}",
    "too_long": "expected {max_length} values",
    "value_error": "{error}",
}


def _reworded(error: ValidationError) -> list[Problem]:
    """Pydantic's errors in our words, one problem for each place."""
    by_place: dict[str, list[ErrorDetails]] = {}
    for detail in _deepest(error.errors(include_url=False)):
        by_place.setdefault(_place(detail), []).append(detail)
    return [_reword(place, details) for place, details in by_place.items()]


def _deepest(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without the errors of those alternatives of `data_path` that fit least."""
    depth = max((len(d["loc"]) for d in details if d["loc"][0] == "data_path"), default=0)
    return [d for d in details if d["loc"][0] != "data_path" or len(d["loc"]) == depth]


def _place(detail: ErrorDetails) -> str:
    """The location as the user would write it: `data_path[0].split`."""
    first, *rest = detail["loc"]
    parts = [p for p in rest if first != "data_path" or not _UNION_BRANCH.match(str(p))]
    return str(first) + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts)


def _reword(place: str, details: list[ErrorDetails]) -> Problem:
    key = place.replace("[", ".").split(".")[0]
    first = details[0]
    if first["type"] in ("extra_forbidden", "no_such_attribute"):
        known = TrainConfig.model_fields if key == place else DatasetSpec.model_fields
        # The value is not shown: a key that is not ours may be a password.
        name = place.rpartition(".")[2]
        return Problem((place, key), f"unknown setting{did_you_mean(name, list(known))}")
    if first["type"] == "missing":
        return Problem((place, key), "required, but not set")
    rule = " or ".join(dict.fromkeys(_rule(detail) for detail in details))
    rule = rule.replace(" or expected ", " or ")
    return Problem((place, key), f"{rule}. Received: {_shown(first['input'])}")


def _rule(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        # pydantic writes the alternatives as "'a', 'b' or 'c'".
        names = re.findall(r"'([^']*)'", context["expected"])
        return f"expected one of {', '.join(names)}{did_you_mean(str(detail['input']), names)}"
    template = _RULES.get(detail["type"])
    return detail["msg"] if template is None else template.format(**context)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else shorten(repr(value), most=200)
