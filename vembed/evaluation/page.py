"""The report as one HTML page: no script, no request to anywhere.

Every text that comes from data or settings is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from vembed.evaluation.gallery import Gallery
from vembed.evaluation.intervals import RESAMPLES, SWAPS, MetricChange
from vembed.evaluation.metrics import metric_label
from vembed.evaluation.moved import MovedQueries, MovedQuery
from vembed.evaluation.results import count_items

_SHOWN_CHARACTERS = 240


@dataclass(frozen=True)
class ReportData:
    """What the page shows; see `write_report`.

    `curves` are `<svg>` elements, `gallery_png` is the picture of `gallery`.
    """

    title: str
    changes: Sequence[MetricChange]
    moved: MovedQueries
    curves: Sequence[str]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    gallery: Gallery | None = None
    gallery_png: bytes = b""


def build_page(data: ReportData) -> str:
    """The whole document."""
    body = "\n".join(
        part
        for part in (
            _header(data),
            _measurements(data),
            _gallery(data),
            _curves(data.curves),
            _moved(data.moved),
            _facts(data.facts),
            _settings(data.settings),
            _method(data),
        )
        if part
    )
    style = files("vembed.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
img-src data:"> <title>{escape(data.title)}</title> <style> {style}</style> </head> <body> <main>
{body} </main> </body> </html>
"""


def format_p_value(p_value: float) -> str:
    """Three digits, or `<0.001`."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def shorten(text: str, length: int = _SHOWN_CHARACTERS) -> str:
    """One line of at most `length` characters, cut at a space."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    cut = line[: length - 1]
    return (cut[: cut.rindex(" ")] if " " in cut[length // 2 :] else cut) + "…"


def _header(data: ReportData) -> str:
    return f"""<header>
<p class="overline">vembed report</p>
<h1>{escape(data.title)}</h1>
{_verdict(data.changes[0]) if data.changes else ""}
</header>"""


def _verdict(change: MetricChange) -> str:
    metric = escape(metric_label(change.metric))
    verb = {"better": "rose", "worse": "fell", "unclear": "went"}[change.verdict]
    doubt = f" {escape(change.doubt)}" if change.doubt else ""
    return f"""<p class="verdict">{metric} {verb} from <b class="before">{change.before:.3f}</b>
to <b class="after">{change.after:.3f}</b> on
{escape(count_items(change.count, f"test {change.items}"))}.</p>
<p class="doubt"><span class="chip {change.verdict}">{change.difference:+.3f}</span>
95&nbsp;% interval {change.difference_low:+.3f} to {change.difference_high:+.3f},
p&nbsp;{_p_relation(change.p_value)}.{doubt}</p>"""


def _p_relation(p_value: float) -> str:
    text = format_p_value(p_value)
    return f"&lt;&nbsp;{text[1:]}" if text.startswith("<") else f"=&nbsp;{text}"


def _measurements(data: ReportData) -> str:
    if not data.changes:
        return ""
    axis = _Axis.covering(data.changes)
    rows = "\n".join(_measurement(change, axis) for change in data.changes)
    return f"""<section>
<h2>Before and after</h2>
<table class="measures">
<thead><tr><th scope="col">Metric</th><th scope="col">Before</th><th scope="col">After</th>
<th scope="col">Change</th><th scope="col">p</th><th scope="col"
class="plot">{axis.labels()}</th></tr></thead> <tbody> {rows} </tbody> </table> <p
class="note"><span class="dot before"></span> before <span class="dot after"></span> after. Bars and
small figures are 95&nbsp;% intervals; the interval of the change is that of the paired
difference.</p>
</section>"""


def _measurement(change: MetricChange, axis: _Axis) -> str:
    before = _number(f"{change.before:.4f}", change.before_low, change.before_high)
    after = _number(f"{change.after:.4f}", change.after_low, change.after_high)
    difference = _number(
        f"{change.difference:+.4f}", change.difference_low, change.difference_high, sign="+"
    )
    return f"""<tr>
<th scope="row">{escape(metric_label(change.metric))}</th>
<td data-label="Before">{before}</td>
<td data-label="After">{after}</td>
<td data-label="Change" class="{change.verdict}">{difference}</td>
<td data-label="p">{escape(format_p_value(change.p_value))}</td>
<td class="plot">{_dumbbell(change, axis)}
{axis.ends()}</td>
</tr>"""


def _number(value: str, low: float, high: float, *, sign: str = "") -> str:
    return f"{value}<small>{low:{sign}.3f} to {high:{sign}.3f}</small>"


@dataclass(frozen=True)
class _Axis:
    """The common scale of the interval plots."""

    low: float
    high: float
    step: float

    @classmethod
    def covering(cls, changes: Sequence[MetricChange]) -> _Axis:
        low = min(min(c.before_low, c.after_low) for c in changes)
        high = max(max(c.before_high, c.after_high) for c in changes)
        steps = (0.01, 0.02, 0.05, 0.1, 0.2)
        step = next((step for step in steps if high - low <= 5 * step), 0.5)
        first = math.floor(low / step)
        last = max(math.ceil(high / step), first + 1)
        return cls(first * step, last * step, step)

    def place(self, value: float) -> str:
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + number * self.step for number in range(count + 1)]

    def label(self, tick: float) -> str:
        return f"{tick:.{2 if self.step < 0.1 else 1}f}"

    def ends(self) -> str:
        """Shown on narrow screens, where the labels over the columns are not."""
        low, high = self.label(self.low), self.label(self.high)
        return f'<span class="ends" aria-hidden="true"><i>{low}</i><i>{high}</i></span>'

    def labels(self) -> str:
        marks = "".join(
            f'<span style="left:{self.place(tick)}">{self.label(tick)}</span>'
            for tick in self.ticks()
        )
        return f'<span class="axis" aria-hidden="true">{marks}</span>'


def _dumbbell(change: MetricChange, axis: _Axis) -> str:
    """Two points over their intervals, in per cent of the width."""
    grid = "".join(
        f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="44"/>'
        for x in map(axis.place, axis.ticks())
    )
    sides = "".join(
        f'<line class="bar {name}" x1="{axis.place(low)}" x2="{axis.place(high)}" '
        f'y1="{y}" y2="{y}"/>'
        f'<circle class="{name}" cx="{axis.place(value)}" cy="{y}" r="5"/>'
        for name, low, value, high, y in (
            ("before", change.before_low, change.before, change.before_high, 14),
            ("after", change.after_low, change.after, change.after_high, 30),
        )
    )
    label = f"{metric_label(change.metric)}: before {change.before:.3f}, after {change.after:.3f}"
    return f'<svg class="dumbbell" role="img" aria-label="{escape(label)}">{grid}{sides}</svg>'


def _gallery(data: ReportData) -> str:
    if data.gallery is None:
        return ""
    encoded = base64.b64encode(data.gallery_png).decode()
    words = escape(data.gallery.describe())
    return f"""<section>
<h2>What queries found</h2>
<figure class="gallery"><img src="data:image/png;base64,{encoded}" alt="{words}"></figure>
<p class="note">{words}</p>
</section>"""


def _curves(curves: Sequence[str]) -> str:
    if not curves:
        return ""
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in curves)
    return f'<section>\n<h2>Training</h2>\n<div class="curves">\n{figures}\n</div>\n</section>'


