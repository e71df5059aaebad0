"""Every warning on a batch that deserves it, and none on one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.training.first_step.batches import healthy, report_on
from vembed.config import TrainConfig
from vembed.losses.cosent import CoSENT
from vembed.losses.distillation.score import ScoreDistillation
from vembed.losses.distillation.similarity import SimilarityKL
from vembed.losses.distillation.weighted import Term, WeightedDistillation
from vembed.losses.info_nce import InfoNCE
from vembed.losses.sigmoid import PairwiseSigmoid
from vembed.losses.supcon import SupervisedContrastive
from vembed.training.first_step.advice import _loss as _advice_on_loss
from vembed.training.first_step.advice import advise
from vembed.training.first_step.report import FirstStepReport, GradientNorm, Loss
from vembed.training.objective import Objective

GRADIENTS = {"backbone": GradientNorm(4, 0.5), "loss": GradientNorm(1, 0.1)}


def names(report) -> list[str]:
    return [advice.name for advice in advise(report)]


def only(report, name: str) -> str:
    """The text of the one warning there is."""
    (advice,) = advise(report)
    assert advice.name == name
    return advice.text


def perfect():
    """Every positive is its query, and queries have nothing in common."""
    student, extras = healthy()
    student["query"] = torch.eye(16)
    student["positive"] = torch.eye(16)
    return student, extras


@pytest.mark.parametrize(
    "criterion",
    [InfoNCE(0.1), InfoNCE(0.1, bidirectional=True), PairwiseSigmoid(), CoSENT(),
     SupervisedContrastive()],
    ids=lambda criterion: type(criterion).__name__,
)  # fmt: skip
def test_a_healthy_batch_has_no_warnings(criterion):
    student, extras = healthy()
    if isinstance(criterion, SupervisedContrastive):
        del student["positive"], extras["ids_positive"], extras["counts_positive"]
    assert names(report_on(student, extras, criterion, gradients=GRADIENTS)) == []


def test_healthy_distillation_has_no_warnings():
    student, extras = healthy()
    teacher, _ = healthy(seed=1)
    distillation = SimilarityKL(0.1)
    report = report_on(student, extras, InfoNCE(0.1), distillation=distillation, teacher=teacher)
    assert names(report) == []


def test_own_text():
    student, extras = healthy()
    extras["ids_query"][:3] = extras["ids_positive"][5:8]
    text = only(report_on(student, extras, InfoNCE(0.1)), "own text")
    assert text.startswith("3 of 16 queries have their own text among their negatives")


@pytest.mark.parametrize(("rows", "few"), [(1, 1), (2, 2), (3, 0)])
def test_few_negatives(rows, few):
    report = report_on(*healthy(rows), InfoNCE(0.1))
    assert ("few negatives" in names(report)) == (few > 0)
    if few:
        assert advise(report)[0].text.startswith(
            f"{few} of {few} queries have one negative or none"
        )


@pytest.mark.parametrize(("rows", "small"), [(7, True), (8, False)])
def test_small_batch(rows, small):
    assert ("small batch" in names(report_on(*healthy(rows), InfoNCE(0.1)))) == small


def test_hard_negatives_make_a_batch_larger():
    student, extras = healthy(4)
    student["negative"] = torch.randn(12, 32)
    extras["ids_negative"] = 2000 + torch.arange(12)
    assert "small batch" not in names(report_on(student, extras, InfoNCE(0.1)))


@pytest.mark.parametrize("role", ["query", "positive"])
def test_all_rows_are_copies(role):
    what = {"query": "queries", "positive": "positives"}[role]
    student, extras = healthy(32)
    extras[f"ids_{role}"] //= 2
    text = only(report_on(student, extras, InfoNCE(0.1)), f"copies: {what}")
    assert text.startswith(f"all 32 {what} of the batch have a copy in it, 16 are different")
    extras[f"ids_{role}"][0] = 5000
    assert names(report_on(student, extras, InfoNCE(0.1))) == []


def test_a_batch_of_one_repeated_row():
    student, extras = healthy()
    extras["ids_query"][:], extras["ids_positive"][:] = 1, 2
    student = {role: rows[:1].expand(16, -1).contiguous() for role, rows in student.items()}
    assert names(report_on(student, extras, InfoNCE(0.1))) == [
        "few negatives",
        "copies: queries",
        "copies: positives",
        "no loss",
    ]


def test_labels_without_partners():
    student, extras = healthy()
    del student["positive"]
    extras["labels"] = torch.tensor([0, 0, 1, 1, *range(2, 14)])
    text = only(report_on(student, extras, SupervisedContrastive()), "no partners")
    assert text.startswith("12 of 16 items are the only one of their label")
    extras["labels"] = torch.arange(16)
    found = names(report_on(student, extras, SupervisedContrastive()))
    assert found == ["no partners", "no loss"]


def test_one_label():
    student, extras = healthy()
    extras["labels"][:] = 3
    assert "one label" in names(report_on(student, extras, SupervisedContrastive()))


def test_equal_scores():
    student, extras = healthy()
    extras["scores"][:] = 0.5
    found = advise(report_on(student, extras, CoSENT()))
    assert [advice.name for advice in found] == ["equal scores", "no loss"]
    assert found[0].text.startswith("all 16 pairs of the batch have the score 0.5")


def test_collapse():
    """Nearly equal vectors; a temperature is not blamed."""
    student, extras = healthy()
    student = {role: 100 + rows for role, rows in student.items()}
    assert "mean similarity 0.999" in only(report_on(student, extras, InfoNCE(0.5)), "collapse")


def test_flat_softmax():
    text = only(report_on(*healthy(), InfoNCE(5.0)), "flat softmax")
    assert text.startswith("at temperature 5 the softmax over candidates is flat (9")


def test_an_untrained_model_is_even_at_any_temperature():
    """Its similarities have no spread yet; what they are divided by is not to blame."""
    student, extras = healthy()
    student = {role: rows + 2 for role, rows in student.items()}
    report = report_on(student, extras, InfoNCE(0.5))
    assert report.candidates.softmax.evenness > 0.95
    assert "flat softmax" not in names(report)
    assert "flat softmax" in names(report_on(student, extras, InfoNCE(2.0)))


def test_saturated_softmax():
    found = names(report_on(*healthy(), InfoNCE(1e-4)))
    assert found[0] == "saturated softmax"
    assert "saturated softmax" not in names(report_on(*healthy(), InfoNCE(0.05)))


@pytest.mark.parametrize(("temperature", "name"), [(5.0, "flat"), (1e-4, "saturated")])
def test_distillation_temperature(temperature, name):
    student, extras = healthy()
    teacher, _ = healthy(seed=1)
    distillation = SimilarityKL(temperature)
    report = report_on(student, extras, InfoNCE(0.1), distillation=distillation, teacher=teacher)
    text = only(report, f"{name} teacher")
    assert f"at temperature {temperature:.4g} the teacher's softmax" in text
    assert f"distillation_temperature, such as {report.teacher.teacher_deviation:.2g}" in text


@pytest.mark.parametrize("weight", [1, 400])
def test_a_teacher_that_is_not_heard(weight):
    student, extras = healthy()
    teacher, _ = healthy(seed=1)
    distillation = WeightedDistillation([Term("distillation.x", SimilarityKL(0.2), weight / 10)])
    loss = Objective(InfoNCE(0.1), distillation, 0.5)(student, extras, teacher)
    report = FirstStepReport(loss=Loss("InfoNCE", 1.0, loss.parts, loss.weights))
    found = [advice.text for advice in advise(report) if advice.name == "unheard teacher"]
    assert len(found) == (weight == 1)
    assert all("lower distillation_alpha" in text for text in found)


def report_of_scores(student, extras, more):
    """Taught by the scores of each query's own candidates."""
    teacher, _ = healthy(seed=1)
    distillation = WeightedDistillation([Term("distillation.score", ScoreDistillation(0.2), 1e4)])
    loss = Objective(InfoNCE(0.1), distillation, 0.5)(
        {**student, **more}, extras, {**teacher, **more}
    )
    return FirstStepReport(loss=Loss("InfoNCE", 1.0, loss.parts, loss.weights))


