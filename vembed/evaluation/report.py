"""What a run shows for itself: tables for the terminal, and a page of one file for the browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vembed.evaluation.curves import History, build_panels, panel_svg, write_png
from vembed.evaluation.gallery import Gallery
from vembed.evaluation.gallery_picture import gallery_png
from vembed.evaluation.intervals import MetricChange
from vembed.evaluation.metrics import metric_label
from vembed.evaluation.moved import MovedQueries, MovedQuery
from vembed.evaluation.page import ReportData, build_page, format_p_value, shorten
from vembed.evaluation.results import count_items

REPORT_FILE = "report.html"
CURVES_FILE = "curves.png"
GALLERY_FILE = "gallery.png"

_STYLES = {"better": "bold green", "worse": "bold red", "unclear": "dim"}


def render_table(changes: Sequence[MetricChange], *, title: str | None = None) -> Table:
    """Before, after and change of each metric, with 95 % intervals; fits 80 columns."""
    table = Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left",
        box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("metric")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("p", justify="right", no_wrap=True)
    for change in changes:
        table.add_row(
            Text(metric_label(change.metric), style="bold"),
            _value(f"{change.before:.4f}", f"{change.before_low:.3f} to {change.before_high:.3f}"),
            _value(
                f"{change.after:.4f}", f"{change.after_low:.3f} to {change.after_high:.3f}", "bold"
            ),
            _value(
                f"{change.difference:+.4f}",
                f"{change.difference_low:+.3f} to {change.difference_high:+.3f}",
                _STYLES[change.verdict],
            ),
            format_p_value(change.p_value),
        )
    if changes:
        counted = count_items(changes[0].count, changes[0].items)
        caption = (
            f"{counted}; below each value its 95 % bootstrap interval"
            "\n"
            "p: how often chance alone, the two models swapped at random, moves it as far"
        )
        if changes[0].doubt:
            caption += f"\n{metric_label(changes[0].metric)}: {changes[0].doubt}"
        table.caption = caption
    return table


def render_moved(moved: MovedQueries) -> RenderableType:
    """The queries that moved most, with the ranks of their right answers and what stood first."""
    counts = Text.assemble(
        "Right answer ranked higher for ", (f"{moved.improved_count:,}", "bold green"),
        " queries, lower for ", (f"{moved.worsened_count:,}", "bold red"),
        f", the same for {moved.unchanged_count:,}.",
    )  # fmt: skip
    parts: list[RenderableType] = [counts]
    if moved.improved or moved.worsened:
        parts.append(Text("Its rank before and after:"))
    for heading, queries, style in (
        ("Improved most", moved.improved, "green"),
        ("Worsened most", moved.worsened, "red"),
    ):
        if queries:
            parts += [Text(f"\n{heading}", style="bold"), _moved_grid(queries, style)]
    return Group(*parts)


def write_report(
    folder: str | Path,
    *,
    title: str,
    changes: Sequence[MetricChange],
    moved: MovedQueries,
    history: History,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    gallery: Gallery | None = None,
) -> Path:
    """Write `report.html`, one file that needs nothing else.

    Its pictures are also beside it: the curves as `curves.png`, what queries found as
    `gallery.png`.

    Args:
        folder: Made when missing; an earlier report in it is replaced.
        title: What was trained, in words.
        changes: From `compare`; the first is the main metric.
        moved: From `moved_queries`.
        history: Lines of `metrics.jsonl`; may be empty.
        settings: The resolved configuration. All of it is shown: leave secrets out.
        facts: What to know about the run (model, sizes, time, device, versions), by label.
        gallery: From `choose_gallery`; None for tasks without images.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    panels = build_panels(history, [change.metric for change in changes])
    if panels:
        write_png(panels, folder / CURVES_FILE)
    picture = b""
    (folder / GALLERY_FILE).unlink(missing_ok=True)
    if gallery is not None:
        picture = gallery_png(gallery)
        (folder / GALLERY_FILE).write_bytes(picture)
    data = ReportData(
        title=title,
        changes=changes,
        moved=moved,
        curves=[panel_svg(panel) for panel in panels],
        settings=settings,
        facts=facts,
        gallery=gallery,
        gallery_png=picture,
    )
    page = folder / REPORT_FILE
    page.write_text(build_page(data), encoding="utf-8")
    return page


def _value(value: str, interval: str, style: str = "") -> Text:
    return Text.assemble((value, style), "\n", (interval, "dim"))


def _moved_grid(queries: Sequence[MovedQuery], style: str) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True, min_width=len("right answer"))
    grid.add_column()
    for query in queries:
        ranks = Text(f"{query.rank_before:,} → {query.rank_after:,}", style=f"bold {style}")
        grid.add_row(ranks, _line(query.query, "bold"))
        grid.add_row(Text("right answer", "dim"), _line(query.right_answer))
        for label, text, rank in (
            ("first before", query.top_before, query.rank_before),
            ("first after", query.top_after, query.rank_after),
        ):
            if rank > 1:
                grid.add_row(Text(label, "dim"), _line(text))
        grid.add_row()
    return grid


def _line(text: str, style: str = "") -> Text:
    """One line however narrow the terminal is; what does not fit ends in an ellipsis."""
    return Text(shorten(text, 300), style=style, no_wrap=True, overflow="ellipsis")
