"""The search finds what sorting everything finds, and counts what it leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vembed.mining import search as module
from vembed.mining.pairs import Pairs
from vembed.mining.rules import Excluded
from vembed.mining.search import Bounds, Window, search


def reference(queries, documents, *, candidates, known, bounds, window):
    """Everything against everything, one query after the other."""
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    cosines = unit(queries.astype(np.float64)) @ unit(documents[:candidates].astype(np.float64)).T
    found, scores, counts = [], [], np.zeros(5, dtype=int)
    for query, row in enumerate(cosines):
        own = set(known.documents[known.queries == query].tolist())
        left = [number for number in range(candidates) if number not in own]
        left.sort(key=lambda number: (-row[number], number))
        looked_at = left[window.first : window.last]
        allowed, out = [], [0, 0, 0]
        for number in looked_at:
            rules = (
                row[number] < bounds.least,
                row[number] > bounds.margin_Q[query],
                row[number] > bounds.most,
            )
            if any(rules):
                out[rules.index(True)] += 1
            else:
                allowed.append(number)
        if len(allowed) >= window.take:
            out[0] = 0  # nobody looked that far
        counts += len(own), len(left) - len(looked_at), *out
        found.append((allowed + [-1] * window.take)[: window.take])
        scores.append([math.nan if n < 0 else row[n] for n in found[-1]])
    return np.asarray(found), np.asarray(scores), Excluded(*counts.tolist())


def random_case(seed, *, ties=False, queries=41, documents=150, size=12):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((queries + documents, size)).astype(np.float32)
    if ties:  # 16 directions, of lengths that rounding does not touch
        vectors = rng.choice([-1.0, 1.0], (queries + documents, 4)).astype(np.float32)
        vectors *= rng.choice([0.25, 1.0, 8.0], (queries + documents, 1)).astype(np.float32)
    pairs = rng.integers(0, [queries, documents - 20], size=(120, 2))
    return vectors[:queries], vectors[queries:], Pairs.of(pairs[:, 0], pairs[:, 1])


def run(queries, documents, **settings):
    parts = list(search(queries, documents, **settings))
    assert [n for part in parts for n in part.block] == list(range(len(queries)))
    return (
        np.concatenate([part.documents_qK for part in parts]),
        np.concatenate([part.cosines_qK for part in parts]),
        sum((part.excluded for part in parts), Excluded()),
    )


WINDOWS = [
    Window(0, None, 3),
    Window(5, None, 4),
    Window(2, 9, 7),
    Window(0, 130, 130),
    Window(128, 140, 5),  # beyond what some queries have left
    Window(0, 10**6, 200),
]
BOUNDS = {
    "none": lambda margins: Bounds(np.full(len(margins), math.inf)),
    "margin": Bounds,
    "scores": lambda margins: Bounds(np.full(len(margins), math.inf), 0.4003, -0.1004),
    "all": lambda margins: Bounds(margins, 0.4003, 0.0507),
}


@pytest.fixture(params=["held", "read anew"])
def small(request, monkeypatch):
    """Many blocks, parts and lists; in memory or not."""
    for name in ("_BLOCK_QUERIES", "_BLOCK_QUERIES_READING"):
        monkeypatch.setattr(module, name, 7)
    monkeypatch.setattr(module, "_PART_CANDIDATES", 16)
    monkeypatch.setattr(module, "_LISTED_PAIRS", 300)
    monkeypatch.setattr(module, "_SPARE", 0)
    if request.param == "read anew":
        monkeypatch.setattr(module, "_HELD_NUMBERS", 100)


def both(bounds, window, *, ties):
    """What is found, and what should be."""
    queries, documents, known = random_case(3, ties=ties)
    margins = np.random.default_rng(1).uniform(-0.3, 0.7, len(queries))
    settings = {
        "candidates": 130, "known": known, "bounds": BOUNDS[bounds](margins), "window": window,
    }  # fmt: skip
    return run(queries, documents, **settings), reference(queries, documents, **settings)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_as_sorting_everything_does(window, bounds):
    (numbers, cosines, excluded), expected = both(bounds, window, ties=False)
    np.testing.assert_array_equal(numbers, expected[0])
    np.testing.assert_allclose(cosines, expected[1], atol=1e-6)
    assert excluded == expected[2]
    assert (numbers < 130).all()


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.usefixtures("small")
def test_and_with_lists_that_are_too_short_at_first(window, bounds):
    (numbers, cosines, excluded), expected = both(bounds, window, ties=False)
    np.testing.assert_array_equal(numbers, expected[0])
    np.testing.assert_allclose(cosines, expected[1], atol=1e-6)
    assert excluded == expected[2]


@pytest.mark.parametrize("spare", [0, 130], ids=["short lists", "of all"])
@pytest.mark.parametrize("bounds", ["none", "margin"])
@pytest.mark.parametrize("window", [WINDOWS[n] for n in (0, 1, 3)], ids=str)
def test_of_equal_ones_the_first_goes_first(window, bounds, spare, monkeypatch):
    """Among those on the list: which of those that equal its last are on it, faiss decides."""
    monkeypatch.setattr(module, "_SPARE", spare)
    (numbers, cosines, excluded), expected = both(bounds, window, ties=True)
    np.testing.assert_array_equal(cosines, expected[1])
    assert excluded == expected[2]
    is_tie = cosines[:, 1:] == cosines[:, :-1]
    assert is_tie.sum() > 20
    assert (numbers[:, 1:] > numbers[:, :-1])[is_tie].all()
    if spare:
        np.testing.assert_array_equal(numbers, expected[0])


@pytest.mark.parametrize("first", [0, 3, 6])
@pytest.mark.parametrize("distance", [2e-6, -2e-6])
def test_a_bound_beside_a_cosine(first, distance):
    """That of the candidate of rank 4, which is left out, or just not, and counts in the ranks."""
    queries, documents, known = random_case(4)
    free = Bounds(np.full(len(queries), math.inf))
    settings = {"candidates": 150, "known": known}
    _, nearest, _ = reference(
        queries, documents, bounds=free, window=Window(0, None, 5), **settings
    )
    settings |= {"bounds": Bounds(nearest[:, 4] - distance), "window": Window(first, 9, 3)}
    numbers, _, excluded = run(queries, documents, **settings)
    expected_numbers, _, expected_excluded = reference(queries, documents, **settings)
    np.testing.assert_array_equal(numbers, expected_numbers)
    assert excluded == expected_excluded


def test_only_queries_whose_list_was_used_up_get_a_deeper_one(monkeypatch):
    queries, documents, _ = random_case(6)
    lists = []
    nearest = module._Corpus.nearest

    def watched(self, vectors, depth):
        lists.append((len(vectors), depth))
        return nearest(self, vectors, depth)

    monkeypatch.setattr(module._Corpus, "nearest", watched)
    limits = np.full(len(queries), math.inf)
    limits[[4, 9]] = -0.4  # leaves few of 150
    known = Pairs(np.full(40, 11), np.arange(40))
    settings = {"known": known, "window": Window(1, None, 3), "candidates": 150}
    run(queries, documents, bounds=Bounds(limits), **settings)
    assert lists[0] == (41, 1 + 3 + module._SPARE)
    assert [depth for _, depth in lists[1:]] == [80, 150]
    assert 2 <= lists[1][0] <= 3
    # Nothing below the least score is wanted, however few there are, and nothing beyond the ranks.
    for bounds, last in ((Bounds(limits, least=0.5), None), (Bounds(limits), 15)):
        lists.clear()
        run(queries, documents, bounds=bounds, known=known.below(0), candidates=150,
            window=Window(1, last, 3))  # fmt: skip
        assert lists == [(41, 20)]
    # What most queries know is reckoned with.
    lists.clear()
    all_know = Pairs(np.repeat(np.arange(41), 40), np.tile(np.arange(40), 41))
    free = Bounds(np.full(len(queries), math.inf))
    run(queries, documents, bounds=free, known=all_know, candidates=150, window=Window(1, None, 3))
    assert lists == [(41, 60)]


def test_a_vector_of_zeros_is_near_nothing():
    documents = np.asarray([[0, 0], [1, 0], [-1, 0]], dtype=np.float32)
    none = Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    numbers, cosines, _ = run(
        np.asarray([[2, 0]], dtype=np.float32), documents, candidates=3, known=none,
        bounds=Bounds(np.asarray([math.inf])), window=Window(0, None, 3),
    )  # fmt: skip
    assert numbers.tolist() == [[1, 0, 2]]
    assert cosines.tolist() == [[1, 0, -1]]
