"""Every loss once more: loops over single numbers, straight from the equation of its docstring."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def reference_info_nce(criterion, batch: Batch, similarity=None) -> Tensor:
    similarity = similarity or _cosine
    query, positive = batch["query"], batch["positive"]
    documents, ids_document, owner = _documents(batch)
    ids_query = _ids(batch.get("ids_query"), len(query))
    relevant = {(ids_query[owner[m]], ids_document[m]) for m in range(len(positive))}
    scale = _scale(criterion, query)
    total = torch.zeros((), dtype=query.dtype)
    for i in range(len(query)):
        own = [m for m in range(len(positive)) if owner[m] == i]
        closest = max(similarity(query[i], positive[m]) for m in own)
        for m in own:
            s_own = scale * similarity(query[i], positive[m])
            others = [
                scale * similarity(query[i], documents[c])
                for c in range(len(documents))
                if (ids_query[i], ids_document[c]) not in relevant
                and not _too_similar(criterion, similarity(query[i], documents[c]), closest)
            ]
            loss = _cross_entropy(s_own, others)
            if criterion.bidirectional:
                s_partner = similarity(query[i], positive[m])
                others = [
                    scale * similarity(query[j], positive[m])
                    for j in range(len(query))
                    if (ids_query[j], ids_document[m]) not in relevant
                    and not _too_similar(criterion, similarity(query[j], positive[m]), s_partner)
                ]
                loss = (loss + _cross_entropy(s_own, others)) / 2
            total = total + loss / len(own)
    return total / len(query)


def reference_sigmoid(criterion, batch: Batch) -> Tensor:
    query, positive = batch["query"], batch["positive"]
    documents, ids_document, owner = _documents(batch)
    ids_query = _ids(batch.get("ids_query"), len(query))
    relevant = {(ids_query[owner[m]], ids_document[m]) for m in range(len(positive))}
    scale = _scale(criterion, query)
    total = torch.zeros((), dtype=query.dtype)
    for i in range(len(query)):
        own = [m for m in range(len(positive)) if owner[m] == i]
        for m in own:
            x = scale * _cosine(query[i], positive[m]) + criterion.logit_bias
            total = total + torch.log1p(torch.exp(-x)) / len(own)
        closest = max(_cosine(query[i], positive[m]) for m in own)
        for c in range(len(documents)):
            similarity = _cosine(query[i], documents[c])
            if (ids_query[i], ids_document[c]) in relevant:
                continue
            if not _too_similar(criterion, similarity, closest):
                total = total + torch.log1p(torch.exp(scale * similarity + criterion.logit_bias))
    return total / len(query)


def reference_cosent(criterion, batch: Batch) -> Tensor:
    query, positive, scores = batch["query"], batch["positive"], batch["scores"]
    terms = torch.ones((), dtype=query.dtype)
    for i in range(len(query)):
        for j in range(len(query)):
            if scores[i] > scores[j]:
                difference = _cosine(query[j], positive[j]) - _cosine(query[i], positive[i])
                terms = terms + torch.exp(difference / criterion.temperature)
    return torch.log(terms)


def reference_supcon(criterion, batch: Batch) -> Tensor:
    query, labels = batch["query"], batch["labels"]
    losses = []
    for i in range(len(query)):
        others = [a for a in range(len(query)) if a != i]
        partners = [p for p in others if labels[p] == labels[i]]
        if not partners:
            continue
        s = {a: _cosine(query[i], query[a]) / criterion.temperature for a in others}
        denominator = sum(torch.exp(s[a]) for a in others)
        losses.append(
            sum(-torch.log(torch.exp(s[p]) / denominator) for p in partners) / len(partners)
        )
    return sum(losses) / len(losses)


def reference_similarity_kl(temperature, student, teacher) -> Tensor:
    total = torch.zeros((), dtype=student["query"].dtype)
    for i in range(len(student["query"])):
        p, q = (
            _softmax([_cosine(side["query"][i], d) / temperature for d in _all_documents(side)])
            for side in (teacher, student)
        )
        total = total + sum(p_c * torch.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))
    return temperature**2 * total / len(student["query"])


def reference_max_sim(criterion, batch: Batch) -> Tensor:
    similarity = partial(_max_sim, mean=criterion.comparison.mean)
    return reference_info_nce(criterion, batch, similarity)


def _max_sim(query: Tensor, document: Tensor, *, mean: bool) -> Tensor:
    """Of `[T, D]` and `[S, D]`, in which rows of zeros are no tokens."""
    total, tokens = torch.zeros((), dtype=query.dtype), 0
    for token in query:
        if not token.any():
            continue
        tokens += 1
        cosines = [_cosine(token, other) for other in document if other.any()]
        if cosines:
            total = total + max(cosines)
    return total / tokens if mean and tokens else total


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def _cross_entropy(own: Tensor, others: list[Tensor]) -> Tensor:
    return -torch.log(torch.exp(own) / (torch.exp(own) + sum(torch.exp(s) for s in others)))


def _too_similar(criterion, similarity: Tensor, partner: Tensor) -> bool:
    """Whether a candidate is no negative beside a partner; one that ties with it is a copy."""
    margins, limits = criterion.margins, [math.inf]
    if margins.absolute is not None:
        limits.append(partner - margins.absolute)
    if margins.relative is not None:
        limits.append(partner - margins.relative * partner.abs())
    return similarity > min(limits) - 1e-12


def _softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum(torch.exp(value) for value in values)
    return [torch.exp(value) / total for value in values]


def _scale(criterion, like: Tensor) -> Tensor:
    if criterion.logit_scale is not None:
        return criterion.logit_scale.exp()
    return torch.tensor(1 / criterion.temperature, dtype=like.dtype)


def _all_documents(side) -> list[Tensor]:
    return [row for role in ("positive", "negative") for row in side.get(role, ())]


def _documents(batch: Batch) -> tuple[list[Tensor], list, list[int]]:
    """All documents, their ids, and the query of each positive."""
    positives, negatives = list(batch["positive"]), list(batch.get("negative", ()))
    ids = _ids(batch.get("ids_positive"), len(positives))
    if "ids_negative" in batch:
        ids += batch["ids_negative"].tolist()
    else:
        ids += [f"negative {i}" for i in range(len(negatives))]
    counts = batch.get("counts_positive", torch.ones(len(batch["query"]), dtype=torch.int64))
    owner = [i for i, count in enumerate(counts.tolist()) for _ in range(count)]
    return [*positives, *negatives], ids, owner


def _ids(ids: Tensor | None, count: int) -> list:
    """Content ids; rows without one are told apart by a name of their own."""
    return [f"row {i}" for i in range(count)] if ids is None else ids.tolist()
