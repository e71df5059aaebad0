"""Rules that cannot be meant are told at once, with what was received."""

from __future__ import annotations

import pytest

from vembed.errors import ConfigError
from vembed.mining.rules import MiningRules, check_output, check_short_rows


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"num_negatives": 0}, "num_negatives: expected a whole number of at least 1. Received: 0"),
        ({"num_negatives": True}, "num_negatives: expected a whole number"),
        ({"range_min": -1}, "range_min: expected a whole number of at least 0. Received: -1"),
        (
            {"range_min": 10, "range_max": 12},
            r"range_max: expected a whole number of at least range_min \+ num_negatives = 13. Rec",
        ),
        ({"max_score": "high"}, "max_score: expected a number. Received: 'high'"),
        ({"min_score": float("nan")}, "min_score: expected a number. Received: nan"),
        (
            {"min_score": 0.8, "max_score": 0.2},
            "min_score: must not exceed max_score, 0.2. Received: 0.8",
        ),
        ({"sampling": "best"}, "sampling: expected top or random. Received: 'best'"),
        ({"seed": -3}, "seed: expected a whole number of at least 0. Received: -3"),
    ],
)
def test_what_is_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        MiningRules(**rules)


def test_as_many_ranks_as_negatives_are_enough():
    assert MiningRules(range_min=10, range_max=13).range_max == 13
    assert MiningRules(min_score=0.2, max_score=0.2).min_score == 0.2


def test_short_rows_is_one_of_three():
    check_short_rows("drop")
    with pytest.raises(ConfigError, match="keep, drop or error. Received: 'pad'"):
        check_short_rows("pad")


def test_the_output(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    (tmp_path / "old.jsonl").touch()
    check_output(tmp_path / "new.jsonl", str(rows), overwrite=False)
    check_output(tmp_path / "old.jsonl", str(rows), overwrite=True)
    for name, overwrite, message in (
        ("new.csv", False, "ends in .jsonl. Received"),
        ("no/new.jsonl", False, "there is no folder"),
        ("old.jsonl", False, "is there already. Name another, or give overwrite"),
        ("rows.jsonl", True, "is the file of the rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_output(tmp_path / name, str(rows), overwrite=overwrite)
