"""Parts of a backbone that are trained or not."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from vembed.errors import ConfigError
from vembed.registry import did_you_mean

TOWERS = ("text", "image")
"""The halves of a model for texts and images."""

HEADS = ("pooler", "head", "text_projection", "visual_projection")
"""Parts of a backbone that turn hidden states into the embedding: small, often new.

With adapters they train as they are, so they are never quantized.
"""


def check_towers(names: Collection[str]) -> None:
    """Raise ConfigError unless all are names of `TOWERS`."""
    for name in names:
        if name not in TOWERS:
            raise ConfigError(
                f"freeze_towers: unknown tower {name!r}{did_you_mean(name, TOWERS)}. "
                f"Of: {', '.join(TOWERS)}"
            )


def freeze_modules(backbone: Any, names: Iterable[str]) -> None:
    """Stop training those of a backbone's modules that it has, of these attribute names."""
    for name in names:
        module = getattr(backbone, name, None)
        if isinstance(module, nn.Module):
            module.requires_grad_(False)
