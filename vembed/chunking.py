"""Cut a batch into chunks that pad little: the one planner of training, evaluation and encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEFAULT_CHUNK_TOKENS = 4096

_OVERHEAD_TOKENS = {"cpu": 64}
_ACCELERATOR_OVERHEAD_TOKENS = 2048


def chunk_overhead(device_type: str) -> int:
    """What a further forward pass costs on a device, in padded tokens of the same time.

    Kernel launches and small matrices: little on a CPU, whose caches like small chunks, much on an
    accelerator, which is idle between small kernels.
    """
    return _OVERHEAD_TOKENS.get(device_type, _ACCELERATOR_OVERHEAD_TOKENS)


def plan_chunks(
    lengths: Sequence[int],
    *,
    max_items: int | None = None,
    max_tokens: int | None = None,
    overhead: int = _OVERHEAD_TOKENS["cpu"],
) -> list[list[int]]:
    """Group sequences of similar length, longest first, so that the whole costs least.

    A chunk costs its *padded* tokens (sequences x longest of the chunk) plus `overhead`; the plan
    is the cheapest there is of sequences in order of length. Budgets count padded tokens too: a
    budget of real tokens fills a chunk with short sequences and pads them all to the longest one.

    Args:
        lengths: Tokens of each sequence.
        max_items: Most sequences in a chunk; None for no limit.
        max_tokens: Most padded tokens in a chunk; None for no limit. A longer sequence gets a chunk
            of its own.
        overhead: Cost of a chunk beside its tokens; see `chunk_overhead`.

    Returns:
        Row numbers per chunk; every row is in exactly one chunk. Ties in length keep row order.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if not order:
        return []
    distinct, counts = np.unique(np.asarray(lengths), return_counts=True)
    longest, counts = np.maximum(distinct[::-1], 1), counts[::-1]
    room = np.full(len(longest), len(order) if max_items is None else max_items)
    if max_tokens is not None:
        room = np.minimum(room, np.maximum(max_tokens // longest, 1))
    starts = np.concatenate([[0], np.cumsum(counts)])
    chunks = []
    for first, end in _cheapest_groups(longest, starts, room, overhead):
        for start in range(starts[first], starts[end], room[first]):
            chunks.append(order[start : min(start + room[first], starts[end])])
    return chunks


def _cheapest_groups(
    longest: NDArray[np.int64], starts: NDArray[np.int64], room: NDArray[np.int64], overhead: int
) -> list[tuple[int, int]]:
    """Cut the distinct lengths into runs that are padded alike; dynamic programming over the cuts.

    Args:
        longest: Distinct lengths, the largest first.
        starts: Position of each length's first sequence, and the number of sequences at the end.
        room: Sequences that fit into a chunk of each length.
        overhead: Cost of a chunk beside its tokens.

    Returns:
        Runs as (first, end) positions in `longest`, in order.
    """
    total = len(longest)
    best = np.zeros(total + 1, dtype=np.int64)
    cut = np.zeros(total + 1, dtype=np.int64)
    for end in range(1, total + 1):
        rows = starts[end] - starts[:end]
        cost = best[:end] + rows * longest[:end] + overhead * -(-rows // room[:end])
        cut[end] = int(cost.argmin())
        best[end] = cost[cut[end]]
    groups = []
    end = total
    while end > 0:
        groups.append((int(cut[end]), end))
        end = int(cut[end])
    return groups[::-1]


def take_rows(
    inputs: Mapping[str, Tensor], rows: Sequence[int], longest: int | None = None
) -> dict[str, Tensor]:
    """The given rows of padded model inputs, cut to their longest sequence.

    Args:
        inputs: Tensors of shape `[B, T]` or `[B, ...]`, with `attention_mask` `[B, T]` when
            sequences are padded.
        rows: Row numbers.
        longest: Tokens of the longest of these rows, when known; spares a look at the mask.
    """
    mask = inputs.get("attention_mask")
    index = torch.as_tensor(rows, device=next(iter(inputs.values())).device)
    picked = {name: tensor.index_select(0, index) for name, tensor in inputs.items()}
    if mask is None:
        return picked
    width = mask.shape[1]
    longest = int(picked["attention_mask"].sum(1).max()) if longest is None else longest
    if longest >= width:
        return picked
    # Right padding leaves column 0 real in every row; left padding leaves the last column real.
    right_padded = bool(picked["attention_mask"][:, 0].all())
    keep = slice(0, longest) if right_padded else slice(width - longest, width)
    return {
        name: tensor[:, keep] if tensor.dim() == 2 and tensor.shape[1] == width else tensor
        for name, tensor in picked.items()
    }
