"""Softmax contrastive loss over the candidates of all processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.errors import ConfigError
from vembed.losses.comparison import COSINE, Comparison
from vembed.losses.global_batch import (
    GlobalBatch,
    gather_batch,
    logsumexp_over_processes,
    require_guide,
)
from vembed.losses.margins import Margins, PairLimits, find_pair_limits
from vembed.losses.similarity import (
    clamp_logit_scale,
    full_precision,
    new_logit_scale,
    similarity_scale,
)
from vembed.losses.tiling import (
    Judge,
    Limits,
    TileSize,
    check_tile_size,
    finite,
    tiled_logsumexp,
    tiled_logsumexp_both,
)


class InfoNCE(nn.Module):
    r"""InfoNCE (van den Oord et al., 2018) with in-batch and hard negatives, on cosine similarity.

    For a query q, one of its positives p, and N(q), all positives and hard negatives of all
    processes that are not relevant to q:

        loss(q, p) = -log( exp(s(q, p)) / (exp(s(q, p)) + sum_{c in N(q)} w(q, c) exp(s(q, c))) )
        s(q, p) = cos(q, p) / temperature,    w = 1

    and the result is the mean over a query's positives, then over the queries. A document is
    relevant to a query when any row of the global batch pairs their contents, so neither a copy of
    a query's positive nor the positive of the same query in another row is a negative.

    What can be changed:

    - `bidirectional`: the mean of this and the same with the roles swapped: each positive ranks the
      queries of all processes that it is not relevant to (Radford et al., 2021). Hard negatives
      take no part in that direction.
    - `query_negatives`, `document_negatives`: to what q (p) must not resemble, the other queries
      (the other positives) are added (Li et al., 2023, GTE). Queries that share a document, or are
      linked by a chain of such, are not told apart, nor are documents that share a query. Hard
      negatives take no part. With `bidirectional`, queries are added to the ranking of q and
      documents to that of p; otherwise both to that of q. With `joint`, everything that is asked
      for stands in the one sum of loss(q, p), as published, but exp(s(q, p)) once, not twice.
    - `hard_negatives: own`: of hard negatives, N(q) has only those of q's own row.
    - `hardness`: w(q, c) = exp(hardness * cos(q, c)) without gradient, so that the most similar
      negatives push hardest (LLaVE: Lan et al., 2025, equation 5, who take 9). It is in every sum,
      and on own hard negatives too, which the paper leaves at w = 1.
    - a margin: N(q) is without the candidates that are too similar to q beside its positives (see
      `vembed.losses.margins`), and so are all the other sums: a query ranks by its own limit, a
      positive by that of its pair. With `guided`, it is a guide model's similarity that judges
      (GISTEmbed: Solatorio, 2024: guided, joint, with query and document negatives). What is left
      out is decided without gradient.

    A batch in which nothing is left costs nothing. Memory grows with the batch, not its square (see
    `vembed.losses.tiling`).

    sentence-transformers' MultipleNegativesRankingLoss and GISTEmbedLoss give the same values on
    rows that share no content, except that theirs count exp(s(q, p)) twice in a joint sum of both
    directions, which keeps the loss above log 2. Where content is shared, theirs count copies of a
    positive as negatives; and documents are ranked against hard negatives of other rows too.

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
        query_negatives: bool = False,
        document_negatives: bool = False,
        joint: bool = False,
        hard_negatives: Literal["all", "own"] = "all",
        hardness: float = 0.0,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guided: bool = False,
    ) -> None:
        """Assign and check.

        Args:
            temperature: Divides cosine similarities, above 0.
            learn_temperature: Train it, starting from the one given; call `clamp` after each step.
            bidirectional: Also rank the queries for each positive.
            tile_size: Rows and columns of the similarity matrix held at once; `auto`: 8 MB on a
                CPU, else 32, and twice that when `bidirectional`.
            query_negatives: Also keep queries apart.
            document_negatives: Also keep positives apart.
            joint: One sum for all that is asked for, instead of the mean of both directions.
            hard_negatives: Those of `all` rows for each query, or its `own`.
            hardness: How much more similar negatives weigh, from 0 (all alike).
            absolute_margin: Leave out of a query's negatives what is more similar to it than its
                most similar positive less this (cosine, from -2 to 2; below zero: more similar by
                that much). None: nothing, or with `guided` 0.
            relative_margin: The same, less this share of the positive's similarity (-1 to 1).
            guided: Judge by the guide model's embeddings, which `forward` must then be given.

        Raises:
            ConfigError: if a number is out of range, or `hard_negatives` is another word.
        """
        super().__init__()
        check_tile_size(tile_size)
        if hard_negatives not in ("all", "own"):
            raise ConfigError(f"hard_negatives: expected all or own. Received: {hard_negatives!r}")
        if not (isinstance(hardness, int | float) and 0 <= hardness < math.inf):
            raise ConfigError(f"hardness: expected a number from 0 up. Received: {hardness!r}")
        self.logit_scale = new_logit_scale(temperature, learn_temperature)
        self.temperature = temperature
        self.bidirectional = bidirectional
        self.tile_size = tile_size
        self.query_negatives = query_negatives
        self.document_negatives = document_negatives
        self.joint = joint
        self.hard_negatives = hard_negatives
        self.hardness = hardness
        self.margins = Margins.of(absolute_margin, relative_margin, guided=guided)
        self.guided = guided

    @property
    def compares_more(self) -> bool:
        """Whether it is another loss than that of queries and all documents, alike in weight."""
        own = self.hard_negatives == "own"
        return own or self.query_negatives or self.document_negatives or self.hardness > 0

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
        counts_negative: Tensor | None = None,
        ids_query: Tensor | None = None,
        ids_positive: Tensor | None = None,
        ids_negative: Tensor | None = None,
        guide_query: Tensor | None = None,
        guide_positive: Tensor | None = None,
        guide_negative: Tensor | None = None,
    ) -> Tensor:
        """The loss of this process's queries. Collective: every process must call it.

        Further arguments and errors are those of `gather_batch`.

        Args:
            query: `[B, D]`.
            positive: `[M, D]`.
            negative: `[K, D]`.
            counts_positive: `[B]`.
            counts_negative: `[B]` hard negatives of each query; looked at where each query has its
                own only, and None where all have equally many.
            ids_query: `[B]`.
            ids_positive: `[M]`.
            ids_negative: `[K]`.
            guide_query: `[B, G]` of the guide model; required when the loss is guided.
            guide_positive: `[M, G]`.
            guide_negative: `[K, G]`.

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
                guide=require_guide(guide_query, guide_positive, guide_negative)
                if self.guided
                else None,
                share_negatives=self.hard_negatives == "all",
            )
            return self._loss(batch, counts_negative)

    def _loss(self, batch: GlobalBatch, counts_negative: Tensor | None) -> Tensor:
        scale = similarity_scale(self.logit_scale, self.temperature, batch.query_BD)
        similarity_M = batch.own_similarities()
        own_M = scale * similarity_M
        sums = _Sums(
            batch=batch,
            scale=_HardScale.of(scale, self.hardness),
            limits=find_pair_limits(self.margins, batch, similarity_M),
            tile_size=self.tile_size,
        )
        of_query, of_document = sums.over_pairs(both=self.bidirectional)
        if self.hard_negatives == "own":
            of_query.append(sums.over_own_negatives(counts_negative)[batch.owner_M])
        if self.query_negatives:
            of_query.append(sums.over_queries()[batch.owner_M])
        if self.document_negatives:
            of_document.append(sums.over_positives())
        if self.joint or not self.bidirectional:
            of_query, of_document = of_query + of_document, []
        loss_M = _cross_entropy(own_M, _log_sum(of_query))
        if of_document:
            loss_M = (loss_M + _cross_entropy(own_M, _log_sum(of_document))) / 2
        return (loss_M * batch.positive_weight_M).sum()


@dataclass(frozen=True)
class _HardScale:
    """What similarities are multiplied by so that negatives are weighted by their hardness.

    `log sum w exp(scale * cos)` with the weights `exp(hardness * cos)` is a log-sum-exp at
    `scale + hardness`. That the weights have no gradient makes its derivatives by similarities
    smaller by a factor, but not that by the scale.

    Attributes:
        value: The scale to reduce with.
        factor: Of the derivatives by similarities; None: 1.
    """

    value: Tensor
    factor: Tensor | None

    @classmethod
    def of(cls, scale: Tensor, hardness: float) -> _HardScale:
        if not hardness:
            return cls(scale, None)
        fixed = scale.detach()
        factor = fixed / (fixed + hardness)
        return cls(fixed + hardness + (scale - fixed) / factor, factor)

    def damp(self, log_sums: Tensor) -> Tensor:
        """The same values, with the derivatives that they must have."""
        if self.factor is None:
            return log_sums
        return self.factor * log_sums + ((1 - self.factor) * log_sums).detach()


@dataclass(frozen=True)
class _Sums:
    """The logarithms of sums over negatives, of which a loss takes those that it asks for."""

    batch: GlobalBatch
    scale: _HardScale
    limits: PairLimits | None
    tile_size: TileSize

    def over_pairs(self, *, both: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Over the documents of each positive's query and, with `both`, the queries of each.

        Collective with `both`.

        Returns:
            `[M]` each, in lists of one, or of none where they were not asked for.
        """
        batch, limits = self.batch, None
        if self.limits is not None:
            of_columns = batch.gather_of_positives(self.limits.positive_M) if both else None
            limits = Limits(self.limits.query_B, of_columns, batch.judge)
        how: dict[str, Any] = self._how(batch.relevant_documents(), limits)
        if not both:
            rows_B = tiled_logsumexp(batch.query_BD, batch.documents_CD, **how)
            return [self.scale.damp(rows_B)[batch.owner_M]], []
        sums = tiled_logsumexp_both(batch.query_BD, batch.documents_CD, **how)
        columns_M = batch.own_positives(logsumexp_over_processes(sums.columns_C))
        return [self.scale.damp(sums.rows_R)[batch.owner_M]], [self.scale.damp(columns_M)]

    def over_queries(self) -> Tensor:
        """`[B]`, over the other queries of each query. Collective."""
        batch, limits = self.batch, None
        if self.limits is not None:
            judge = None
            if batch.guide is not None:
                own_BG = batch.guide.query_BG
                judge = Judge(own_BG, batch.gather_queries(own_BG))
            limits = Limits(self.limits.query_B, judge=judge)
        all_QD = batch.gather_queries(batch.query_BD)
        how = self._how(batch.linked_queries(), limits)
        return self.scale.damp(tiled_logsumexp(batch.query_BD, all_QD, **how))

    def over_positives(self) -> Tensor:
        """`[M]`, over the other positives of each positive."""
        batch, limits = self.batch, None
        if self.limits is not None:
            judge = None
            if batch.guide is not None:
                columns = batch.only_positives(batch.guide.documents_CG)
                judge = Judge(batch.guide.positive_MG, columns)
            limits = Limits(self.limits.positive_M, judge=judge)
        columns_PD = batch.only_positives(batch.documents_CD)
        how = self._how(batch.linked_positives(), limits)
        return self.scale.damp(tiled_logsumexp(batch.positive_MD, columns_PD, **how))

    def over_own_negatives(self, counts_negative: Tensor | None) -> Tensor:
        """`[B]`, over the hard negatives of each query's own row. Collective."""
        batch = self.batch
        own = batch.own_negatives(counts_negative)
        similarity_K = batch.comparison.paired(batch.query_BD[own.owner_K], batch.negative_KD)
        left_out_K = own.is_relevant_K
        if self.limits is not None:
            judged_K = similarity_K.detach()
            if batch.guide is not None:
                judged_K = (batch.guide.query_BG[own.owner_K] * batch.guide.negative_KG).sum(1)
            left_out_K = left_out_K | (judged_K > self.limits.query_B[own.owner_K])
        scores_K = (self.scale.value * similarity_K).masked_fill(left_out_K, -math.inf)
        return self.scale.damp(_log_sum_of_groups(scores_K, own.owner_K, len(batch.query_BD)))

    def _how(self, masked: Any, limits: Limits | None) -> dict[str, Any]:
        return {
            "scale": self.scale.value,
            "masked": masked,
            "limits": limits,
            "tile_size": self.tile_size,
            "comparison": self.batch.comparison,
        }


def _log_sum(terms: list[Tensor]) -> Tensor:
    """`log(sum(exp(terms)))`; unlike torch's, without NaN in the gradient of an empty sum."""
    if len(terms) == 1:
        return terms[0]
    stacked = torch.stack(terms)
    group = torch.arange(stacked.shape[1], device=stacked.device).repeat(len(terms))
    return _log_sum_of_groups(stacked.flatten(), group, stacked.shape[1])


def _log_sum_of_groups(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """`[groups]`, the log-sum-exp of the values of each group; -inf of none."""
    peaks = values.new_full((groups,), -math.inf)
    peaks = finite(peaks.scatter_reduce(0, group, values.detach(), "amax"))
    sums = torch.zeros_like(peaks).index_add(0, group, (values - peaks[group]).exp())
    is_empty = sums == 0
    return (peaks + sums.masked_fill(is_empty, 1).log()).masked_fill(is_empty, -math.inf)


def _cross_entropy(own: Tensor, others: Tensor) -> Tensor:
    """`-log(e^own / (e^own + e^others))`, without losing a small loss in the rounding of a log."""
    return -functional.logsigmoid(own - others)
