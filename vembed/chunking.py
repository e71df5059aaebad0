"""Cut a batch into chunks that pad little: the one planner of training, evaluation and encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vembed.placing import index_tensor

DEFAULT_CHUNK_TOKENS = 4096
_CHUNK_TOKENS = {"cpu": 2048}

IMAGE_INPUTS = frozenset(
    {
        "pixel_values",
        "pixel_attention_mask",
        "spatial_shapes",
        "image_grid_thw",
        "image_sizes",
    }
)
"""Model inputs that are about images; all others are about tokens."""

_PIXELS_PER_TOKEN = 16 * 16

_OVERHEAD_TOKENS = {"cpu": 64}
_ACCELERATOR_OVERHEAD_TOKENS = 2048


def chunk_overhead(device_type: str) -> int:
    """What a further forward pass costs on a device, in padded tokens of the same time.

    Kernel launches and small matrices: little on a CPU, whose caches like small chunks, much on an
    accelerator, which is idle between small kernels.
    """
    return _OVERHEAD_TOKENS.get(device_type, _ACCELERATOR_OVERHEAD_TOKENS)


def chunk_tokens_on(device_type: str, given: int | None = None) -> int:
    """Most padded tokens of a forward pass on a device, unless they are given.

    On a CPU, passes of 2,048 tokens took 0.96 to 0.99 of the time that passes of 4,096 did (texts
    of 32 and 64 tokens, all-MiniLM-L6-v2), because more of what a layer works on stays in its
    caches, and as long with texts of 128.
    """
    return given or _CHUNK_TOKENS.get(device_type, DEFAULT_CHUNK_TOKENS)


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


def count_rows(inputs: Mapping[str, Tensor]) -> int:
    """Items that model inputs hold."""
    # The patches of all images lie in one tensor, whose length says nothing about items.
    told = next((inputs[name] for name in ("input_ids", "image_grid_thw") if name in inputs), None)
    return len(next(iter(inputs.values())) if told is None else told)


def count_tokens(inputs: Mapping[str, Tensor]) -> list[int]:
    """What each item costs to encode: its real tokens, and those of its image.

    An image in a tensor of its own counts one token for each 16 x 16 pixels, or its patches where
    it comes cut up; images that are tokens of the text's sequence are counted there.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return [padded_length(inputs)] * count_rows(inputs)
    image = _image_tokens(inputs)
    return [int(count) + image for count in mask.sum(1).tolist()]


def padded_length(inputs: Mapping[str, Tensor]) -> int:
    """What each item costs with its padding, in the tokens of `count_tokens`."""
    tokens = inputs.get("attention_mask", inputs.get("input_ids"))
    return max((0 if tokens is None else tokens.shape[1]) + _image_tokens(inputs), 1)


def take_rows(
    inputs: Mapping[str, Tensor], rows: Sequence[int], longest: int | None = None
) -> dict[str, Tensor]:
    """The given rows of padded model inputs, cut to their longest sequence.

    Args:
        inputs: Tensors of shape `[B, T]` or `[B, ...]`, with `attention_mask` `[B, T]` when
            sequences are padded. With `image_grid_thw` `[B, 3]`, the grid of patches of each item's
            image, `pixel_values` are the patches of all images, one image after the other.
        rows: Row numbers.
        longest: What the longest of these rows costs, as `count_tokens` says it, when known; spares
            a look at the mask, which on an accelerator means to wait for it.
    """
    index = index_tensor(rows, next(iter(inputs.values())).device)
    picked = {
        name: _take_patches(inputs, rows)
        if name == "pixel_values" and "image_grid_thw" in inputs
        else tensor.index_select(0, index)
        for name, tensor in inputs.items()
    }
    mask = picked.get("attention_mask")
    if mask is None:
        return picked
    width = mask.shape[1]
    tokens = int(mask.sum(1).max()) if longest is None else longest - _image_tokens(inputs)
    if tokens >= width:
        return picked
    # Right padding leaves column 0 real in every row; left padding leaves the last column real.
    # Which of them it is stays on the device: asking would mean to wait for it.
    start = torch.where(mask[:, 0].all(), 0, width - tokens)
    columns = start + torch.arange(tokens, device=mask.device)
    return {
        name: tensor.index_select(1, columns)
        if name not in IMAGE_INPUTS and tensor.dim() == 2 and tensor.shape[1] == width
        else tensor
        for name, tensor in picked.items()
    }


def _image_tokens(inputs: Mapping[str, Tensor]) -> int:
    """Tokens of each item's image, where images have a tensor of their own, all of one size."""
    pixels = inputs.get("pixel_values")
    if pixels is None or "image_grid_thw" in inputs:
        return 0
    if "spatial_shapes" in inputs:
        return pixels.shape[1]
    per_item = pixels.shape[1:]
    area = per_item[-1] * per_item[-2] if len(per_item) > 2 else 1
    crops = per_item[0] if len(per_item) > 3 else 1
    return max(crops * area // _PIXELS_PER_TOKEN, 1)


def _take_patches(inputs: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    patches, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    if len(grids) != count_rows(inputs):
        raise ValueError(
            f"take_rows: expected one image per item. "
            f"Received: {len(grids)} images for {count_rows(inputs)} items"
        )
    counts = grids.prod(1).tolist()
    images = torch.split(patches, counts)
    return torch.cat([images[row] for row in rows])
