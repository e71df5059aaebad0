"""`vembed verify resume`: a run that is interrupted gives the same bits as one that is not."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vembed.cli.parsing import Parser
from vembed.cli.terminal import sigterm_as_interrupt
from vembed.config import RUN_REQUIRES
from vembed.training.config import load_and_parse_config

if TYPE_CHECKING:
    from vembed.training.verification.resume import PartResult, ResumeVerification

_PROG = "vembed verify resume"
_SHOWN = 3


def main(argv: list[str]) -> int:
    """Compare, and print a table or, with `--json`, one JSON object; returns 1 if bits differ.

    Raises:
        ConfigError: listing all problems of the settings, or of the command line.
        DataError: if a row cannot be used.
        DistributedError: if a process fails or does not come to an end.
    """
    parser = _parser()
    arguments, settings = parser.parse_known_args(argv)
    if arguments.help or not argv:
        parser.print_help()
        return 0 if arguments.help else 2
    config = load_and_parse_config(settings, required=RUN_REQUIRES, prog=_PROG)
    console = Console(stderr=True)
    with sigterm_as_interrupt(), console.status("loading") as status:
        # After the settings are checked, because it imports torch.
        from vembed.training.verification.resume import verify_resume

        verification = verify_resume(
            config,
            steps=arguments.steps,
            processes=arguments.processes,
            on_stage=status.update,
        )
    if arguments.json:
        sys.stdout.write(json.dumps(_as_json(verification)) + "\n")
    else:
        _show(verification)
    return 0 if verification.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        usage="%(prog)s --config FILE [--config_override KEY=VALUE ...] [--KEY VALUE ...]\n"
        "       [--steps N] [--processes N] [--json]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train 2 N steps without a break, and N steps, a checkpoint and N more. "
        "Compare weights,\noptimizer, random states and metrics bit by bit. The settings are "
        "those of `vembed train`;\nnothing is left on the disk. Exit status: 0 if all is equal, "
        "1 if not.",
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this and stop")
    add("--steps", type=int, default=3, metavar="N", help="steps before the break (default: 3)")
    several = "processes to start, on the CPU; 1: none, on the device of the run (default: 1)"
    add("--processes", type=int, default=1, metavar="N", help=several)
    add("--json", action="store_true", help="print one JSON object, nothing else")
    return parser


def _as_json(verification: ResumeVerification) -> dict[str, Any]:
    return {"passed": verification.passed, **asdict(verification)}


def _show(verification: ResumeVerification) -> None:
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, fact in verification.facts.items():
        facts.add_row(Text(name, "bold"), Text(fact))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("compared", no_wrap=True)
    table.add_column("equal", justify="right", no_wrap=True)
    table.add_column("first that differ")
    for part in verification.parts:
        equal = part.total - len(part.different)
        style = "bold red" if part.different else "green"
        table.add_row(part.name, Text(f"{equal} of {part.total}", style), _first(part))
    console.print(facts, table)
    n = verification.steps
    if verification.passed:
        console.print(f"{n} + {n} steps are {2 * n} steps, bit by bit", style="green")
    elif verification.repeats:
        console.print(
            "wrong: a run that is interrupted ends with other numbers. Does a part of your own "
            "(loss, encoder, optimizer, batch sampler) remember something that is neither a "
            "parameter nor a buffer?",
            style="red",
        )
    else:
        console.print(
            f"Two runs of {2 * n} steps without a break differ, too: this device computes other "
            "bits each time, so that nothing can be said about going on. Try --device cpu",
            style="yellow",
        )


def _first(part: PartResult) -> str:
    more = " ..." if len(part.different) > _SHOWN else ""
    return ", ".join(part.different[:_SHOWN]) + more
