"""Supervised contrastive loss for labelled single items."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vembed.distributed import gather_counts, gather_rows, process_count, process_index
from vembed.errors import ConfigError
from vembed.losses.relevance import Relevance
from vembed.losses.similarity import (
    check_temperature,
    full_precision,
    similarity_scale,
    unit_rows,
)
from vembed.losses.tiling import TileSize, check_tile_size, tiled_logsumexp
from vembed.placing import on_host, to_device


class SupervisedContrastive(nn.Module):
    r"""Items of one label shall be nearer than all others (Khosla et al., 2020, equation 2).

    For an item i, all other items A(i) of all processes, and those of its label P(i):

        loss(i) = mean_{p in P(i)} -log( exp(s(i, p)) / sum_{a in A(i)} exp(s(i, a)) )
        s(i, a) = cos(i, a) / temperature

    and the result is the mean over the items that have a partner of their label; 0 when none has.
    """

    required_fields = frozenset({"label"})
    takes_tokens = False
    batch_sampler = "class_balanced"

    def __init__(self, temperature: float = 0.05, tile_size: TileSize = "auto") -> None:
        """Assign and check.

        Args:
            temperature: Divides cosine similarities, above 0.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 8 or 32 MB.

        Raises:
            ConfigError: if temperature or tile size is out of range.
        """
        super().__init__()
        check_temperature(temperature)
        check_tile_size(tile_size)
        self.temperature = temperature
        self.tile_size = tile_size

    def forward(self, query: Tensor, *, labels: Tensor) -> Tensor:
        """The loss of this process's items. Collective: every process must call it.

        Args:
            query: `[B, D]`, one row per item.
            labels: `[B]` int64.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if the number of labels is not that of the items.
        """
        check_labels(query, labels)
        with full_precision(query.device):
            own_BD = unit_rows(query)
            counts = gather_counts(len(query), query.device)
            all_QD, labels_Q = gather_rows(own_BD, counts), gather_rows(on_host(labels), counts)
            own = slice(start := sum(counts[: process_index()]), start + len(query))
            _, class_Q = torch.unique(labels_Q, return_inverse=True)
            partners_Q = class_Q.bincount(minlength=len(all_QD))[class_Q] - 1
            class_Q, partners_Q = (to_device(of, query.device) for of in (class_Q, partners_Q))

            scale = similarity_scale(None, self.temperature, own_BD)
            itself = Relevance.identity(first=start, rows=len(query), columns=len(all_QD))
            total_B = tiled_logsumexp(
                own_BD, all_QD, scale=scale, masked=itself, tile_size=self.tile_size
            )
            # The mean over partners of s(i, p) is the similarity to the mean of the partners.
            class_sums = torch.zeros_like(all_QD).index_add(0, class_Q, all_QD)
            partners_BD = class_sums[class_Q[own]] - own_BD
            mean_B = scale * (own_BD * partners_BD).sum(1) / partners_Q[own].clamp(min=1)
            # Rows without a partner stay in the graph: backward through the gather is collective.
            loss_B = (total_B - mean_B).masked_fill(partners_Q[own] == 0, 0)
            num_valid = (partners_Q > 0).sum().clamp(min=1)
            mean: Tensor = loss_B.sum() * process_count() / num_valid
            return mean


def check_labels(query: Tensor, labels: Tensor) -> None:
    """Check labelled items.

    Args:
        query: `[B, D]`, one row per item.
        labels: `[B]`.

    Raises:
        ConfigError: if the number of labels is not that of the items.
    """
    if len(labels) != len(query):
        raise ConfigError(
            "this loss needs one label per item. Received: "
            f"{len(query)} items, {len(labels)} labels"
        )
