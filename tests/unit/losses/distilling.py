"""Distillation losses for the tests: each kind, and each once more in loops over single numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from tests.unit.losses.conformance import EMBEDDINGS, make_rich
from tests.unit.losses.references import reference_similarity_kl
from vembed.losses import build_distillation_loss

Rows = dict[str, Tensor]
STUDENT_DIM, TEACHER_DIM = 5, 7


def teacher_rows(batch: Rows, dim: int = TEACHER_DIM, seed: int = 9) -> Rows:
    """Another embedding of the same contents: what is equal stays equal."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch["query"].shape[1], dim, generator=generator, dtype=torch.float64)
    return {role: (batch[role] @ matrix).tanh() for role in EMBEDDINGS if role in batch}


def teacher_scores(batch: Rows, seed: int = 3) -> Tensor:
    """Scores of the candidates of each query, with -inf after the last."""
    generator = torch.Generator().manual_seed(seed)
    counts = batch["counts_positive"] + batch["counts_negative"]
    scores = torch.randn(len(counts), int(counts.max()), generator=generator, dtype=torch.float64)
    for row, count in enumerate(counts.tolist()):
        scores[row, count:] = -math.inf
    return scores


def scored(seed: int) -> Rows:
    """`make_rich` with scores of a teacher."""
    batch = make_rich(seed)
    return batch | {"teacher_scores": teacher_scores(batch)}


def build(kind: str, **settings) -> Callable[..., Tensor]:
    """A loss of a kind for these rows, in float64."""
    sizes = {"student_dim": STUDENT_DIM, "teacher_dim": TEACHER_DIM}
    return build_distillation_loss(kind, temperature=0.3, **sizes, **settings).double()


def reference_kl(loss, student: Rows, teacher: Rows, batch: Rows) -> Tensor:
    total = reference_similarity_kl(loss.temperature, student, teacher)
    if not loss.bidirectional:
        return total
    turned = [{"query": s["positive"], "positive": s["query"]} for s in (student, teacher)]
    return (total + reference_similarity_kl(loss.temperature, *turned)) / 2


def reference_embedding(loss, student: Rows, teacher: Rows, batch: Rows) -> Tensor:
    values = []
    for role in teacher:
        for own, taught in zip(student[role], teacher[role], strict=True):
            moved = own if loss.projection is None else own @ loss.projection
            if loss.distance == "mse":
                values.append(
                    sum((a - b) ** 2 for a, b in zip(moved, taught, strict=True)) / len(taught)
                )
            else:
                values.append(1 - moved @ taught / (moved.norm() * taught.norm()))
    return sum(values) / len(values)


def reference_relational(loss, student: Rows, teacher: Rows, batch: Rows) -> Tensor:
    own, taught = (
        [row / row.norm() for role in EMBEDDINGS if role in teacher for row in side[role]]
        for side in (student, teacher)
    )
    pairs = list(permutations(range(len(own)), 2))
    distances = [{(i, j): (x[i] - x[j]).norm() for i, j in pairs} for x in (own, taught)]
    means = [sum(d.values()) / len(pairs) for d in distances]
    distance = sum(
        _huber(distances[0][p] / means[0] - distances[1][p] / means[1]) for p in pairs
    ) / len(pairs)
    kept = min(len(own), loss.angle_rows)
    rows = [i * len(own) // kept for i in range(kept)]
    triples = list(permutations(rows, 3))
    angle = sum(_huber(_angle(own, *triple) - _angle(taught, *triple)) for triple in triples) / len(
        triples
    )
    return loss.distance_weight * distance + loss.angle_weight * angle


def reference_score(loss, student: Rows, teacher: Rows, batch: Rows) -> Tensor:
    values = []
    of_positive = torch.arange(len(student["positive"])).split(batch["counts_positive"].tolist())
    of_negative = torch.arange(len(student["negative"])).split(batch["counts_negative"].tolist())
    for i, query in enumerate(student["query"]):
        own = [_cosine(query, student["positive"][m]) for m in of_positive[i]]
        own += [_cosine(query, student["negative"][k]) for k in of_negative[i]]
        if "teacher_scores" in batch:
            taught = list(batch["teacher_scores"][i][: len(own)])
        else:
            t = teacher["query"][i]
            taught = [_cosine(t, teacher["positive"][m]) for m in of_positive[i]]
            taught += [_cosine(t, teacher["negative"][k]) for k in of_negative[i]]
        taught = [score / loss.teacher_temperature for score in taught]
        if loss.form == "kl" and len(own) > 1:
            p, q = _softmax(taught), _softmax([score / loss.temperature for score in own])
            divergence = sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))
            values.append(loss.temperature**2 * divergence)
        if loss.form == "margin_mse":
            first = len(of_positive[i])
            margins = [
                ((own[a] - own[b]) - (taught[a] - taught[b])) ** 2
                for a in range(first)
                for b in range(first, len(own))
            ]
            if margins:
                values.append(sum(margins) / len(margins))
    return sum(values) / len(values)


CASES: dict[str, tuple[Callable[[], Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "similarity_kl": (lambda: build("similarity_kl"), reference_kl),
    "similarity_kl-both": (lambda: build("similarity_kl", bidirectional=True), reference_kl),
    "embedding": (lambda: build("embedding"), reference_embedding),
    "embedding-mse": (lambda: build("embedding", distance="mse"), reference_embedding),
    "relational": (lambda: build("relational"), reference_relational),
    "relational-few": (lambda: build("relational", angle_rows=5), reference_relational),
    "score": (lambda: build("score", teacher_temperature=2.0), reference_score),
    "score-margins": (lambda: build("score", form="margin_mse"), reference_score),
}
"""By name: what builds the loss, and its slow reference."""


def _huber(difference: Tensor) -> Tensor:
    size = difference.abs()
    return difference**2 / 2 if size < 1 else size - 0.5


def _angle(x: list[Tensor], i: int, j: int, k: int) -> Tensor:
    a, b = x[i] - x[j], x[k] - x[j]
    if a.norm() < 1e-6 or b.norm() < 1e-6:
        return a.sum() * 0
    return _cosine(a, b)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    exps = [torch.exp(score) for score in scores]
    return [e / sum(exps) for e in exps]
