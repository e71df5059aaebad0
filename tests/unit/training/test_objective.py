from __future__ import annotations

import pytest
import torch

from vembed.errors import ConfigError
from vembed.training.objective import Objective

STUDENT = {"query": torch.tensor([[1.0, 2.0]]), "positive": torch.tensor([[3.0, 4.0]])}


def test_a_criterion_gets_the_extras_that_its_signature_names():
    seen = {}

    def criterion(query, positive, *, labels):
        seen.update(query=query, positive=positive, labels=labels)
        return query.sum()

    loss = Objective(criterion)(STUDENT, {"labels": torch.tensor([5]), "ids_query": None})

    assert loss.total == 3
    assert loss.parts == {"task": 3}
    assert seen["positive"] is STUDENT["positive"]
    assert seen["labels"].tolist() == [5]


def test_a_module_is_asked_through_its_forward():
    class Loss(torch.nn.Module):
        def forward(self, query, positive, negative):
            assert negative is None
            return (query * positive).sum()

    assert Objective(Loss())(STUDENT, {"scores": torch.ones(1)}).total == 11


@pytest.mark.parametrize(
    ("alpha", "expected"), [(1.0, 3.0), (0.25, 0.25 * 3 + 0.75 * 8), (0.0, 8.0)]
)
def test_alpha_weighs_the_task_loss(alpha, expected):
    objective = Objective(
        lambda query: query.sum(), lambda student, teacher: teacher["query"].sum(), alpha
    )
    loss = objective(STUDENT, {}, teacher={"query": torch.tensor([8.0])})
    assert float(loss.total) == pytest.approx(expected)
    assert float(loss.parts["task"]) == 3
    assert float(loss.parts["distillation"]) == 8


def test_a_distillation_term_needs_a_teacher():
    objective = Objective(lambda query: query.sum(), lambda student, teacher: 0, 0.5)
    with pytest.raises(ConfigError, match="teacher"):
        objective(STUDENT, {})
