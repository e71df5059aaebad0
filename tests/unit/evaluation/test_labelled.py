import numpy as np
import pytest

from tests.unit.evaluation.fakes import constant_encode, hashing_encode, table_encode
from vembed.errors import DataError
from vembed.evaluation import LabelledTask
from vembed.modes import Item


def task_of(pairs, **kwargs):
    texts, labels = zip(*pairs, strict=True)
    return LabelledTask([Item(t) for t in texts], labels, **kwargs)


def test_neighbours_by_hand():
    # On a quarter circle: a1 a2 b1 a3 b2, in steps of ten degrees.
    degrees = {"a1": 0, "a2": 10, "b1": 21, "a3": 33, "b2": 46}
    table = {k: [np.cos(np.radians(d)), np.sin(np.radians(d))] for k, d in degrees.items()}
    result = task_of([(k, k[0]) for k in degrees]).evaluate(table_encode(table))
    # nearest: a1 -> a2 right, a2 -> a1 right, b1 -> a2 wrong, a3 -> b1 wrong, b2 -> a3 wrong
    assert result.per_item["knn@1"].tolist() == [1, 1, 0, 0, 0]
    # of the 4 others: an a finds 2 a's, a b finds 1 b
    assert result.per_item["p@10"] == pytest.approx([2 / 4, 2 / 4, 1 / 4, 2 / 4, 1 / 4])
    assert result.metrics["knn@1"] == pytest.approx(2 / 5)


def test_an_item_is_not_its_own_neighbour():
    pairs = [("a x", 0), ("a y", 1), ("b x", 0), ("b y", 1)]
    assert task_of(pairs).evaluate(hashing_encode).metrics["knn@1"] < 1


def test_equal_texts_are_separate_items():
    result = task_of([("same", 0), ("same", 0), ("other", 1), ("more", 1)]).evaluate(hashing_encode)
    assert len(result) == 4
    assert result.per_item["knn@1"][:2].tolist() == [1, 1]


def test_a_label_that_nobody_shares_is_a_distractor_but_not_counted():
    result = task_of([("a x", 0), ("a y", 0), ("a x y", 1)]).evaluate(hashing_encode)
    assert len(result) == 2
    assert result.metrics["knn@1"] == 0


def test_a_collapsed_model_gets_no_credit():
    pairs = [(f"t{i}", i % 3) for i in range(60)]
    assert task_of(pairs).evaluate(constant_encode).metrics == {"knn@1": 0, "p@10": 0}


def test_large_sets_are_sampled_the_same_way_each_time():
    pairs = [(f"text {i}", i % 5) for i in range(100)]
    first, again = task_of(pairs, max_items=30), task_of(pairs, max_items=30)
    assert first.describe() == {"texts": 30, "labels": 5}
    assert first.items == again.items
    assert first.items != task_of(pairs, max_items=30, seed=1).items
    assert len(set(first.items)) == 30


def test_labels_that_cannot_be_used_are_refused():
    with pytest.raises(DataError, match="a label that two items share"):
        task_of([("a", 0), ("b", 1)])
    with pytest.raises(DataError, match="1 items but 2 labels"):
        LabelledTask([Item("a")], [0, 1])
