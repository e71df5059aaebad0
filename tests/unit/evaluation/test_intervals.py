import itertools
import math

import numpy as np
import pytest
from scipy import stats

from vembed.errors import ConfigError
from vembed.evaluation import compare, confidence_intervals, intervals
from vembed.evaluation.correlation import pearson, spearman
from vembed.evaluation.results import EvalResult, mean_result


def result_of(values, task="task", metric="ndcg@10"):
    return mean_result(
        task,
        items="queries",
        headline=(metric,),
        per_item={metric: np.asarray(values, dtype=float)},
    )


def pairs_result(cosines, scores):
    columns = np.stack([cosines, scores], axis=1)
    metrics = {"spearman": float(spearman(columns)), "pearson": float(pearson(columns))}
    return EvalResult(
        "sts", "pairs", ("spearman", "pearson"), metrics, dict.fromkeys(metrics, columns)
    )


def noisy_pair(seed=0, size=300, gain=0.05):
    rng = np.random.default_rng(seed)
    shared = rng.random(size)
    return result_of(shared + 0.1 * rng.random(size)), result_of(
        shared + gain + 0.1 * rng.random(size)
    )


def test_a_clear_change():
    before, after = noisy_pair()
    (change,) = compare(before, after)
    assert change.metric == "ndcg@10"
    assert (change.count, change.items) == (300, "queries")
    assert change.difference == pytest.approx(change.after - change.before)
    assert change.before_low < change.before < change.before_high
    assert change.after_low < change.after < change.after_high
    assert 0.04 < change.difference_low < change.difference < change.difference_high < 0.06
    assert change.verdict == "better"
    assert change.p_value == pytest.approx(1e-4)


def test_the_paired_difference_is_surer_than_the_sides():
    (change,) = compare(*noisy_pair())
    side = change.after_high - change.after_low
    assert change.difference_high - change.difference_low < side / 4


def test_swapping_the_sides_mirrors_everything():
    before, after = noisy_pair(gain=0.004)
    (forth,), (back,) = compare(before, after), compare(after, before)
    assert back.difference == pytest.approx(-forth.difference)
    assert (back.difference_low, back.difference_high) == pytest.approx(
        (-forth.difference_high, -forth.difference_low)
    )
    assert (back.before_low, back.before_high) == (forth.after_low, forth.after_high)
    assert back.p_value == forth.p_value
    assert {forth.verdict, back.verdict} in ({"better", "worse"}, {"unclear"})


def test_swapping_the_sides_mirrors_correlations():
    rng = np.random.default_rng(5)
    scores = rng.random(200)
    sides = [
        pairs_result(scores + noise * rng.standard_normal(200), scores) for noise in (0.5, 0.4)
    ]
    for forth, back in zip(compare(*sides), compare(*sides[::-1]), strict=True):
        assert back.difference == pytest.approx(-forth.difference)
        assert back.difference_low == pytest.approx(-forth.difference_high)
        assert back.p_value == pytest.approx(forth.p_value, abs=0.002)


def test_no_change_at_all():
    before, _ = noisy_pair()
    (change,) = compare(before, before)
    assert (change.difference, change.difference_low, change.difference_high) == (0, 0, 0)
    assert change.p_value == 1
    assert change.verdict == "unclear"


def test_the_same_results_give_the_same_intervals():
    assert compare(*noisy_pair()) == compare(*noisy_pair())


def test_intervals_agree_with_scipy():
    values = np.random.default_rng(3).gamma(1.0, size=150)
    ours = confidence_intervals(result_of(values))["ndcg@10"]
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width


