from __future__ import annotations

import pytest
import torch

from vembed.losses.relevance import Relevance, link_components


def random_relation(seed: int) -> Relevance:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(0, 6, (n,), generator=generator) for n in (9, 14))
    related = torch.randint(0, 14, (7,), generator=generator)
    return Relevance(
        rows, columns, torch.randint(0, 8, (7,), generator=generator), columns[related]
    )


def test_count_is_the_number_of_pairs():
    for seed in range(20):
        relation = random_relation(seed)
        marked = torch.rand(14, generator=torch.Generator().manual_seed(seed)) > 0.4
        row, column = relation.pairs(slice(0, 9))
        expected = torch.bincount(row[marked[column]], minlength=9)
        assert relation.count(marked).tolist() == expected.tolist()
        assert relation.count(torch.ones(14, dtype=torch.bool)).sum() == len(row)


def test_count_of_one_repeated_item_takes_no_room():
    """All 10^10 pairs are related."""
    same = torch.zeros(100_000, dtype=torch.int64)
    counts = Relevance(same, same, same, same).count(same == 0)
    assert counts.unique().tolist() == [100_000]


@pytest.mark.parametrize(("width", "lists"), [(1, 1), (3, 1), (14, 1), (200, 2)])
def test_pairs_in_tiles_are_the_pairs(width, lists):
    """Many of them are marked in a mask, few for the size of a tile are listed."""
    kinds = set()
    for seed in range(20):
        relation = random_relation(seed)
        row, column = relation.pairs(slice(2, 7))
        expected = torch.zeros(5, 14, dtype=torch.int64).index_put((row, column), torch.tensor(1))
        tiles = expected.split(width, dim=1)
        for tile, index in zip(tiles, relation.in_tiles(slice(2, 7), width), strict=True):
            kinds.add(len(index))
            found = torch.zeros_like(tile)
            found[index] += 1
            assert found.equal(tile)
    assert lists in kinds


@pytest.mark.parametrize("repeated", ["items", "queries", "documents"])
def test_tiles_of_a_large_relation_take_the_room_of_one_tile(repeated):
    """All pairs are related: 10^10 of them, 10^6 in a tile."""
    same, different = torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000)
    rows = different if repeated == "documents" else same
    columns = different if repeated == "queries" else same
    relation = Relevance(rows, columns, rows, columns)
    (mask,) = next(relation.in_tiles(slice(0, 1000), 1000))
    assert mask.shape == (1000, 1000)
    assert mask.all()


def test_no_rows():
    nothing = torch.zeros(0, dtype=torch.int64)
    columns = torch.arange(3)
    assert Relevance(nothing, columns, columns, columns).count(columns > 0).tolist() == []


@pytest.mark.parametrize("seed", range(6))
def test_components_are_those_of_a_search(seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(0, 14, (2, 11), generator=generator)
    assert_components(left.tolist(), right.tolist())


@pytest.mark.parametrize("length", [2, 7, 64])
def test_components_of_a_long_chain(length):
    """Left n is linked to right n and n + 1; two chains, and numbers that stand for both sides."""
    left = [n for n in range(length) for _ in range(2)]
    right = [n + step for n in range(length) for step in (0, 1)]
    apart = [number + 1000 for number in left], [number + 1000 for number in right]
    order = torch.randperm(4 * length, generator=torch.Generator().manual_seed(0)).tolist()
    both = [left + apart[0], right + apart[1]]
    assert_components(*[[numbers[place] for place in order] for numbers in both])


def assert_components(left, right):
    """Against walking from each pair to all that can be reached."""
    found = link_components(torch.tensor(left), torch.tensor(right)).tolist()
    pairs = list(zip(left, right, strict=True))
    for start in range(len(pairs)):
        reached = {pairs[start]}
        while more := {
            pair
            for pair in pairs
            if any(pair[0] == a or pair[1] == b for a, b in reached) and pair not in reached
        }:
            reached |= more
        assert [number == found[start] for number in found] == [pair in reached for pair in pairs]
