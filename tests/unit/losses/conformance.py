"""What every loss must do, as functions that a test of any loss can call, also of a user's own.

    from tests.unit.losses.conformance import Case, check_all, make_pairs

    def test_my_loss():
        check_all(Case("mine", build=MyLoss, make_batch=make_pairs))

A batch is the keyword arguments of a criterion: `query` [B, D], `positive` [M, D] ... see
`vembed.losses.Criterion`. All numbers are float64 where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.launch import run_on_processes
from tests.unit.losses.references import (
    Batch,
    reference_cosent,
    reference_info_nce,
    reference_max_sim,
    reference_sigmoid,
    reference_supcon,
)
from vembed import distributed
from vembed.losses import build_criterion
from vembed.registry import accepted_arguments

BY_QUERY = ("query", "ids_query", "counts_positive", "counts_negative", "labels", "scores")
BY_DOCUMENT = {"positive": ("positive", "ids_positive"), "negative": ("negative", "ids_negative")}
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
        splits: The queries that each process gets, for the comparison with one process.
    """

    name: str
    build: Callable[[], Callable[..., Tensor]]
    make_batch: Callable[[int], Batch]
    reference: Callable[..., Tensor] | None = None
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
        return self.reference(self.criterion[0], batch)


def check_batch_of_one(case: Case) -> None:
    """One query: a finite loss, with a graph and finite gradients, even if nothing is compared."""
    _check_finite(evaluate(build_double(case), take_queries(case.make_batch(0), [0])))


def check_all_duplicates(case: Case) -> None:
    """A batch of one row, repeated: finite loss and gradients."""
    _check_finite(evaluate(build_double(case), take_queries(case.make_batch(0), [0] * 5)))


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


def _case(name: str, make_batch: Any, reference: Any, loss_type: str, **kwargs: Any) -> Case:
    return Case(name, lambda: build_criterion(loss_type, **kwargs), make_batch, reference)


CASES = {
    case.name: case
    for case in (
        _case("infonce-pairs", make_pairs, reference_info_nce, "infonce"),
        _case("infonce", make_rich, reference_info_nce, "infonce", tile_size=2),
        _case(
            "infonce-bidirectional",
            make_rich,
            reference_info_nce,
            "infonce",
            bidirectional=True,
            learn_temperature=True,
            tile_size=4,
        ),
        _case(
            "infonce-margins",
            make_rich,
            reference_info_nce,
            "infonce",
            bidirectional=True,
            learn_temperature=True,
            absolute_margin=-0.1,
            relative_margin=0.2,
            tile_size=3,
        ),
        _case("sigmoid", make_rich, reference_sigmoid, "sigmoid", learn_temperature=True),
        _case("sigmoid-margins", make_rich, reference_sigmoid, "sigmoid", absolute_margin=0.1),
        _case("sigmoid-fixed", make_pairs, reference_sigmoid, "sigmoid", tile_size=4),
        _case("cosent", make_graded, reference_cosent, "cosent"),
        _case("supcon", make_labelled, reference_supcon, "supcon", tile_size=4),
        _case("maxsim", make_tokens, reference_max_sim, "maxsim", tile_size=2),
        _case(
            "colbert-sum-bidirectional",
            make_tokens,
            reference_max_sim,
            "colbert",
            normalize_scores=False,
            temperature=0.5,
            bidirectional=True,
            learn_temperature=True,
            tile_size=3,
        ),
        _case(
            "maxsim-margins",
            make_tokens,
            reference_max_sim,
            "maxsim",
            bidirectional=True,
            absolute_margin=0.1,
            relative_margin=0.2,
        ),
    )
}
