"""Margins, random choice and a cross-encoder's judgement, against the plain statement of each."""

from __future__ import annotations

import numpy as np
import pytest

from vembed.errors import ConfigError
from vembed.mining.choosing import choose, margin_limits
from vembed.mining.pairs import Pairs
from vembed.mining.rescoring import Cosines
from vembed.mining.rules import Excluded, MiningRules

COSINES = np.asarray([0.95, 0.9, 0.8, 0.7, 0.5, 0.2, -0.1, -0.6])


def at(cosines):
    """Unit vectors with these cosines to (1, 0)."""
    return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1).astype(np.float32)


def mine(rules, *, positives=(2,), queries=1, ids=None, cosines=COSINES, judge=None):
    vectors = np.tile(np.asarray([[1, 0]], dtype=np.float32), (queries, 1))
    own = Pairs.of(
        np.repeat(np.arange(queries), len(positives)), np.tile(np.asarray(positives), queries)
    )
    scores = cosines[own.documents] if judge is None else 1 / (1 + np.exp(-judge(own)))
    return choose(
        vectors,
        at(cosines),
        candidates=len(cosines),
        known=own,
        positives=own,
        positive_scores_P=scores,
        query_ids_Q=np.arange(100, 100 + queries) if ids is None else np.asarray(ids),
        rules=rules,
        judge=judge,
    )


def found(chosen, query=0):
    return [n for n in chosen.documents_QN[query].tolist() if n >= 0]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [0, 1, 3]),
        ({"range_min": 1}, [1, 3, 4]),
        ({"range_max": 3, "max_score": 0.92}, [1, 3]),
        ({"absolute_margin": 0.0}, [3, 4, 5]),
        ({"absolute_margin": 0.25}, [4, 5, 6]),
        ({"relative_margin": 0.05}, [3, 4, 5]),  # at most 0.76
        ({"relative_margin": 0.2}, [4, 5, 6]),  # at most 0.64
        ({"relative_margin": 0.05, "absolute_margin": 0.25}, [4, 5, 6]),
        ({"absolute_margin": 0.0, "range_min": 3}, [4, 5, 6]),  # ranks are those before margins
        ({"absolute_margin": 0.0, "range_max": 4}, [3, 4]),
        ({"min_score": 0.4, "absolute_margin": 0.0}, [3, 4]),
        ({"min_score": 0.99}, []),
    ],
)
def test_what_each_rule_leaves(rules, expected):
    assert found(mine(MiningRules(**rules))) == expected


def test_of_several_positives_the_least_similar_counts():
    rules = MiningRules(absolute_margin=0.0)
    assert found(mine(rules, positives=(0, 4))) == [5, 6, 7]
    assert found(mine(rules, positives=(0,))) == [1, 2, 3]


def test_a_relative_margin_is_taken_off_below_zero_too():
    """`(1 - r) p` would be above a negative `p`: the limit must be below it."""
    pairs = Pairs(np.asarray([0, 1]), np.asarray([0, 1]))
    limits = margin_limits(MiningRules(relative_margin=0.5), pairs, np.asarray([-0.1, 0.4]))
    assert limits == pytest.approx([-0.15, 0.2], abs=1e-4)


def test_a_copy_of_the_positive_is_left_out_at_a_margin_of_zero():
    """Whichever way its vector was rounded."""
    cosines = np.asarray([0.8, 0.8 - 3e-7, 0.8 + 3e-7, 0.79])
    assert found(mine(MiningRules(absolute_margin=0.0), positives=(0,), cosines=cosines)) == [3]
    assert found(mine(MiningRules(), positives=(0,), cosines=cosines)) == [2, 1, 3]


def test_so_is_one_of_4096_numbers_with_every_query():
    """The search sums in float32, the score of the positive in float64."""
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((64, 4096)).astype(np.float32)
    documents = np.concatenate([documents, 3 * documents])  # row k + 64 is row k, to rounding
    queries = documents[:64] + rng.standard_normal((64, 4096)).astype(np.float32)
    own = Pairs(np.arange(64), np.arange(64))
    chosen = choose(
        queries, documents, candidates=128, known=own, positives=own,
        positive_scores_P=Cosines(queries, documents)(own), query_ids_Q=np.arange(64),
        rules=MiningRules(absolute_margin=0.0),
    )  # fmt: skip
    assert (chosen.counts_Q == 3).all()
    assert not (chosen.documents_QN == np.arange(64, 128)[:, None]).any()
    assert chosen.excluded.margin == 64


