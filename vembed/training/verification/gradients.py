"""The gradient that a Trainer computes, and the one that it should: all rows in one graph.

With dropout, two gradients can only be compared if both drew the same masks. A mask depends on the
shape of the chunk and on the state of the generator, so the reference cuts the rows as the run
does: process by process, chunk by chunk, each process from its own seed on, through all of its
micro-batches. Only then it puts the embeddings together, in one graph, for one loss of the whole
batch. Where the encoder gives a row the same embedding however it is cut and padded, the reference
is simpler and stronger: one forward for all rows of a role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vembed.chunking import take_rows
from vembed.losses.matryoshka import innermost
from vembed.token_vectors import cat_items, pad_tokens
from vembed.training.copies import Copies, Place
from vembed.training.data_utils import (
    ROLES,
    Inputs,
    maybe_first,
    own_rows,
    row_keys,
    row_lengths,
    teacher_batch,
    teacher_vectors,
    unpack_roles,
)
from vembed.training.gradient_cache import GradientCache
from vembed.training.objective import Embeddings
from vembed.training.sharding import whole_tensor
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
        scaler.update()
    return _take_gradients(trainer)


def whole_batch_gradients(trainer: Trainer, batches: Sequence[Batch]) -> Gradients:
    """The gradient of the mean loss of whole micro-batches, one forward for each role.

    Args:
        trainer: Prepared, on one process. Only its encoders and its objective are used.
        batches: Global micro-batches.
    """
    for batch in batches:
        embeddings = {role: _embed(trainer, rows) for role, rows in _inputs(trainer, batch).items()}
        _backward(trainer, embeddings, _said(trainer, batch), batch, len(batches))
    return _take_gradients(trainer)


def replayed_gradients(
    trainer: Trainer, batches: Sequence[Batch], shares: Sequence[Sequence[Batch]], *, seed: int
) -> Gradients:
    """The same, with each row embedded in the chunk and with the random numbers of a real step.

    Args:
        trainer: Prepared, on one process. Its encoders, its objective and its plan are used.
        batches: Global micro-batches.
        shares: The micro-batches of each process: what it takes of each global one.
        seed: Process p draws from `seed + p` on.
    """
    states = []
    for process in range(len(shares)):
        torch.manual_seed(seed + process)
        states.append(torch.get_rng_state())
    for number, batch in enumerate(batches):
        embedded, taught = [], []
        for process, of_process in enumerate(shares):
            torch.set_rng_state(states[process])
            embedded.append(embed_in_chunks(trainer, of_process[number]))
            states[process] = torch.get_rng_state()
            taught.append(_teach_in_chunks(trainer, of_process[number]))
        _backward(trainer, _join(embedded), _join(taught), batch, len(batches))
    return _take_gradients(trainer)


def embed_in_chunks(trainer: Trainer, batch: Batch) -> Embeddings:
    """Embeddings by role, each row in the chunk that the Trainer's next step puts it into."""
    inputs = _inputs(trainer, batch)
    copies = Copies.find(row_lengths(batch, inputs), row_keys(batch))
    return own_rows(_in_chunks(trainer, inputs, copies, row_lengths(batch, inputs), _embed), batch)


def chunks_of(trainer: Trainer) -> GradientCache:
    """What cuts the batches of the Trainer's next step."""
    return trainer.gradient_cache if trainer.config.use_gradient_cache else trainer.plain_step


@torch.no_grad()
def cutting_error(
    trainer: Trainer, batches: Sequence[Batch], partitions: Iterable[Sequence[Sequence[Batch]]]
) -> float:
    """How much embeddings change when rows are cut and padded as in a step, or drawn anew.

    Args:
        trainer: Prepared, on one process. Its encoders and its plan are used.
        batches: Global micro-batches.
        partitions: Ways to share them: by process, what it takes of each global one.

    Returns:
        The largest difference, of student and teacher, relative to the largest element.
    """
    cut_by = [list(zip(*shares, strict=True)) for shares in partitions]
    largest = torch.zeros((), dtype=torch.float64)
    for number, batch in enumerate(batches):
        whole = [_embed(trainer, rows) for rows in _inputs(trainer, batch).values()]
        whole += _said(trainer, batch).values()
        for partition in cut_by:
            shares = partition[number]
            cut = [
                *_join([embed_in_chunks(trainer, share) for share in shares]).values(),
                *_join([_teach_in_chunks(trainer, share) for share in shares]).values(),
            ]
            errors = [
                (pad_tokens(c, w.shape[1]) - w).abs().max() / w.abs().max()
                for c, w in zip(cut, whole, strict=True)
            ]
            largest = torch.stack([largest, *errors]).max()
    return float(largest)


