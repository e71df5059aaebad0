"""Softmax contrastive loss over the candidates of all processes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from vembed.losses.global_batch import gather_batch
from vembed.losses.similarity import (
    clamp_logit_scale,
    full_precision,
    new_logit_scale,
    similarity_scale,
)
from vembed.losses.tiling import TileSize, check_tile_size, tiled_logsumexp


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

    Memory grows with the batch, not its square (see `vembed.losses.tiling`).

    Attributes:
        logit_scale: The parameter `log(1 / temperature)` when it is learned, else None.
    """

    required_fields = frozenset({"positive"})

    def __init__(
        self,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        bidirectional: bool = False,
        tile_size: TileSize = "auto",
    ) -> None:
        """Assign and check.

        Args:
            temperature: Divides cosine similarities, above 0.
            learn_temperature: Train it, starting from the one given; call `clamp` after each step.
            bidirectional: Also rank the queries for each positive.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 32 MB.

        Raises:
            ConfigError: if temperature or tile size is out of range.
        """
        super().__init__()
        check_tile_size(tile_size)
        self.logit_scale = new_logit_scale(temperature, learn_temperature)
        self.temperature = temperature
        self.bidirectional = bidirectional
        self.tile_size = tile_size

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
            )
            scale = similarity_scale(self.logit_scale, self.temperature, batch.query_BD)
            own_M = scale * (batch.query_BD[batch.owner_M] * batch.positive_MD).sum(1)
            others_B = tiled_logsumexp(
                batch.query_BD,
                batch.documents_CD,
                scale=scale,
                masked=batch.relevant_documents(),
                tile_size=self.tile_size,
            )
            # log(e^own / (e^own + e^others)), without losing a small loss in the rounding of a log.
            loss_M = -functional.logsigmoid(own_M - others_B[batch.owner_M])
            if self.bidirectional:
                others_M = tiled_logsumexp(
                    batch.positive_MD,
                    batch.gather_queries(),
                    scale=scale,
                    masked=batch.relevant_queries(),
                    tile_size=self.tile_size,
                )
                loss_M = (loss_M - functional.logsigmoid(own_M - others_M)) / 2
            return (loss_M * batch.positive_weight_M).sum()
