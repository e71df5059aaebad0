"""A smaller student: a pretrained backbone without some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

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
    stacks = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(stacks) != 1:
        raise ConfigError(
            f"keep_layers: a {config.model_type} has {len(stacks)} stacks of {count} layers, so "
            "vembed does not know which to cut. Leave it unset"
        )
    chosen = _chosen(keep, count)
    for place, number in enumerate(chosen):
        # Loading builds the layer of a place as the first ones are built: ModernBERT's first has no
        # norm of its own.
        if _parts(stacks[0][number]) != _parts(stacks[0][place]):
            raise ConfigError(
                f"keep_layers: layer {number} of a {config.model_type} is built unlike layer "
                f"{place}, whose place it would take. Keep layer {place}"
            )
    kinds = getattr(config, "layer_types", None)
    for number in sorted(set(range(count)) - set(chosen), reverse=True):
        del stacks[0][number]
    config.num_hidden_layers = len(chosen)
    if kinds is not None:
        config.layer_types = [kinds[number] for number in chosen]
    for number, layer in enumerate(stacks[0]):
        # Decoders count their layers, for a cache that embedding does not use.
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number


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
