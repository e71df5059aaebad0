"""The curves of a run: one small panel per question, as inline SVG for the page and as one PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vembed.evaluation.metrics import metric_label

VALIDATION_PREFIX = "val_"
_SMOOTH_FROM = 30  # points; fewer are shown as they are

History = Sequence[Mapping[str, Any]]
"""Lines of `metrics.jsonl`, all with `step`: training has `loss`, validation has `val_...` keys."""


@dataclass(frozen=True)
class Series:
    """One line of a panel; `colour` is a role of the page: before, after, third or fourth."""

    label: str
    steps: list[float]
    values: list[float]
    colour: str
    is_faint: bool = False
    has_markers: bool = False


@dataclass(frozen=True)
class Panel:
    """One small chart over optimizer steps."""

    title: str
    series: list[Series]

    def describe(self) -> str:
        """The chart in words, for readers who cannot see it."""
        told = [
            f"{s.label} from {s.values[0]:.4g} at step {s.steps[0]:g} "
            f"to {s.values[-1]:.4g} at step {s.steps[-1]:g}"
            for s in self.series
            if not s.is_faint
        ]
        return f"{self.title}: {'; '.join(told)}."


@dataclass(frozen=True)
class Palette:
    """Colours by use; `series` in the order in which lines take them."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


_PRINT = Palette("#1b1f24", "#5d6672", "#e3e6ea", ("#7b8794", "#0b6e4f", "#b4540a", "#3a5bbf"))
# Stand-ins that matplotlib takes for colours; in the SVG they become the page's CSS variables, so
# that the curves follow its light or dark theme.
_STAND_INS = Palette("#010101", "#010102", "#010103", ("#010104", "#010105", "#010106", "#010107"))
_VARIABLES = {
    "#010101": "var(--ink)",
    "#010102": "var(--muted)",
    "#010103": "var(--line)",
    "#010104": "var(--before)",
    "#010105": "var(--after)",
    "#010106": "var(--third)",
    "#010107": "var(--fourth)",
}


def build_panels(history: History, metrics: Sequence[str]) -> list[Panel]:
    """The panels that `history` has numbers for, the loss first.

    Args:
        history: Lines of `metrics.jsonl`.
        metrics: Validation metrics to draw, at most three are.
    """
    validation = [
        _series(history, VALIDATION_PREFIX + name, metric_label(name), colour, has_markers=True)
        for name, colour in zip(metrics, ("after", "third", "fourth"), strict=False)
    ]
    drafts = [
        Panel(
            "Loss",
            [
                *_training_loss(history),
                *_series(history, "val_loss", "validation", "after", has_markers=True),
            ],
        ),
        Panel("Validation", [series for found in validation for series in found]),
        Panel("Learning rate", list(_series(history, "lr", "learning rate", "before"))),
        Panel("Gradient norm", list(_series(history, "grad_norm", "gradient norm", "before"))),
        Panel(
            "Speed", list(_series(history, "examples_per_second", "examples per second", "before"))
        ),
    ]
    return [panel for panel in drafts if panel.series]


def panel_svg(panel: Panel) -> str:
    """The panel as an `<svg>` element coloured by CSS variables, with a text alternative."""
    # Text stays text: the page's font, selectable; the salt makes ids the same in every run, yet
    # unlike per panel.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        _draw(figure.add_subplot(), panel, _STAND_INS)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"#01010[1-7]", lambda match: _VARIABLES[match[0]], svg)
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{escape(panel.describe())}"', 1
    ).strip()


def write_png(panels: Sequence[Panel], path: Path) -> None:
    """All panels, two in a row, as one picture on white."""
    rows = math.ceil(len(panels) / 2)
    columns = min(2, len(panels))
    figure = Figure(figsize=(4.8 * columns, 2.9 * rows), layout="constrained", facecolor="white")
    for number, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, number), panel, _PRINT)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15)


def _series(
    history: History, key: str, label: str, colour: str, *, has_markers: bool = False
) -> Iterator[Series]:
    points = [
        (float(line["step"]), float(line[key])) for line in history if line.get(key) is not None
    ]
    if points:
        steps, values = zip(*points, strict=True)
        yield Series(label, list(steps), list(values), colour, has_markers=has_markers)


def _training_loss(history: History) -> Iterator[Series]:
    for raw in _series(history, "loss", "training", "before"):
        if len(raw.values) < _SMOOTH_FROM:
            yield raw
        else:
            yield Series(raw.label, raw.steps, raw.values, raw.colour, is_faint=True)
            yield Series("training, smoothed", raw.steps, _smooth(raw.values), raw.colour)


def _smooth(values: list[float]) -> list[float]:
    """Centred mean over a twentieth of the points; at the ends over what there is."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    rows = np.arange(len(values))
    low, high = np.maximum(rows - half, 0), np.minimum(rows + half + 1, len(values))
    return [float(v) for v in (total[high] - total[low]) / (high - low)]


def _draw(axes: Axes, panel: Panel, palette: Palette) -> None:
    colours = dict(zip(("before", "after", "third", "fourth"), palette.series, strict=True))
    for series in panel.series:
        axes.plot(
            series.steps, series.values, color=colours[series.colour],
            label=None if series.is_faint else series.label,
            linewidth=0.8 if series.is_faint else 1.8, alpha=0.4 if series.is_faint else 1.0,
            marker="o" if series.has_markers else None, markersize=3.5,
        )  # fmt: skip
    axes.set_title(panel.title, loc="left", fontsize=10, color=palette.ink, fontweight="bold")
    axes.set_xlabel("step", fontsize=8.5, color=palette.muted)
    axes.tick_params(colors=palette.muted, labelsize=8.5, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
    axes.yaxis.get_offset_text().set(color=palette.muted, fontsize=8.5)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(palette is _PRINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)
    if len([series for series in panel.series if not series.is_faint]) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=palette.muted, handlelength=1.4)