def test_one_candidate_for_each_query_is_nothing_to_score():
    student, extras = healthy()
    assert names(report_of_scores(student, extras, {})) == ["nothing to score"]
    negative = {"negative": student["positive"].roll(1, dims=0)}
    assert names(report_of_scores(student, extras, negative)) == []


def test_no_loss():
    text = only(report_on(*perfect(), InfoNCE(0.05)), "no loss")
    assert text.startswith("the loss is 3.1e-08: there is nothing to learn")


def test_a_loss_of_the_users_own_is_zero_only_when_it_is_zero():
    def distance(query, positive):
        return (1 - torch.cosine_similarity(query, positive)).mean()

    student, extras = healthy()
    assert names(report_on(student, extras, distance)) == []
    nearly = {"query": student["query"], "positive": student["query"] * 1.01 + 1e-3}
    assert names(report_on(nearly, extras, distance)) == []
    assert names(report_on(perfect()[0], extras, distance)) == ["no loss"]


def test_at_chance():
    """Pairs that have nothing to do with each other."""
    student, extras = healthy()
    student["positive"] = student["positive"].roll(1, dims=0)
    text = only(report_on(student, extras, InfoNCE(0.2)), "at chance")
    assert "is higher than at chance, 2.7726" in text
    alike = {role: torch.ones(16, 32) for role in student}
    (advice,) = [a for a in _advice_on_loss(report_on(alike, extras, InfoNCE(0.2)))]
    assert "the loss, 2.7726, is about that of chance, 2.7726" in advice.text


