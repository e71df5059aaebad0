"""Memory and operations of a model that has no weights: its forward and backward on fake tensors.

A fake tensor has a shape, a type and a device but no memory, and every operation on it only says
what it would allocate. So the code that runs is the model's own: attention kernels, autocast,
adapters, dropout and recomputed layers need no formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vembed.errors import ConfigError
from vembed.models.weights import without_weights

Encode = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class ChunkCost:
    """What one forward and backward pass takes beside weights and their gradients.

    Attributes:
        saved: Bytes that the forward pass leaves for the backward pass.
        forward_peak: Most bytes at a time in a forward pass that saves nothing.
        peak: Most bytes at a time in forward and backward.
        forward_flops: Floating-point operations of the forward pass, an addition being one and a
            multiplication another.
        backward_flops: Those of the backward pass, recomputed layers included.
    """

    saved: int
    forward_peak: int
    peak: int
    forward_flops: int
    backward_flops: int


class Tracer:
    """Builds models without memory, and runs them."""

    def __init__(self, *, autocast: torch.dtype | None = None) -> None:
        """Set up.

        Args:
            autocast: Type that forward passes compute in; None for that of the weights.
        """
        self._autocast = autocast
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Inside, `load_encoder` builds backbones without weights."""

        def build(make: Callable[[], Any]) -> Any:
            with self._mode:
                return make()

        with without_weights(build):
            yield

    def empty(self, model: nn.Module) -> None:
        """Take the memory of every parameter and buffer that was loaded all the same."""
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = self._mode.from_tensor(parameter)
                module.register_parameter(name, nn.Parameter(fake, parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self._mode.from_tensor(buffer)

    def cost(self, model: nn.Module, encode: Encode, inputs: Mapping[str, Tensor]) -> ChunkCost:
        """What a chunk takes once every parameter has a gradient, as after the first chunk.

        Args:
            model: Built here.
            encode: Calls it, as a training step does.
            inputs: Of the chunk; only shapes and types matter.

        Raises:
            ConfigError: if the model decides by the values of tensors what to compute.
        """
        try:
            return self._cost(model, encode, inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"this model cannot be planned without running it: what it computes depends on the "
                f"values of tensors ({error}). Take `vembed check`, which takes one real step"
            ) from error

    def _cost(self, model: nn.Module, encode: Encode, inputs: Mapping[str, Tensor]) -> ChunkCost:
        with self._mode:
            taken = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            known = [*model.parameters(), *model.buffers(), *taken.values()]
            known += [p.grad for p in model.parameters() if p.grad is not None]
            with Watch(known) as bare, torch.no_grad():
                self._encode(encode, taken)
            with Watch(known) as watch:
                output = self._encode(encode, taken)
                saved, forward_flops = watch.bytes, watch.flops
                if output.requires_grad:
                    torch.autograd.backward(output, torch.empty_like(output))
        return ChunkCost(
            saved, bare.most_bytes, watch.most_bytes, forward_flops, watch.flops - forward_flops
        )

    def _encode(self, encode: Encode, inputs: dict[str, Tensor]) -> Tensor:
        enabled = self._autocast is not None
        with torch.autocast("cpu", self._autocast or torch.bfloat16, enabled=enabled):
            return encode(dict(inputs)).float()


class Watch(TorchDispatchMode):
    """Counts floating-point operations, and the bytes of what they make until it is let go.

    Attributes:
        bytes: Bytes that live now.
        most_bytes: Most of them at a time.
        flops: Operations of matrix products, convolutions and attention.
    """

    def __init__(self, known: list[Tensor]) -> None:
        """Start at zero.

        Args:
            known: Tensors that were there before; they and their views do not count.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most_bytes = self.flops = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._watched: dict[int, Any] = {storage._cdata: None for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # as torch declares it
        """Run an operation and count what it returns."""
        output = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return output

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched:
            return
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)

        def let_go(_: Any) -> None:
            del self._watched[key]
            self.bytes -= size

        self._watched[key] = weakref.ref(storage, let_go)
