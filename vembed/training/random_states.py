"""The random states of a process: of torch on the CPU and the device, of numpy and of Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU, _DEVICE = "random.cpu", "random.device"


@dataclass(frozen=True)
class RandomStates:
    """Where every global generator stands.

    Attributes:
        tensors: Those of torch, by name.
        others: Those of numpy and Python, as JSON can hold them.
    """

    tensors: dict[str, Tensor]
    others: dict[str, Any]

    @classmethod
    def take(cls, device: torch.device) -> RandomStates:
        """As they are now.

        Args:
            device: Where the encoder runs.
        """
        tensors = {_CPU: torch.get_rng_state()}
        if device.type != "cpu":
            tensors[_DEVICE] = torch.get_device_module(device).get_rng_state(device).cpu()
        # `legacy=False` gives a mapping.
        state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - others may draw from it
        inner = {name: np.asarray(value).tolist() for name, value in state["state"].items()}
        version, words, gauss = random.getstate()
        return cls(
            tensors,
            {"numpy": {**state, "state": inner}, "python": [version, list(words), gauss]},
        )

    def restore(self, device: torch.device) -> None:
        """Make every later draw of this process continue from here."""
        torch.set_rng_state(self.tensors[_CPU])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(self.tensors[_DEVICE], device)
        of_numpy = self.others["numpy"]
        inner = {**of_numpy["state"], "key": np.asarray(of_numpy["state"]["key"], dtype=np.uint32)}
        np.random.set_state({**of_numpy, "state": inner})  # noqa: NPY002 - as above
        version, words, gauss = self.others["python"]
        random.setstate((version, tuple(words), gauss))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[RandomStates]:
    """Inside, whatever is drawn changes nothing for what is drawn afterwards; gives the states."""
    before = RandomStates.take(device)
    try:
        yield before
    finally:
        before.restore(device)
