import math

import pytest

from tests.unit.evaluation.fakes import table_encode
from vembed.errors import ConfigError
from vembed.evaluation import GradedPairsTask, MovedQueries, RetrievalTask, moved_queries
from vembed.modes import Item

# Ten documents in steps of ten degrees; query i is told to look near document `aim`, and its right
# answer is `right`.
DOCUMENTS = [f"d{i}" for i in range(10)]


def evaluate(aims, rights):
    degrees = {f"d{i}": 10 * i for i in range(10)}
    degrees |= {f"q{i}": 10 * aim - 1 for i, aim in enumerate(aims)}
    table = {k: [math.cos(math.radians(d)), math.sin(math.radians(d))] for k, d in degrees.items()}
    task = RetrievalTask(
        {f"q{i}": Item(f"q{i}") for i in range(len(aims))},
        {d: Item(d) for d in DOCUMENTS},
        {f"q{i}": dict.fromkeys(right.split(), 1) for i, right in enumerate(rights)},
    )
    return task.evaluate(table_encode(table))


RIGHTS = ["d9", "d0", "d5", "d0", "d3 d4"]
# Looking at d0, d9 is last; looking at d9, d8 is second, d0 last.
BEFORE = evaluate([0, 0, 5, 1, 0], RIGHTS)
AFTER = evaluate([9, 9, 5, 0, 3], RIGHTS)


def test_ranks_texts_and_counts():
    moved = moved_queries(BEFORE, AFTER)
    assert (moved.improved_count, moved.worsened_count, moved.unchanged_count) == (3, 1, 1)
    # q0: last to first, q4: fourth to first (d3), q3: second to first
    assert [(m.query, m.rank_before, m.rank_after) for m in moved.improved] == [
        ("q0", 10, 1),
        ("q4", 4, 1),
        ("q3", 2, 1),
    ]
    first = moved.improved[0]
    assert (first.right_answer, first.top_before, first.top_after) == ("d9", "d0", "d9")
    assert moved.improved[1].right_answer == "d3"
    assert [(m.query, m.rank_before, m.rank_after) for m in moved.worsened] == [("q1", 1, 10)]


def test_the_other_way_round_is_the_mirror():
    there, back = moved_queries(BEFORE, AFTER), moved_queries(AFTER, BEFORE)
    assert [m.query for m in back.worsened] == [m.query for m in there.improved]
    assert (back.improved_count, back.worsened_count) == (
        there.worsened_count,
        there.improved_count,
    )


def test_no_more_than_asked_and_the_counts_stay():
    moved = moved_queries(BEFORE, AFTER, n=1)
    assert [m.query for m in moved.improved] == ["q0"]
    assert moved.improved_count == 3


def test_nothing_moves_between_a_model_and_itself():
    assert moved_queries(AFTER, AFTER) == MovedQueries(unchanged_count=5)


def test_tasks_without_rankings_have_no_moved_queries():
    texts = [Item("a"), Item("b"), Item("c")]
    result = GradedPairsTask(texts, texts, [1, 2, 3]).evaluate(
        table_encode({"a": [1, 0], "b": [0, 1], "c": [1, 1]})
    )
    assert moved_queries(result, result) == MovedQueries()


def test_results_of_different_queries_are_refused():
    with pytest.raises(ConfigError, match="different queries"):
        moved_queries(BEFORE, evaluate([0], ["d9"]))
