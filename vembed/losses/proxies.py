"""Losses that compare labelled items with one learned vector per class.

# Shapes: B items of this process, D size, L classes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.distributed import global_mean
from vembed.errors import ConfigError
from vembed.losses.relevance import Relevance
from vembed.losses.similarity import (
    check_temperature,
    full_precision,
    similarity_scale,
    unit_rows,
)
from vembed.losses.supcon import check_labels
from vembed.losses.tiling import TileSize, check_tile_size, tiled_logsumexp
from vembed.placing import on_host

_LEAST_SINE = 1e-6
"""Where the sine's own slope would be infinite, at a similarity of 1."""


class NormalizedSoftmax(nn.Module):
    r"""Classification by cosine (Wang et al., 2017, NormFace; Zhai and Wu, 2019).

    With a learned vector w of unit length for each class, and the label y of an item x:

        loss = mean_x -log( exp(s(x, w_y)) / sum_l exp(s(x, w_l)) ),  s(x, w) = cos(x, w) / T

    The class vectors are the loss's own: they are trained and kept for resuming, and no part of the
    model that is saved. sentence-transformers has no such loss (its SoftmaxLoss classifies pairs).

    Attributes:
        proxies: `[L, D]`, the class vectors, of any length.
    """

    required_fields = frozenset({"label"})
    takes_tokens = False

    def __init__(
        self,
        temperature: float = 0.05,
        tile_size: TileSize = "auto",
        *,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        """Assign and check.

        Args:
            temperature: T, above 0.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 8 or 32 MB.
            num_classes: L; labels are from 0 to below it.
            embedding_dim: D.

        Raises:
            ConfigError: if a number is out of range, or that of classes or dimensions is missing.
        """
        super().__init__()
        check_temperature(temperature)
        check_tile_size(tile_size)
        self.temperature = temperature
        self.tile_size = tile_size
        self.proxies = _new_proxies(num_classes, embedding_dim)

    def forward(self, query: Tensor, *, labels: Tensor, prefix_dim: int | None = None) -> Tensor:
        """The loss of this process's items. Collective: every process must call it.

        Args:
            query: `[B, D]`, one row per item.
            labels: `[B]` int64, numbers of classes.
            prefix_dim: Compare with so many numbers of the class vectors, where items have no
                more; None: all.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if the number of labels is not that of the items.
        """
        return _proxy_loss(self, query, labels, prefix_dim, margin=0.0)


class ArcFace(nn.Module):
    r"""`NormalizedSoftmax` with an angular margin (Deng et al., 2019, ArcFace).

    An item must be nearer to its class than to others by an angle: with the angle a between x and
    its class vector, and s as there but for the item's own class,

        s(x, w_y) = cos(a + margin) / T

    Beyond a = pi - margin, where the cosine would rise again, cos(a) - margin sin(margin) goes on
    falling. Published at T = 1/64 and a margin of 0.5.

    Attributes:
        proxies: `[L, D]`, the class vectors, of any length.
    """

    required_fields = frozenset({"label"})
    takes_tokens = False

    def __init__(
        self,
        temperature: float = 1 / 64,
        tile_size: TileSize = "auto",
        *,
        margin: float = 0.5,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        """Assign and check.

        Args:
            temperature: T, above 0.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 8 or 32 MB.
            margin: Radians, from 0 to below pi / 2.
            num_classes: L; labels are from 0 to below it.
            embedding_dim: D.

        Raises:
            ConfigError: if a number is out of range, or that of classes or dimensions is missing.
        """
        super().__init__()
        check_temperature(temperature)
        check_tile_size(tile_size)
        if not 0 <= margin < math.pi / 2:
            raise ConfigError(f"margin: expected radians in [0, pi / 2). Received: {margin!r}")
        self.temperature = temperature
        self.tile_size = tile_size
        self.margin = margin
        self.proxies = _new_proxies(num_classes, embedding_dim)

    def forward(self, query: Tensor, *, labels: Tensor, prefix_dim: int | None = None) -> Tensor:
        """The loss of this process's items; see `NormalizedSoftmax.forward`."""
        return _proxy_loss(self, query, labels, prefix_dim, margin=self.margin)


def _new_proxies(num_classes: int | None, embedding_dim: int | None) -> nn.Parameter:
    """Random class vectors, the same on every process whose generators stand alike."""
    for name, number in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
        if number is None or number < 1:
            raise ConfigError(
                f"{name}: a loss with a vector for each class needs it, as a number from 1 up. "
                f"Received: {number!r}. A run takes it from the data, unless it is a stream, whose "
                "classes are not known in advance"
            )
    return nn.Parameter(torch.randn(num_classes or 0, embedding_dim or 0))


def _proxy_loss(
    loss: NormalizedSoftmax | ArcFace,
    query: Tensor,
    labels: Tensor,
    prefix_dim: int | None,
    *,
    margin: float,
) -> Tensor:
    """Collective: every process must call it."""
    check_labels(query, labels)
    with full_precision(query.device):
        item_BD = unit_rows(query)
        class_LD = unit_rows(loss.proxies[:, :prefix_dim]).to(item_BD.dtype)
        scale = similarity_scale(None, loss.temperature, item_BD)
        labels_B = on_host(labels)
        own_class = Relevance.classes(labels_B, torch.arange(len(class_LD)))
        others_B = tiled_logsumexp(
            item_BD, class_LD, scale=scale, masked=own_class, tile_size=loss.tile_size
        )
        cosine_B = (item_BD * class_LD[labels]).sum(1)
        own_B = scale * _with_margin(cosine_B, margin)
        return global_mean(-functional.logsigmoid(own_B - others_B))


def _with_margin(cosine: Tensor, margin: float) -> Tensor:
    """`cos(a + margin)` of an angle a with this cosine, and its continuation beyond pi."""
    if not margin:
        return cosine
    sine = (1 - cosine.square()).clamp(min=_LEAST_SINE**2).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    falling = cosine - margin * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, falling)
