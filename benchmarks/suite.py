"""Every benchmark of speed and memory, or one of them by name with its own options.

python benchmarks/suite.py                           # all, an hour on two quiet cores
python benchmarks/suite.py --quick                   # all, on little work: do they run?
python benchmarks/suite.py training mixed --rounds 7
python benchmarks/suite.py quality --data ../shared/data scifact
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

SPEED = (
    "training",
    "images",
    "large_batch",
    "losses",
    "encoding",
    "evaluation",
    "mining",
    "collation",
    "checkpoints",
    "two_processes",
    "startup",
    "same_quality",
)
"""Against sentence-transformers and the limit."""

QUALITY = ("quality", "student", "matryoshka")
"""What training brings on real data; see RESULTS.md for their commands."""

WHOLE_RUNS = ("plan", "save_cost", "torture", "interruptions")
"""What a run needs, what its checkpoints cost, and what it survives; each has its own options."""


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nNames: {', '.join((*SPEED, *QUALITY, *WHOLE_RUNS))}")
        return
    named = argv[:1] if argv and argv[0] in {*SPEED, *QUALITY, *WHOLE_RUNS} else []
    sys.path.append(str(Path(__file__).parent.parent))  # some share runs with the tests
    for name in named or SPEED:
        print(f"\n## {name}", flush=True)
        # Scripts that take no arguments of their own read the command line.
        sys.argv[1:] = argv[len(named) :]
        import_module(name).main()


if __name__ == "__main__":
    main(sys.argv[1:])
