"""Parameters that are not trained: for good, or until some optimizer step.

A frozen parameter gets no gradient; it still takes part in the forward pass, dropout included, as
everywhere in torch. What is frozen at a step depends on the step alone, so that a run which is
taken up again freezes what it would have frozen.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from vembed.errors import ConfigError
from vembed.training.parameters import check_patterns, last_match, matches, named_parameters

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, patterns: Collection[str], *, until_later: Collection[str]) -> None:
    """Freeze the parameters that a pattern matches, in place and for good.

    Args:
        model: The encoder, before adapters are put into it.
        patterns: Globs of parameter names, or of the names of modules.
        until_later: Patterns of `unfreeze_at_step`, whose parameters are left to it.

    Raises:
        ConfigError: if a pattern matches no parameter.
    """
    if not patterns:
        return
    parameters = dict(named_parameters(model))
    check_patterns("freeze", patterns, list(parameters))
    chosen = [
        parameter
        for name, parameter in parameters.items()
        if any(matches(name, pattern) for pattern in patterns)
        and not any(matches(name, pattern) for pattern in until_later)
    ]
    for parameter in chosen:
        parameter.requires_grad_(False)
    frozen, total = (sum(p.numel() for p in of) for of in (chosen, parameters.values()))
    logger.info("%-14s %s of %s parameters: %s", "frozen", f"{frozen:,}", f"{total:,}",
        ", ".join(patterns))  # fmt: skip


class Unfreezing:
    """Which parameters train at which step, as a function of the step.

    Attributes:
        starts: By visible name, the optimizer steps that must be done before a parameter trains.
            Parameters that train from the beginning, and those that never do, are not in it.
    """

    def __init__(
        self, model: nn.Module, criterion: Any, unfreeze_at_step: Mapping[str, int]
    ) -> None:
        """Find the parameters. All of them train until `apply` is called.

        Args:
            model: The encoder. What is frozen in it is left alone: an adapter's base weights,
                what `freeze` names.
            criterion: The loss, whose parameters are `loss.NAME`.
            unfreeze_at_step: Steps by pattern; the last pattern that matches decides.

        Raises:
            ConfigError: if a pattern matches no trainable parameter, or nothing trains at first.
        """
        trainable = [n for n, p in named_parameters(model, criterion) if p.requires_grad]
        check_patterns("unfreeze_at_step", unfreeze_at_step, trainable, kind="trainable parameter")
        chosen = {name: last_match(name, unfreeze_at_step) for name in trainable}
        self.starts = {name: step for name, step in chosen.items() if step is not None}
        self._phase: int | None = None
        if trainable and len(self.starts) == len(trainable):
            raise ConfigError(
                f"unfreeze_at_step: nothing would train before step {min(self.starts.values())}. "
                "Leave a part of the model to train from the beginning"
            )

    def apply(self, model: nn.Module, criterion: Any, step: int) -> None:
        """Freeze and unfreeze, in place, as it must be when `step` optimizer steps are done.

        Weights that are shared out must not be gathered. Every process must call it.
        """
        phase = sum(step >= start for start in set(self.starts.values()))
        if phase == self._phase:
            return
        joined = 0
        for name, parameter in named_parameters(model, criterion):
            start = self.starts.get(name)
            if start is not None:
                joined += parameter.numel() if step >= start and not parameter.requires_grad else 0
                parameter.requires_grad_(step >= start)
        if joined:
            logger.info("step %d: %s more parameters train", step, f"{joined:,}")
        self._phase = phase

    def describe(self, model: nn.Module, criterion: Any) -> str:
        """For the log: how many parameters join at which steps."""
        sizes: dict[int, int] = {}
        for name, parameter in named_parameters(model, criterion):
            if name in self.starts:
                start = self.starts[name]
                sizes[start] = sizes.get(start, 0) + parameter.numel()
        return ", ".join(f"{sizes[start]:,} join after step {start}" for start in sorted(sizes))
