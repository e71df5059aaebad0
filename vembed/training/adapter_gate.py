"""The check of a saved model that adapters were merged into: it is what was trained.

Merging can go wrong without an error: left out, done twice, lost in the rounding of 16-bit weights.
So a few inputs are embedded by the model with its adapters, by the same without them, and by the
folder as it was written; all on the CPU and in float32, so that only weights can differ.

For N parameters this takes 4 N to 9 N bytes of the main process's memory: first a copy of the
model, unless it is on the CPU in float32 already, then the folder, which takes time to load.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging as transformers_logging

from vembed.chunking import take_rows
from vembed.config import TrainConfig
from vembed.errors import CheckpointError
from vembed.images import as_image_source
from vembed.inference.encoding import eval_mode
from vembed.models import load_encoder
from vembed.models.merging import copy_to_cpu, plain_copy
from vembed.modes import Item
from vembed.token_vectors import cat_items
from vembed.training.adapters import adapters_of
from vembed.training.data_utils import Inputs

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference of an element of a unit vector, by the type of the weights.

16-bit weights are rounded once more when adapters are merged into them.
"""

# How much the same weights may differ in unit vectors when they are computed in another way, as
# torch's attention does where modules are wrapped: 9e-8 in SigLIP.
_NOISE = 2.5e-7

ROWS_PER_ROLE = 6

