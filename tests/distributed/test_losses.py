"""Losses on several gloo processes against one process with the concatenated batch (float64)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.launch import ChildFailed, run_on_processes
from tests.unit.losses.conformance import (
    CASES,
    EXACT,
    MATRYOSHKAS,
    Case,
    check_processes,
    distance_of_processes,
    evaluate,
    make_pairs,
    make_rich,
    take_queries,
)
from tests.unit.losses.references import reference_similarity_kl
from vembed import distributed
from vembed.distributed import process_index
from vembed.losses import LOSSES, build_criterion
from vembed.losses.distillation.similarity import SimilarityKL

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_processes_equal_one_big_batch(case):
    for split in case.splits:
        check_processes(case, split)


@pytest.mark.parametrize("case", MATRYOSHKAS.values(), ids=MATRYOSHKAS)
def test_a_matryoshka_on_processes_equals_one_big_batch(case):
    check_processes(case, case.splits[2])


@pytest.mark.parametrize("sabotage", ["no gather", "times W", "divided by W"])
def test_a_mistake_under_a_matryoshka_is_noticed(sabotage):
    case = MATRYOSHKAS["infonce-two-sided"]
    assert distance_of_processes(case, case.splits[2], sabotage) > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "infonce-bidirectional",
        "infonce-margins",
        "infonce-guided",
        "infonce-own",
        "sigmoid-margins",
        "triplet-all",
        "arcface",
        "online_contrastive",
    ],
)
def test_three_processes_one_of_them_without_queries(name):
    check_processes(CASES[name], ((0, 2, 4), (), (1, 3, 5)))


@pytest.mark.parametrize("case", [CASES[name] for name in LOSSES], ids=LOSSES)
@pytest.mark.parametrize("sabotage", ["no gather", "times W", "divided by W"])
def test_a_mistake_in_the_scale_or_the_gather_is_noticed(case, sabotage):
    assert distance_of_processes(case, case.splits[2], sabotage) > 1e-3


def _without_ids(seed):
    return {name: rows for name, rows in make_rich(seed).items() if not name.startswith("ids")}


def test_duplicates_are_masked_across_processes():
    """Rows 0 and 3 of `make_rich` share positives with rows on the other process."""
    case = CASES["infonce-bidirectional"]
    batch, split = case.make_batch(0), case.splits[2]
    order = [query for part in split for query in part]
    blind = Case("blind", case.build, _without_ids)
    check_processes(blind, split)  # consistent without ids as well, but another loss
    masked, unmasked = (
        evaluate(case.build(), take_queries(make(0), order)) for make in (make_rich, _without_ids)
    )
    assert abs(masked.loss - unmasked.loss) > 1e-3
    assert batch.keys() - _without_ids(0).keys() == {"ids_query", "ids_positive", "ids_negative"}


def _count_collectives(batch, split, kwargs):
    """Shapes of what is gathered in forward and summed in backward, sizes and ids apart."""
    shapes = {"gather": [], "sum": []}
    gather, reduce = distributed._all_gather, dist.all_reduce

    def counting_gather(output, own, **kwargs):
        if own.is_floating_point():
            shapes["gather"].append(tuple(output.shape))
        return gather(output, own, **kwargs)

    def counting_reduce(tensor, **kwargs):
        shapes["sum"].append(tuple(tensor.shape))
        return reduce(tensor, **kwargs)

    distributed._all_gather, dist.all_reduce = counting_gather, counting_reduce
    evaluate(build_criterion("infonce", **kwargs), take_queries(batch, split[process_index()]))
    return shapes


@pytest.mark.parametrize("tile_size", [1, "auto"])
@pytest.mark.parametrize(
    ("kwargs", "gathered", "summed"),
    [
        ({}, [(22, 5)], [(15, 5)]),
        ({"absolute_margin": 0.0}, [(22, 5)], [(15, 5)]),
        # One sum of exponentials of each document from each process, and one gradient back.
        ({"bidirectional": True}, [(30,), (22, 5)], [(15,), (15, 5)]),
        (
            {"bidirectional": True, "absolute_margin": 0.0},
            [(30,), (22,), (22, 5)],
            [(15,), (15, 5)],
        ),
    ],
)
def test_embeddings_are_gathered_once(kwargs, gathered, summed, tile_size):
    """Documents, in either direction, however many tiles."""
    split, kwargs = CASES["infonce"].splits[2], {**kwargs, "tile_size": tile_size}
    for shapes in run_on_processes(_count_collectives, 2, make_rich(0), split, kwargs):
        assert sorted(shapes["gather"]) == sorted(gathered)
        assert sorted(shapes["sum"]) == sorted(summed)


def _with_wrong_counts(batch):
    if process_index() == 1:
        batch = batch | {"counts_positive": torch.full((6,), 2)}
    try:
        build_criterion("infonce")(**batch)
    except ValueError as error:
        return str(error)
    return None


def test_a_wrong_batch_on_one_process_is_an_error_on_all():
    messages = run_on_processes(_with_wrong_counts, 2, make_pairs(0))
    assert messages[0] == messages[1]
    assert "process 1: 6 queries, 6 positives" in messages[0]


# --- distillation


def _distil(student, teacher, split):
    own = split[process_index()]
    student, teacher = take_queries(student, own), take_queries(teacher, own)
    roles = [role for role in ("query", "positive", "negative") if role in student]
    leaves = {role: student[role].clone().requires_grad_() for role in roles}
    loss = SimilarityKL(temperature=0.3)(leaves, {role: teacher[role] for role in roles})
    return loss.detach(), dict(zip(roles, torch.autograd.grad(loss, leaves.values()), strict=True))


@pytest.mark.parametrize("split", CASES["infonce"].splits)
def test_distillation_on_processes_equals_one_big_batch(split):
    student, teacher = make_rich(0), make_rich(1)
    results = run_on_processes(_distil, 2, student, teacher, split)
    order = [query for part in split for query in part]
    roles = ("query", "positive", "negative")
    whole = {role: take_queries(student, order)[role].requires_grad_() for role in roles}
    taught = {role: take_queries(teacher, order)[role] for role in roles}
    loss = reference_similarity_kl(0.3, whole, taught)
    grads = torch.autograd.grad(loss, whole.values())
    assert abs(sum(value for value, _ in results) / 2 - loss) <= EXACT
    for role, grad in zip(roles, grads, strict=True):
        parts = torch.cat([of_role[role] for _, of_role in results if role in of_role])
        assert (parts / 2 - grad).abs().max() <= EXACT
        assert (parts - grad).abs().max() > 1e-3  # a factor of the number of processes


def _one_raises():
    if process_index() == 0:
        build_criterion("infonce")(torch.ones(2, 2), None)


def test_positives_are_required():
    with pytest.raises(ChildFailed, match="needs positives"):
        run_on_processes(_one_raises, 1)
