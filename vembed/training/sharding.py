"""Weights, gradients and optimizer state shared out among processes (FSDP2, torch's `fully_shard`).

FSDP2 communicates in every forward and every backward pass. Chunks do not go together with that:
processes cut their batches into different numbers of them, some of which use one tower only, and
whoever does not take part in a collective leaves the others waiting. So weights are gathered once
per optimizer step and whole until its end; gradients add up where they are, and are reduced once,
each process keeping its share. Between steps nothing is whole; the optimizer only sees shares.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vembed.distributed import (
    all_reduce_sum,
    process_count,
    process_index,
    reduce_shares,
    used_anywhere,
)
from vembed.errors import ConfigError


class ShardedEncoder:
    """An encoder of which each process holds a share, and how to have all of it for a while.

    Parameters without dimensions, such as a temperature, stay whole: FSDP2 cannot split them.

    Attributes:
        encoder: The encoder itself, its parameters replaced by shares (`DTensor`).
    """

    def __init__(self, encoder: nn.Module, *, device: torch.device) -> None:
        """Share out the parameters, in place. Collective: every process must call it.

        Args:
            encoder: On `device`, with the same weights on every process.
            device: What the process group communicates from.
        """
        self.encoder = encoder
        self._empty_copy = _without_weights(encoder)
        mesh = init_device_mesh(device.type, (process_count(),))
        scalars = {parameter for parameter in encoder.parameters() if parameter.ndim == 0}
        settings: dict[str, Any] = {
            "mesh": mesh, "reshard_after_forward": False, "ignored_params": scalars,
        }  # fmt: skip
        for block in _blocks(encoder):
            fully_shard(block, **settings)
        root = fully_shard(encoder, **settings)
        root.set_reshard_after_backward(False)
        # Gradients are reduced by `reduce_gradients`, whichever passes there were before.
        root.set_requires_gradient_sync(False)
        self._shards = [module for module in encoder.modules() if isinstance(module, FSDPModule)]

    def gather(self) -> None:
        """Make the weights whole until `reduce_gradients`, or `release`; again costs nothing.

        Collective: every process must call it.
        """
        for module in self._shards:
            module.unshard()

    def release(self) -> None:
        """Go back to shares."""
        for module in self._shards:
            module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Weights are whole inside, for forward passes that differ between processes.

        Collective: every process must enter it.
        """
        self.gather()
        try:
            yield
        finally:
            self.release()

    def reduce_gradients(self) -> None:
        """Average gradients over processes; each keeps those of its share. Weights are released.

        A parameter that got no gradient on any process keeps none. Collective.
        """
        whole = {n: p for n, p in self.encoder.named_parameters() if p.requires_grad and p.ndim}
        used = used_anywhere(whole.values())
        names = [name for name, flag in zip(whole, used, strict=True) if flag]
        grads = [_gradient(whole[name]) for name in names]
        for parameter in whole.values():
            parameter.grad = None
        self.release()
        shares = dict(self.encoder.named_parameters())
        for name, grad in zip(names, reduce_shares(grads), strict=True):
            share = shares[name]
            share.grad = share_like(share, grad)

    def plain_copy(self) -> nn.Module | None:
        """The encoder with all of its weights, on the CPU of the main process; None on the others.

        Collective.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.encoder, options=options)
        if process_index() != 0:
            return None
        plain = copy.deepcopy(self._empty_copy).to_empty(device="cpu")
        plain.load_state_dict(weights)
        # Also those that checkpoints do not hold, such as the numbers of positions.
        buffers = dict(self.encoder.named_buffers())
        for name, buffer in plain.named_buffers():
            buffer.copy_(buffers[name])
        return plain


def adopt_shares(optimizer: Optimizer, before: Iterable[nn.Parameter], module: nn.Module) -> None:
    """Let an optimizer step the parameters that took the place of those it was built with.

    Args:
        optimizer: Without state yet.
        before: The module's parameters before they were shared out.
        module: The module now.

    Raises:
        ConfigError: if the optimizer has stepped before, or one of its groups holds whole
            parameters beside shares, which torch cannot update together.
    """
    if optimizer.state:
        raise ConfigError("distributed_strategy: fsdp2 needs an optimizer that has not stepped yet")
    after = {id(old): new for old, new in zip(before, module.parameters(), strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [after.get(id(p), p) for p in group["params"]]
        if len({isinstance(p, DTensor) for p in group["params"]}) > 1:
            raise ConfigError(
                "distributed_strategy: fsdp2 shares out the model's parameters, but not those of "
                "the loss nor those without dimensions. Received: an optimizer with both kinds in "
                "one group; build it with build_optimizer(model, config, criterion)"
            )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients of shares and of whole parameters to a total norm of at most `max_norm`.

    Collective: every process must call it.

    Returns:
        The norm before.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(found)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(own_parts(found), factor)
    return norm


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, shares counted with those of the other processes.

    Collective where there are shares: every process must call it with the same tensors.
    """
    shares = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    squares = torch.nn.utils.get_total_norm(whole).square()
    if shares:
        squares = squares + all_reduce_sum(
            torch.nn.utils.get_total_norm(own_parts(shares)).square()
        )
    return squares.sqrt()


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: the same memory, as a plain tensor."""
    return [own_part(tensor) for tensor in tensors]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the same memory, as a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_like(share: Tensor, own: Tensor) -> Tensor:
    """This process's part as a share of a whole, where `share` is one; else the part itself."""
    return _like(share, own) if isinstance(share, DTensor) else own


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out. Collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    """The repeated layers: what is gathered in one go, and needs room for a second copy then."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for of in lists for layer in of for m in layer.modules() if m is not layer}
    return [
        layer
        for of in lists
        for layer in of
        if id(layer) not in inner and next(layer.parameters(), None) is not None
    ]


def _without_weights(encoder: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes only."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in encoder.buffers()}
    for parameter in encoder.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return copy.deepcopy(encoder, memo)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _like(share: DTensor, own: Tensor) -> Tensor:
    made: Tensor = DTensor.from_local(
        own, share.device_mesh, share.placements, run_check=False,
        shape=share.shape, stride=share.stride(),
    )  # fmt: skip
    return made
