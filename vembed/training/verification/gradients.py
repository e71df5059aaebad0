"""The gradient that a Trainer computes, and the one that it should: all rows in one graph.

With dropout, two gradients can only be compared if both drew the same masks. A mask depends on the
shape of the chunk and on the state of the generator, so the reference cuts the rows as the run
does: process by process, chunk by chunk, each process from its own seed on, through all of its
micro-batches. Only then it puts the embeddings together, in one graph, for one loss of the whole
batch. Where the encoder gives a row the same embedding however it is cut and padded, the reference
is simpler and stronger: one forward for all rows of a role.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vembed.chunking import take_rows
from vembed.training.data_utils import (
    ROLES,
    TEACHER_PREFIX,
    Inputs,
    maybe_first,
    row_lengths,
    unpack_extras,
    unpack_roles,
)
from vembed.training.gradient_cache import GradientCache
from vembed.training.objective import Embeddings
from vembed.training.trainer import Batch, Trainer

Gradients = dict[str, Tensor]
"""By parameter: `encoder.NAME`, `loss.NAME`, `distillation.NAME`. One that got none is left out."""


def step_gradients(trainer: Trainer, batches: Sequence[Batch], *, seed: int) -> Gradients:
    """What a prepared Trainer hands to its optimizer, from these micro-batches.

    Collective: every process must call it.

    Args:
        trainer: Its gradients are left as they were: none.
        batches: This process's micro-batches.
        seed: Process p draws from `seed + p` on.
    """
    torch.manual_seed(seed + trainer.accelerator.process_index)
    for batch in batches:
        trainer.step(batch)
    trainer.reduce_gradients(len(batches))
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        # As before clipping; by hand, because Accelerate has no fp16 on a CPU.
        scaler.unscale_(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    return _take_gradients(trainer)


def whole_batch_gradients(trainer: Trainer, batches: Sequence[Batch]) -> Gradients:
    """The gradient of the mean loss of whole micro-batches, one forward for each role.

    Args:
        trainer: Prepared, on one process. Only its encoder and its objective are used.
        batches: Global micro-batches.
    """
    for batch in batches:
        inputs = unpack_roles(batch, trainer.config.retrieval_mode)
        embeddings = {role: _embed(trainer, of_role) for role, of_role in inputs.items()}
        _backward(trainer, embeddings, batch, len(batches))
    return _take_gradients(trainer)


def replayed_gradients(
    trainer: Trainer, batches: Sequence[Batch], shares: Sequence[Sequence[Batch]], *, seed: int
) -> Gradients:
    """The same, with each row embedded in the chunk and with the random numbers of a real step.

    Args:
        trainer: Prepared, on one process. Its encoder, its objective and its plan are used.
        batches: Global micro-batches.
        shares: The micro-batches of each process: what it takes of each global one.
        seed: Process p draws from `seed + p` on.
    """
    states = []
    for process in range(len(shares)):
        torch.manual_seed(seed + process)
        states.append(torch.get_rng_state())
    for number, batch in enumerate(batches):
        parts = []
        for process, of_process in enumerate(shares):
            torch.set_rng_state(states[process])
            parts.append(embed_in_chunks(trainer, of_process[number]))
            states[process] = torch.get_rng_state()
        # A process may have no rows of a role, such as hard negatives.
        roles = [role for role in ROLES if any(role in part for part in parts)]
        joined = {role: torch.cat([part[role] for part in parts if role in part]) for role in roles}
        _backward(trainer, joined, batch, len(batches))
    return _take_gradients(trainer)


def embed_in_chunks(trainer: Trainer, batch: Batch) -> Embeddings:
    """Embeddings by role, each row in the chunk that the Trainer's next step puts it into."""
    inputs = unpack_roles(batch, trainer.config.retrieval_mode)
    lengths = row_lengths(batch, inputs)
    outputs: dict[str, list[Tensor]] = {role: [] for role in inputs}
    rows: dict[str, list[int]] = {role: [] for role in inputs}
    for chunk in chunks_of(trainer).plan(inputs, lengths):
        taken = take_rows(inputs[chunk.role], chunk.rows, chunk.longest)
        outputs[chunk.role].append(_embed(trainer, taken))
        rows[chunk.role] += chunk.rows
    return {
        role: torch.cat(of_role)[torch.tensor(rows[role]).argsort()]
        for role, of_role in outputs.items()
    }


def chunks_of(trainer: Trainer) -> GradientCache:
    """What cuts the batches of the Trainer's next step."""
    return trainer.gradient_cache if trainer.config.use_gradient_cache else trainer.plain_step


@torch.no_grad()
def cutting_error(trainer: Trainer, batch: Batch) -> float:
    """How much embeddings change when rows are cut and padded otherwise, or drawn anew.

    Returns:
        The largest difference, relative to the largest element.
    """
    inputs = unpack_roles(batch, trainer.config.retrieval_mode)
    cut = embed_in_chunks(trainer, batch)
    errors = []
    for role, of_role in inputs.items():
        whole = _embed(trainer, of_role)
        errors.append(float((cut[role] - whole).abs().max() / whole.abs().max()))
    return max(errors)


def _embed(trainer: Trainer, inputs: Inputs) -> Tensor:
    return maybe_first(trainer.accelerator.unwrap_model(trainer.model)(**inputs))


def _backward(trainer: Trainer, embeddings: Embeddings, batch: Batch, micro_batches: int) -> None:
    teacher = _teach(trainer, batch)
    loss = trainer.objective(embeddings, unpack_extras(batch), teacher)
    (loss.total / micro_batches).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _teach(trainer: Trainer, batch: Batch) -> Embeddings | None:
    teacher = trainer.teacher_model
    if teacher is None:
        return None
    own = {
        key.removeprefix(TEACHER_PREFIX): value
        for key, value in batch.items()
        if key.startswith(TEACHER_PREFIX) and key != "teacher_scores"
    }
    inputs = unpack_roles(own or batch, trainer.config.retrieval_mode)
    return {role: maybe_first(teacher(**of_role)) for role, of_role in inputs.items()}


def _take_gradients(trainer: Trainer) -> Gradients:
    """Copies of all gradients, in float64; the parameters are left without."""
    owners = {
        "encoder": trainer.accelerator.unwrap_model(trainer.model),
        "loss": trainer.criterion,
        "distillation": trainer.distillation_loss_fn,
    }
    gradients = {}
    for owner, module in owners.items():
        if not isinstance(module, nn.Module):
            continue
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[f"{owner}.{name}"] = parameter.grad.to(torch.float64, copy=True)
                parameter.grad = None
    return gradients
