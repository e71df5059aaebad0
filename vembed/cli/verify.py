"""`vembed verify`: proof, for one's own settings, of what vembed promises."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vembed.cli import verify_resume
from vembed.cli.parsing import Parser
from vembed.cli.terminal import sigterm_as_interrupt
from vembed.config import RUN_REQUIRES, TrainConfig
from vembed.errors import ConfigError, did_you_mean
from vembed.training.config import load_and_parse_config
from vembed.training.verification.cases import (
    MAX_PAIRS,
    TOLERANCES,
    VARIATIONS,
    Case,
    Precision,
    Step,
)
from vembed.training.verification.processes import start_importing

if TYPE_CHECKING:
    from vembed.training.verification.comparison import CaseResult, GroupDifference
    from vembed.training.verification.verify import OnCase, Verification

TOPICS = ("gradients", "resume")

_PROG = "vembed verify"


def main(argv: list[str]) -> int:
    """Compare, and print a table or, with `--json`, one JSON object; returns 1 if a case failed.

    Raises:
        ConfigError: listing all problems of the settings, or of the command line.
        DataError: if there are no rows, or one cannot be used.
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
    if topic == "resume":
        return verify_resume.main(rest)
    arguments, settings = parser.parse_known_args(rest)
    if arguments.help:
        parser.print_help()
        return 0
    config = load_and_parse_config(settings, required=RUN_REQUIRES, prog=f"{_PROG} gradients")
    verification = _verify(config, arguments)
    if arguments.json:
        sys.stdout.write(json.dumps(_as_json(verification)) + "\n")
    else:
        _show(verification, every_case=arguments.every_case)
    return 0 if verification.passed else 1


def _verify(config: TrainConfig, arguments: argparse.Namespace) -> Verification:
    on_case, progress = _progress(arguments.processes)
    with progress, sigterm_as_interrupt():
        if arguments.processes > 1:
            start_importing()
        # After the settings are checked, because it imports torch.
        from vembed.training.verification.verify import quiet, verify_gradients

        with quiet():
            return verify_gradients(
                config,
                processes=arguments.processes,
                precision=arguments.precision,
                pairs=arguments.pairs,
                on_case=on_case,
            )


def _parser() -> argparse.ArgumentParser:
    width = max(len(variation.name) for variation in VARIATIONS)
    conditions = "\n".join(f"  {v.name:<{width}}  {v.meaning}" for v in VARIATIONS)
    tolerances = ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items())
    precision = f"type of weights (default: float64); tolerances: {tolerances}"
    most = f"rows per process and micro-batch (default: batch_size, at most {MAX_PAIRS})"
    parser = Parser(
        prog=f"{_PROG} gradients",
        usage="%(prog)s --config FILE [--config_override KEY=VALUE ...] [--KEY VALUE ...]\n"
        "       [--processes N] [--precision float64|float32] [--pairs N] [--every_case] [--json]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare the gradients that a run would compute with those of one process and "
        "one graph of the\nwhole batch: plain and cached, on one process and on several, under "
        f"these conditions:\n\n{conditions}\n\n"
        "The settings are those of `vembed train`. Exit status: 0 if all are equal, 1 if not.",
    )
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this and stop")
    add("--processes", type=int, default=2, metavar="N", help="processes to start (default: 2)")
    add("--precision", choices=get_args(Precision), default="float64", help=precision)
    add("--pairs", type=int, metavar="N", help=most)
    add("--every_case", action="store_true", help="show each step, not only the worst of them")
    add("--json", action="store_true", help="print one JSON object, nothing else")
    return parser


def _progress(processes: int) -> tuple[OnCase, Progress]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    cases = len(get_args(Step)) * len(VARIATIONS)
    total = cases if processes == 1 else 2 * cases
    task = progress.add_task("loading", total=total)

    def on_case(result: CaseResult) -> None:
        progress.update(task, advance=1, description=result.case.name)

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


