"""Regression of cosine similarity to a score."""

from __future__ import annotations

from torch import Tensor, nn

from vembed.distributed import global_mean
from vembed.errors import ConfigError
from vembed.losses.scored_pairs import check_scored_pairs
from vembed.losses.similarity import full_precision, unit_rows


class CosineMSE(nn.Module):
    r"""The cosine similarity of a pair shall be its score (Reimers and Gurevych, 2019).

        loss = mean_i (cos_i - score_i / score_scale)^2

    sentence-transformers' CosineSimilarityLoss is the same at a `score_scale` of 1.

    Attributes:
        score_range: Scores beyond it, which no similarity can meet, are refused before training.
    """

    required_fields = frozenset({"positive", "score"})
    takes_tokens = False

    def __init__(self, score_scale: float = 1.0) -> None:
        """Assign and check.

        Args:
            score_scale: The score that stands for a similarity of 1, such as 5 in STS-B.

        Raises:
            ConfigError: if it is not above 0.
        """
        super().__init__()
        if not score_scale > 0:
            raise ConfigError(f"score_scale: must be above 0. Received: {score_scale!r}")
        self.score_scale = score_scale
        self.score_range = (-float(score_scale), float(score_scale))

    def forward(self, query: Tensor, positive: Tensor | None, *, scores: Tensor) -> Tensor:
        """The loss of this process's pairs. Collective: every process must call it.

        Arguments and errors are those of `check_scored_pairs`.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.
        """
        with full_precision(query.device):
            pairs = check_scored_pairs(query, positive, scores)
            cosine_B = (unit_rows(pairs.first) * unit_rows(pairs.second)).sum(1)
            return global_mean((cosine_B - pairs.scores / self.score_scale).square())