@pytest.mark.parametrize("margin", [{"absolute_margin": 2.5}, {"relative_margin": "0.1"}])
def test_margins_are_checked_as_those_of_losses(margin):
    with pytest.raises(ConfigError, match="_margin: expected a number from"):
        mine(MiningRules(**margin))


class TestRandom:
    COSINES = np.linspace(0.9, -0.9, 60)

    def mine(self, *, queries=200, ids=None, **rules):
        rules = MiningRules(sampling="random", num_negatives=2, **rules)
        return mine(rules, positives=(3,), queries=queries, ids=ids, cosines=self.COSINES)

    def test_all_that_is_allowed_is_drawn_and_nothing_else(self):
        chosen = self.mine(range_min=4, range_max=12)
        # Document 3 has no rank: rank 4 is document 5.
        assert set(chosen.documents_QN.ravel().tolist()) == set(range(5, 13))
        assert (chosen.documents_QN[:, 0] < chosen.documents_QN[:, 1]).all()
        counts = np.bincount(chosen.documents_QN.ravel())[5:]
        assert counts.min() > 25  # of 50 expected: not the first ones only

    def test_unless_told_from_ten_for_each_negative(self):
        chosen = self.mine(range_min=4)
        assert set(chosen.documents_QN.ravel().tolist()) == set(range(5, 25))

    def test_margins_hold(self):
        chosen = self.mine(absolute_margin=0.2, range_max=30)
        assert self.COSINES[chosen.documents_QN].max() <= self.COSINES[3] - 0.2

    def test_what_a_query_gets_depends_on_the_seed_and_on_itself(self):
        both = self.mine(queries=2, ids=[7, 8])
        alone = self.mine(queries=1, ids=[8])
        other = self.mine(queries=200, seed=5)
        assert both.documents_QN[1].tolist() == alone.documents_QN[0].tolist()
        assert (other.documents_QN != self.mine().documents_QN).any()

    def test_fewer_than_wanted_are_all_taken(self):
        chosen = self.mine(queries=1, min_score=self.COSINES[1] - 1e-3, range_max=9)
        assert chosen.documents_QN.tolist() == [[0, 1]]


class TestCrossEncoder:
    SCORES = np.asarray([-3.0, 2.0, 1.0, 0.9, -1.0, 0.5, 4.0, 5.0])

    def judge(self, pairs):
        self.asked = pairs.documents.tolist()
        return self.SCORES[pairs.documents]

    def test_it_puts_those_within_the_ranks_in_order(self):
        chosen = mine(MiningRules(range_max=5), judge=self.judge)
        assert sorted(self.asked) == [0, 1, 3, 4, 5]
        assert found(chosen) == [1, 3, 5]
        expected = 1 / (1 + np.exp(-self.SCORES[[1, 3, 5]]))
        np.testing.assert_allclose(chosen.scores_QN[0], expected, rtol=1e-6)

    def test_rules_are_by_the_sigmoid_of_its_scores(self):
        # The positive has sigmoid(1) = 0.731; 0.9 gives 0.711, 0.5 gives 0.622, -1 gives 0.269.
        rules = MiningRules(range_max=5, absolute_margin=0.05, min_score=0.2)
        chosen = mine(rules, judge=self.judge)
        assert found(chosen) == [5, 4]
        assert chosen.excluded == Excluded(known=1, rank=2, margin=2, min_score=1)

    def test_unless_told_ten_candidates_for_each_negative(self):
        mine(MiningRules(num_negatives=1), judge=self.judge, cosines=np.linspace(0.9, 0, 8))
        assert len(self.asked) == 7
        rules = MiningRules(num_negatives=1)
        assert rules.last_rank(is_pool=True) == 10
        assert rules.last_rank(is_pool=False) is None
