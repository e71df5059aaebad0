"""Encode any number of items: each distinct one once, in chunks of similar length, in input order.

# Shapes: n items, T_i tokens of item i, D embedding size
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.chunking import (
    DEFAULT_CHUNK_TOKENS,
    chunk_overhead,
    count_tokens,
    plan_chunks,
    take_rows,
)
from vembed.errors import ConfigError
from vembed.models.checkpoint_format import NO_POOLING
from vembed.models.protocol import Encoder, Role
from vembed.modes import Item
from vembed.placing import to_device
from vembed.token_vectors import TokenVectors, Vectors, join_vectors

# Items tokenised together: enough for a chunk to find items of its own length, and few enough that
# a corpus of any size never needs more memory for token ids than these.
_WINDOW_ITEMS = 2048
# Pixels take more room than token ids: 150 kB for a small image in float32, megabytes for a large.
_WINDOW_IMAGES = 64


def encode_items(
    encoder: Encoder,
    items: Sequence[Item],
    *,
    role: Role | None,
    prompt: str | None = None,
    normalize: bool | None = None,
    truncate_dim: int | None = None,
    chunk_tokens: int | None = DEFAULT_CHUNK_TOKENS,
    max_items: int | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Vectors:
    """Embed `items` without gradients, in eval mode; the encoder's modes are restored afterwards.

    Args:
        encoder: Stays on its device.
        items: n things to embed; equal ones are encoded once.
        role: Decides the prompt; None stands for the checkpoint's default prompt.
        prompt: Text put before every item instead of the role's; `""` for none.
        normalize: Unit length or not; None takes the encoder's own.
        truncate_dim: How many numbers of each vector are kept, the first; what has unit length, has
            it afterwards too. None keeps all.
        chunk_tokens: Most padded tokens in a forward pass; None for no limit.
        max_items: Most items in a forward pass; None for no limit.
        device: Where inputs go; None takes the encoder's device.
        autocast_dtype: Run the forward pass in this type; None runs it in the type of the weights.
        progress: Called after each chunk with the number of further `items` that are done.

    Returns:
        `[n, D]`, in the order of `items`; of an encoder that keeps tokens, `[T_i, D]` of each item.

    Raises:
        ConfigError: if the vectors cannot be cut to `truncate_dim`.
    """
    check_truncate_dim(encoder, truncate_dim)
    where = next(encoder.parameters()).device if device is None else torch.device(device)
    copies = Counter(items)
    # Longest first, so that memory runs out at once or not at all. Characters stand in for tokens
    # until a window is tokenised.
    distinct = sorted(copies, key=lambda item: (_kind(item), -len(item.text or "")))
    parts: list[Vectors] = []
    encoded: list[Item] = []
    autocast = torch.autocast(where.type, autocast_dtype, enabled=autocast_dtype is not None)
    with eval_mode(encoder), torch.no_grad(), autocast:
        for window in _windows(distinct):
            prompts = None if prompt is None else [prompt] * len(window)
            inputs = encoder.processor(window, role=role, prompts=prompts)
            lengths = count_tokens(inputs)
            chunks = plan_chunks(
                lengths,
                max_items=max_items,
                max_tokens=chunk_tokens,
                overhead=chunk_overhead(where.type),
            )
            outputs: list[Tensor] = []
            for rows in chunks:
                chunk = take_rows(inputs, rows, longest=lengths[rows[0]])
                on_device = {name: to_device(tensor, where) for name, tensor in chunk.items()}
                output = encoder(normalize=normalize, **on_device).float()
                if truncate_dim is not None:
                    unit = encoder.normalize if normalize is None else normalize
                    output = _truncate(output, truncate_dim, unit=unit)
                outputs.append(output)
                if progress is not None:
                    progress(sum(copies[window[row]] for row in rows))
            encoded += [window[row] for rows in chunks for row in rows]
            parts.append(_to_host(outputs))
    position = {item: i for i, item in enumerate(encoded)}
    size = truncate_dim or encoder.embedding_dim
    vectors = join_vectors(parts) if parts else np.empty((0, size), np.float32)
    return vectors[np.asarray([position[item] for item in items], dtype=np.int64)]


def check_truncate_dim(encoder: Encoder, truncate_dim: int | None) -> None:
    """Raise ConfigError unless the encoder's vectors have so many numbers, one vector an item."""
    if truncate_dim is None:
        return
    if encoder.pooling_method == NO_POOLING:
        raise ConfigError(
            "truncate_dim: this model gives a vector for each token, and is not cut. Remove it"
        )
    if not 1 <= truncate_dim <= encoder.embedding_dim:
        raise ConfigError(
            f"truncate_dim: expected from 1 to {encoder.embedding_dim}, the size of the model's "
            f"vectors. Received: {truncate_dim}"
        )


def _truncate(vectors_BD: Tensor, dim: int, *, unit: bool) -> Tensor:
    if dim == vectors_BD.shape[-1]:
        return vectors_BD
    cut_Bd = vectors_BD[:, :dim]
    return functional.normalize(cut_Bd, dim=-1) if unit else cut_Bd


def _to_host(outputs: list[Tensor]) -> Vectors:
    """What the chunks of a window gave, one after the other."""
    if outputs[0].dim() == 3:
        # Chunk by chunk, because together they would be padded to the longest item.
        return join_vectors([TokenVectors.from_padded(output) for output in outputs])
    # One copy from the device: copying each chunk would make the device wait for the host.
    vectors: npt.NDArray[np.float32] = torch.cat(outputs).cpu().numpy()
    return vectors


def _kind(item: Item) -> tuple[bool, bool]:
    """Which parts an item has: those that have the same go through the model together."""
    return item.image is not None, item.text is not None


def _windows(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items of one kind, as many as are processed together."""
    for (has_image, _), same in groupby(items, key=_kind):
        listed = list(same)
        size = _WINDOW_IMAGES if has_image else _WINDOW_ITEMS
        yield from (listed[i : i + size] for i in range(0, len(listed), size))


@contextmanager
def eval_mode(encoder: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own mode again, frozen parts included."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
