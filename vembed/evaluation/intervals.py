"""How sure a number is, and how sure a change: bootstrap intervals and a paired randomisation test.

Items (queries, pairs, texts) are resampled with replacement, the same draws for both models, so
that the interval of a difference uses that both answered the same questions: it is far narrower
than the two intervals beside it suggest. The seed is fixed: the same results give the same
intervals.

# Shapes: n items, r resamples of one block
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vembed.errors import ConfigError
from vembed.evaluation.correlation import pearson, spearman
from vembed.evaluation.metrics import metric_without_reduction
from vembed.evaluation.results import EvalResult

LEVEL = 0.95
RESAMPLES = 2000
SWAPS = 9999  # with the observed one, 10,000: the smallest p-value is 0.0001

MAX_P_VALUE = 0.05
FEW_ITEMS = 30
"""Below it, bootstrap intervals of a mean are too narrow, and only a large change can be told from
chance: what stays unclear is then blamed on the number of items.
"""

_SEED = 0
_BLOCK_ENTRIES = 2**21  # draws held at once: 16 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class MetricChange:
    """One metric before and after, each and their difference with a 95 % interval.

    Attributes:
        metric: Such as `ndcg@10`.
        count: Number of items that both were measured on.
        items: What they are, in the plural: `"queries"`.
        p_value: Two-sided, of a paired randomisation test: how often swapping the two models'
            answers at random, item by item, gives a difference as large as this one.
    """

    metric: str
    count: int
    items: str
    before: float
    before_low: float
    before_high: float
    after: float
    after_low: float
    after_high: float
    difference: float
    difference_low: float
    difference_high: float
    p_value: float

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """`unclear` when the interval of the difference holds 0, or p is above 0.05."""
        if self.p_value > MAX_P_VALUE:
            return "unclear"
        if self.difference_low > 0:
            return "better"
        return "worse" if self.difference_high < 0 else "unclear"

    @property
    def doubt(self) -> str:
        """Why the verdict is unclear, in a sentence; empty where it is not."""
        if self.verdict != "unclear":
            return ""
        if self.count < FEW_ITEMS:
            return f"There are too few test {self.items} ({self.count}) to conclude."
        if self.difference_low <= 0 <= self.difference_high:
            return "The interval holds zero: this may be chance."
        return f"p is above {MAX_P_VALUE}: this may be chance."


def confidence_intervals(
    result: EvalResult, metrics: Sequence[str] | None = None
) -> dict[str, Interval]:
    """A 95 % percentile bootstrap interval for each of `metrics` (None: the headline ones)."""
    names = result.headline if metrics is None else metrics
    samples = {name: _bootstrap(name, [result.per_item[name]])[0] for name in names}
    return {name: _interval(sample) for name, sample in samples.items()}


def compare(
    before: EvalResult, after: EvalResult, metrics: Sequence[str] | None = None
) -> list[MetricChange]:
    """What changed between two models on the same task.

    Args:
        before: Result of the first model.
        after: Result of the second, from the same task.
        metrics: Which metrics; None for the headline ones.

    Raises:
        ConfigError: if the two results are not of the same items.
    """
    _check_paired(before, after)
    names = before.headline if metrics is None else metrics
    return [_change(name, before, after) for name in names]


def _check_paired(before: EvalResult, after: EvalResult) -> None:
    same = before.task == after.task and len(before) == len(after)
    if same and before.rankings is not None and after.rankings is not None:
        same = list(before.rankings.queries) == list(after.rankings.queries)
    if not same:
        raise ConfigError(
            f"compare: expected two results of one task on the same items. Received: "
            f"{before.task!r} with {len(before)} {before.items} and "
            f"{after.task!r} with {len(after)} {after.items}"
        )


def _change(name: str, before: EvalResult, after: EvalResult) -> MetricChange:
    pair = [before.per_item[name], after.per_item[name]]
    samples_before, samples_after = _bootstrap(name, pair)
    low_high = [
        _interval(s) for s in (samples_before, samples_after, samples_after - samples_before)
    ]
    return MetricChange(
        metric=name,
        count=len(before),
        items=before.items,
        before=before.metrics[name],
        before_low=low_high[0].low,
        before_high=low_high[0].high,
        after=after.metrics[name],
        after_low=low_high[1].low,
        after_high=low_high[1].high,
        difference=after.metrics[name] - before.metrics[name],
        difference_low=low_high[2].low,
        difference_high=low_high[2].high,
        p_value=_randomisation_test(name, *pair),
    )


def _mean(values: Floats) -> Floats:
    return np.asarray(values.mean(axis=-1))


_STATISTICS: dict[str, Callable[[Floats], Floats]] = {"spearman": spearman, "pearson": pearson}


def _bootstrap(name: str, sides: Sequence[Floats]) -> list[Floats]:
    """The metric in each of RESAMPLES resamples of the items, per side; sides share the draws."""
    statistic = _STATISTICS.get(metric_without_reduction(name), _mean)
    count = len(sides[0])
    rng = np.random.default_rng(_SEED)
    samples: list[list[Floats]] = [[] for _ in sides]
    for size in _block_sizes(RESAMPLES, count):
        drawn_rn = rng.integers(count, size=(size, count))
        for side, kept in zip(sides, samples, strict=True):
            kept.append(statistic(side[drawn_rn]))
    return [np.concatenate(kept) for kept in samples]


def _interval(samples: Floats) -> Interval:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def _randomisation_test(name: str, before: Floats, after: Floats) -> float:
    name = metric_without_reduction(name)
    difference = _correlation_swaps if name in _STATISTICS else _mean_swaps
    if name == "spearman":
        from scipy.stats import rankdata

        before, after = rankdata(before, axis=0), rankdata(after, axis=0)
    observed, swapped = difference(before, after)
    # The tolerance lets rounding not decide whether an equal difference counts.
    extreme = int((np.abs(swapped) >= abs(observed) - 1e-12).sum())
    return (extreme + 1) / (SWAPS + 1)


def _mean_swaps(before: Floats, after: Floats) -> tuple[float, Floats]:
    difference = after - before
    swapped = [signs_rn @ difference / len(difference) for signs_rn in _signs(len(difference))]
    return float(difference.mean()), np.concatenate(swapped)


def _correlation_swaps(before: Floats, after: Floats) -> tuple[float, Floats]:
    """Differences of correlation when the models' cosines (or their ranks) are swapped at random.

    Both models' cosines are standardised first: what is exchangeable under "no difference" is the
    place of a pair among the model's own cosines. Swapped columns are `mean + sign * half`, whose
    moments are linear in the signs.
    """
    score = _standardise(before[:, 1])
    x, y = _standardise(before[:, 0]), _standardise(after[:, 0])
    mean, half = (x + y) / 2, (y - x) / 2
    moments = np.stack([half, mean * half, half * score], axis=1) / len(score)
    square = float((mean * mean + half * half).mean())
    shared = float((mean * score).mean())

    def difference(signs_rn: Floats) -> Floats:
        first, cross, tilt = (
            signs_rn @ moments
        ).T  # the mean of `mean` is 0: so is that of x and y
        after_r = _safe_ratio(shared + tilt, square + 2 * cross - first * first)
        before_r = _safe_ratio(shared - tilt, square - 2 * cross - first * first)
        return after_r - before_r

    observed = difference(np.ones((1, len(score))))[0]
    return float(observed), np.concatenate([difference(s) for s in _signs(len(score))])


def _standardise(values: Floats) -> Floats:
    spread = values.std()
    if np.ptp(values) == 0:
        return np.zeros_like(values)
    return np.asarray((values - values.mean()) / spread)


def _safe_ratio(covariance: Floats, variance: Floats) -> Floats:
    positive = variance > 1e-12
    return np.divide(
        covariance, np.sqrt(variance, where=positive, out=np.ones_like(variance)),
        out=np.zeros_like(covariance), where=positive,
    )  # fmt: skip


def _signs(count: int) -> Iterator[Floats]:
    rng = np.random.default_rng(_SEED)
    for size in _block_sizes(SWAPS, count):
        yield rng.integers(2, size=(size, count), dtype=np.int8).astype(np.float64) * 2 - 1


def _block_sizes(total: int, count: int) -> Iterator[int]:
    size = max(1, _BLOCK_ENTRIES // count)
    for start in range(0, total, size):
        yield min(size, total - start)
