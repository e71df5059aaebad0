"""`vembed check`: settings and all data, shown before hours are spent on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from vembed.config import RUN_REQUIRES, TrainConfig
from vembed.training.config import load_and_parse_config

if TYPE_CHECKING:
    from vembed.data import Finding, Inspection, LengthSummary
    from vembed.training.check import CheckResult, SampleItem

ABOUT = "Check settings and read all data, take one step, show what was found; nothing is written."

_BAR_WIDTH = 40
_SHOWN_BAD_RECORDS = 10


def main(argv: list[str]) -> int:
    """Check settings and data, take one step, write nothing.

    Raises:
        ConfigError: listing all problems of the settings.
        DataError: about the first row that cannot be used, and how many more there are.
    """
    config = load_and_parse_config(argv, required=RUN_REQUIRES, prog="vembed check", about=ABOUT)
    result = _run(config)
    console = Console()
    console.print(_facts(result))
    if result.inspection is not None:
        console.print(
            _lengths(result.inspection), _images(result.inspection), _findings(result.inspection)
        )
    if result.bad_records:
        console.print(_bad_records(result))
    console.print(_sample(result), _first_step(result))
    console.print("Nothing was written; `vembed train` can start.")
    return 0


def _run(config: TrainConfig) -> CheckResult:
    # After the settings are checked, because it imports torch.
    from vembed.training.check import check_run

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(stage: str, share: float | None) -> None:
            total = None if share is None else 1.0
            progress.update(task, description=stage, total=total, completed=share or 0.0)

        return check_run(config, show)


def _facts(result: CheckResult) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, fact in result.facts.items():
        grid.add_row(Text(name, "bold"), Text(fact))
    return grid


def _lengths(inspection: Inspection) -> RenderableType:
    parts: list[RenderableType] = []
    for role, summary in inspection.lengths.items():
        at = ", ".join(f"{p} % up to {length:,}" for p, length in summary.percentiles.items())
        parts.append(Text(f"\n{role}: {summary.count:,} texts; tokens: {at}", "bold"))
        parts.append(_histogram(summary))
        share = summary.truncated / summary.count
        cut = f"{summary.truncated:,} ({share:.1%}) are cut at {summary.max_seq_length:,} tokens"
        parts.append(Text(cut, "yellow" if summary.truncated else "green"))
    return Group(*parts)


def _histogram(summary: LengthSummary) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    most = max(summary.bin_counts)
    bounds = zip(summary.bin_edges, summary.bin_edges[1:], strict=False)
    for (low, high), count in zip(bounds, summary.bin_counts, strict=True):
        bar = "█" * -(-count * _BAR_WIDTH // most)
        grid.add_row(f"{low:,} to {high - 1:,}", bar, f"{count:,}")
    return grid


def _images(inspection: Inspection) -> RenderableType:
    parts: list[RenderableType] = []
    for role, summary in inspection.images.items():
        formats = ", ".join(f"{count:,} {name}" for name, count in summary.formats.items())
        parts.append(Text(f"\n{role}: {summary.count:,} images; {formats}", "bold"))
        for name, at in (("width", summary.widths), ("height", summary.heights)):
            parts.append(Text(f"{name}: " + ", ".join(f"{p} % up to {n:,}" for p, n in at.items())))
    if parts:
        parts.append(Text("all of them can be decoded", "green"))
    return Group(*parts)


def _bad_records(result: CheckResult) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(f"\nrows that are left out: {len(result.bad_records):,}", "bold yellow"))
    for record in result.bad_records[:_SHOWN_BAD_RECORDS]:
        grid.add_row(Text(f"{record.where}: {record.field}: {record.reason}"))
    return grid


def _findings(inspection: Inspection) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("")
    for name, finding in (
        ("rows that are there twice", inspection.duplicate_rows),
        ("queries that are there twice", inspection.repeated_queries),
        ("positives that are there twice", inspection.repeated_positives),
        ("queries that are their own positive", inspection.own_positive),
        ("positives that are negatives of the same row", inspection.positive_as_negative),
        *(
            [("images with the bytes of another", inspection.copied_images)]
            * bool(inspection.images)
        ),
    ):
        grid.add_row(name, _finding(finding))
    return grid


def _finding(finding: Finding) -> Text:
    if not finding.count:
        return Text("none", "green")
    return Text(f"{finding.count:,}, the first at {finding.first}", "yellow")


def _sample(result: CheckResult) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("\nfirst row, as the model sees it", "bold"))
    table = Table.grid(padding=(0, 2))
    for item in result.sample:
        sizes = [f"{item.tokens} tokens"] if item.tokens else []
        sizes += [f"{name} {' x '.join(map(str, size))}" for name, size in item.shapes.items()]
        table.add_row(Text(item.role, "bold"), Text(", ".join(sizes)), Text(_words(item)))
    grid.add_row(table)
    return grid


def _words(item: SampleItem) -> str:
    return " ".join(part for part in (item.text, item.image) if part)


def _first_step(result: CheckResult) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(f"\none step, {result.step_seconds:.1f} s", "bold"))
    facts = Table.grid(padding=(0, 2))
    for label, fact in result.first_step.lines():
        facts.add_row(Text(label, "bold"), Text(fact))
    for text in result.advice:
        facts.add_row(Text("warning", "bold yellow"), Text(text, "yellow"))
    grid.add_row(facts)
    grid.add_row("")
    return grid
