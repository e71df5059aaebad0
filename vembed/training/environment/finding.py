"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: What was looked at.
        level: `problem` where a run would fail or give something else than asked for; `warning`
            where it would be slow, or fail with other settings.
        found: What there is.
        remedy: What to do; empty where nothing is.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""