_TEXTS = (
    "How do I boil an egg?", "Lower the egg into boiling water for six minutes.",
    "Why is the sky blue?", "Air scatters blue light more than red.",
    "open a file in Python", "with open(path) as file: text = file.read()",
    "the invoice is overdue", "Payment was due on 1 March 2024.",
    "red shoes", "Laufschuhe für Damen, Größe 38", "42", "a",
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """What to look at when a model with adapters is saved.

    Attributes:
        inputs: Model inputs of a few rows, one mapping for each role.
        updated: Whether an optimizer step has changed adapters, so that they must do something.
    """

    inputs: Sequence[Inputs]
    updated: bool


class AdapterWatch:
    """Sees, during training, what the check of a saved model needs; nothing without adapters."""

    def __init__(self, model: nn.Module) -> None:
        """Look for adapters.

        Args:
            model: The encoder.
        """
        self._has_adapters = any(map(_is_second_matrix, dict(model.named_parameters())))
        self._inputs: list[Inputs] | None = None
        self._updated = False

    @property
    def probe(self) -> Probe | None:
        """A few rows of the first batch; None before it."""
        return None if self._inputs is None else Probe(self._inputs, self._updated)

    def see_batch(self, inputs: Mapping[str, Inputs], lengths: Mapping[str, Sequence[int]]) -> None:
        """Keep a few rows of the first batch."""
        if self._has_adapters and self._inputs is None:
            self._inputs = shortest_rows(inputs, lengths)

    def see_update(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Note whether a step, just taken, changed adapters: warm-up begins with a rate of 0."""
        if not self._has_adapters or self._updated:
            return
        moved = {id(p) for g in optimizer.param_groups if g["lr"] > 0 for p in g["params"]}
        self._updated = any(
            id(parameter) in moved and parameter.grad is not None
            for name, parameter in model.named_parameters()
            if _is_second_matrix(name)
        )


def shortest_rows(
    inputs: Mapping[str, Inputs], lengths: Mapping[str, Sequence[int]]
) -> list[Inputs]:
    """A few rows of each role of a batch, the cheapest ones, on the CPU.

    Args:
        inputs: Model inputs by role.
        lengths: Real tokens per row, by role.
    """
    chosen = []
    for role, of_role in lengths.items():
        rows = sorted(range(len(of_role)), key=lambda row: of_role[row])[:ROWS_PER_ROLE]
        if rows:
            taken = take_rows(inputs[role], sorted(rows), of_role[rows[-1]])
            chosen.append({name: tensor.cpu() for name, tensor in taken.items()})
    return chosen


def check_saved(
    encoder: Any, folder: Path, probe: Probe | None, config: TrainConfig, *, name: str
) -> None:
    """Raise unless the folder embeds as the encoder does with its adapters; else do nothing.

    Args:
        encoder: Stays as it is, and where it is.
        folder: Where the encoder was saved, adapters merged in.
        probe: None for literal texts and images, and an encoder of which it is not known whether
            it was trained.
        config: Says how to load the folder.
        name: What the folder is called in errors.

    Raises:
        CheckpointError: if the vectors differ, or adapters that were trained change nothing.
    """
    models = adapters_of(encoder).values()
    if not models:
        return
    inputs = _literal_inputs(encoder) if probe is None else probe.inputs
    # Random numbers and progress bars are those of the run, not of a look at its result.
    with torch.random.fork_rng(devices=[]), _no_progress_bars(), torch.no_grad():
        adapted = _in_float32(encoder)
        with_adapters = _embed(adapted, inputs)
        with _without_adapters(adapted):
            base = _embed(adapted, inputs)
        del adapted  # as large as the model; what is loaded next is as well
        saved = load_encoder(
            str(folder),
            encoder_mode=config.encoder_mode,
            attn_implementation=_attention_of(next(iter(models))),
            trust_remote_code=config.trust_remote_code,
        )
        found = _embed(saved, inputs)
    dtype = max((m.get_base_model().dtype for m in models), key=TOLERANCES.__getitem__)
    seen = _Vectors(with_adapters, base, found, dtype, new=all(map(_is_new, models)))
    fault = _find_fault(seen, updated=probe is not None and probe.updated)
    if fault is not None:
        raise CheckpointError(f"{name}: {fault}. The model is not saved")
    if dtype.itemsize < 4 and seen.error >= seen.learned > 0:
        logger.warning(
            "%s: rounding to %s weights changes vectors by up to %.1e, the adapters merged into "
            "them only by up to %.1e. torch_dtype: float32 holds what was learned",
            name, _name_of(dtype), seen.error, seen.learned,
        )  # fmt: skip


@dataclass(frozen=True)
class _Vectors:
    """Unit vectors of the same inputs, `[n, D]`, or of their tokens, `[n, T, D]`.

    Attributes:
        adapted: Of the model with its adapters.
        base: Of the model without them.
        saved: Of the folder that was written.
        dtype: Of the weights.
        new: Whether the adapters are as they were made.
    """

    adapted: Tensor
    base: Tensor
    saved: Tensor
    dtype: torch.dtype
    new: bool

    @property
    def error(self) -> float:
        """How much merging changed, at most in one element."""
        return float((self.saved - self.adapted).abs().max())

    @property
    def learned(self) -> float:
        """How much the adapters change, at most in one element."""
        return float((self.base - self.adapted).abs().max())


def _find_fault(seen: _Vectors, *, updated: bool) -> str | None:
    """What is wrong, in words; None if nothing is."""
    error, learned = seen.error, seen.learned
    to_base = float((seen.saved - seen.base).abs().max())
    is_base = to_base <= _NOISE
    # A base model that is no farther away may be what the weights' own rounding leaves. Without it,
    # what is far more than noise tells a base model whose vectors are not bit-equal.
    rounding = torch.finfo(seen.dtype).eps * float(seen.base.abs().max())
    least = rounding if to_base == 0 else max(rounding, 8 * _NOISE)
    tolerance = TOLERANCES[seen.dtype]
    if not error <= tolerance or (is_base and learned > least):
        return (
            f"the merged model differs from the one with adapters by up to {error:.1e} in unit "
            f"vectors, where {tolerance:g} is allowed for {_name_of(seen.dtype)} (the adapters "
            f"themselves change them by up to {learned:.1e}): "
            f"{'it is the base model' if is_base else 'merging went wrong'}"
        )
    if seen.new and updated:
        return "optimizer steps were taken, but the adapters are as they were at the start"
    if not seen.new and learned == 0:
        return "the model gives the same vectors with its adapters and without: they do nothing"
    return None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention_of(model: Any) -> str | None:
    """The kernel of a backbone with adapters, as a CPU has it; None where it is another one."""
    name = str(model.get_base_model().config._attn_implementation)
    return "sdpa" if "flash" in name else name if name in ("eager", "sdpa") else None


def _in_float32(encoder: Any) -> Any:
    """The encoder itself where it is on the CPU, in float32 and not quantized; else such a copy."""
    models = adapters_of(encoder).values()
    bases = [model.get_base_model() for model in models]
    quantized = any(getattr(base, "hf_quantizer", None) is not None for base in bases)
    tensors = encoder.parameters()
    if not quantized and all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
        return encoder
    replaced: dict[int, Any] = {id(model): plain_copy(model) for model in models}
    for module in encoder.modules():
        # Tokenizers are large, and nothing here changes them.
        processor = getattr(module, "processor", None)
        replaced[id(processor)] = processor
    copied = copy_to_cpu(encoder, replaced).float()
    for model in adapters_of(copied).values():
        if "flash" in str(model.get_base_model().config._attn_implementation):
            model.get_base_model().set_attn_implementation(_attention_of(model))
    return copied


@contextmanager
def _without_adapters(encoder: nn.Module) -> Iterator[None]:
    trained = {name: p.requires_grad for name, p in encoder.named_parameters()}
    try:
        with ExitStack() as stack:
            for model in adapters_of(encoder).values():
                stack.enter_context(model.disable_adapter())
            yield
    finally:
        # peft makes all adapters trainable that it turns on again.
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(trained[name])


def _embed(encoder: Any, inputs: Sequence[Inputs]) -> Tensor:
    with eval_mode(encoder), _own_forward(encoder):
        return cat_items([encoder(normalize=True, **of_role).float() for of_role in inputs])


@contextmanager
def _own_forward(encoder: nn.Module) -> Iterator[None]:
    """Without the autocast that Accelerate puts around an instance's `forward`, also on a CPU."""
    around = vars(encoder).pop("forward", None)
    try:
        yield
    finally:
        if around is not None:
            encoder.forward = around


def _literal_inputs(encoder: Any) -> list[Inputs]:
    items = {
        "t": [Item(text=text) for text in _TEXTS],
        "i": [Item(image=as_image_source(image)) for image in _literal_images()],
    }
    return [
        encoder.processor(of_modality, role="document")
        for modality, of_modality in items.items()
        if modality in encoder.modalities
    ]


def _literal_images() -> Iterator[Image]:
    """Stripes of one colour each, from wide to narrow."""
    from PIL.Image import frombytes

    size = 64
    for number, colour in enumerate([(220, 40, 40), (40, 160, 60), (50, 60, 200)], start=1):
        rows = (bytes(colour if x * number // 16 % 2 else (250, 250, 240)) for x in range(size))
        yield frombytes("RGB", (size, size), b"".join(rows) * size)


def _is_new(model: Any) -> bool:
    """Whether adapters are as they were made."""
    return not any(bool(p.any()) for name, p in model.named_parameters() if _is_second_matrix(name))


def _is_second_matrix(name: str) -> bool:
    """Whether this is the parameter of an adapter that starts as zero."""
    return ".lora_B." in name


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
