"""What the first step warns about, each with the setting to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vembed.training.first_step.report import FirstStepReport

_NO_LOSS = 1e-3
"""An InfoNCE loss below it leaves nothing to learn: a positive has 99.9 % of its softmax."""

_EXACT_ZERO = 1e-8

_AT_CHANCE = 0.97
"""Share of the loss at chance from which on a loss is about as high."""

_UNHEARD = 0.01
"""Share of the loss below which what a teacher says makes no difference."""

_FEW_NEGATIVES = 7
_FLAT = 0.95
_FLAT_AT_BEST = 0.5
"""A temperature is too high if a perfect model could not give a positive more of its softmax."""

_SATURATED = 0.9
_ALIKE = 0.99


@dataclass(frozen=True)
class Advice:
    """A warning.

    Attributes:
        name: What it is about.
        text: One line: what was seen, why it matters, what to change.
        settings: The settings that the text names.
    """

    name: str
    text: str
    settings: tuple[str, ...]


_EXPLAINED_BY = {
    "flat softmax": {"collapse"},
    "saturated softmax": {"no loss"},
    "at chance": {"collapse", "flat softmax"},
    "no gradient": {"no loss"},
    "unheard teacher": {"flat teacher", "saturated teacher"},
}
"""Warnings that are left out beside one of others, which says why."""


def advise(report: FirstStepReport) -> list[Advice]:
    """Everything that looks wrong in the first step."""
    found = [advice for rule in _RULES for advice in rule(report)]
    names = {advice.name for advice in found}
    return [advice for advice in found if not names & _EXPLAINED_BY.get(advice.name, set())]


def _own_text(report: FirstStepReport) -> Iterator[Advice]:
    candidates = report.candidates
    if candidates is not None and candidates.own_text:
        yield Advice(
            "own text",
            f"{candidates.own_text} of {candidates.queries} queries have their own text among "
            "their negatives: the loss pushes a text away from itself. Take these rows or "
            "negatives out of data_path",
            ("data_path",),
        )


def _negatives(report: FirstStepReport) -> Iterator[Advice]:
    candidates = report.candidates
    if candidates is None:
        return
    if candidates.too_similar and candidates.too_similar.mean > candidates.negatives.mean:
        yield Advice(
            "margins",
            f"the margin leaves out {candidates.too_similar.mean:.3g} candidates per query as too "
            f"similar and {candidates.negatives.mean:.3g} negatives. Set a smaller absolute_margin "
            "or relative_margin in loss_kwargs, or train without one first",
            ("loss_kwargs",),
        )
    remedy = (
        "Set a larger batch_size (use_gradient_cache: true makes it fit, "
        "gradient_accumulation_steps adds no negatives), or add negatives to the rows of data_path"
    )
    settings = ("batch_size", "use_gradient_cache", "gradient_accumulation_steps", "data_path")
    if candidates.few:
        yield Advice(
            "few negatives",
            f"{candidates.few} of {candidates.queries} queries have one negative or none: there is "
            f"little or nothing to tell their positive from. {remedy}",
            settings,
        )
    elif candidates.negatives.mean < _FEW_NEGATIVES:
        yield Advice(
            "small batch",
            f"only {candidates.negatives.mean:.3g} negatives per query: finding one text among so "
            f"few is easy and says little about search. {remedy}",
            settings,
        )


def _copies(report: FirstStepReport) -> Iterator[Advice]:
    for role, what in (("query", "queries"), ("positive", "positives")):
        copies = report.copies.get(role)
        if copies is not None and copies.with_copy == copies.rows:
            yield Advice(
                f"copies: {what}",
                f"all {copies.rows} {what} of the batch have a copy in it, {copies.different} are "
                "different: copies are no negatives of each other, so the batch counts as a "
                "smaller one. Take repeated rows out of data_path, or set a larger batch_size",
                ("data_path", "batch_size"),
            )


def _labels(report: FirstStepReport) -> Iterator[Advice]:
    labels = report.labels
    if labels is None:
        return
    if labels.labels == 1:
        yield Advice(
            "one label",
            f"all {labels.items} items of the batch have the same label: there is nothing to tell "
            "them from. Set a larger batch_size, or give data_path rows of more labels",
            ("batch_size", "data_path"),
        )
    if 2 * labels.alone > labels.items:
        yield Advice(
            "no partners",
            f"{labels.alone} of {labels.items} items are the only one of their label in the batch: "
            "they teach nothing but by being no partner. Set a larger batch_size",
            ("batch_size",),
        )


def _scores(report: FirstStepReport) -> Iterator[Advice]:
    scores = report.scores
    if scores is not None and scores.different == 1:
        yield Advice(
            "equal scores",
            f"all {scores.pairs} pairs of the batch have the score {scores.spread.mean:.4g}: none "
            "is to rank above another, so nothing is learned. Check which column column_mapping "
            "calls score, or set a larger batch_size",
            ("column_mapping", "batch_size"),
        )


def _collapse(report: FirstStepReport) -> Iterator[Advice]:
    if report.embeddings is None:
        return
    similarity = [s for s in report.embeddings.random_pairs.values() if s is not None]
    if similarity and max(similarity) > _ALIKE:
        yield Advice(
            "collapse",
            f"different texts get almost the same vector (mean similarity {max(similarity):.4f}): "
            "there is nothing to tell them apart by. Check pooling_method and model_name, and that "
            "max_seq_length leaves room for more than the prompts",
            ("pooling_method", "model_name", "max_seq_length"),
        )


def _student_softmax(report: FirstStepReport) -> Iterator[Advice]:
    candidates, temperature = report.candidates, report.temperature
    if candidates is None or candidates.softmax is None or temperature is None:
        return
    seen = f"at temperature {temperature.value:.4g} the softmax over candidates"
    softmax = candidates.softmax
    best = _best_share(temperature.value, candidates.negatives.mean)
    # Without a geometry of rows, vectors are those of tokens, whose similarities may be sums.
    if report.embeddings and softmax.evenness >= _FLAT and best <= _FLAT_AT_BEST:
        yield Advice(
            "flat softmax",
            f"{seen} is flat ({softmax.evenness:.1%} even) and stays so: a positive of similarity "
            "1 among negatives of -1 would get no more than "
            f"{best:.0%} of it. Set a lower temperature",
            ("temperature",),
        )
    if softmax.decided >= _SATURATED:
        yield Advice(
            "saturated softmax",
            f"{seen} is saturated ({softmax.decided:.0%} of the queries give one more than 0.999): "
            "no other gets a gradient. Set a higher temperature, or, where the first one is right, "
            "a larger batch_size",
            ("temperature", "batch_size"),
        )


def _best_share(temperature: float, negatives: float) -> float:
    """Of a positive of similarity 1 among negatives of similarity -1, the widest spread there is.

    What the first batch spreads over says nothing about the temperature: an untrained model is
    even at any.
    """
    return 1 / (1 + negatives * math.exp(-2 / temperature))


def _teacher_softmax(report: FirstStepReport) -> Iterator[Advice]:
    teacher = report.teacher
    if teacher is None:
        return
    scored = report.distillation_temperature is None
    setting = "teacher_temperature in distillation_kwargs" if scored else "distillation_temperature"
    settings = ("distillation_kwargs",) if scored else ("distillation_temperature",)
    # Logits that deviate by 1 have a softmax that is neither flat nor decided.
    remedy = f"{setting}, such as {teacher.teacher_deviation:.2g}"
    seen = f"at temperature {teacher.temperature:.4g} the teacher's softmax"
    if teacher.softmax.evenness >= _FLAT:
        yield Advice(
            "flat teacher",
            f"{seen} is flat ({teacher.softmax.evenness:.1%} even; its similarities deviate by "
            f"{teacher.teacher_deviation:.2g}): it teaches that all documents are alike. Set a "
            f"lower {remedy}",
            settings,
        )
    if teacher.softmax.decided >= _SATURATED:
        yield Advice(
            "saturated teacher",
            f"{seen} is saturated ({teacher.softmax.decided:.0%} of the queries give one document "
            "more than 0.999): it teaches no more than a label does. Set a higher "
            f"{remedy}",
            settings,
        )


_SCORE = "distillation.score"


def _weak_teacher(report: FirstStepReport) -> Iterator[Advice]:
    loss = report.loss
    if loss is None or not loss.weights:
        return
    shares = {name: abs(weight * loss.parts[name]) for name, weight in loss.weights.items()}
    if shares.get(_SCORE) == 0:
        yield Advice(
            "nothing to score",
            "distillation_loss: score compares a query's own candidates, and no query of this "
            "batch has two that it can tell apart. Give rows negatives, or set similarity_kl, "
            "which compares all documents of the batch",
            ("distillation_loss",),
        )
        del shares[_SCORE]
    taught = sum(share for name, share in shares.items() if name != "task")
    total = sum(shares.values())
    if len(shares) > 1 and taught < _UNHEARD * total and loss.weights["task"] < 1:
        yield Advice(
            "unheard teacher",
            f"the teacher's part is {taught / total:.1%} of the loss: the student hardly hears it. "
            "Set a lower distillation_alpha, or weights in distillation_loss, as in "
            "{similarity_kl: 400} (at temperature T its divergence is multiplied by T^2)",
            ("distillation_alpha", "distillation_loss"),
        )


def _loss(report: FirstStepReport) -> Iterator[Advice]:
    if report.loss is None:
        return
    loss = report.loss.parts.get("task", report.loss.total)
    chance = None if report.candidates is None else report.candidates.chance
    if not math.isfinite(loss):
        yield Advice(
            "not finite",
            f"the loss is {loss}: no step can be taken from it. Set mixed_precision: no or "
            "torch_dtype: float32, or a higher temperature",
            ("mixed_precision", "torch_dtype", "temperature"),
        )
    elif abs(loss) < (_EXACT_ZERO if chance is None else _NO_LOSS):
        yield Advice(
            "no loss",
            f"the loss is {loss:.2g}: there is nothing to learn from this batch. Set a larger "
            "batch_size, add harder negatives to data_path, or set a higher temperature",
            ("batch_size", "data_path", "temperature"),
        )
    elif chance is not None and loss >= _AT_CHANCE * chance:
        relation = "higher than at" if loss > chance / _AT_CHANCE else "about that of"
        yield Advice(
            "at chance",
            f"the loss, {loss:.4f}, is {relation} chance, {chance:.4f}: the model cannot tell "
            "positives from other documents. Unless it, or its projection, is untrained, check "
            "model_name, pooling_method and query_prompt, and that column_mapping pairs what "
            "belongs together",
            ("model_name", "pooling_method", "query_prompt", "column_mapping"),
        )


def _gradients(report: FirstStepReport) -> Iterator[Advice]:
    for group, gradient in report.gradients.items():
        if gradient.norm == 0:
            yield Advice(
                "no gradient",
                f"no gradient reaches {group} ({gradient.parameters} trainable tensors): they stay "
                "as they are. Check that loss_type and distillation_alpha let the loss depend on "
                "them, or freeze them (use_lora does for the backbone)",
                ("loss_type", "distillation_alpha", "use_lora"),
            )


_RULES = (
    _own_text,
    _negatives,
    _copies,
    _labels,
    _scores,
    _collapse,
    _student_softmax,
    _teacher_softmax,
    _weak_teacher,
    _loss,
    _gradients,
)
