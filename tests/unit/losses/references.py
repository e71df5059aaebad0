"""Every loss once more: loops over single numbers, straight from the equation of its docstring."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def reference_info_nce(criterion, batch: Batch, similarity=None) -> Tensor:
    similarity = similarity or _cosine
    judged = _cosine if criterion.guided else similarity
    query, positive = batch["query"], batch["positive"]
    documents, ids_document, owner = _documents(batch)
    ids_query = _ids(batch.get("ids_query"), len(query))
    relevant = {(ids_query[owner[m]], ids_document[m]) for m in range(len(positive))}
    linked = _linked(relevant)
    guide = _guide_of(criterion, batch)
    guide_documents = [*guide["positive"], *guide.get("negative", ())]
    owner_of_negative = _owners(batch, "negative")
    scale = _scale(criterion, query)

    def logits(a, b, of_row, of_candidate, limit) -> list[Tensor]:
        """The logit of a candidate, if it is not too similar, as a list of one."""
        if _too_similar(criterion, judged(of_row, of_candidate), limit):
            return []
        near = similarity(a, b)
        return [scale * near + criterion.hardness * near.detach()]

    def ranks_queries(m) -> list[Tensor]:
        limit = judged(guide["query"][owner[m]], guide["positive"][m])
        return [
            logit
            for j in range(len(query))
            if (ids_query[j], ids_document[m]) not in relevant
            for logit in logits(
                query[j], positive[m], guide["query"][j], guide["positive"][m], limit
            )
        ]

    def ranks_documents(i, limit) -> list[Tensor]:
        return [
            logit
            for c in range(len(documents))
            if (ids_query[i], ids_document[c]) not in relevant
            and (
                criterion.hard_negatives == "all"
                or c < len(positive)
                or owner_of_negative[c - len(positive)] == i
            )
            for logit in logits(
                query[i], documents[c], guide["query"][i], guide_documents[c], limit
            )
        ]

    def other_queries(i, limit) -> list[Tensor]:
        return [
            logit
            for j in range(len(query))
            if linked["query", ids_query[i]] != linked["query", ids_query[j]]
            for logit in logits(query[i], query[j], guide["query"][i], guide["query"][j], limit)
        ]

    def other_positives(m) -> list[Tensor]:
        limit = judged(guide["query"][owner[m]], guide["positive"][m])
        return [
            logit
            for c in range(len(positive))
            if linked["document", ids_document[m]] != linked["document", ids_document[c]]
            for logit in logits(
                positive[m], positive[c], guide["positive"][m], guide["positive"][c], limit
            )
        ]

    total = torch.zeros((), dtype=query.dtype)
    for i in range(len(query)):
        own = [m for m in range(len(positive)) if owner[m] == i]
        closest = max(judged(guide["query"][i], guide["positive"][m]) for m in own)
        of_query = ranks_documents(i, closest)
        of_query += other_queries(i, closest) if criterion.query_negatives else []
        for m in own:
            s_own = scale * similarity(query[i], positive[m])
            of_document = ranks_queries(m) if criterion.bidirectional else []
            of_document += other_positives(m) if criterion.document_negatives else []
            if criterion.bidirectional and not criterion.joint:
                loss = _cross_entropy(s_own, of_query) + _cross_entropy(s_own, of_document)
                total = total + loss / 2 / len(own)
            else:
                total = total + _cross_entropy(s_own, of_query + of_document) / len(own)
    return total / len(query)


def _guide_of(criterion, batch: Batch) -> Batch:
    """By whose similarities pairs are judged."""
    roles = [role for role in ("query", "positive", "negative") if role in batch]
    return {
        role: batch[f"guide_{role}"] if criterion.guided else batch[role].detach() for role in roles
    }


def _linked(relevant) -> dict:
    """The number of the connected component of each query and document."""
    component = {}
    for number, (query, document) in enumerate(sorted(relevant, key=str)):
        ends = ("query", query), ("document", document)
        joined = {component[end] for end in ends if end in component}
        component |= dict.fromkeys(ends, number)
        component = {
            node: number if found in joined else found for node, found in component.items()
        }
    return component


def reference_sigmoid(criterion, batch: Batch) -> Tensor:
    query, positive = batch["query"], batch["positive"]
    documents, ids_document, owner = _documents(batch)
    ids_query = _ids(batch.get("ids_query"), len(query))
    relevant = {(ids_query[owner[m]], ids_document[m]) for m in range(len(positive))}
    guide = _guide_of(criterion, batch)
    guide_documents = [*guide["positive"], *guide.get("negative", ())]
    scale = _scale(criterion, query)
    total = torch.zeros((), dtype=query.dtype)
    for i in range(len(query)):
        own = [m for m in range(len(positive)) if owner[m] == i]
        for m in own:
            x = scale * _cosine(query[i], positive[m]) + criterion.logit_bias
            total = total + torch.log1p(torch.exp(-x)) / len(own)
        closest = max(_cosine(guide["query"][i], guide["positive"][m]) for m in own)
        for c in range(len(documents)):
            similarity = _cosine(query[i], documents[c])
            if (ids_query[i], ids_document[c]) in relevant:
                continue
            if not _too_similar(criterion, _cosine(guide["query"][i], guide_documents[c]), closest):
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


def reference_angle(criterion, batch: Batch) -> Tensor:
    query, positive, scores = batch["query"], batch["positive"], batch["scores"]
    terms = torch.ones((), dtype=query.dtype)
    angles = [_complex_angle(*pair) for pair in zip(query, positive, strict=True)]
    for i in range(len(query)):
        for j in range(len(query)):
            if scores[i] > scores[j]:
                terms = terms + torch.exp((angles[j] - angles[i]) / criterion.temperature)
    return torch.log(terms)


def _complex_angle(a: Tensor, b: Tensor) -> Tensor:
    half = (len(a) + 1) // 2
    a, b = (torch.cat([row / row.norm(), row.new_zeros(2 * half - len(row))]) for row in (a, b))
    z, w = (torch.complex(row[:half], row[half:]) for row in (a, b))
    product = z * w.conj()
    return sum(number.real + number.imag for number in product).abs()


def reference_cosine_mse(criterion, batch: Batch) -> Tensor:
    errors = [
        (_cosine(q, p) - score / criterion.score_scale) ** 2
        for q, p, score in zip(batch["query"], batch["positive"], batch["scores"], strict=True)
    ]
    return sum(errors) / len(errors)


def _distances(batch: Batch) -> list[tuple[Tensor, float]]:
    return [
        (1 - _cosine(q, p), float(score))
        for q, p, score in zip(batch["query"], batch["positive"], batch["scores"], strict=True)
    ]


def reference_contrastive(criterion, batch: Batch) -> Tensor:
    losses = [
        (y * d**2 + (1 - y) * torch.clamp(criterion.margin - d, min=0) ** 2) / 2
        for d, y in _distances(batch)
    ]
    return sum(losses) / len(losses)


def reference_online_contrastive(criterion, batch: Batch) -> Tensor:
    pairs = _distances(batch)
    similar = [d for d, y in pairs if y >= 0.5]
    others = [d for d, y in pairs if y < 0.5]
    nearest = min(others) if others else sum(similar) / len(similar)
    farthest = max(similar) if similar else sum(others) / len(others)
    losses = [d**2 for d in similar if d > nearest]
    losses += [torch.clamp(criterion.margin - d, min=0) ** 2 for d in others if d < farthest]
    return _mean_or_zero(losses, batch)


def reference_margin_mse(criterion, batch: Batch) -> Tensor:
    errors = []
    for i, (positives, negatives) in enumerate(_own_candidates(batch)):
        for m, p in enumerate(positives):
            for k, n in enumerate(negatives):
                similarity = _cosine if criterion.cosine else torch.dot
                lead = similarity(batch["query"][i], p) - similarity(batch["query"][i], n)
                taught = batch["teacher_scores"][i]
                wanted = taught[m] - taught[len(positives) + k]
                errors.append((criterion.scale * lead - wanted) ** 2)
    return _mean_or_zero(errors, batch)


def reference_triplet(criterion, batch: Batch) -> Tensor:
    query = batch["query"]
    if criterion.triplets == "own":
        losses = [
            torch.clamp(_cosine(query[i], n) - _cosine(query[i], p) + criterion.margin, min=0)
            for i, (positives, negatives) in enumerate(_own_candidates(batch))
            for p in positives
            for n in negatives
        ]
        return _mean_or_zero(losses, batch)
    documents, ids_document, owner = _documents(batch)
    ids_query = _ids(batch.get("ids_query"), len(query))
    relevant = {(ids_query[owner[m]], ids_document[m]) for m in range(len(batch["positive"]))}
    anchors = []
    for i in range(len(query)):
        is_relevant = [(ids_query[i], ids_document[c]) in relevant for c in range(len(documents))]
        cosines = [_cosine(query[i], document) for document in documents]
        anchors.append(
            (
                [s for s, is_positive in zip(cosines, is_relevant, strict=True) if is_positive],
                [s for s, is_positive in zip(cosines, is_relevant, strict=True) if not is_positive],
            )
        )
    return _mean_or_zero(_triplet_losses(criterion, anchors), batch)


def reference_label_triplet(criterion, batch: Batch) -> Tensor:
    query, labels = batch["query"], batch["labels"].tolist()
    anchors = []
    for i in range(len(query)):
        others = [j for j in range(len(query)) if j != i]
        cosines = {j: _cosine(query[i], query[j]) for j in others}
        anchors.append(
            (
                [cosines[j] for j in others if labels[j] == labels[i]],
                [cosines[j] for j in others if labels[j] != labels[i]],
            )
        )
    return _mean_or_zero(_triplet_losses(criterion, anchors), batch)


def _triplet_losses(criterion, anchors) -> list[Tensor]:
    """Losses of the triplets that count, of the cosines to positives and to negatives."""
    losses = []
    for positives, negatives in anchors:
        if not positives or not negatives:
            continue
        if criterion.triplets == "hard":
            chosen = [(min(positives), max(negatives))]
        elif criterion.triplets == "semi_hard":
            chosen = []
            for p in positives:
                farther = [n for n in negatives if n < p]
                chosen.append((p, max(farther) if farther else min(negatives)))
        else:
            chosen = [(p, n) for p in positives for n in negatives if n - p + criterion.margin > 0]
        losses += [torch.clamp(n - p + criterion.margin, min=0) for p, n in chosen]
    return losses


def reference_proxies(criterion, batch: Batch) -> Tensor:
    margin = getattr(criterion, "margin", 0.0)
    losses = []
    for x, label in zip(batch["query"], batch["labels"].tolist(), strict=True):
        logits = [_cosine(x, w) / criterion.temperature for w in criterion.proxies]
        cosine = _cosine(x, criterion.proxies[label])
        angle = torch.acos(cosine)
        if angle + margin < math.pi:
            own = torch.cos(angle + margin) / criterion.temperature
        else:
            own = (cosine - margin * math.sin(margin)) / criterion.temperature
        others = [logit for number, logit in enumerate(logits) if number != label]
        losses.append(_cross_entropy(own, others))
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


def _mean_or_zero(losses: list[Tensor], batch: Batch) -> Tensor:
    return sum(losses, torch.zeros((), dtype=batch["query"].dtype)) / max(1, len(losses))


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


def _owners(batch: Batch, role: str) -> list[int]:
    """The query of each positive, or negative."""
    rows = len(batch.get(role, ()))
    each = rows // len(batch["query"])
    counts = batch.get(f"counts_{role}", torch.full((len(batch["query"]),), each)).tolist()
    return [i for i, count in enumerate(counts) for _ in range(count)]


def _own_candidates(batch: Batch) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The positives and the negatives of each query."""
    owners = {role: _owners(batch, role) for role in ("positive", "negative")}
    return [
        tuple(
            [
                row
                for row, owner in zip(batch.get(role, ()), owners[role], strict=True)
                if owner == i
            ]
            for role in owners
        )
        for i in range(len(batch["query"]))
    ]


def _ids(ids: Tensor | None, count: int) -> list:
    """Content ids; rows without one are told apart by a name of their own."""
    return [f"row {i}" for i in range(count)] if ids is None else ids.tolist()


def reference_matryoshka(criterion, batch: Batch, reference) -> Tensor:
    """`reference` on one prefix after the other, cut and brought to length one number by number."""
    total = 0 * batch["query"].sum()
    for dim, weight in criterion.weights.items():
        cut = dict(batch)
        for role in ("query", "positive", "negative"):
            if role in batch:
                cut[role] = torch.stack(
                    [row[:dim] / row[:dim].square().sum().sqrt() for row in batch[role]]
                )
        total = total + weight * reference(_PrefixOf(criterion.criterion, dim), cut)
    return total


class _PrefixOf:
    """A criterion whose class vectors have their first numbers only."""

    def __init__(self, criterion, dim: int):
        self._criterion = criterion
        self._dim = dim

    def __getattr__(self, name: str):
        value = getattr(self._criterion, name)
        return value[:, : self._dim] if name == "proxies" else value