def _show(verification: Verification, *, every_case: bool) -> None:
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for name, fact in verification.facts.items():
        facts.add_row(Text(name, "bold"), Text(fact))
    console.print(facts, _table(verification, every_case=every_case))
    skipped = {r.case.variation.name: r.skipped for r in verification.results if r.skipped}
    for name, reason in skipped.items():
        console.print(Text(f"{name}: skipped: {reason}", "yellow"))
    if any(group.is_zero for result in verification.results for group in result.groups.values()):
        text = "zero: the reference has no gradient, which shows nothing. More rows: --pairs"
        console.print(Text(text, "yellow"))
    for where, cause in _causes(verification):
        console.print(Text("wrong: ", "bold red").append(where, "not bold default"))
        console.print(Padding(Text(cause), (0, 0, 0, 2)))
    done = [r for r in verification.results if r.skipped is None]
    failed = len(verification.suspicions)
    text = f"{len(done) - failed} of {len(done)} cases give the gradient of the whole batch"
    console.print(Text(text, "red" if failed else "green"))


def _table(verification: Verification, *, every_case: bool) -> Table:
    caption = "ratio: of the norms, gradient over reference. max diff: of an element, relative to "
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=f"{caption}the largest of the reference."
        + ("" if every_case else " Shown: the worst of the steps; each of them: --every_case"),
        caption_justify="left",
    )
    table.add_column("condition")
    table.add_column("group", no_wrap=True)
    for name in ("ratio", "cosine", "max diff", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("step" if every_case else "passed", no_wrap=True)
    for variation, of_variation in groupby(verification.results, lambda r: r.case.variation):
        results = list(of_variation)
        names = iter((variation.name,))
        for shown in [[result] for result in results] if every_case else [results]:
            for group in dict.fromkeys(name for result in shown for name in result.groups):
                of_group = [result for result in shown if group in result.groups]
                cells = _cells(group, of_group, every_case=every_case)
                table.add_row(next(names, ""), group, *cells)
        if every_case:
            table.add_section()
    return table


def _cells(group: str, results: Sequence[CaseResult], *, every_case: bool) -> list[Text]:
    """The numbers of the worst of these cases; how many passed, or the only one's step."""
    passed = sum(group not in result.failing for result in results)
    worst = max(results, key=lambda result: _badness(result.groups[group]))
    found = worst.groups[group]
    style = "green" if passed == len(results) else "bold red"
    last = f"{passed} of {len(results)}"
    if every_case:
        last = worst.case.step_name + ("" if passed else ", wrong")
    ends = [Text(f"{worst.tolerance:.0e}"), Text(last, style)]
    if found.is_zero and found.difference == 0:
        return [Text("zero", "yellow"), Text(), Text("0"), *ends]
    ratio = f"{found.ratio:.6f}" if found.ratio < 1000 else f"{found.ratio:.6g}"
    difference = Text(f"{found.difference:.1e}", style)
    return [Text(ratio), Text(f"{found.cosine:.6f}"), difference, *ends]


def _badness(found: GroupDifference) -> float:
    return math.inf if math.isnan(found.difference) else found.difference


def _causes(verification: Verification) -> Iterator[tuple[str, str]]:
    """Where something is wrong, and what: once for all cases of one cause."""
    by_cause: dict[str, list[Case]] = {}
    for suspicion in verification.suspicions:
        cause = f"{suspicion.text}. Look at: {suspicion.setting}"
        by_cause.setdefault(cause, []).append(suspicion.case)
    conditions = {r.case.variation.name for r in verification.results if r.skipped is None}
    for cause, cases in by_cause.items():
        yield _where(cases, len(conditions)), cause


def _where(cases: Sequence[Case], condition_count: int) -> str:
    """`plain x 2, cached x 2 (as configured, dropout)`."""
    steps: dict[str, list[str]] = {}
    for case in cases:
        steps.setdefault(case.variation.name, []).append(case.step_name)
    conditions: dict[str, list[str]] = {}
    for condition, of_condition in steps.items():
        conditions.setdefault(", ".join(of_condition), []).append(condition)
    return "; ".join(
        f"{steps} ({'every condition' if len(names) == condition_count else ', '.join(names)})"
        for steps, names in conditions.items()
    )
