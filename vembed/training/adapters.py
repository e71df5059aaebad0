"""Low-rank adapters: which layers get them.

LoRA: https://arxiv.org/abs/2106.09685, DoRA: https://arxiv.org/abs/2402.09353, rsLoRA:
https://arxiv.org/abs/2312.03732. `adapter_files` keeps them, `vembed.models.merging` merges them
for a saved model, and `adapter_gate` compares the two.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from vembed.config import TrainConfig
from vembed.errors import ConfigError, did_you_mean
from vembed.models.merging import has_adapters
from vembed.models.towers import HEADS

_IN_A_HEAD = rf"(.*\.)?({'|'.join(HEADS)})(\..*)?"

# What peft says of a matter that it settles itself, or that is none.
_IDLE_WARNINGS = (
    "fan_in_fan_out is set to",
    "You have passed exclude_modules",
    "`is_gradient_checkpointing` is deprecated",
)


def adapt(
    backbone: Any,
    config: TrainConfig,
    *,
    targets: Collection[str] | None = None,
    model_name: str | None = None,
) -> Any:
    """The backbone with new adapters, which do nothing yet; everything else but heads is frozen.

    Args:
        backbone: Changed in place. What is frozen in it gets no adapter.
        config: Reads `lora_*`, `use_dora`, `use_rslora`, `revision`.
        targets: What `find_targets` found in it, if it was asked.
        model_name: What the adapter says that it belongs to.

    Raises:
        ConfigError: if `lora_target_modules` names what cannot be adapted, or nothing can.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if targets is None:
        (targets,) = find_targets([backbone], config.lora_target_modules)
    heads = [
        n for n, m in _outermost_heads(backbone) if any(p.requires_grad for p in m.parameters())
    ]
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=_for_peft(targets, backbone),
        # Also a pooler that was taken off: peft meets it where it loads the adapter.
        exclude_modules=_IN_A_HEAD if heads or hasattr(backbone, "pooler") else None,
        modules_to_save=heads or None,
    )
    if getattr(backbone, "hf_quantizer", None) is not None:
        # Recomputing activations is on already, in the way that needs no gradient at the inputs.
        backbone = prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    with warnings.catch_warnings():
        for message in _IDLE_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        adapted = get_peft_model(backbone, settings)
    # Otherwise a path on this machine.
    adapted.peft_config["default"].base_model_name_or_path = model_name
    adapted.peft_config["default"].revision = config.revision
    return adapted


def find_targets(backbones: Sequence[nn.Module], wanted: Collection[str] | None) -> list[list[str]]:
    """Names of the linear layers to adapt: all of them but heads and frozen ones, or those wanted.

    Args:
        backbones: Without adapters; of each tower one.
        wanted: Names, or ends of names from a dot on, as in `query` or `attention.self.query`, each
            of a layer in one backbone at least.

    Returns:
        The names in each backbone.

    Raises:
        ConfigError: if a wanted one is not there, or there is none at all.
    """
    found = [[n for n, m in _adaptable(backbone) if _is_trained(m)] for backbone in backbones]
    known = [name for names in found for name in names]
    label = " or ".join(dict.fromkeys(type(backbone).__name__ for backbone in backbones))
    if not known:
        raise ConfigError(
            f"use_lora: {label or 'the model'} has no linear layer that is not frozen to put "
            "adapters on. Set use_lora: false, or freeze less"
        )
    if wanted is None:
        return found
    for name in wanted:
        if not any(_ends_with(layer, name) for layer in known):
            ends = [_short(layer) for layer in known]
            raise ConfigError(
                f"lora_target_modules: {name!r} is no linear layer of {label} "
                f"that can be adapted{did_you_mean(name, dict.fromkeys([*ends, *known]))}. "
                f"Those are: {count_names(known)}"
            )
    return [[x for x in names if any(_ends_with(x, name) for name in wanted)] for names in found]


def freeze_all_but_heads(backbone: nn.Module) -> None:
    """As adapting would leave a backbone of which no layer is wanted, in place."""
    for name, parameter in backbone.named_parameters():
        if not is_in_head(name):
            parameter.requires_grad_(False)


def is_in_head(name: str) -> bool:
    """Whether a module or parameter is one of `HEADS`, or part of one."""
    return re.fullmatch(_IN_A_HEAD, name) is not None


def count_names(layers: Iterable[str]) -> str:
    """Layers by the last part of their names, as in `key x2, query x2`."""
    counts = Counter(map(_short, layers))
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


def describe_layers(model: nn.Module) -> str:
    """The layers that have adapters, for the log: of each tower by itself, where there are two."""
    adapters = adapters_of(model)
    groups: dict[str, list[str]] = {}
    for name, backbone in adapters.items():
        for layer in adapted_layers(backbone.get_base_model()):
            tower = name.removesuffix(".backbone") if len(adapters) > 1 else layer.split(".")[0]
            groups.setdefault(tower, []).append(layer)
    if len(groups) == 1:
        return count_names(*groups.values())
    return "; ".join(f"{tower}: {count_names(layers)}" for tower, layers in groups.items())


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that have adapters."""
    from peft.tuners.lora import LoraLayer

    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """The backbones with adapters (`PeftModel`), by name."""
    return {name: module for name, module in model.named_modules() if has_adapters(module)}


def _adaptable(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers outside of heads, fused and transposed ones (GPT-2's) included."""
    from transformers.pytorch_utils import Conv1D

    # torch's own attention reads the weight of its output layer instead of calling the layer.
    read = {
        id(part)
        for module in backbone.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    for name, module in backbone.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D) and id(module) not in read
        if is_linear and not is_in_head(name):
            yield name, module


def _is_trained(module: nn.Module) -> bool:
    # Quantized weights never train by themselves, so that being frozen says nothing.
    return any(p.requires_grad or not p.is_floating_point() for p in module.parameters())


def _outermost_heads(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    named = [(n, m) for n, m in backbone.named_modules() if n.rpartition(".")[2] in HEADS]
    return [(n, m) for n, m in named if not any(n.startswith(f"{o}.") for o, _ in named)]


def _short(layer: str) -> str:
    """The last part of a name; with the one before it where it is a number in a list."""
    rest, _, last = layer.rpartition(".")
    return f"{rest.rpartition('.')[2]}.{last}" if last.isdigit() else last


def _ends_with(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _for_peft(targets: Collection[str], backbone: nn.Module) -> list[str] | str:
    """The layers as peft's `target_modules`: by the ends of their names where that is exact."""
    ends = sorted({target.rpartition(".")[2] for target in targets})
    meant = {
        name
        for name, _ in backbone.named_modules()
        if name.rpartition(".")[2] in ends and not is_in_head(name)
    }
    return ends if meant == set(targets) else "|".join(map(re.escape, sorted(targets)))
