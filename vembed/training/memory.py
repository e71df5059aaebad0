"""How much memory there is, and how much of it a forward pass keeps for its backward pass."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def available_bytes(device: torch.device, processes: int = 1) -> int:
    """Memory that can still be taken on a device.

    Args:
        device: An accelerator, or the CPU, whose memory the processes of this machine share.
        processes: Processes on this machine.
    """
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // processes
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    # What the allocator holds without using it can be used as well.
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


class SavedBytes:
    """Counts the bytes that autograd saves for backward inside a `with` block; weights excluded.

    Attributes:
        total: Bytes of the distinct storages that were saved.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.total = 0
        self._seen: set[int] = set()
        self._hooks = saved_tensors_hooks(self._count, lambda saved: saved)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _count(self, tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage()
        if not isinstance(owner, nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor
