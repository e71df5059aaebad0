"""What every loss must do, as functions that a test of any loss can call, also of a user's own.

    from tests.unit.losses.conformance import Case, check_all, make_pairs

    def test_my_loss():
        check_all(Case("mine", build=MyLoss, make_batch=make_pairs))

Every row of `vembed.losses.LOSSES` is tested by itself, on a batch of the fields that it requires;
what it is compared with stands in `REFERENCES`, and more ways to build it in `VARIANTS`.

A batch is the keyword arguments of a criterion: `query` [B, D], `positive` [M, D] ... see
`vembed.losses.Criterion`. All numbers are float64 where nothing else is said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.launch import run_on_processes
from tests.unit.losses import references
from tests.unit.losses.references import Batch
from vembed import distributed
from vembed.losses import LOSSES, build_criterion
from vembed.losses.matryoshka import Matryoshka
from vembed.registry import accepted_arguments, resolve
from vembed.training.gradient_cache import GradientCache
from vembed.training.objective import Objective

BY_QUERY = (
    "query",
    "ids_query",
    "counts_positive",
    "counts_negative",
    "labels",
    "scores",
    "teacher_scores",
    "guide_query",
)
BY_DOCUMENT = {role: (role, f"ids_{role}", f"guide_{role}") for role in ("positive", "negative")}
EMBEDDINGS = ("query", "positive", "negative")

EXACT = 1e-12
"""Largest difference between two ways to compute one number in float64."""


@dataclass(frozen=True)
class Case:
    """A loss and a batch for it.

    Attributes:
        name: Of the test.
        build: Makes the criterion.
        make_batch: Makes a batch of at least five queries from a seed.
        reference: The same loss, slowly, as `reference(criterion, batch)`; None if there is none.
        make_nothing: Makes a batch that has rows, but nothing that the loss compares; None if it
            always has something.
        splits: The queries that each process gets, for the comparison with one process.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    make_batch: Callable[[int], Batch]
    reference: Callable[..., Tensor] | None = None
    make_nothing: Callable[[], Batch] | None = None
    splits: tuple[tuple[tuple[int, ...], ...], ...] = (
        ((0, 1, 2), (3, 4, 5)),
        ((0,), (1, 2, 3, 4, 5)),  # uneven, and without a partner on its own process
        ((0, 3), (1, 2, 4, 5)),  # in `make_rich` these two have no hard negatives
    )


# --- batches


def make_pairs(seed: int) -> Batch:
    """Six queries with a positive each, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    query, positive = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return {"query": query, "positive": positive}


def make_rich(seed: int) -> Batch:
    """Several positives and hard negatives per query, and contents that occur more than once.

    Queries 1 and 5 are the same text, so each other's positives are theirs; documents 3, 12 and 20
    are the positive of one row and a positive or a hard negative of another.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = {
        "ids_query": [100, 101, 102, 103, 104, 101],
        "ids_positive": [3, 10, 11, 12, 3, 14, 15, 20, 12],
        "ids_negative": [30, 3, 20, 12, 31, 32],
    }
    batch = {name: torch.tensor(values) for name, values in ids.items()}
    batch["counts_positive"] = torch.tensor([1, 2, 1, 3, 1, 1])
    batch["counts_negative"] = torch.tensor([0, 2, 1, 0, 2, 1])
    contents = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    for role in EMBEDDINGS:
        batch[role] = contents[batch[f"ids_{role}"]]
    return batch


def make_tokens(seed: int) -> Batch:
    """`make_rich` with up to four tokens per query, and up to six or seven per document.

    Document 32, a hard negative, has no tokens. The longest negative is longer than the longest
    positive, and where padding stands differs from row to row.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = make_rich(seed)
    most = {"query": 4, "positive": 6, "negative": 7}
    tokens = torch.randn(200, 7, 5, generator=generator, dtype=torch.float64)
    for role in EMBEDDINGS:
        ids = batch[f"ids_{role}"]
        matrices = tokens[ids, : most[role]].clone()
        for row, content in enumerate(ids.tolist()):
            if content == 32:
                matrices[row] = 0
            elif content != 31:
                matrices[row, content % 3 + 1 : content % 3 + 3] = 0
        batch[role] = matrices
    return batch


def make_graded(seed: int) -> Batch:
    """Six pairs with scores, two of them equal."""
    return make_pairs(seed) | {"scores": torch.tensor([0.1, 0.9, 0.5, 0.9, 0.0, 1.0])}


def make_labelled(seed: int) -> Batch:
    """Six items of three labels, one of which occurs once."""
    return {"query": make_pairs(seed)["query"], "labels": torch.tensor([7, 3, 7, 3, 3, 0])}


def make_taught(seed: int) -> Batch:
    """As `make_rich`, with a teacher's scores of each row's positives and negatives."""
    batch = make_rich(seed)
    counts = batch["counts_positive"] + batch["counts_negative"]
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return batch | {
        "teacher_scores": scores.masked_fill(torch.arange(4) >= counts[:, None], -torch.inf)
    }


def make_noisy(seed: int) -> Batch:
    """As `make_rich`, with copies that differ a little, as dropout makes them.

    The gradient of what chooses among equals hangs on rounding.
    """
    batch = make_rich(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    for role in EMBEDDINGS:
        noise = torch.randn(batch[role].shape, generator=generator, dtype=torch.float64)
        batch[role] = batch[role] + 0.1 * noise
    return batch


def make_guided(seed: int) -> Batch:
    """As `make_rich`, with the embeddings of a guide model, which are of another size."""
    return make_rich(seed) | _guide_of(make_rich(seed), seed)


def make_guided_tokens(seed: int) -> Batch:
    """As `make_tokens`, with a guide model's embeddings, one for each item."""
    return make_tokens(seed) | _guide_of(make_tokens(seed), seed)


def _guide_of(batch: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed + 100)
    contents = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    return {f"guide_{role}": contents[batch[f"ids_{role}"]] for role in EMBEDDINGS}


def take_queries(batch: Batch, queries: Sequence[int]) -> Batch:
    """The batch of these queries and the documents that are theirs."""
    rows = torch.tensor(queries, dtype=torch.int64)
    taken = {key: batch[key][rows] for key in BY_QUERY if key in batch}
    for role, keys in BY_DOCUMENT.items():
        if role not in batch:
            continue
        counts = batch.get(f"counts_{role}", torch.ones(len(batch["query"]), dtype=torch.int64))
        of_query = torch.arange(len(batch[role])).split(counts.tolist())
        documents = torch.cat([rows[:0], *(of_query[query] for query in queries)])
        if len(documents) or role == "positive":
            taken |= {key: batch[key][documents] for key in keys if key in batch}
        else:
            del taken[f"counts_{role}"]
    return taken


# --- values and gradients


@dataclass(frozen=True)
class Outcome:
    """A loss, and its gradients by embeddings (`query`) and parameters (`logit_scale`)."""

    loss: Tensor
    grads: dict[str, Tensor]

    def distance(self, other: Outcome) -> float:
        """The largest difference in the loss or any gradient."""
        assert self.grads.keys() == other.grads.keys()
        differences = [(self.grads[name] - other.grads[name]).abs().max() for name in self.grads]
        return float(torch.stack([(self.loss - other.loss).abs(), *differences]).max())


def evaluate(criterion: Callable[..., Tensor], batch: Batch) -> Outcome:
    """Call the criterion and differentiate it by everything that can be trained."""
    batch = accepted_arguments(getattr(criterion, "forward", criterion), batch)
    leaves = {}
    for role in EMBEDDINGS:
        if role in batch:
            batch[role] = leaves[role] = batch[role].detach().clone().requires_grad_()
    if isinstance(criterion, nn.Module):
        leaves |= dict(criterion.named_parameters())
    loss = criterion(**batch)
    assert loss.shape == ()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return Outcome(loss.detach(), dict(zip(leaves, grads, strict=True)))


