"""Cosine similarity and temperature, as every loss uses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vembed.errors import ConfigError

MAX_LOGIT_SCALE = math.log(100)
"""Upper bound of a learned `logit_scale`: temperature 0.01, as in CLIP (Radford et al., 2021)."""

_LEAST_LENGTH = 1e-12
"""As in `functional.normalize`."""

_PRODUCT_BYTES = 4 * 2**20
"""Products of numbers that are held until they are added up."""


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast does not lower the precision of a loss."""
    return torch.autocast(device.type, enabled=False)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to length one, in float32 or, if they come in it, float64; zero stays zero.

    The gradient of a row that is zero is that of a row of length one: `functional.normalize` has
    1e12 times as much, which fp16 cannot hold and which would be all that is left after clipping.
    Backward needs no more room than its result, where operations of torch take three times that.
    """
    unit: Tensor = _UnitRows.apply(rows)  # type: ignore[no-untyped-call]
    return unit


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        length = wide.norm(dim=-1, keepdim=True)
        length.masked_fill_(length < _LEAST_LENGTH, 1)
        unit: Tensor = wide / length
        ctx.dtype = rows.dtype
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        unit, length = ctx.saved_tensors
        along = dot_rows(grad, unit).unsqueeze(-1)
        grad_rows = torch.addcmul(grad, unit, along, value=-1).div_(length)
        return grad_rows.to(ctx.dtype)


def dot_rows(first: Tensor, second: Tensor) -> Tensor:
    """Of each row of one, and of the same row of the other, the dot product: `[..., D]` to `[...]`.

    Products are held for some rows at a time.
    """
    step = max(1, _PRODUCT_BYTES // max(1, first.element_size() * first[:1].numel()))
    if len(first) <= step:
        return (first * second).sum(-1)
    parts = zip(torch.split(first, step), torch.split(second, step), strict=True)
    return torch.cat([(one * other).sum(-1) for one, other in parts])


def paired_dots(rows_MD: Tensor, columns_MD: Tensor) -> Tensor:
    """`[M]`, row i with column i; backward makes the two gradients one after the other."""
    apply: Callable[..., Tensor] = _DotsForRows.apply
    return apply(columns_MD, rows_MD.detach(), apply(rows_MD, columns_MD.detach(), None))


class _DotsForRows(torch.autograd.Function):
    """Differentiable in the first argument; what is known of the result already is passed on."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, fixed: Tensor, known: Tensor | None) -> Tensor:
        ctx.save_for_backward(fixed)
        return dot_rows(rows, fixed) if known is None else known.view_as(known)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (fixed,) = ctx.saved_tensors
        grad_rows = grad[:, None] * fixed if ctx.needs_input_grad[0] else None
        return grad_rows, None, grad if ctx.needs_input_grad[2] else None


def dot_products(rows_RD: Tensor, columns_CD: Tensor) -> Tensor:
    """`[R, C]`, each row with each column; also backward as precise, inside autocast or not."""
    products: Tensor = _DotProducts.apply(rows_RD, columns_CD)  # type: ignore[no-untyped-call]
    return products


class _DotProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, columns_CD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, columns_CD)
        return rows_RD @ columns_CD.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows_RD, columns_CD = ctx.saved_tensors
        # The caller's autocast is on in backward, and would lower these products.
        with full_precision(rows_RD.device):
            return grads[0] @ columns_CD, grads[0].T @ rows_RD


def check_temperature(temperature: float, *, learned: bool = False) -> None:
    """Check that similarities can be divided by `temperature`.

    Raises:
        ConfigError: if it is not above zero or, when learned, outside the range it is clamped to.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature: must be above 0. Received: {temperature!r}")
    if learned and not 0.01 <= temperature <= 1:
        raise ConfigError(
            "temperature: learn_temperature keeps it within [0.01, 1], so it must start there. "
            f"Received: {temperature!r}"
        )


def new_logit_scale(temperature: float, learned: bool) -> nn.Parameter | None:
    """The parameter `log(1 / temperature)`, or None when the temperature is fixed."""
    check_temperature(temperature, learned=learned)
    return nn.Parameter(torch.tensor(-math.log(temperature))) if learned else None


def clamp_logit_scale(logit_scale: nn.Parameter | None) -> None:
    """Bring a learned scale back into [0, ln 100], in place."""
    if logit_scale is not None:
        with torch.no_grad():
            logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def similarity_scale(logit_scale: nn.Parameter | None, temperature: float, like: Tensor) -> Tensor:
    """What similarities are multiplied by: a scalar tensor of the type and device of `like`."""
    if logit_scale is not None:
        return logit_scale.exp().to(like.dtype)
    # `full` fills on the device, where `tensor` would copy from the host and wait for it.
    return torch.full((), 1 / temperature, dtype=like.dtype, device=like.device)
