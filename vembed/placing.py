"""Tensors on a device without waiting for it, and what the host still knows of them.

An accelerator works behind the host. To ask it for a number means to wait until it has done all
that was asked of it before, and to leave it idle until the next command arrives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HOST_COPY = "_vembed_host_copy"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there. What comes from the host, `on_host` finds again as it was."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    # From memory that is not pinned, CUDA copies when the device is idle, and waits for that.
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    placed = source.to(device, non_blocking=True)
    setattr(placed, _HOST_COPY, tensor)
    return placed


def on_host(tensor: Tensor) -> Tensor:
    """What a tensor holds, in the host's memory: without waiting where it came from there."""
    known: Tensor | None = getattr(tensor, _HOST_COPY, None)
    return tensor.cpu() if known is None else known


def index_tensor(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`[n]` int64 on a device."""
    return to_device(torch.tensor(numbers, dtype=torch.int64), device)
