"""Pairwise sigmoid contrastive loss over the candidates of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.losses.global_batch import gather_batch, require_guide
from vembed.losses.margins import Margins, find_limits
from vembed.losses.similarity import (
    clamp_logit_scale,
    full_precision,
    new_logit_scale,
    similarity_scale,
)
from vembed.losses.tiling import TileSize, check_tile_size, tiled_softplus_sum


class PairwiseSigmoid(nn.Module):
    r"""Every query-document pair is a yes-or-no question of its own (SigLIP, Zhai et al., 2023).

    For a query q with the positives P(q), and N(q), all positives and hard negatives of all
    processes that are not relevant to q (as in `InfoNCE`):

        loss(q) = mean_{p in P(q)} log(1 + exp(-x(q, p))) + sum_{c in N(q)} log(1 + exp(x(q, c)))
        x(q, c) = cos(q, c) / temperature + bias

    and the result is the mean over the queries. As published, temperature and bias are learned,
    from 0.1 and -10.

    With a margin, N(q) is without the candidates that are too similar to q beside its positives
    (see `vembed.losses.margins`), judged by a guide model's similarities with `guided`. What is
    left out is decided without gradient.

    Attributes:
        logit_scale: The parameter `log(1 / temperature)` when it is learned, else None.
        logit_bias: The bias; a parameter when it is learned.
    """

    required_fields = frozenset({"positive"})
    takes_tokens = False
    logit_bias: Tensor

    def __init__(
        self,
        temperature: float = 0.1,
        learn_temperature: bool = True,
        bias: float = -10.0,
        tile_size: TileSize = "auto",
        *,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guided: bool = False,
    ) -> None:
        """Assign and check.

        Args:
            temperature: Divides cosine similarities, above 0.
            learn_temperature: Train temperature and bias, starting from those given; call `clamp`
                after each step.
            bias: Added to similarities; below zero since most pairs are no match.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 8 or 32 MB.
            absolute_margin: Leave out of a query's negatives what is more similar to it than its
                most similar positive less this (cosine, from -2 to 2; below zero: more similar by
                that much). None: nothing, or with `guided` 0.
            relative_margin: The same, less this share of the positive's similarity (-1 to 1).
            guided: Judge by the guide model's embeddings, which `forward` must then be given.

        Raises:
            ConfigError: if temperature, tile size or a margin is out of range.
        """
        super().__init__()
        check_tile_size(tile_size)
        self.logit_scale = new_logit_scale(temperature, learn_temperature)
        self.temperature = temperature
        self.tile_size = tile_size
        self.margins = Margins.of(absolute_margin, relative_margin, guided=guided)
        self.guided = guided
        if learn_temperature:
            self.logit_bias = nn.Parameter(torch.tensor(float(bias)))
        else:
            self.register_buffer("logit_bias", torch.tensor(float(bias)), persistent=False)

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
        guide_query: Tensor | None = None,
        guide_positive: Tensor | None = None,
        guide_negative: Tensor | None = None,
    ) -> Tensor:
        """The loss of this process's queries. Collective: every process must call it.

        Arguments and errors are those of `gather_batch`; the guide's rows are required when the
        loss is guided.

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
                guide=require_guide(guide_query, guide_positive, guide_negative)
                if self.guided
                else None,
            )
            scale = similarity_scale(self.logit_scale, self.temperature, batch.query_BD)
            bias = self.logit_bias.to(scale.dtype)
            similarity_M = batch.own_similarities()
            own_M = scale * similarity_M + bias
            others_B = tiled_softplus_sum(
                batch.query_BD,
                batch.documents_CD,
                scale=scale,
                bias=bias,
                masked=batch.relevant_documents(),
                limits=find_limits(self.margins, batch, similarity_M),
                tile_size=self.tile_size,
            )
            matches = -(functional.logsigmoid(own_M) * batch.positive_weight_M).sum()
            return matches + batch.query_weight * others_B.sum()
