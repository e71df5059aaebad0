"""Every loss of the table against the conformance battery."""

from __future__ import annotations

import pytest
import torch

from tests.unit.losses.conformance import (
    CASES,
    NOTHING,
    REFERENCES,
    VARIANTS,
    Case,
    check_all,
    check_all_duplicates,
    check_autocast,
    check_batch_of_one,
    check_cached,
    check_low_precision,
    check_nothing_to_compare,
    check_reference,
    check_row_order,
    make_pairs,
)
from vembed.losses import LOSSES

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_loss_of_the_table_has_a_case_and_a_reference():
    assert set(LOSSES) == set(REFERENCES) == {case.split("-")[0] for case in CASES}
    assert set(NOTHING) <= set(LOSSES)
    assert all(name.startswith(f"{loss_type}-") for name, (loss_type, *_) in VARIANTS.items())


@every_case
@pytest.mark.parametrize(
    "check",
    [
        check_reference,
        check_batch_of_one,
        check_all_duplicates,
        check_row_order,
        check_nothing_to_compare,
        check_cached,
        check_autocast,
    ],
)
def test_check(case, check):
    check(case)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(case, dtype):
    check_low_precision(case, dtype)


def _summed_distance(query, positive):
    return (1 - torch.cosine_similarity(query.float(), positive.float())).sum()


def _mean_distance(query, positive):
    wide = torch.promote_types(query.dtype, torch.float32)
    return (1 - torch.cosine_similarity(query.to(wide), positive.to(wide))).mean()


def test_the_battery_accepts_a_users_own_loss():
    even = (((0, 1, 2), (3, 4, 5)),)
    check_all(Case("mine", lambda: _mean_distance, make_pairs, splits=even))


@pytest.mark.parametrize(
    ("loss", "splits"),
    [
        (_summed_distance, (((0, 1, 2), (3, 4, 5)),)),  # a sum is no mean over processes
        (_mean_distance, (((0,), (1, 2, 3, 4, 5)),)),  # a mean of means, of uneven batches
    ],
)
def test_the_battery_rejects_a_wrong_one(loss, splits):
    with pytest.raises(AssertionError):
        check_all(Case("wrong", lambda: loss, make_pairs, splits=splits))