def build_double(case: Case) -> Callable[..., Tensor]:
    """The criterion, its parameters in float64."""
    criterion = case.build()
    return criterion.double() if isinstance(criterion, nn.Module) else criterion


# --- the checks


def check_all(case: Case) -> None:
    """Every check below."""
    check_reference(case)
    check_batch_of_one(case)
    check_all_duplicates(case)
    check_row_order(case)
    check_nothing_to_compare(case)
    check_cached(case)
    for dtype in (torch.bfloat16, torch.float16):
        check_low_precision(case, dtype)
    check_autocast(case)
    for split in case.splits:
        check_processes(case, split)


def check_reference(case: Case, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Value and gradients are those of the slow reference."""
    if case.reference is None:
        return
    for seed in seeds:
        assert distance_to_reference(case, case.make_batch(seed)) <= EXACT


def distance_to_reference(case: Case, batch: Batch, reference_batch: Batch | None = None) -> float:
    """How far the criterion on a batch is from the reference on it, or on another one."""
    criterion = build_double(case)
    slow = _Reference(criterion, case.reference)
    return evaluate(criterion, batch).distance(evaluate(slow, reference_batch or batch))


class _Reference(nn.Module):
    """A reference, with the criterion's parameters under their own names."""

    def __init__(self, criterion, reference):
        super().__init__()
        self.criterion = [criterion]
        self.reference = reference

    def named_parameters(self, *args: Any, **kwargs: Any):
        criterion = self.criterion[0]
        return criterion.named_parameters() if isinstance(criterion, nn.Module) else iter(())

    def forward(self, **batch: Tensor) -> Tensor:
        # A reference need not touch rows that do not count.
        untouched = sum(0 * batch[role].sum() for role in EMBEDDINGS if role in batch)
        return self.reference(self.criterion[0], batch) + untouched


def check_batch_of_one(case: Case) -> None:
    """One query: a finite loss, with a graph and finite gradients, even if nothing is compared."""
    _check_finite(evaluate(build_double(case), take_queries(case.make_batch(0), [0])))


def check_all_duplicates(case: Case) -> None:
    """A batch of one row, repeated: finite loss and gradients."""
    _check_finite(evaluate(build_double(case), take_queries(case.make_batch(0), [0] * 5)))


def check_nothing_to_compare(case: Case) -> None:
    """A batch without a valid pair: 0, with a graph, and gradients of 0."""
    if case.make_nothing is None:
        return
    outcome = evaluate(build_double(case), case.make_nothing())
    assert outcome.loss == 0
    for grad in outcome.grads.values():
        assert (grad == 0).all()


def check_cached(case: Case) -> None:
    """Encoded chunk by chunk, and a second time in backward: the gradient of one graph."""
    plain = _through_encoder(case, None)
    cached = _through_encoder(case, GradientCache(chunk_size=2))
    assert plain.distance(cached) <= EXACT


def _through_encoder(case: Case, cache: GradientCache | None) -> Outcome:
    """The loss of encoded rows, and the gradients of the encoder and of the loss."""
    batch, criterion = case.make_batch(0), build_double(case)
    torch.manual_seed(0)
    encoder = nn.Linear(5, 5, dtype=torch.float64)
    roles = {role: batch.pop(role) for role in EMBEDDINGS if role in batch}
    objective = Objective(criterion)
    if cache is None:
        total = objective({role: encoder(rows) for role, rows in roles.items()}, batch).total
        total.backward()
    else:
        total = cache.backward(
            encode=lambda inputs: encoder(inputs["rows"]),
            inputs={role: {"rows": rows} for role, rows in roles.items()},
            lengths={role: [1] * len(rows) for role, rows in roles.items()},
            objective=lambda embeddings: objective(embeddings, batch),
            backward=torch.Tensor.backward,
        ).total
    modules = {"encoder": encoder} | (
        {"loss": criterion} if isinstance(criterion, nn.Module) else {}
    )
    named = {
        f"{module}.{name}": parameter.grad
        for module, of_module in modules.items()
        for name, parameter in of_module.named_parameters()
    }
    return Outcome(total.detach(), named)


def check_row_order(case: Case) -> None:
    """The order of the rows changes nothing but the order of the gradients."""
    batch, criterion = case.make_batch(0), build_double(case)
    order = [3, 0, 5, 1, 4, 2]
    straight, shuffled = evaluate(criterion, batch), evaluate(criterion, take_queries(batch, order))
    assert abs(straight.loss - shuffled.loss) <= EXACT
    moved = take_queries(batch | _embedding_grads(straight), order)
    for role, grad in _embedding_grads(shuffled).items():
        assert (grad - moved[role]).abs().max() <= EXACT


def check_low_precision(case: Case, dtype: torch.dtype) -> None:
    """Half-precision embeddings lose nothing beyond their own rounding."""
    batch, criterion = case.make_batch(0), case.build()
    rounded = batch | {role: batch[role].to(dtype) for role in EMBEDDINGS if role in batch}
    widened = rounded | {role: rounded[role].float() for role in EMBEDDINGS if role in batch}
    low, wide = evaluate(criterion, rounded), evaluate(criterion, widened)
    assert low.loss.dtype == torch.float32
    assert low.loss == wide.loss
    for role, grad in _embedding_grads(low).items():
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, wide.grads[role].to(dtype), rtol=0, atol=0)


