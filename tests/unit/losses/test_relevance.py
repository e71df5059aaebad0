from __future__ import annotations

import torch

from vembed.losses.relevance import Relevance


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


def test_no_rows():
    nothing = torch.zeros(0, dtype=torch.int64)
    columns = torch.arange(3)
    assert Relevance(nothing, columns, columns, columns).count(columns > 0).tolist() == []
