"""From which similarity on a candidate is no negative."""

from __future__ import annotations

import math

import pytest
import torch

from vembed.losses.global_batch import gather_batch
from vembed.losses.margins import Margins, find_limits


@pytest.mark.parametrize(
    ("margins", "limits"),
    [
        (Margins(absolute=0.0), [0.8, -0.4]),
        (Margins(absolute=0.1), [0.7, -0.5]),
        (Margins(absolute=-0.1), [0.9, -0.3]),
        (Margins(relative=0.25), [0.6, -0.5]),
        (Margins(relative=-0.25), [1.0, -0.3]),
        (Margins(absolute=0.15, relative=0.25), [0.6, -0.55]),
    ],
)
def test_limits(margins, limits):
    similarity = torch.tensor([0.8, -0.4], dtype=torch.float64, requires_grad=True)
    found = margins.limits(similarity)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx(limits, abs=1e-12)
    # Never above, so that what ties with the limit is left out.
    assert (found < torch.tensor(limits, dtype=torch.float64)).all()


def test_without_margins_there_are_no_limits():
    assert Margins().limits(torch.zeros(2)) is None


def test_each_query_and_document_has_its_limit():
    ids = dict.fromkeys(("ids_query", "ids_positive", "ids_negative"))
    counts = torch.tensor([2, 0, 1])
    rows = torch.eye(3)
    batch = gather_batch(rows, rows, rows[:2], counts_positive=counts, **ids)
    similarity = torch.tensor([0.2, 0.7, -0.5])
    limits = find_limits(Margins(absolute=0.1), batch, similarity, of_documents=True)
    # The most similar positive decides; where there is none, nothing is left out.
    assert limits.row_R.tolist() == pytest.approx([0.6, math.inf, -0.6], abs=1e-5)
    assert limits.column_C.tolist() == pytest.approx([0.1, 0.6, -0.6, *[math.inf] * 2], abs=1e-5)
    assert find_limits(Margins(absolute=0.1), batch, similarity).column_C is None
    assert find_limits(Margins(), batch, similarity, of_documents=True) is None