def test_chance_is_not_defined_for_every_loss():
    student, extras = healthy()
    student["positive"] = student["positive"].roll(1, dims=0)
    assert names(report_on(student, extras, CoSENT())) == []


def test_a_loss_that_is_not_finite():
    student, extras = healthy()
    student["query"][3] = torch.nan
    assert "not finite" in names(report_on(student, extras, InfoNCE(0.1)))


def test_a_group_without_gradient():
    still = {**GRADIENTS, "projections": GradientNorm(2, 0.0)}
    text = only(report_on(*healthy(), InfoNCE(0.1), gradients=still), "no gradient")
    assert text.startswith("no gradient reaches projections (2 trainable tensors)")


def test_a_loss_of_zero_explains_that_there_is_no_gradient():
    gradients = {name: replace(norm, norm=0.0) for name, norm in GRADIENTS.items()}
    assert names(report_on(*perfect(), InfoNCE(0.05), gradients=gradients)) == ["no loss"]
    assert len(names(report_on(*healthy(), InfoNCE(0.1), gradients=gradients))) == 2


ALL = {
    "own text",
    "few negatives",
    "small batch",
    "copies: queries",
    "copies: positives",
    "one label",
    "no partners",
    "equal scores",
    "collapse",
    "flat softmax",
    "saturated softmax",
    "flat teacher",
    "saturated teacher",
    "unheard teacher",
    "nothing to score",
    "not finite",
    "no loss",
    "at chance",
    "no gradient",
}


def reports_with_every_warning():
    student, extras = healthy()
    single = {"query": student["query"]}
    alike = {role: 100 + rows for role, rows in student.items()}
    nan = {role: rows * torch.nan for role, rows in student.items()}
    shifted = {**student, "positive": student["positive"].roll(1, dims=0)}
    same = torch.zeros(16, dtype=torch.int64)
    texts = {**extras, "ids_query": extras["ids_positive"].roll(1)}
    copies = {**extras, "ids_query": same, "ids_positive": same}
    still = {"backbone": GradientNorm(4, 0.0)}
    teacher, _ = healthy(seed=1)
    for temperature in (5.0, 0.05, 1e-4):
        distillation = SimilarityKL(temperature)
        yield report_on(
            student, extras, InfoNCE(temperature), distillation=distillation, teacher=teacher
        )
    yield report_of_scores(student, extras, {})
    yield report_on(*healthy(2), InfoNCE(0.1))
    yield report_on(*healthy(4), InfoNCE(0.1), gradients=still)
    yield report_on(alike, extras, InfoNCE(0.1))
    yield report_on(student, texts, InfoNCE(0.1))
    yield report_on(student, copies, InfoNCE(0.1))
    yield report_on(shifted, extras, InfoNCE(0.2))
    yield report_on(nan, extras, InfoNCE(0.1))
    yield report_on(student, {**extras, "scores": torch.zeros(16)}, CoSENT())
    yield report_on(single, {"labels": torch.arange(16)}, SupervisedContrastive())
    yield report_on(single, {"labels": same}, SupervisedContrastive())


def test_every_warning_is_a_line_that_names_settings_which_exist():
    given = [advice for report in reports_with_every_warning() for advice in advise(report)]
    assert {advice.name for advice in given} == ALL
    for advice in given:
        assert "\n" not in advice.text
        assert advice.settings, advice.name
        assert set(advice.settings) <= set(TrainConfig.model_fields), advice.name
        assert all(setting in advice.text for setting in advice.settings), advice.name


def test_a_margin_that_leaves_out_most_candidates():
    student, extras = healthy()
    report = report_on(student, extras, InfoNCE(0.1, absolute_margin=2.0), gradients=GRADIENTS)
    assert report.candidates.negatives.high == 0
    assert "smaller absolute_margin" in next(a.text for a in advise(report) if a.name == "margins")
    assert "as too similar: 15" in dict(report.lines())["negatives"]
