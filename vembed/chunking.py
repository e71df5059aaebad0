"""Cut the sequences of a batch into chunks that pad little: the one planner of training, evaluation and encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DEFAULT_CHUNK_TOKENS = 4096


def plan_chunks(
    lengths: Sequence[int], *, max_items: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Group sequences of similar length, longest first.

    The budget counts *padded* tokens (sequences x longest of the chunk): a budget of real tokens fills a chunk with many
    short sequences and then pads them all to the longest one.

    Args:
        lengths: Tokens of each sequence.
        max_items: Most sequences in a chunk; None for no limit.
        max_tokens: Most padded tokens in a chunk; None for no limit. A longer sequence gets a chunk of its own.

    Returns:
        Row numbers per chunk; every row is in exactly one chunk. Ties in length keep row order.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    chunks: list[list[int]] = []
    for row in order:
        if chunks and _has_room(chunks[-1], lengths, max_items, max_tokens):
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def _has_room(
    chunk: list[int], lengths: Sequence[int], max_items: int | None, max_tokens: int | None
) -> bool:
    size = len(chunk) + 1
    if max_items is not None and size > max_items:
        return False
    return max_tokens is None or size * max(1, lengths[chunk[0]]) <= max_tokens


def take_rows(
    inputs: Mapping[str, Tensor], rows: Sequence[int], longest: int | None = None
) -> dict[str, Tensor]:
    """The given rows of padded model inputs, cut to their longest sequence.

    Args:
        inputs: Tensors of shape `[B, T]` or `[B, ...]`, with `attention_mask` `[B, T]` when sequences are padded.
        rows: Row numbers.
        longest: Tokens of the longest of these rows, when known; spares a look at the mask (a device sync).
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
