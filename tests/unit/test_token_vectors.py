"""Token vectors at rest and in a step, and MaxSim against loops over single tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vembed import token_vectors
from vembed.token_vectors import (
    TokenVectors,
    cat_items,
    join_vectors,
    max_sim,
    pad_tokens,
    paired_max_sim,
    real_tokens,
)

LENGTHS = [3, 1, 0, 5, 2]


def arrays(lengths=LENGTHS, seed=0, size=4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, size)).astype(np.float32) for length in lengths]


def slow_max_sim(query, document):
    def cosine(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    query, document = query.astype(np.float64), document.astype(np.float64)
    if not len(query) or not len(document):
        return 0.0
    return sum(max(cosine(q, d) for d in document) for q in query) / len(query)


def assert_items(vectors, expected):
    assert len(vectors) == len(expected)
    for found, array in zip(vectors, expected, strict=True):
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("rows", [[4, 0, 0, 2, 3], [2], [], slice(1, 4), slice(None, None, 2)])
def test_rows_are_taken_as_from_a_list(rows):
    items = arrays()
    expected = items[rows] if isinstance(rows, slice) else [items[row] for row in rows]
    picked = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
    assert_items(TokenVectors.from_arrays(items)[picked], expected)


def test_padding_comes_off_wherever_it_stands():
    padded = torch.zeros(3, 4, 2)
    padded[0, :2] = torch.tensor([[1.0, 2], [3, 4]])
    padded[1, [1, 3]] = torch.tensor([[0.0, 5], [6, 0]])
    found = TokenVectors.from_padded(padded)
    assert found.lengths.tolist() == [2, 2, 0]
    assert found.flat_SD.tolist() == [[1, 2], [3, 4], [0, 5], [6, 0]]


def test_a_broken_token_is_not_taken_for_padding():
    broken = torch.tensor([[[0.0, 0], [float("nan"), 0]]])
    assert real_tokens(broken).tolist() == [[False, True]]
    assert np.isnan(TokenVectors.from_padded(broken).flat_SD).any()


def test_items_of_two_widths_go_together():
    long, short = torch.ones(1, 3, 2), torch.ones(2, 1, 2)
    both = cat_items([short, long])
    assert both.shape == (3, 3, 2)
    assert real_tokens(both).sum(1).tolist() == [1, 1, 3]
    pooled = torch.ones(2, 5)
    assert cat_items([pooled, pooled]).shape == (4, 5)
    assert pad_tokens(pooled, 9) is pooled


def test_parts_are_joined_in_order():
    first, second = arrays(), arrays([2, 4], seed=1)
    joined = join_vectors([TokenVectors.from_arrays(part) for part in (first, second)])
    assert_items(joined, first + second)
    assert join_vectors([np.ones((2, 3)), np.zeros((1, 3))]).shape == (3, 3)


@pytest.mark.parametrize(("entries", "tokens"), [(1, 1), (12, 4), (2**22, 2**10)])
def test_max_sim_is_that_of_loops_whatever_the_tile(entries, tokens, monkeypatch):
    monkeypatch.setattr(token_vectors, "_TILE_ENTRIES", entries)
    monkeypatch.setattr(token_vectors, "_TILE_TOKENS", tokens)
    queries, documents = arrays(), arrays([4, 0, 1, 6, 2, 0], seed=1)
    scores = max_sim(TokenVectors.from_arrays(queries), TokenVectors.from_arrays(documents))
    expected = [[slow_max_sim(q, d) for d in documents] for q in queries]
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    # The other way round, it is another number.
    turned = max_sim(TokenVectors.from_arrays(documents), TokenVectors.from_arrays(queries)).T
    assert np.abs(turned - expected).max() > 0.1


def test_pairs_are_the_diagonal():
    queries, documents = (TokenVectors.from_arrays(arrays(seed=seed)) for seed in (0, 1))
    np.testing.assert_allclose(
        paired_max_sim(queries, documents), max_sim(queries, documents).diagonal(), atol=1e-12
    )
