"""How the first micro-batch was encoded: its chunks, and the memory that they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vembed.chunking import count_rows, padded_length, take_rows
from vembed.training.data_utils import maybe_first
from vembed.training.first_step.report import RoleChunks
from vembed.training.gradient_cache import RandomState
from vembed.training.memory import SavedBytes

_COUNTED = ("cuda", "npu", "xpu")
"""Devices whose allocator keeps the peak of what was in use."""


@dataclass(frozen=True)
class Forward:
    """One call of the encoder.

    Attributes:
        rows: Sequences.
        padded_tokens: Tokens of all of them.
        real_tokens: Of these, the ones that are no padding; a scalar that still is on the device.
        kept: Whether its activations were kept.
        first_row: Model inputs of the first sequence.
    """

    rows: int
    padded_tokens: int
    real_tokens: Tensor
    kept: bool
    first_row: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> Forward:
        """What a call with these inputs does."""
        rows = count_rows(inputs)
        padded = rows * padded_length(inputs)
        mask = inputs.get("attention_mask")
        return cls(
            rows=rows,
            padded_tokens=padded,
            real_tokens=torch.tensor(padded) if mask is None else padded - (1 - mask).sum(),
            kept=torch.is_grad_enabled(),
            first_row=take_rows(inputs, [0], padded_length(inputs)),
        )


def split_by_role(forwards: Sequence[Forward], rows: Mapping[str, int]) -> dict[str, list[Forward]]:
    """The passes of each role, whose chunks come role by role.

    Passes before them (a measurement, a first try that ran out of memory) are left out.

    Args:
        forwards: All passes before the loss, in order.
        rows: Rows of each role, in the order in which roles are encoded.

    Returns:
        One entry for each role; only `all` where the passes do not follow the roles.
    """
    left = list(forwards)
    by_role: dict[str, list[Forward]] = {}
    for role in reversed(list(rows)):
        taken: list[Forward] = []
        while left and sum(forward.rows for forward in taken) < rows[role]:
            taken.insert(0, left.pop())
        if sum(forward.rows for forward in taken) != rows[role]:
            return {"all": list(forwards)} if forwards else {}
        by_role = {role: taken, **by_role}
    return by_role


def count_chunks(forwards: Sequence[Forward]) -> RoleChunks:
    """Sum up the passes of one role; waits for the device."""
    return RoleChunks(
        rows=sum(forward.rows for forward in forwards),
        chunks=len(forwards),
        kept=sum(forward.kept for forward in forwards),
        padded_tokens=sum(forward.padded_tokens for forward in forwards),
        real_tokens=sum(int(forward.real_tokens) for forward in forwards),
    )


def expected_activations(encoder: nn.Module, by_role: Mapping[str, Sequence[Forward]]) -> int:
    """Bytes of activations that are held at most at a time.

    Those of every kept chunk, and of the largest of the others, which are encoded again one by one.
    Encodes one sequence of each role once more, which draws no random numbers of the run.
    """
    kept = again = 0.0
    for forwards in filter(None, by_role.values()):
        widest = max(forwards, key=lambda forward: forward.padded_tokens // forward.rows)
        per_token = _saved_bytes(encoder, widest.first_row) * widest.rows / widest.padded_tokens
        kept += per_token * sum(f.padded_tokens for f in forwards if f.kept)
        others = [f.padded_tokens for f in forwards if not f.kept]
        again = max(again, per_token * max(others, default=0))
    return round(kept + again)


def _saved_bytes(encoder: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    before = RandomState(next(iter(inputs.values())).device)
    with torch.enable_grad(), SavedBytes() as saved:
        maybe_first(encoder(**inputs))
    before.restore()
    return saved.total


class PeakMemory:
    """The most memory that was in use on a device since it was made, above what was then."""

    def __init__(self, device: torch.device) -> None:
        """Start to count, where the device can."""
        self._device = device
        self._before = 0
        if device.type in _COUNTED:
            module = torch.get_device_module(device)
            module.reset_peak_memory_stats(device)
            self._before = module.memory_allocated(device)

    def read(self) -> int | None:
        """Bytes; None on a device that does not count."""
        if self._device.type not in _COUNTED:
            return None
        peak = torch.get_device_module(self._device).max_memory_allocated(self._device)
        return int(peak) - self._before
