"""Regression of score differences to those of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vembed.distributed import global_ratio
from vembed.errors import ConfigError
from vembed.losses.own_triplets import counts_or_equal, own_triplets
from vembed.losses.similarity import full_precision, unit_rows


class MarginMSE(nn.Module):
    r"""A positive shall lead a negative as far as for a teacher (Hofstätter et al., 2020).

    For every positive p and hard negative n of the same row, with the teacher's scores t:

        loss = mean_{q, p, n} ( scale (s(q, p) - s(q, n)) - (t(q, p) - t(q, n)) )^2

    where s is the dot product of the embeddings as they come, or with `cosine` their cosine
    similarity. The mean is over the triplets of all processes; rows without a negative have none,
    and the loss is 0 when no row has. A teacher's scores are often logits of a cross-encoder, from
    -10 to 10, which similarities of unit vectors reach with a `scale` only.

    sentence-transformers' MarginMSELoss is the same at a scale of 1, for rows of one positive and
    equally many negatives.
    """

    required_fields = frozenset({"positive", "negative", "teacher_scores"})
    takes_tokens = False

    def __init__(self, scale: float = 1.0, cosine: bool = False) -> None:
        """Assign and check.

        Args:
            scale: Multiplies similarities, above 0.
            cosine: Compare by cosine similarity, whatever the length of the embeddings.

        Raises:
            ConfigError: if the scale is not above 0.
        """
        super().__init__()
        if not scale > 0:
            raise ConfigError(f"scale: must be above 0. Received: {scale!r}")
        self.scale = scale
        self.cosine = cosine

    def forward(
        self,
        query: Tensor,
        positive: Tensor | None,
        negative: Tensor | None = None,
        *,
        teacher_scores: Tensor,
        counts_positive: Tensor | None = None,
        counts_negative: Tensor | None = None,
    ) -> Tensor:
        """The loss of this process's rows. Collective: every process must call it.

        Args:
            query: `[B, D]`.
            positive: `[M, D]`, in the order of their queries.
            negative: `[K, D]`, likewise; None where no row of this process has any.
            teacher_scores: `[B, C]`, of a row's positives, then of its negatives.
            counts_positive: `[B]`; None where all queries have equally many.
            counts_negative: `[B]`; likewise.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if there are no positives, or not the scores of each row's candidates.
            DataError: if counts do not add up to the rows.
        """
        if positive is None or len(teacher_scores) != len(query):
            raise ConfigError(
                "this loss needs positives and a row of teacher_scores per query. Received: "
                f"{len(query)} queries, {None if positive is None else len(positive)} positives, "
                f"{len(teacher_scores)} rows of teacher_scores"
            )
        with full_precision(query.device):
            negative = query[:0] if negative is None else negative
            counts = [
                counts_or_equal(given, rows=len(rows), queries=len(query), like=query)
                for given, rows in ((counts_positive, positive), (counts_negative, negative))
            ]
            lead_T, taught_T = self._leads(query, positive, negative, teacher_scores, counts)
            error_T = self.scale * lead_T - taught_T
            return global_ratio(error_T.square().sum(), len(error_T))

    def _leads(
        self,
        query: Tensor,
        positive: Tensor,
        negative: Tensor,
        teacher_scores: Tensor,
        counts: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """`[T]` each: by how much positives lead negatives, here and in the teacher's scores."""
        wide = torch.promote_types(query.dtype, torch.float32)
        rows = [r if not self.cosine else unit_rows(r) for r in (query, positive, negative)]
        query_BD, positive_MD, negative_KD = (r.to(wide) for r in rows)
        of = own_triplets(*counts)
        difference_TD = positive_MD[of.positive_T] - negative_KD[of.negative_T]
        taught = teacher_scores.to(wide)
        first_negative_T = counts[0][of.query_T] + of.negative_rank_T
        taught_T = taught[of.query_T, of.positive_rank_T] - taught[of.query_T, first_negative_T]
        return (query_BD[of.query_T] * difference_TD).sum(1), taught_T
