"""`vembed verify`: proof, for one's own settings, of what vembed promises."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from vembed.config import RUN_REQUIRES
from vembed.errors import ConfigError, did_you_mean
from vembed.training.config import load_and_parse_config
from vembed.training.verification.cases import (
    MAX_PAIRS,
    TOLERANCES,
    VARIATIONS,
    Precision,
    Step,
)

if TYPE_CHECKING:
    from vembed.training.verification.comparison import CaseResult, GroupDifference
    from vembed.training.verification.verify import OnCase, Verification

TOPICS = ("gradients",)

_PROG = "vembed verify"


def main(argv: list[str]) -> int:
    """Compare, and print a table or, with `--json`, one JSON object; returns 1 if a case failed.

    Raises:
        ConfigError: listing all problems of the settings, or of the command line.
        DataError: if a row cannot be used, or there are too few.
        DistributedError: if a process fails or does not come to an end.
    """
    parser = _parser()
    if argv[:1] in ([], ["-h"], ["--help"]):
        parser.print_help()
        return 0 if argv else 2
    topic, *rest = argv
    if topic not in TOPICS:
        raise ConfigError(
            f"{_PROG}: unknown topic {topic!r}{did_you_mean(topic, TOPICS)}. "
            f"One of: {', '.join(TOPICS)}"
        )
    arguments, settings = parser.parse_known_args(rest)
    if arguments.help:
        parser.print_help()
        return 0
    config = load_and_parse_config(settings, required=RUN_REQUIRES, prog=f"{_PROG} gradients")
    # After the settings are checked, because it imports torch.
    from vembed.training.verification.verify import quiet, verify_gradients

    quiet()
    # SIGTERM, too, shall end the processes and remove what is on the disk.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    on_case, progress = _progress(arguments.processes)
    with progress:
        verification = verify_gradients(
            config,
            processes=arguments.processes,
            precision=arguments.precision,
            pairs=arguments.pairs,
            on_case=on_case,
        )
    if arguments.json:
        sys.stdout.write(json.dumps(_as_json(verification)) + "\n")
    else:
        _show(verification)
    return 0 if verification.passed else 1


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{_PROG}: {message}")


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(variation.name for variation in VARIATIONS)
    parser = _Parser(
        prog=f"{_PROG} gradients",
        usage="%(prog)s --config FILE [--processes N] [--precision float64|float32] [--json] "
        "[--config_override KEY=VALUE ...] [--KEY VALUE ...]",
        allow_abbrev=False,
        add_help=False,
        description="Compare gradients with those of one process and one graph of the whole batch: "
        "plain and cached, on one process and on several, under these conditions: "
        f"{names}. The settings are those of `vembed train`. Exit status 1: they differ.",
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this and stop")
    add("--processes", type=int, default=2, metavar="N", help="processes to start (default: 2)")
    add("--precision", choices=get_args(Precision), default="float64",
        help="type that weights are converted to (default: float64); tolerances: "
        + ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items()))  # fmt: skip
    most = f"rows per process and micro-batch (default: batch_size, at most {MAX_PAIRS})"
    add("--pairs", type=int, metavar="N", help=most)
    add("--json", action="store_true", help="print one JSON object, nothing else")
    return parser


def _progress(processes: int) -> tuple[OnCase, Progress]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    cases = len(get_args(Step)) * len(VARIATIONS)
    total = cases if processes == 1 else 2 * cases
    task = progress.add_task("comparing gradients", total=total)

    def on_case(result: CaseResult) -> None:
        progress.update(task, advance=1, description=f"comparing gradients: {result.case.name}")

    return on_case, progress


def _as_json(verification: Verification) -> dict[str, Any]:
    scope = verification.scope
    return {
        "passed": verification.passed,
        **asdict(scope),
        "cases": [_case_as_json(result) for result in verification.results],
        "suspicions": [
            {"case": s.case.name, "setting": s.setting, "text": s.text}
            for s in verification.suspicions
        ],
    }


def _case_as_json(result: CaseResult) -> dict[str, Any]:
    case = result.case
    return {
        "variation": case.variation.name,
        "step": case.step,
        "processes": case.processes,
        "passed": result.passed,
        "skipped": result.skipped,
        "tolerance": result.tolerance,
        "reference": result.reference,
        "cutting_error": result.cutting_error,
        "groups": {name: asdict(group) for name, group in result.groups.items()},
    }


def _show(verification: Verification) -> None:
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, fact in verification.facts.items():
        facts.add_row(Text(name, "bold"), Text(fact))
    console.print(facts, _table(verification))
    skipped = {r.case.variation.name: r.skipped for r in verification.results if r.skipped}
    for name, reason in skipped.items():
        console.print(Text(f"{name}: skipped: {reason}", "yellow"))
    if any(group.is_zero for result in verification.results for group in result.groups.values()):
        text = "zero: the reference has no gradient, which shows nothing. More rows: --pairs"
        console.print(Text(text, "yellow"))
    for suspicion in verification.suspicions:
        console.print(
            Text(f"{suspicion.case.name}: ", "bold red").append(
                f"{suspicion.text}. Look at: {suspicion.setting}", "not bold default"
            )
        )
    done = [r for r in verification.results if r.skipped is None]
    failed = len(verification.suspicions)
    text = f"{len(done) - failed} of {len(done)} cases give the gradient of the whole batch"
    console.print(Text(text, "red" if failed else "green"))


def _table(verification: Verification) -> Table:
    count = verification.scope.processes
    several = f"x {count}: on {count} processes. " if count > 1 else ""
    table = Table(
        box=SIMPLE_HEAD,
        caption=f"{several}ratio: norm over that of the reference. difference: of an element, the "
        "largest, relative to the largest of the reference",
        caption_justify="left",
    )
    table.add_column("condition")
    for name in ("step", "group"):
        table.add_column(name, no_wrap=True)
    for name in ("ratio", "cosine", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for variation, results in groupby(verification.results, lambda r: r.case.variation):
        names = iter((variation.name, f"<= {verification.scope.tolerance(variation):.0e}"))
        for result in results:
            times = f" x {result.case.processes}" if result.case.processes > 1 else ""
            steps = iter((result.case.step + times,))
            for group, found in result.groups.items():
                table.add_row(next(names, ""), next(steps, ""), group, *_numbers(found, result))
        table.add_section()
    return table


def _numbers(found: GroupDifference, result: CaseResult) -> list[Text]:
    style = "green" if found.difference <= result.tolerance else "bold red"
    if found.is_zero and found.difference == 0:
        return [Text("zero", "yellow"), Text(""), Text("0", style)]
    numbers = (f"{found.ratio:.6f}", f"{found.cosine:.6f}")
    return [*map(Text, numbers), Text(f"{found.difference:.1e}", style)]
