"""Cosine similarity: rows of length one, and what a row without a direction does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vembed.losses import DISTILLATION_LOSSES, build_distillation_loss, similarity
from vembed.losses.similarity import dot_rows, paired_dots, unit_rows


def test_rows_and_gradients_are_those_of_torch():
    rows = torch.randn(4, 3, dtype=torch.float64) * torch.tensor([[1e-6], [1.0], [1e6], [3.0]])
    weights = torch.randn(4, 3, dtype=torch.float64)
    found = []
    for scale in (unit_rows, functional.normalize):
        own = rows.clone().requires_grad_()
        (scale(own) * weights).sum().backward()
        found.append((scale(rows), own.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_zero_row_stays_zero_with_a_gradient_of_ordinary_size(dtype):
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype, requires_grad=True)
    scaled = unit_rows(rows)
    assert scaled.tolist() == [[0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]
    (scaled * torch.tensor([2.0, 1.0])).sum().backward()
    assert rows.grad[0].tolist() == [2, 1]


@pytest.mark.parametrize("shape", [(7, 3), (7, 2, 3)])
def test_dot_products_of_rows_are_the_same_in_parts(shape, monkeypatch):
    first, second = torch.randn(2, *shape, dtype=torch.float64)
    whole = dot_rows(first, second)
    monkeypatch.setattr(similarity, "_PRODUCT_BYTES", 2 * 8 * first[0].numel())  # two rows
    torch.testing.assert_close(dot_rows(first, second), whole, rtol=0, atol=0)
    torch.testing.assert_close(whole, (first * second).sum(-1), rtol=0, atol=0)


def test_gradients_of_paired_dot_products():
    rows, columns = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(paired_dots, (rows, columns))
    assert torch.autograd.gradcheck(lambda own: paired_dots(own, own), (rows,))
    paired_dots(rows, columns.detach()).sum().backward()
    assert torch.equal(rows.grad, columns)


@pytest.mark.parametrize("kind", DISTILLATION_LOSSES)
def test_a_student_of_zeros_in_fp16_can_be_taught(kind):
    student = {
        role: torch.zeros(5, 8, dtype=torch.float16, requires_grad=True)
        for role in ("query", "positive")
    }
    teacher = {role: torch.randn(5, 8) for role in student}
    build_distillation_loss(kind)(student, teacher).backward()
    assert all(rows.grad.isfinite().all() for rows in student.values())
