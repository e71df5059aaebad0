"""Token vectors to one vector per sequence.

Every function sees only real tokens, wherever the padding is, and gives at least float32: sums of
many half-precision numbers would lose digits. What stands at padded positions, NaN included, never
reaches the result.

# Shapes: B sequences, T tokens, H size of a token vector
"""

from __future__ import annotations

import torch
from torch import Tensor

from vembed.errors import ConfigError
from vembed.models.checkpoint_format import NO_POOLING
from vembed.registry import did_you_mean


def pool(method: str, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Pool `[B, T, H]` to `[B, H]`, float32 or wider.

    Args:
        method: A name of `POOLINGS`.
        hidden_BTH: Token vectors.
        mask_BT: 1 where a token is real; every row must have one.
    """
    pooled: Tensor = POOLINGS[method](hidden_BTH, mask_BT.bool())
    return pooled.to(torch.promote_types(pooled.dtype, torch.float32))


def check_pooling_method(method: str) -> None:
    """Raise ConfigError unless `method` is a name of `POOLINGS`, or none."""
    known = (*POOLINGS, NO_POOLING)
    if method not in known:
        raise ConfigError(
            f"pooling_method: unknown name {method!r}{did_you_mean(method, known)}. "
            f"One of: {', '.join(known)}"
        )


def keep_tokens(unit_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Token vectors as they are, but zeros at padding (see `vembed.token_vectors`)."""
    return unit_BTD.masked_fill(~mask_BT.bool().unsqueeze(-1), 0)


def first_token(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The first real token: the CLS token of models that have one."""
    return _take(hidden_BTH, mask_BT.int().argmax(1))


def last_token(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The last real token: the only one that has seen the whole text when attention is causal."""
    return _take(hidden_BTH, mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1))


def mean(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The average of real tokens."""
    total_BH = _sum(hidden_BTH, mask_BT)
    return total_BH / mask_BT.sum(1, keepdim=True)


def mean_sqrt_len(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum of real tokens over the square root of their number."""
    total_BH = _sum(hidden_BTH, mask_BT)
    return total_BH / mask_BT.sum(1, keepdim=True).to(total_BH.dtype).sqrt()


def weighted_mean(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The average of real tokens, weighted 1, 2, 3 ... from the first (SGPT, arXiv:2202.08904)."""
    wide = torch.promote_types(hidden_BTH.dtype, torch.float32)
    weight_BT = (mask_BT.cumsum(1) * mask_BT).to(wide)
    total_BH = _sum(hidden_BTH.to(wide) * weight_BT.unsqueeze(-1), mask_BT)
    return total_BH / weight_BT.sum(1, keepdim=True)


def maximum(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The largest value of each column among real tokens."""
    return hidden_BTH.masked_fill(~mask_BT.unsqueeze(-1), -torch.inf).amax(1)


def _take(hidden_BTH: Tensor, index_B: Tensor) -> Tensor:
    return hidden_BTH[torch.arange(len(hidden_BTH), device=hidden_BTH.device), index_B]


def _sum(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    # Filling, unlike multiplying by 0, also removes a NaN that attention left where it had nothing
    # to attend to.
    real_BTH = hidden_BTH.masked_fill(~mask_BT.unsqueeze(-1), 0)
    return real_BTH.sum(1, dtype=torch.promote_types(hidden_BTH.dtype, torch.float32))


POOLINGS = {
    "cls": first_token,
    "mean": mean,
    "max": maximum,
    "mean_sqrt_len": mean_sqrt_len,
    "weighted_mean": weighted_mean,
    "last_token": last_token,
}
"""The functions by the name that the configuration uses."""
