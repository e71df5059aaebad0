"""Settings of an encoder: given by the caller, else the checkpoint's own, else a default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIVEN, CHECKPOINT, DEFAULT = "given", "from the checkpoint", "default"


@dataclass(frozen=True)
class Choice:
    """A setting and where it came from."""

    value: Any
    origin: str


def choose(given: Any, stored: Any, default: Any) -> Choice:
    """The first of these that is not None; `default` may be None."""
    if given is not None:
        return Choice(given, GIVEN)
    return Choice(default, DEFAULT) if stored is None else Choice(stored, CHECKPOINT)


def values_of(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """The settings, without where they came from."""
    return {name: choice.value for name, choice in choices.items()}


def origins_of(choices: Mapping[str, Choice]) -> dict[str, str]:
    """Where each setting came from."""
    return {name: choice.origin for name, choice in choices.items()}
