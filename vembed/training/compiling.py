"""`torch_compile`: the repeated layers of a model as compiled code, for every length at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vembed.config import TrainConfig
from vembed.errors import ConfigError

_RECOMPILE_LIMIT = 64
"""Variants of a layer's code before torch gives up and runs it uncompiled, without an error.

Gradients or none, training or not, padding or none, one item or several, two kinds of layer: a run
needs more than torch's 8.
"""


def compile_layers(encoder: nn.Module, config: TrainConfig) -> None:
    """Compile the layers of every stack in the encoder, in place; a second call changes nothing.

    Layers rather than the whole model: one is compiled for all, which is many times faster to
    compile, and it is reached however a model is called (`get_text_features` included). Sizes stay
    symbols, so that another length or batch size needs no new code. Parameters keep their names.

    Args:
        encoder: After adapters were put in.
        config: Reads `torch_compile` and `torch_compile_backend`.

    Raises:
        ConfigError: if the encoder has no stack of layers.
    """
    if not config.torch_compile:
        return
    layers = list(repeated_layers(encoder))
    if not layers:
        raise ConfigError(
            f"torch_compile: expected a stack of layers of one kind. Received: "
            f"{type(encoder).__name__}, which has none. Set torch_compile: false"
        )
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _RECOMPILE_LIMIT)
    # Dropout of a chunk that is encoded twice must draw what it drew before: inductor's own random
    # numbers depend on the graph, and the first pass has another than the second.
    is_inductor = config.torch_compile_backend == "inductor"
    options: dict[str, Any] | None = {"fallback_random": True} if is_inductor else None
    for layer in layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True, backend=config.torch_compile_backend, options=options)


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of each stack of at least two of one class; not those inside of a layer."""
    for child in module.children():
        stack = list(child) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        if len(stack) > 1 and len({type(layer) for layer in stack}) == 1:
            yield from stack
        else:
            yield from repeated_layers(child)
