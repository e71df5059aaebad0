"""Parameters by the names that users see, the patterns that choose them, and their layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any, TypeVar

from torch import nn

from vembed.errors import ConfigError, did_you_mean
from vembed.losses.matryoshka import innermost

_Value = TypeVar("_Value")

LOSS = "loss."
"""What the names of the loss's own parameters begin with, as in `loss.logit_scale`."""

DISTILLATION = "distillation."
"""The same for the distillation loss."""

# What peft puts around the module that it adapts, or trains a copy of.
_WRAPPING = re.compile(r"\.(base_layer|modules_to_save\.default)(?=\.)")
_ADAPTER_NAME = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")


def visible_name(name: str) -> str:
    """A parameter's name as it would be without what peft wraps around modules.

    So a pattern for a layer means the same with adapters and without. The adapters of `a.weight`
    are `a.lora_A.weight` and `a.lora_B.weight`.
    """
    if ".base_model.model." not in f".{name}":
        return name
    plain = f".{name}".replace(".base_model.model.", ".", 1)
    return _ADAPTER_NAME.sub(r"\1", _WRAPPING.sub("", plain)).removeprefix(".")


def named_parameters(
    model: nn.Module, criterion: Any = None, distillation_loss_fn: Any = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the model, and of losses that have any, by visible name, in a fixed order."""
    for name, parameter in model.named_parameters():
        yield visible_name(name), parameter
    for prefix, loss in ((LOSS, innermost(criterion)), (DISTILLATION, distillation_loss_fn)):
        if isinstance(loss, nn.Module):
            for name, parameter in loss.named_parameters():
                yield prefix + name, parameter


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern is for this parameter, or for a module that it is part of."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def last_match(name: str, choices: Mapping[str, _Value]) -> _Value | None:
    """The value of the last pattern that matches; None without any."""
    found = None
    for pattern, value in choices.items():
        if matches(name, pattern):
            found = value
    return found


def check_patterns(
    key: str, patterns: Iterable[str], names: Collection[str], *, kind: str = "parameter"
) -> None:
    """Raise ConfigError, with names that are near, for the first pattern that matches nothing.

    Args:
        key: The setting that holds the patterns.
        patterns: To look at.
        names: Of the parameters that they are for.
        kind: What these are.
    """
    for pattern in patterns:
        if any(matches(name, pattern) for name in names):
            continue
        modules = dict.fromkeys(part for name in names for part in _modules_of(name))
        near = did_you_mean(pattern, [*(f"{module}.*" for module in modules), *names])
        shallow = [module for module in modules if module.count(".") <= 1]
        raise ConfigError(
            f"{key}: {pattern!r} matches no {kind} of this model{near}. Their names begin with: "
            f"{', '.join(shallow) or ', '.join(names) or 'nothing, there is none'}"
        )


def _modules_of(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def layers_above(model: nn.Module) -> dict[int, int]:
    """How many layers are above each parameter in its stack, by the parameter's id.

    A stack is a list of layers (`nn.ModuleList`) inside a backbone; of lists in one another, the
    outermost, and of lists beside each other, the longest. 0 is the last layer and whatever comes
    after; what comes before the layers, and every embedding table, has all layers above it.
    Parameters outside a backbone are left out.
    """
    found: dict[int, int] = {}
    for name, backbone in _backbones(model):
        stacks = _stacks(backbone)
        if not stacks:
            raise ConfigError(
                f"layerwise_lr_decay: {name} ({type(backbone).__name__}) has no list of layers "
                "(nn.ModuleList) to count. Set lr_groups instead"
            )
        found |= _depths(backbone, stacks)
    if not found:
        raise ConfigError(
            "layerwise_lr_decay: this model has no backbone whose layers could be counted. "
            "Set lr_groups instead"
        )
    return found


def _depths(backbone: nn.Module, stacks: Mapping[str, nn.ModuleList]) -> dict[int, int]:
    depths: dict[int, int] = {}
    for stack in stacks.values():
        for number, layer in enumerate(stack, 1):
            depths |= {id(p): len(stack) - number for p in layer.parameters()}
    tables = {
        id(p) for m in backbone.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    # Modules are listed in the order in which they are used, in all models of transformers: what
    # is listed before the layers comes before them.
    before = set(stacks)
    for name, parameter in backbone.named_parameters():
        before = {stack for stack in before if not name.startswith(f"{stack}.")}
        if id(parameter) in depths:
            continue
        own = _nearest(name, list(stacks))
        below = id(parameter) in tables or all(stack in before for stack in own)
        depths[id(parameter)] = max(len(stacks[stack]) for stack in own) if below else 0
    return depths


def _nearest(name: str, stacks: Sequence[str]) -> list[str]:
    """The stacks that share most of their path with a name: those of its own tower."""
    parts = name.split(".")

    def shared(stack: str) -> int:
        pairs = zip(parts, stack.split("."), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    most = max(map(shared, stacks))
    return [stack for stack in stacks if shared(stack) == most]


def _backbones(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The pretrained models inside an encoder, by name."""
    named = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] == "backbone"]
    return [(n, m) for n, m in named if not any(n.startswith(f"{o}.") for o, _ in named)]


def _stacks(backbone: nn.Module) -> dict[str, nn.ModuleList]:
    lists = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    # Of lists beside each other, shorter ones are no layers, such as Qwen3-VL's ways from some of
    # its vision layers into the text.
    longest: dict[str, int] = {}
    for name, stack in outer.items():
        place = name.rpartition(".")[0]
        longest[place] = max(len(stack), longest.get(place, 0))
    return {n: m for n, m in outer.items() if len(m) == longest[n.rpartition(".")[0]]}
