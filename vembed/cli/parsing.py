"""How the commands read their flags."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vembed.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}")
