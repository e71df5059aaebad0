"""Collectives on torch.distributed: the lowest layer that knows of other processes.

# Shapes: B rows on this process, P rows of all processes, D columns
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from vembed.errors import DistributedError, VembedError
from vembed.placing import to_device

# Torch 2.13 gave these collectives other names, and warns at every call of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_Tensor = TypeVar("_Tensor", bound=Tensor)

_HOST_GROUPS: dict[dist.ProcessGroup | None, dist.ProcessGroup] = {}
_MESSAGE_ROOM: dict[dist.ProcessGroup | None, int] = {}
_BUCKET_BYTES = 256 * 2**20


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_count() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def process_index() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_distributed() else 0


def _group_of(device: torch.device) -> dist.ProcessGroup | None:
    """The group that tensors of a device go through; None for the default one.

    Numbers that the host has, and needs, do not go by way of an accelerator: they would wait for
    all that it still has to do. Where the default group does not reach the host's memory, as that
    of NCCL, a second one does. Collective at its first call.
    """
    if device.type != "cpu" or "cpu:" in dist.get_backend_config():
        return None
    world = dist.group.WORLD
    if world not in _HOST_GROUPS:
        _HOST_GROUPS.clear()
        _HOST_GROUPS[world] = dist.new_group(backend="gloo")
    return _HOST_GROUPS[world]


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """These numbers of every process, by process. Collective: every process must call it.

    Args:
        numbers: As many on every process.
        device: Of the run; numbers do not go through it.
    """
    if not is_distributed():
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64)
    gathered = own.new_empty(process_count() * len(own))
    _all_gather(gathered, own, group=_group_of(own.device))
    return [[int(n) for n in of_process] for of_process in gathered.view(-1, len(own)).tolist()]


def gather_messages(message: Tensor) -> list[Tensor]:
    """The message of every process, by process. Collective: every process must call it.

    One collective, or two where a message is longer than any that processes have seen so far.

    Args:
        message: `[n]` int64 in the host's memory; n may differ.
    """
    if not is_distributed():
        return [message]
    group = dist.group.WORLD
    # Every process has seen the same lengths, so that all know this room, or none.
    room = _MESSAGE_ROOM.get(group, 0)
    while True:
        padded = message.new_zeros(1 + room)
        padded[0] = len(message)
        shown = min(room, len(message))
        padded[1 : 1 + shown] = message[:shown]
        gathered = padded.new_empty(process_count() * len(padded))
        _all_gather(gathered, padded, group=_group_of(padded.device))
        rows = gathered.view(process_count(), -1)
        lengths = rows[:, 0].tolist()
        if max(lengths) <= room:
            return [row[1 : 1 + length] for row, length in zip(rows, lengths, strict=True)]
        room = max(lengths)
        _MESSAGE_ROOM.clear()
        _MESSAGE_ROOM[group] = room


def gather_counts(count: int, device: torch.device) -> list[int]:
    """How many rows every process holds, by process. Collective: every process must call it."""
    return [of_process[0] for of_process in gather_numbers([count], device)]


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums what every process contributed to this process's rows."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, counts: list[int]
    ) -> Tensor:
        ctx.counts = counts  # type: ignore[attr-defined]
        return _all_gather_uneven(rows, counts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]
        # All-reduce, then a slice: gloo cannot reduce-scatter uneven rows, and [P, D] is small
        # beside activations.
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        start = sum(counts[: process_index()])
        return grad[start : start + counts[process_index()]], None


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Concatenate the rows of every process, keeping gradients.

    The backward pass sums, over processes, the gradients of this process's rows; no factor of the
    number of processes is applied anywhere, so the mean that data parallelism takes over processes
    is the global mean.

    Collective: every process must call it, in the same order, and its backward is collective too:
    the rows of all processes need gradients or those of none do, and every process's loss must
    depend on the result, if only by a zero. Row counts may differ.

    Args:
        rows: `[B, ...]`, this process's rows.
        counts: Rows per process when already known (see `gather_counts`), which saves a collective.

    Returns:
        `[P, ...]`, ordered by process. Without a process group, `rows` itself.
    """
    if not is_distributed():
        return rows
    counts = gather_counts(len(rows), rows.device) if counts is None else counts
    if rows.requires_grad:
        gathered: Tensor = _GatherRows.apply(rows, counts)  # type: ignore[no-untyped-call]
        return gathered
    return _all_gather_uneven(rows, counts)


