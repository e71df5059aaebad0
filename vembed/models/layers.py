"""Fewer layers of a pretrained backbone: as a smaller model, or beside the whole one.

# Shapes: B items, T tokens, H hidden size of the backbone
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from vembed.errors import ConfigError


def keep_layers(backbone: Any, keep: int | Sequence[int]) -> None:
    """Take layers out of a transformer, in place; the rest stays as it was trained.

    The config follows, so that the model is saved and loaded as one with fewer layers.

    Args:
        backbone: A transformers model with one stack of layers.
        keep: How many, evenly chosen with the first and the last among them (one: the first), as
            teachers are cut for students (Sanh et al., 2019); or which, from 0.

    Raises:
        ConfigError: if there is no such layer, or the layers cannot be told.
    """
    config = backbone.config.get_text_config()
    count = config.num_hidden_layers
    layers = _find_stack(backbone, key="keep_layers").layers
    chosen = _chosen(keep, count)
    for place, number in enumerate(chosen):
        # Loading builds the layer of a place as the first ones are built: ModernBERT's first has no
        # norm of its own.
        if _parts(layers[number]) != _parts(layers[place]):
            raise ConfigError(
                f"keep_layers: layer {number} of a {config.model_type} is built unlike layer "
                f"{place}, whose place it would take. Keep layer {place}"
            )
    kinds = getattr(config, "layer_types", None)
    for number in sorted(set(range(count)) - set(chosen), reverse=True):
        del layers[number]
    config.num_hidden_layers = len(chosen)
    if kinds is not None:
        config.layer_types = [kinds[number] for number in chosen]
    for number, layer in enumerate(layers):
        # Decoders count their layers, for a cache that embedding does not use.
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number


class LayerTap:
    """What the first layers of a backbone say, seen in a forward pass of all of them.

    With `n` layers a model gives what layer n gives, through whatever follows its last layer, such
    as a norm: that is found by seeing which module takes the last layer's very output.
    """

    def __init__(self, backbone: Any, counts: Sequence[int]) -> None:
        """Find the layers; nothing is seen yet."""
        self._stack = _find_stack(backbone, key="mrl_layers")
        self._counts = tuple(counts)
        self._outputs: dict[int, Tensor] = {}
        self._calls: list[_Call] = []

    def hidden(self, count: int, last_hidden_BTH: Tensor) -> Tensor:
        """`[B, T, H]`, the `last_hidden_state` of the backbone with so many layers.

        Args:
            count: One of those that were asked for.
            last_hidden_BTH: That of all layers, as the backbone returned it.

        Raises:
            ConfigError: if it cannot be told how the backbone makes it of its last layer's output.
        """
        hidden_BTH = self._outputs[count]
        for module in self._after_layers(last_hidden_BTH):
            hidden_BTH = module(hidden_BTH)
        return hidden_BTH

    def _after_layers(self, last_hidden_BTH: Tensor) -> list[nn.Module]:
        found, state = [], self._outputs[len(self._stack.layers)]
        for call in self._calls:
            if state is not last_hidden_BTH and call.input is state:
                found.append(call.module)
                state = call.output
        if state is not last_hidden_BTH:
            raise ConfigError(
                "mrl_layers: what this model does after its last layer is not known, so that fewer "
                "layers cannot be trained beside all. Leave it unset"
            )
        return found

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, forward passes are seen."""
        handles = [
            self._stack.layers[count - 1].register_forward_hook(self._see_layer(count))
            for count in {*self._counts, len(self._stack.layers)}
        ]
        handles += [module.register_forward_hook(self._see_call) for module in self._stack.beside]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_layer(self, count: int) -> Any:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs[count] = _first(output)

        return see

    def _see_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args:
            self._calls.append(_Call(module, args[0], _first(output)))


class _Call(NamedTuple):
    """A module outside of the stack, with the first thing that it took and gave."""

    module: nn.Module
    input: Any
    output: Any


class _Stack(NamedTuple):
    """The layers of a backbone, and the modules on the way to them that may come after them."""

    layers: nn.ModuleList
    beside: list[nn.Module]


def check_layer_counts(backbone: Any, counts: Sequence[int]) -> None:
    """Raise ConfigError unless a backbone has more layers than each of `counts`."""
    most = len(_find_stack(backbone, key="mrl_layers").layers) - 1
    if max(counts) > most:
        raise ConfigError(
            f"mrl_layers: the model has {most + 1} layers, which are always trained; name smaller "
            f"numbers. Received: {[*counts]}"
        )


def _find_stack(backbone: Any, *, key: str) -> _Stack:
    config = backbone.config.get_text_config()
    count = config.num_hidden_layers
    stacks = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(stacks) != 1:
        raise ConfigError(
            f"{key}: a {config.model_type} has {len(stacks)} stacks of {count} layers, so vembed "
            "does not know which is meant. Leave it unset"
        )
    name, layers = stacks[0]
    path = name.split(".")
    above = ["", *(".".join(path[:length]) for length in range(1, len(path) + 1))]
    on_the_way = {id(backbone.get_submodule(n)) for n in above}
    beside = [
        child
        for n in above[:-1]
        for child in backbone.get_submodule(n).children()
        if id(child) not in on_the_way
    ]
    return _Stack(layers, beside)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _parts(layer: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(part)) for name, part in layer.named_modules()]


def _chosen(keep: int | Sequence[int], count: int) -> list[int]:
    if isinstance(keep, int):
        if not 1 <= keep <= count:
            raise ConfigError(f"keep_layers: the model has {count} layers. Received: {keep}")
        step = (count - 1) / max(1, keep - 1)
        return [round(number * step) for number in range(keep)]
    chosen = list(keep)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
        raise ConfigError(
            f"keep_layers: expected numbers from 0 to {count - 1} in rising order. "
            f"Received: {chosen}"
        )
    return chosen
