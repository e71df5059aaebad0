"""`vembed quickstart [text | images]`: the main job on data that is made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

EXAMPLES = {
    "text": "vembed.quickstart.text",
    "images": "vembed.quickstart.images",
}
"""Examples by name, each a module with `main(argv) -> int`. The first is the default."""


def main(argv: Sequence[str]) -> int:
    """Run an example: build its data, train, show what it brought.

    Args:
        argv: Name of the example, or none, then flags of `vembed train`; they win over the settings
            of the recipe.

    Raises:
        ConfigError: if a setting is wrong, or a package of the quickstart is not installed.
    """
    name, *rest = argv if argv and argv[0] in EXAMPLES else [next(iter(EXAMPLES)), *argv]
    status: int = import_module(EXAMPLES[name]).main(rest)
    return status
