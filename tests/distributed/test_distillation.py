"""Distillation on two processes is that of one: losses, runs, and the ratio of the two terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_training import folder, largest_difference, train
from tests.launch import run_on_processes
from tests.tiny import tiny_bert
from tests.unit.losses.conformance import EMBEDDINGS, EXACT, take_queries
from tests.unit.losses.distilling import CASES, scored, teacher_rows
from vembed.distributed import process_index
from vembed.errors import VembedError
from vembed.losses import build_distillation_loss
from vembed.losses.distillation.weighted import Term, WeightedDistillation
from vembed.training.objective import Objective

__all__ = ["folder"]

SPLITS = (((0, 1, 2), (3, 4, 5)), ((0, 3), (1, 2, 4, 5)))


def share(batch: dict, queries: tuple[int, ...]) -> dict:
    own = take_queries({k: v for k, v in batch.items() if k != "teacher_scores"}, queries)
    return own | {"teacher_scores": batch["teacher_scores"][list(queries)]}


def distil(names: list[str], batch: dict, split: Any) -> list[Any]:
    """Of every kind: the loss, the gradients of the rows, and of its own parameters."""
    own = share(batch, split[process_index()])
    found = []
    for name in names:
        loss = CASES[name][0]()
        rows = {role: own[role].clone().requires_grad_() for role in EMBEDDINGS if role in own}
        value = WeightedDistillation([Term("x", loss)]).each(rows, teacher_rows(own), own)["x"]
        value.backward()
        grads = {role: rows[role].grad for role in rows}
        found.append((value.detach(), grads, [p.grad for p in loss.parameters()]))
    return found


@pytest.mark.parametrize("split", SPLITS, ids=["even", "uneven"])
def test_every_kind_on_two_processes_is_that_of_one(split):
    batch, names = scored(0), list(CASES)
    order = [query for part in split for query in part]
    whole = distil(names, share(batch, order), (range(6),))
    halves = run_on_processes(distil, 2, names, batch, split)
    for name, (value, grads, own), *parts in zip(names, whole, *halves, strict=True):
        assert abs(sum(part[0] for part in parts) / 2 - value) <= EXACT, name
        for role, grad in grads.items():
            joined = torch.cat([part[1][role] for part in parts if role in part[1]])
            if grad is None or joined is None:
                continue
            assert (joined / 2 - grad).abs().max() <= 10 * EXACT, (name, role)
            assert (joined - grad).abs().max() > 1e-5, (name, role)  # a factor of processes shows
        for number, grad in enumerate(own):
            mean = sum(part[2][number] for part in parts) / 2
            assert (mean - grad).abs().max() <= EXACT, name


def misfit(batch: dict) -> str:
    """Only the second process has a score too few."""
    own = share(batch, SPLITS[0][process_index()])
    if process_index():
        own["teacher_scores"] = own["teacher_scores"][:, :1]
    student = {role: own[role] for role in EMBEDDINGS if role in own}
    with pytest.raises(VembedError) as caught:
        build_distillation_loss("score")(
            student, {}, own["teacher_scores"], own["counts_positive"], own["counts_negative"]
        )
    return str(caught.value)


def test_scores_that_do_not_fit_end_every_process():
    found = run_on_processes(misfit, 2, scored(0))
    assert all("teacher_scores: expected one for each positive and negative" in f for f in found)


def parts_of(batch: dict, split: Any) -> dict[str, float]:
    from vembed.losses import build_criterion

    own = share(batch, split[process_index()])
    student = {role: own[role] for role in EMBEDDINGS if role in own}
    extras = {key: value for key, value in own.items() if key not in EMBEDDINGS}
    terms = [Term(name, CASES[name][0](), 0.5) for name in CASES]
    objective = Objective(build_criterion("infonce"), WeightedDistillation(terms), 0.25)
    loss = objective(student, extras, teacher_rows(own))
    assert loss.weights == {"task": 0.25, **dict.fromkeys(CASES, 0.375)}
    total = sum(loss.weights[name] * value for name, value in loss.parts.items())
    assert float(total) == pytest.approx(float(loss.total))
    return {name: float(value) for name, value in loss.parts.items()}


def test_the_ratio_of_the_terms_does_not_depend_on_processes():
    batch, split = scored(0), SPLITS[1]
    order = [query for part in split for query in part]
    one = parts_of(share(batch, order), (range(6),))
    two = run_on_processes(parts_of, 2, batch, split)
    for name, value in one.items():
        ratio = value / one["task"]
        mean = sum(part[name] for part in two) / sum(part["task"] for part in two)
        assert mean == pytest.approx(ratio, rel=1e-10), name


EVERY_KIND = {"similarity_kl": 1, "embedding": 0.5, "relational": 0.5, "score": 0.5}


@pytest.fixture(scope="module")
def teacher(folder):
    """A teacher of another size, so that there is a projection."""
    return tiny_bert(
        folder / "teacher", hidden_size=16, seed=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"use_gradient_cache": True, "gradient_cache_chunk_size": 2, "use_lora": True,
         "lora_dropout": 0.0, "teacher_cache": "<cache>"},
        {"distributed_strategy": "fsdp2", "teacher_cache": "<cache>"},
    ],
    ids=["accumulation", "cached-lora-stored-teacher", "fsdp2-stored-teacher"],
)  # fmt: skip
def test_two_processes_are_taught_like_one(folder, teacher, settings, request):
    name = request.node.callspec.id
    # Small steps: the hard corner of a Huber loss and fp32 part two runs sooner or later.
    settings = {
        "teacher_model_name": str(teacher), "distillation_loss": EVERY_KIND,
        "distillation_alpha": 0.3, "lr": 0.02, "holdout_ratio": 0,
        "test_data_path": str(folder / "pairs.jsonl"), **settings,
    }  # fmt: skip
    if "teacher_cache" in settings:
        from vembed.training.teaching.teach import teach

        settings["teacher_cache"] = str(folder / "cache")
        data = {"data_path": str(folder / "pairs.jsonl"), "device": "cpu"}
        teach({**{k: settings[k] for k in ("teacher_model_name", "teacher_cache")}, **data})
    alone = {k: v for k, v in settings.items() if k != "distributed_strategy"}
    one = train(str(folder), f"taught-{name}-1", {"batch_size": 6, **alone})
    two = run_on_processes(
        train, 2, str(folder), f"taught-{name}-2", {"batch_size": 3, **settings}, timeout=240
    )[0]
    for expected, actual in zip(one["history"], two["history"], strict=True):
        assert actual == pytest.approx(expected, rel=5e-4, abs=5e-5)
    assert "loss_distillation.embedding" in one["history"][1]
    assert largest_difference(one["weights"], two["weights"]) < 5e-5