def check_autocast(case: Case) -> None:
    """Autocast around forward and backward changes nothing."""
    batch, criterion = case.make_batch(0), case.build()
    batch |= {role: batch[role].float() for role in EMBEDDINGS if role in batch}
    plain = evaluate(criterion, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(criterion, batch).distance(plain) == 0


def check_processes(case: Case, split: Sequence[Sequence[int]]) -> None:
    """Several processes give the loss and the gradients of one with the concatenated batch."""
    assert distance_of_processes(case, split) <= EXACT


def distance_of_processes(
    case: Case, split: Sequence[Sequence[int]], sabotage: str | None = None
) -> float:
    """How far the mean over processes is from one; `sabotage` names a deliberate mistake."""
    batch = case.make_batch(0)
    whole = evaluate(
        build_double(case), take_queries(batch, [query for part in split for query in part])
    )
    outcomes = run_on_processes(_evaluate_part, len(split), case, batch, split, sabotage)
    shared = {name for name in whole.grads if name not in EMBEDDINGS}
    grads = {name: _mean([o.grads[name] for o in outcomes]) for name in shared}
    for role in whole.grads.keys() - shared:
        # Each process trains the encoder through its own rows; then gradients are averaged.
        parts = [o.grads[role] for o in outcomes if role in o.grads]
        grads[role] = torch.cat(parts) / len(split)
    return Outcome(_mean([o.loss for o in outcomes]), grads).distance(whole)


def _evaluate_part(
    case: Case, batch: Batch, split: Sequence[Sequence[int]], sabotage: str | None
) -> Outcome:
    part = take_queries(batch, split[distributed.process_index()])
    criterion = build_double(case)
    if sabotage == "no gather":
        distributed.is_distributed = lambda: False
    outcome = evaluate(criterion, part)
    factor = {"times W": float(len(split)), "divided by W": 1 / len(split)}.get(sabotage, 1.0)
    return Outcome(
        outcome.loss * factor, {name: grad * factor for name, grad in outcome.grads.items()}
    )


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _embedding_grads(outcome: Outcome) -> Batch:
    return {role: grad for role, grad in outcome.grads.items() if role in EMBEDDINGS}


def _check_finite(outcome: Outcome) -> None:
    assert outcome.loss.isfinite()
    for grad in outcome.grads.values():
        assert grad.isfinite().all()


# --- the losses of the package

REFERENCES = {
    "infonce": references.reference_info_nce,
    "sigmoid": references.reference_sigmoid,
    "triplet": references.reference_triplet,
    "margin_mse": references.reference_margin_mse,
    "cosent": references.reference_cosent,
    "angle": references.reference_angle,
    "cosine_mse": references.reference_cosine_mse,
    "contrastive": references.reference_contrastive,
    "online_contrastive": references.reference_online_contrastive,
    "supcon": references.reference_supcon,
    "label_triplet": references.reference_label_triplet,
    "arcface": references.reference_proxies,
    "normalized_softmax": references.reference_proxies,
    "maxsim": references.reference_max_sim,
    "colbert": references.reference_max_sim,
}
"""What each loss of the table is compared with."""

BATCHES = {"teacher_scores": make_taught, "score": make_graded, "label": make_labelled}
"""Batches by a field that a loss requires; `make_rich` for others."""


def _one_pair() -> Batch:
    return {role: rows[:1] for role, rows in make_pairs(0).items()}


def _one_pair_of_tokens() -> Batch:
    return {role: make_tokens(0)[role][:1] for role in ("query", "positive")}


def _all_different() -> Batch:
    return make_labelled(0) | {"labels": torch.arange(6)}


def _all_alike() -> Batch:
    return make_graded(0) | {"scores": torch.ones(6)}


NOTHING = {
    "infonce": _one_pair,
    "triplet": _one_pair,
    "margin_mse": lambda: _one_pair() | {"teacher_scores": torch.ones(1, 1)},
    "cosent": _all_alike,
    "angle": _all_alike,
    "online_contrastive": lambda: _one_pair() | {"scores": torch.ones(1)},
    "supcon": _all_different,
    "label_triplet": _all_different,
    "maxsim": _one_pair_of_tokens,
    "colbert": _one_pair_of_tokens,
}
"""Batches in which a loss has nothing to compare; others always have something."""

VARIANTS: dict[str, tuple[str, dict[str, Any], Callable[[int], Batch] | None]] = {
    "infonce-pairs": ("infonce", {}, make_pairs),
    "infonce-bidirectional": (
        "infonce",
        {"bidirectional": True, "learn_temperature": True, "tile_size": 4},
        None,
    ),
    "infonce-margins": (
        "infonce",
        {
            "bidirectional": True,
            "learn_temperature": True,
            "absolute_margin": -0.1,
            "relative_margin": 0.2,
            "tile_size": 3,
        },
        None,
    ),
    "infonce-extra": (
        "infonce",
        {"query_negatives": True, "document_negatives": True, "learn_temperature": True},
        None,
    ),
    "infonce-joint": (
        "infonce",
        {
            "bidirectional": True,
            "joint": True,
            "query_negatives": True,
            "document_negatives": True,
            "absolute_margin": 0.1,
            "tile_size": 4,
        },
        None,
    ),
    "infonce-two-sided": (
        "infonce",
        {
            "bidirectional": True,
            "query_negatives": True,
            "document_negatives": True,
            "learn_temperature": True,
            "hardness": 3.0,
        },
        None,
    ),
    "infonce-own": ("infonce", {"hard_negatives": "own", "relative_margin": 0.1}, None),
    "infonce-hardness": (
        "infonce",
        {"hard_negatives": "own", "hardness": 9.0, "learn_temperature": True, "tile_size": 3},
        None,
    ),
    "infonce-guided": (
        "infonce",
        {
            "guided": True,
            "bidirectional": True,
            "query_negatives": True,
            "document_negatives": True,
            "relative_margin": 0.3,
            "tile_size": 3,
        },
        make_guided,
    ),
    "infonce-guided-own": (
        "infonce",
        {"guided": True, "hard_negatives": "own", "absolute_margin": 0.2},
        make_guided,
    ),
    "sigmoid-margins": ("sigmoid", {"absolute_margin": 0.1, "learn_temperature": True}, None),
    "sigmoid-guided": ("sigmoid", {"guided": True}, make_guided),
    "sigmoid-fixed": ("sigmoid", {"tile_size": 4, "learn_temperature": False}, make_pairs),
    "triplet-all": ("triplet", {"triplets": "all", "margin": 0.5}, None),
    "triplet-hard": ("triplet", {"triplets": "hard"}, None),
    "triplet-own": ("triplet", {"triplets": "own", "margin": 0.7}, None),
    "margin_mse-cosine": ("margin_mse", {"cosine": True, "scale": 10.0}, None),
    "cosine_mse-scaled": ("cosine_mse", {"score_scale": 5.0}, None),
    "supcon-tiles": ("supcon", {"tile_size": 4}, None),
    "label_triplet-all": ("label_triplet", {"triplets": "all", "margin": 0.5}, None),
    "label_triplet-hard": ("label_triplet", {"triplets": "hard"}, None),
    "arcface-wide": ("arcface", {"margin": 1.4, "tile_size": 3}, None),
    "maxsim-tiles": ("maxsim", {"tile_size": 2}, None),
    "maxsim-margins": (
        "maxsim",
        {"bidirectional": True, "absolute_margin": 0.1, "relative_margin": 0.2},
        None,
    ),
    "maxsim-own": (
        "maxsim",
        {"hard_negatives": "own", "hardness": 3.0, "learn_temperature": True, "tile_size": 3},
        None,
    ),
    "maxsim-guided": (
        "maxsim",
        {"guided": True, "bidirectional": True, "joint": True, "relative_margin": 0.3},
        make_guided_tokens,
    ),
    "maxsim-guided-own": (
        "maxsim",
        {"guided": True, "hard_negatives": "own", "absolute_margin": 0.2, "tile_size": 3},
        make_guided_tokens,
    ),
    "colbert-sum-bidirectional": (
        "colbert",
        {
            "normalize_scores": False,
            "temperature": 0.5,
            "bidirectional": True,
            "learn_temperature": True,
            "tile_size": 3,
        },
        None,
    ),
}
"""Further ways to build a loss of the table: its name, arguments, and a batch of its own."""


def _build(loss_type: str, arguments: dict[str, Any]) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    learned = {"learn_temperature": True} if loss_type == "sigmoid" else {}
    # A criterion gets what it has a use for, as in a run.
    return build_criterion(
        loss_type, num_classes=8, embedding_dim=5, **(learned | copy.deepcopy(arguments))
    )


def case_of(
    name: str,
    loss_type: str,
    arguments: dict[str, Any],
    make_batch: Callable[[int], Batch] | None = None,
) -> Case:
    """The case of a loss of the table, on a batch of what it requires if none is given."""
    loss = resolve("loss_type", loss_type, LOSSES)
    fitting = [make for field, make in BATCHES.items() if field in loss.required_fields]
    if loss.takes_tokens:
        fitting = [make_tokens]
    if loss_type == "triplet":
        fitting = [make_noisy]
    return Case(
        name,
        partial(_build, loss_type, arguments),
        make_batch or (fitting or [make_rich])[0],
        REFERENCES.get(loss_type),
        # A guide or hard negatives of its own give one pair no candidate either.
        None if arguments.get("guided") else NOTHING.get(loss_type),
    )


CASES = {name: case_of(name, name, {}) for name in LOSSES} | {
    name: case_of(name, *variant) for name, variant in VARIANTS.items()
}


def matryoshka_of(case: Case) -> Case:
    """The case, wrapped; dimensions out of order, each with a weight of its own."""
    assert case.reference is not None
    return replace(
        case,
        name=f"{case.name}-mrl",
        build=partial(_build_matryoshka, case.build),
        reference=partial(references.reference_matryoshka, reference=case.reference),
    )


def _build_matryoshka(build: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    return Matryoshka(build(), dims=(3, 5, 2), weights=(0.5, 1.25, 2.0))


MATRYOSHKAS = {
    name: matryoshka_of(case)
    for name, case in CASES.items()
    if name in LOSSES or name in {"infonce-two-sided", "infonce-guided"}
    if not resolve("loss_type", name.split("-")[0], LOSSES).takes_tokens
}
"""Every loss of one vector per item, on prefixes of it."""
