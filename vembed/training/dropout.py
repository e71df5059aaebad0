"""Another dropout than a checkpoint's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vembed.errors import ConfigError


def set_dropout(backbone: Any, probability: float) -> None:
    """Set the probability of every dropout of a transformers model, in place.

    That is dropout by module, by an argument that a module or its config keeps for a function, and
    by a module that was left out because the probability was 0. Stochastic depth, which skips
    whole layers (`drop_path`), is something else. The model's config says the new probability, and
    so does the saved model's.

    Raises:
        ConfigError: if the model has no dropout.
    """
    places = 0
    # A module keeps the config of its own part; a model of several parts has several.
    configs = {id(m.config): m.config for m in backbone.modules() if hasattr(m, "config")}
    for module in backbone.modules():
        if isinstance(module, _DropoutNd):
            module.p = probability
            places += 1
        for name, child in list(module.named_children()):
            if _is_dropout(name) and isinstance(child, nn.Identity):
                setattr(module, name, nn.Dropout(probability))
                places += 1
        places += _set_numbers(module, probability)
    for config in configs.values():
        places += _set_numbers(config, probability)
    if places == 0:
        raise ConfigError(
            f"dropout: {type(backbone).__name__} has no dropout that could be set. "
            f"Received: {probability}. Set dropout: null"
        )


def _set_numbers(owner: Any, probability: float) -> int:
    names = [
        name
        for name, value in vars(owner).items()
        if _is_dropout(name) and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    for name in names:
        setattr(owner, name, probability)
    return len(names)


def _is_dropout(name: str) -> bool:
    """Whether a name is that of a dropout, and not of one in a head that embeddings do not use."""
    of_head = name.startswith(("classifier", "cls_", "seq_classif", "summary", "_"))
    return ("dropout" in name or name.endswith(("_drop", "pdrop"))) and not of_head