def global_mean(values: Tensor) -> Tensor:
    """What a loss of independent rows returns: their mean over all processes, to be averaged.

    A plain `values.mean()` gives the rows of a process that has fewer of them too much weight.

    Collective: every process must call it.

    Args:
        values: `[B]`, one per row of this process; B may differ between processes, and be 0.

    Returns:
        A scalar whose mean over processes is the mean over the rows of all of them.
    """
    rows = sum(gather_counts(len(values), values.device))
    return values.sum() * (process_count() / rows)


def global_ratio(total: Tensor, count: Tensor | int) -> Tensor:
    """A mean over things that processes have unequally many of, to be averaged over processes.

    Collective: every process must call it.

    Args:
        total: Scalar, the sum over those of this process.
        count: How many they are, without gradient; 0 on every process gives 0, with a graph.

    Returns:
        A scalar whose mean over processes is the sum of the totals over the sum of the counts.
    """
    counts = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total * (process_count() / all_reduce_sum(counts).clamp(min=1))


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean of `value` over processes, without gradient. Collective: every process must call it."""
    return all_reduce_sum(value) / process_count()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum of `value` over processes, without gradient. Collective: every process must call it."""
    total = value.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process. Collective: every process must call it."""
    if not is_distributed():
        return flag
    return any(flag for (flag,) in gather_numbers([int(flag)], device))


@dataclass
class Said:
    """What processes tell each other when they leave `fail_together`.

    Attributes:
        largest: The largest number that any of them said.
    """

    largest: int = 0


@contextmanager
def name_lost_processes(where: Callable[[], str]) -> Iterator[None]:
    """Turn torch's errors about a process that does not answer into one that says who tells it.

    Args:
        where: What this process was at, as in `step 3`.

    Raises:
        DistributedError: in place of them.
    """
    try:
        yield
    except RuntimeError as error:
        from_torch = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if isinstance(error, VembedError) or not from_torch:
            raise
        reason = str(error).strip().splitlines()[0]
        raise DistributedError(
            f"process {process_index()} lost the others at {where()}: one of them ended or hangs, "
            f"and says why if it can. Received: {reason}"
        ) from error


@contextmanager
def fail_together(device: torch.device, say: Callable[[], int] | None = None) -> Iterator[Said]:
    """Raise on every process if one raises inside, so that none waits for it for ever.

    Collective: every process must enter it. There must be no other collective inside.

    Args:
        device: Of the run; numbers do not go through it.
        say: Gives a number from 0 up for the other processes, which costs nothing more.

    Yields:
        What they said, once it is left.

    Raises:
        DistributedError: on the processes that could have gone on; it has the message and the
            `exit_code` of the first one that could not, whose own error is raised there.
    """
    said = Said()
    try:
        yield said
    except Exception as error:
        _share_failure(error, device, said, 0)
        raise
    if failure := _share_failure(None, device, said, 0 if say is None else say()):
        raise failure


def gather_texts(text: str, device: torch.device) -> list[str]:
    """The text of every process, by process. Collective: every process must call it.

    Args:
        text: This process's.
        device: Of the run; texts do not go through it.
    """
    if not is_distributed():
        return [text]
    message = torch.tensor(list(text.encode("utf-8", "replace")), dtype=torch.uint8)
    lengths = gather_counts(len(message), device)
    texts = torch.split(gather_rows(message, lengths), lengths)
    return [bytes(of_process.tolist()).decode() for of_process in texts]


def _share_failure(
    own: Exception | None, device: torch.device, said: Said, number: int
) -> DistributedError | None:
    """What the first process that failed says; None if none did. Collective."""
    said.largest = number
    if not is_distributed():
        return None
    code = 0
    if own is not None:
        code = own.exit_code if isinstance(own, VembedError) else VembedError.exit_code
    shared = gather_numbers([code, number], device)
    codes = [code for code, _ in shared]
    said.largest = max(number for _, number in shared)
    if not any(codes):
        return None
    text = "" if own is None else str(own) if isinstance(own, VembedError) else repr(own)
    texts = gather_texts(text, device)
    rank = next(rank for rank, code in enumerate(codes) if code)
    told = texts[rank]
    failure = DistributedError(f"process {rank} cannot go on, so that none can: {told}")
    failure.exit_code = codes[rank]
    failure.is_shared = True
    if isinstance(own, VembedError) and rank == process_index():
        own.is_shared = True
    return failure


def min_over_processes(number: int, device: torch.device) -> int:
    """The smallest `number` of all processes. Collective: every process must call it."""
    if not is_distributed():
        return number
    return min(of_process for (of_process,) in gather_numbers([number], device))


def local_processes() -> int:
    """Processes of this run on this machine, as launchers say it; 1 when they do not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed() else 1


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Average the gradients of trainable `parameters` over processes, in place, in flat buckets.

    A parameter without a gradient on this process counts as zero, so that processes whose batches
    used different parts of a model agree; one without a gradient on every process keeps `None`.

    Collective: every process must call it with the same parameters in the same order.

    Returns:
        The number of all-reduce calls made, one for each bucket.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not is_distributed() or not trainable:
        return 0
    calls = 0
    for bucket in _buckets(trainable):
        has_own = [p.grad is not None for p in bucket]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        # Who has a gradient goes along: of parameters that none has, zeros travel for nothing, but
        # no process has to ask before it can begin.
        told = to_device(torch.tensor(has_own, dtype=grads[0].dtype), grads[0].device)
        flat = torch.cat([*(g.reshape(-1) for g in grads), told])
        dist.all_reduce(flat)
        *parts, told = torch.split(flat, [*(g.numel() for g in grads), len(bucket)])
        # To look means to wait for the device, which is for those only that lack a gradient.
        used = has_own if all(has_own) else (told > 0).tolist()
        flat /= process_count()
        for parameter, part, is_used in zip(bucket, parts, used, strict=True):
            if is_used:
                parameter.grad = part.view_as(parameter)
        calls += 1
    return calls