def test_correlation_intervals_agree_with_scipy():
    rng = np.random.default_rng(4)
    scores = rng.random(120)
    cosines = scores + 0.4 * rng.standard_normal(120)
    ours = confidence_intervals(pairs_result(cosines, scores))["spearman"]
    theirs = stats.bootstrap(
        (cosines, scores), lambda x, y: stats.spearmanr(x, y).statistic, paired=True,
        vectorized=False, n_resamples=800, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.12 * width
    assert abs(ours.high - theirs.high) < 0.12 * width


def test_p_value_agrees_with_scipys_exact_test():
    rng = np.random.default_rng(6)
    before, after = rng.random(10), rng.random(10) + 0.15
    exact = stats.permutation_test(
        (before, after), lambda x, y, axis: (y - x).mean(axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    (change,) = compare(result_of(before), result_of(after))
    assert 0.02 < exact < 0.9
    assert change.p_value == pytest.approx(exact, abs=0.015)


def test_correlation_p_value_is_the_exact_one_when_all_swaps_are_tried(monkeypatch):
    every = np.array(list(itertools.product([-1.0, 1.0], repeat=9)))
    monkeypatch.setattr(intervals, "_signs", lambda count: [every])
    monkeypatch.setattr(intervals, "SWAPS", len(every))
    rng = np.random.default_rng(7)
    scores = rng.random(9)
    standard = lambda v: (v - v.mean()) / v.std()  # noqa: E731
    before = standard(scores + 0.8 * rng.standard_normal(9))
    after = standard(scores + 0.3 * rng.standard_normal(9))

    def difference(x, y):
        return np.corrcoef(y, scores)[0, 1] - np.corrcoef(x, scores)[0, 1]

    exact = stats.permutation_test(
        (before, after),
        difference,
        permutation_type="samples",
        vectorized=False,
        n_resamples=np.inf,
    ).pvalue
    change = compare(pairs_result(before, scores), pairs_result(after, scores))[1]
    assert change.metric == "pearson"
    assert change.difference == pytest.approx(difference(before, after))
    assert 0.02 < exact < 0.9
    assert change.p_value == pytest.approx((exact * 512 + 1) / 513, abs=1e-9)


def test_intervals_hold_the_truth_about_nineteen_times_in_twenty(monkeypatch):
    """300 data sets with a known mean difference of 0.1: 95 % of the intervals should hold it."""
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    monkeypatch.setattr(intervals, "SWAPS", 9)
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(300):
        before = rng.random(80)
        (change,) = compare(
            result_of(before), result_of(before + 0.1 + 0.3 * rng.standard_normal(80))
        )
        held += change.difference_low <= 0.1 <= change.difference_high
    # Standard error of the share is 1.3 points.
    assert 0.90 <= held / 300 <= 0.985


def test_p_values_are_uniform_when_nothing_changed(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 2)
    monkeypatch.setattr(intervals, "SWAPS", 199)
    rng = np.random.default_rng(9)
    p_values = [
        compare(result_of(rng.random(30)), result_of(rng.random(30)))[0].p_value for _ in range(300)
    ]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
    assert 0.42 <= np.mean(p_values) <= 0.58


def test_blocks_do_not_change_the_draws(monkeypatch):
    whole = compare(*noisy_pair(size=50))
    monkeypatch.setattr(intervals, "_BLOCK_ENTRIES", 50 * 7)
    assert compare(*noisy_pair(size=50)) == whole


def test_only_the_headline_is_compared_unless_asked():
    per_item = {"ndcg@10": np.arange(4.0), "map@100": np.arange(4.0)}
    result = mean_result("t", items="queries", headline=("ndcg@10",), per_item=per_item)
    assert [c.metric for c in compare(result, result)] == ["ndcg@10"]
    assert [c.metric for c in compare(result, result, ["map@100"])] == ["map@100"]


def test_one_item_has_an_interval_of_no_width():
    (change,) = compare(result_of([0.25]), result_of([0.5]))
    assert (change.difference_low, change.difference_high) == (0.25, 0.25)
    assert change.p_value == 1  # swapping the only answer gives as large a difference


@pytest.mark.parametrize("other", [result_of([1, 2]), result_of([1, 2, 3], task="another")])
def test_results_of_different_items_are_refused(other):
    with pytest.raises(ConfigError, match="same items"):
        compare(result_of([1, 2, 3]), other)


def test_a_collapsed_side_does_not_break_the_test():
    rng = np.random.default_rng(1)
    scores = rng.random(30)
    for change in compare(pairs_result(np.ones(30), scores), pairs_result(scores, scores)):
        assert (change.before, change.before_low, change.before_high) == (0, 0, 0)
        assert change.after == pytest.approx(1)
        assert math.isfinite(change.p_value)
        assert change.p_value < 0.01