def _inputs(trainer: Trainer, batch: Batch) -> dict[str, Inputs]:
    return unpack_roles(batch, trainer.config.retrieval_mode)


def _taught(trainer: Trainer, batch: Batch) -> dict[str, Inputs]:
    """The inputs of the teacher: its own where it has another tokenizer; none without a teacher."""
    if trainer.teacher_model is None:
        return {}
    return _inputs(trainer, teacher_batch(batch))


def _said(trainer: Trainer, batch: Batch) -> Embeddings:
    """The teacher's embeddings: those that came with the batch, or one forward for each role."""
    taught = {role: _teach(trainer, rows) for role, rows in _taught(trainer, batch).items()}
    return teacher_vectors(batch) or taught


def _embed(trainer: Trainer, inputs: Inputs) -> Tensor:
    return maybe_first(trainer.accelerator.unwrap_model(trainer.model)(**inputs))


@torch.no_grad()
def _teach(trainer: Trainer, inputs: Inputs) -> Tensor:
    if trainer.teacher_model is None:
        raise ValueError("there is no teacher")
    return maybe_first(trainer.teacher_model(**inputs))


def _teach_in_chunks(trainer: Trainer, batch: Batch) -> Embeddings:
    if given := teacher_vectors(batch):
        return given
    inputs = _taught(trainer, batch)
    lengths = row_lengths(teacher_batch(batch), inputs)
    copies = Copies.find(lengths, row_keys(batch))
    return own_rows(_in_chunks(trainer, inputs, copies, lengths, _teach), batch)


def _in_chunks(
    trainer: Trainer,
    inputs: dict[str, Inputs],
    copies: Copies,
    lengths: dict[str, list[int]],
    encode: Callable[[Trainer, Inputs], Tensor],
) -> Embeddings:
    """Embeddings by role; a copy has that of the row that is encoded, and so its dropout mask."""
    encoded: dict[Place, Tensor] = {}
    for chunk in chunks_of(trainer).plan(inputs, lengths, copies):
        taken = take_rows(inputs[chunk.role], chunk.rows, chunk.longest)
        output = encode(trainer, taken)
        encoded |= {(chunk.role, row): output[[i]] for i, row in enumerate(chunk.rows)}
    return {
        role: cat_items([encoded[origin] for origin in origins])
        for role, origins in copies.origin.items()
    }


def _join(parts: Sequence[Embeddings]) -> Embeddings:
    """The rows of all processes; a process may have none of a role, such as hard negatives."""
    roles = [role for role in ROLES if any(role in part for part in parts)]
    return {role: cat_items([part[role] for part in parts if role in part]) for role in roles}


def _backward(
    trainer: Trainer, embeddings: Embeddings, taught: Embeddings, batch: Batch, micro_batches: int
) -> None:
    loss = trainer.objective(embeddings, trainer.extras_of(batch), taught or None)
    (loss.total / micro_batches).backward()  # type: ignore[no-untyped-call]


def _take_gradients(trainer: Trainer) -> Gradients:
    """Copies of all gradients, in float64; the parameters are left without. Collective."""
    owners = {
        "encoder": trainer.accelerator.unwrap_model(trainer.model),
        "loss": innermost(trainer.criterion),
        "distillation": trainer.distillation_loss_fn,
    }
    gradients = {}
    for owner, module in owners.items():
        if not isinstance(module, nn.Module):
            continue
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[f"{owner}.{name}"] = whole_tensor(parameter.grad).to(
                    torch.float64, copy=True, memory_format=torch.contiguous_format
                )
                parameter.grad = None
    return gradients