def used_anywhere(parameters: Iterable[nn.Parameter]) -> list[bool]:
    """Which parameters have a gradient on any process. Collective: every process must call it."""
    found = list(parameters)
    if not found:
        return []
    used = torch.tensor([p.grad is not None for p in found], dtype=torch.int32)
    if is_distributed():
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=_group_of(used.device))
    return [bool(flag) for flag in used.tolist()]


def reduce_shares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors over processes, each of which keeps its share of the rows.

    Rows are dealt out as by `torch.chunk`: process p gets the p-th chunk, which may be empty.

    Collective: every process must call it with tensors of the same shapes and types.

    Args:
        tensors: Each `[R, ...]`.
    """
    shares: list[Tensor] = []
    for bucket in _buckets(tensors):
        # Chunks are padded to one size, so that a single collective deals out all tensors.
        heights = [-(-len(tensor) // process_count()) for tensor in bucket]
        padded = [
            functional.pad(t.reshape(len(t), -1), (0, 0, 0, height * process_count() - len(t)))
            for t, height in zip(bucket, heights, strict=True)
        ]
        flat = torch.cat([t.view(process_count(), -1) for t in padded], 1)
        own = flat.new_empty(flat.shape[1])
        _reduce_scatter(own, flat.view(-1))
        own /= process_count()
        parts = torch.split(own, [t.numel() // process_count() for t in padded])
        for tensor, height, part in zip(bucket, heights, parts, strict=True):
            rows = min(height, max(0, len(tensor) - height * process_index()))
            shares.append(part.view(height, *tensor.shape[1:])[:rows].contiguous())
    return shares


def _buckets(tensors: Iterable[_Tensor]) -> Iterable[list[_Tensor]]:
    """Consecutive tensors of one dtype, together at most `_BUCKET_BYTES`, or a larger one."""
    bucket: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and (size + nbytes > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket


def _all_gather_uneven(rows: Tensor, counts: list[int]) -> Tensor:
    longest = max(counts)
    if longest == 0:
        return rows.detach().clone()
    padded = rows.detach().contiguous()
    if len(rows) < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = padded.new_empty(longest * len(counts), *rows.shape[1:])
    _all_gather(gathered, padded, group=_group_of(padded.device))
    if min(counts) == longest:
        return gathered
    return torch.cat(
        [gathered[i * longest : i * longest + count] for i, count in enumerate(counts)]
    )
