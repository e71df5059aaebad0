"""Fine-tune an embedding model: `accelerate launch vembed/entrypoints/train.py --config FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vembed.training.program import train_program


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status (see `train_program`)."""
    return train_program(argv)


if __name__ == "__main__":
    sys.exit(main())