def _moved(moved: MovedQueries) -> str:
    if not moved.improved and not moved.worsened:
        return ""
    total = moved.improved_count + moved.worsened_count + moved.unchanged_count
    shares = "".join(
        f'<span class="{name}" style="flex-grow:{count}"></span>'
        for name, count in (
            ("better", moved.improved_count),
            ("unclear", moved.unchanged_count),
            ("worse", moved.worsened_count),
        )
        if count
    )
    return f"""<section>
<h2>Queries that moved</h2>
<p>Of {total:,} queries, the right answer stands higher for <b>{moved.improved_count:,}</b>,
lower for <b>{moved.worsened_count:,}</b>, and where it stood for {moved.unchanged_count:,}.</p>
<div class="shares" aria-hidden="true">{shares}</div>
<div class="moves">
{_move_list("Improved most", "better", moved.improved)}
{_move_list("Worsened most", "worse", moved.worsened)}
</div>
</section>"""


def _move_list(heading: str, verdict: str, queries: Sequence[MovedQuery]) -> str:
    if not queries:
        return f"<div><h3>{heading}</h3><p>None.</p></div>"
    cards = "\n".join(_move(query, verdict) for query in queries)
    return f"<div><h3>{heading}</h3>\n{cards}\n</div>"


def _move(query: MovedQuery, verdict: str) -> str:
    rows = [("Right answer", query.right_answer, "")]
    for label, text, rank in (
        ("First before", query.top_before, query.rank_before),
        ("First after", query.top_after, query.rank_after),
    ):
        rows.append((label, "the right answer", "right") if rank == 1 else (label, text, ""))
    listed = "".join(
        f'<dt>{label}</dt><dd class="{kind}">{escape(shorten(text))}</dd>'
        for label, text, kind in rows
    )
    return f"""<article>
<p class="query">{escape(shorten(query.query))}</p>
<p class="ranks">rank <b>{query.rank_before:,}</b> → <b class="chip
{verdict}">{query.rank_after:,}</b></p> <dl>{listed}</dl>
</article>"""


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    listed = "".join(
        f"<div><dt>{escape(str(label))}</dt><dd>{escape(str(value))}</dd></div>"
        for label, value in facts.items()
    )
    return f'<section>\n<h2>The run</h2>\n<dl class="facts">{listed}</dl>\n</section>'


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_setting(value))}</td></tr>'
        for key, value in settings.items()
    )
    return f"""<details>
<summary>All {len(settings)} settings</summary>
<table class="settings"><tbody>
{rows}
</tbody></table>
</details>"""


def _setting(value: Any) -> str:
    """As YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_setting(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_setting(entry) for entry in value) + "]"
    return str(value)


def _method(data: ReportData) -> str:
    if not data.changes:
        return ""
    items = escape(data.changes[0].items)
    return f"""<footer>
<p>Both models answered the same {items}. Intervals: {RESAMPLES:,} bootstrap resamples of the
{items}, the same ones for both models. p: paired randomisation test,
{SWAPS:,} random swaps. Equal scores are ordered to the disadvantage of the model, so one that gives
every text the same vector earns nothing. Retrieval metrics are as trec_eval defines them.</p>
</footer>"""
