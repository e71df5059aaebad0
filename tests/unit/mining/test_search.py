"""The tiled search finds what sorting everything finds, and counts what it leaves out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vembed.mining import search as module
from vembed.mining.search import Bounds, Excluded, Pairs, Window, search


def reference(queries, documents, *, candidates, known, bounds, window):
    """Everything against everything, one query after the other."""
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    cosines = unit(queries.astype(np.float64)) @ unit(documents[:candidates].astype(np.float64)).T
    found, scores, counts = [], [], np.zeros(5, dtype=int)
    for query, row in enumerate(cosines):
        own = set(known.documents[known.queries == query].tolist())
        left = [number for number in range(candidates) if number not in own]
        left.sort(key=lambda number: (-round(row[number] * 2**30), number))
        looked_at = left[window.first : window.last]
        allowed = []
        for number in looked_at:
            rules = (
                row[number] > bounds.margin_Q[query],
                row[number] > bounds.most,
                row[number] < bounds.least,
            )
            if any(rules):
                counts[2 + rules.index(True)] += 1
            else:
                allowed.append(number)
        counts[:2] += len(own), len(left) - len(looked_at)
        found.append((allowed + [-1] * window.take)[: window.take])
        scores.append([math.nan if n < 0 else row[n] for n in found[-1]])
    return np.asarray(found), np.asarray(scores), Excluded(*counts.tolist())


def random_case(seed, *, ties=False, queries=41, documents=150, size=12):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((queries + documents, size)).astype(np.float32)
    if ties:  # few different vectors, of different lengths
        vectors = rng.integers(-1, 2, (queries + documents, 3)).astype(np.float32) + 0.5
        vectors *= rng.uniform(0.5, 2, (queries + documents, 1)).astype(np.float32)
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


@pytest.mark.parametrize("tiles", ["small", "large"])
@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_as_sorting_everything_does(window, bounds, ties, tiles, monkeypatch):
    if tiles == "small":
        monkeypatch.setattr(module, "_BLOCK_QUERIES", 7)
        monkeypatch.setattr(module, "_TILE_CANDIDATES", 16)
        monkeypatch.setattr(module, "_HELD_NUMBERS", 100)
        monkeypatch.setattr(module, "_EXACT_NUMBERS", 300)
    queries, documents, known = random_case(3, ties=ties)
    margins = np.random.default_rng(1).uniform(-0.3, 0.7, len(queries))
    settings = {
        "candidates": 130,
        "known": known,
        "bounds": BOUNDS[bounds](margins),
        "window": window,
    }
    numbers, cosines, excluded = run(queries, documents, **settings)
    expected_numbers, expected_cosines, expected_excluded = reference(
        queries, documents, **settings
    )
    np.testing.assert_array_equal(numbers, expected_numbers)
    np.testing.assert_allclose(cosines, expected_cosines, atol=1e-12)
    assert excluded == expected_excluded
    assert (numbers < 130).all()


@pytest.mark.parametrize("first", [0, 3, 6])
@pytest.mark.parametrize("distance", [2e-6, -2e-6])
def test_a_bound_that_float32_hardly_tells_from_a_cosine(first, distance):
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


def test_products_are_in_float32_whatever_a_program_has_set(monkeypatch):
    """`medium` allows bf16, whose errors are thousands of times what the proof allows."""
    seen = []
    solve = module._Block.solve

    def watched(self, block):
        seen.append(torch.get_float32_matmul_precision())
        return solve(self, block)

    monkeypatch.setattr(module._Block, "solve", watched)
    queries, documents, known = random_case(4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        run(queries, documents, candidates=150, known=known, bounds=BOUNDS["none"](queries),
            window=Window(0, None, 3))  # fmt: skip
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


def ranked_exactly(monkeypatch) -> list[int]:
    """The rows of blocks that were ranked in float64 throughout."""
    rows: list[int] = []
    exact = module._Block._rank_exactly

    def watched(self, row):
        rows.append(row)
        return exact(self, row)

    monkeypatch.setattr(module._Block, "_rank_exactly", watched)
    return rows


def test_what_float32_cannot_tell_apart_is_ranked_in_float64(monkeypatch):
    """600 documents whose cosines differ by 1e-9: their order is seen in float64 only."""
    rows = ranked_exactly(monkeypatch)
    query = np.zeros((1, 2), dtype=np.float32)
    query[0, 0] = 1
    angles = 0.1 + 1e-8 * np.random.default_rng(0).permutation(600)
    documents = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # float32 has 2^-24 near one: lengths are spread, so that directions differ by less.
    documents = (documents * np.linspace(1, 50, 600)[:, None]).astype(np.float32)
    none = Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    settings = {
        "candidates": 600,
        "known": none,
        "bounds": Bounds(np.asarray([math.inf])),
        "window": Window(0, None, 5),
    }
    numbers, *_ = run(query, documents, **settings)
    np.testing.assert_array_equal(numbers, reference(query, documents, **settings)[0])
    assert rows == [0]
    rows.clear()
    # Of fewer, all are listed the second time.
    numbers, *_ = run(query, documents, **(settings | {"candidates": 200}))
    expected = reference(query, documents, **(settings | {"candidates": 200}))[0]
    np.testing.assert_array_equal(numbers, expected)
    assert rows == []


def test_and_nothing_else_is(monkeypatch):
    rows = ranked_exactly(monkeypatch)
    queries, documents, known = random_case(5)
    bounds = Bounds(np.full(len(queries), 0.5))
    run(queries, documents, candidates=150, known=known, bounds=bounds, window=Window(3, None, 4))
    assert rows == []


def test_a_vector_of_zeros_is_near_nothing():
    documents = np.asarray([[0, 0], [1, 0], [-1, 0]], dtype=np.float32)
    none = Pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    numbers, cosines, _ = run(
        np.asarray([[2, 0]], dtype=np.float32), documents, candidates=3, known=none,
        bounds=Bounds(np.asarray([math.inf])), window=Window(0, None, 3),
    )  # fmt: skip
    assert numbers.tolist() == [[1, 0, 2]]
    assert cosines.tolist() == [[1, 0, -1]]
