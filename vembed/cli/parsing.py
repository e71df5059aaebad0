"""How the commands read their flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from vembed.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit, and names the flag that was meant."""

    def parse_args(  # type: ignore[override]  # typeshed has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse has it.

        Raises:
            ConfigError: if a flag is missing, unknown or has no such value.
        """
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((each for each in unknown if each.startswith("-")), "").partition("=")[0]
            near = did_you_mean(flag, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}")
