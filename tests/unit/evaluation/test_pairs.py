import numpy as np
import pytest
from scipy import stats

from tests.unit.evaluation.fakes import constant_encode, hashing_encode, table_encode
from vembed.errors import DataError
from vembed.evaluation import GradedPairsTask
from vembed.evaluation.correlation import pearson, spearman
from vembed.modes import Item


def test_spearman_and_pearson_by_hand():
    table = {"x": [1, 0], "a": [0, 1], "b": [0.6, 0.8], "c": [0.8, 0.6], "d": [1, 0]}
    task = GradedPairsTask([Item("x")] * 4, [Item(t) for t in "abcd"], [1, 3, 2, 4])
    result = task.evaluate(table_encode(table))
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert result.metrics["spearman"] == pytest.approx(0.8)
    # cosines 0 .6 .8 1 (mean .6), scores mean 2.5: covariance .9+0-.1+.6 = 1.4 over sqrt(.56 * 5)
    assert result.metrics["pearson"] == pytest.approx(1.4 / np.sqrt(0.56 * 5), abs=1e-5)
    assert (result.main_metric, result.rankings, len(result)) == ("spearman", None, 4)


def test_correlations_equal_scipy_with_ties():
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 6, size=(5, 40, 2)).astype(float)
    for row, block in enumerate(columns):
        x, y = block.T
        assert pearson(columns)[row] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
        assert spearman(columns)[row] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_a_constant_column_correlates_with_nothing():
    for size in range(3, 30):  # the mean of equal numbers is not always exactly that number
        columns = np.stack([np.full(size, 0.1), np.sqrt(np.arange(size))], axis=1)
        assert pearson(columns) == pytest.approx(0, abs=1e-9)
        assert spearman(columns) == 0


def test_roles_are_query_and_document():
    roles = []
    task = GradedPairsTask(
        [Item("a b"), Item("c"), Item("d")], [Item("a"), Item("c"), Item("e")], [1, 2, 0]
    )
    result = task.evaluate(lambda items, role: roles.append(role) or hashing_encode(items, role))
    assert roles == ["query", "document"]
    assert result.metrics["spearman"] == pytest.approx(1)


def test_a_collapsed_model_gets_no_credit():
    task = GradedPairsTask([Item("a")] * 3, [Item("b")] * 3, [1, 2, 3])
    assert task.evaluate(constant_encode).metrics == {"spearman": 0, "pearson": 0}


@pytest.mark.parametrize("scores", [[1, 2], [1, 1, 1]])
def test_too_little_to_correlate_is_refused(scores):
    pairs = [Item("a")] * len(scores)
    with pytest.raises(DataError, match="three pairs and two different scores"):
        GradedPairsTask(pairs, pairs, scores)


def test_sides_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="equally many"):
        GradedPairsTask([Item("a")] * 3, [Item("a")] * 2, [1, 2, 3])
