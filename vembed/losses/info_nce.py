"""Softmax contrastive loss over the candidates of all processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vembed.losses.comparison import COSINE, Comparison
from vembed.losses.global_batch import GlobalBatch, gather_batch, logsumexp_over_processes
from vembed.losses.margins import Margins, find_limits
from vembed.losses.similarity import (
    clamp_logit_scale,
    full_precision,
    new_logit_scale,
    similarity_scale,
)
from vembed.losses.tiling import (
    TileSize,
    check_tile_size,
    tiled_logsumexp,
    tiled_logsumexp_both,
)


class InfoNCE(nn.Module):
    r"""InfoNCE (van den Oord et al., 2018) with in-batch and hard negatives, on cosine similarity.

    For a query q, one of its positives p, and N(q), all positives and hard negatives of all
    processes that are not relevant to q:

        loss(q, p) = -log( exp(s(q, p)) / (exp(s(q, p)) + sum_{c in N(q)} exp(s(q, c))) )
        s(q, p) = cos(q, p) / temperature

    and the result is the mean over a query's positives, then over the queries. A document is
    relevant to a query when any row of the global batch pairs their contents, so neither a copy of
    a query's positive nor the positive of the same query in another row is a negative.

    With `bidirectional`, the mean of this and the same with the roles swapped: each positive ranks
    the queries of all processes that it is not relevant to (Radford et al., 2021). Hard negatives
    take no part in that direction.

    With a margin, N(q) is without the candidates that are too similar to q beside its positives
    (see `vembed.losses.margins`), and so are the queries that a positive ranks, judged by its own.
    What is left out is decided without gradient. A batch in which nothing is left costs nothing.

    Memory grows with the batch, not its square (see `vembed.losses.tiling`).

    Attributes:
        logit_scale: The parameter `log(1 / temperature)` when it is learned, else None.
        comparison: What takes the place of the cosine.
    """

    required_fields = frozenset({"positive"})
    takes_tokens = False
    comparison: Comparison = COSINE

    def __init__(
        self,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        bidirectional: bool = False,
        tile_size: TileSize = "auto",
        *,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
    ) -> None:
        """Assign and check.

        Args:
            temperature: Divides cosine similarities, above 0.
            learn_temperature: Train it, starting from the one given; call `clamp` after each step.
            bidirectional: Also rank the queries for each positive.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 32 MB, and
                twice that when `bidirectional`.
            absolute_margin: Leave out of a query's negatives what is more similar to it than its
                most similar positive less this (cosine, from -2 to 2; below zero: more similar by
                that much). None: nothing.
            relative_margin: The same, less this share of the positive's similarity (-1 to 1).

        Raises:
            ConfigError: if temperature, tile size or a margin is out of range.
        """
        super().__init__()
        check_tile_size(tile_size)
        self.logit_scale = new_logit_scale(temperature, learn_temperature)
        self.temperature = temperature
        self.bidirectional = bidirectional
        self.tile_size = tile_size
        self.margins = Margins(absolute_margin, relative_margin)

    def clamp(self) -> None:
        """Bring a learned temperature back into [0.01, 1]; call it after each optimizer step."""
        clamp_logit_scale(self.logit_scale)

    def forward(
        self,
        query: Tensor,
        positive: Tensor | None,
        negative: Tensor | None = None,
        *,
        counts_positive: Tensor | None = None,
        ids_query: Tensor | None = None,
        ids_positive: Tensor | None = None,
        ids_negative: Tensor | None = None,
    ) -> Tensor:
        """The loss of this process's queries. Collective: every process must call it.

        Arguments and errors are those of `gather_batch`.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.
        """
        with full_precision(query.device):
            batch = gather_batch(
                query,
                positive,
                negative,
                counts_positive=counts_positive,
                ids_query=ids_query,
                ids_positive=ids_positive,
                ids_negative=ids_negative,
                comparison=self.comparison,
            )
            return self._loss(batch)

    def _loss(self, batch: GlobalBatch) -> Tensor:
        scale = similarity_scale(self.logit_scale, self.temperature, batch.query_BD)
        similarity_M = batch.own_similarities()
        own_M = scale * similarity_M
        how: dict[str, Any] = {
            "scale": scale,
            "masked": batch.relevant_documents(),
            "limits": find_limits(
                self.margins, batch, similarity_M, of_documents=self.bidirectional
            ),
            "tile_size": self.tile_size,
            "comparison": self.comparison,
        }
        if not self.bidirectional:
            others_B = tiled_logsumexp(batch.query_BD, batch.documents_CD, **how)
            loss_M = _cross_entropy(own_M, others_B[batch.owner_M])
        else:
            others = tiled_logsumexp_both(batch.query_BD, batch.documents_CD, **how)
            others_M = batch.own_positives(logsumexp_over_processes(others.columns_C))
            loss_M = _cross_entropy(own_M, others.rows_R[batch.owner_M])
            loss_M = (loss_M + _cross_entropy(own_M, others_M)) / 2
        return (loss_M * batch.positive_weight_M).sum()


def _cross_entropy(own: Tensor, others: Tensor) -> Tensor:
    """`-log(e^own / (e^own + e^others))`, without losing a small loss in the rounding of a log."""
    return -functional.logsigmoid(own - others)
