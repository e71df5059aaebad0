"""Losses for pairs that are similar (1) or not (0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.distributed import gather_rows, global_mean, global_ratio
from vembed.errors import ConfigError
from vembed.losses.scored_pairs import ScoredPairs, check_scored_pairs
from vembed.losses.similarity import full_precision, unit_rows


class Contrastive(nn.Module):
    r"""Similar pairs shall be near, others no nearer than a margin (Hadsell et al., 2006).

    With the cosine distance d = 1 - cos, and y the score, 1 for similar pairs and 0 for others (one
    between weighs both sides):

        loss = mean_i ( y_i d_i^2 + (1 - y_i) max(0, margin - d_i)^2 ) / 2

    sentence-transformers' ContrastiveLoss is the same.

    Attributes:
        score_range: Scores beyond it are refused before training.
    """

    required_fields = frozenset({"positive", "score"})
    takes_tokens = False
    score_range = (0.0, 1.0)

    def __init__(self, margin: float = 0.5) -> None:
        """Assign and check.

        Args:
            margin: Cosine distance (0 to 2) from which on a pair that is not similar costs nothing.

        Raises:
            ConfigError: if it is out of range.
        """
        super().__init__()
        check_distance_margin(margin)
        self.margin = margin

    def forward(self, query: Tensor, positive: Tensor | None, *, scores: Tensor) -> Tensor:
        """The loss of this process's pairs. Collective: every process must call it.

        Arguments and errors are those of `check_scored_pairs`.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.
        """
        with full_precision(query.device):
            pairs = check_scored_pairs(query, positive, scores)
            distance_B = _distance(pairs)
            score_B = pairs.scores.to(distance_B.dtype)
            near_B = score_B * distance_B.square()
            far_B = (1 - score_B) * functional.relu(self.margin - distance_B).square()
            return global_mean((near_B + far_B) / 2)


class OnlineContrastive(nn.Module):
    r"""As `Contrastive`, over the pairs that are out of place (Reimers and Gurevych, 2019).

    With d = 1 - cos: of all processes, a similar pair (score of at least 0.5) counts if it is
    farther than the nearest of the others, and one of the others if it is nearer than the farthest
    similar one. Where there are no others, similar pairs count that are farther than their mean;
    where there are no similar ones, others count that are nearer than theirs.

        loss = mean over the pairs that count of ( d^2 if similar, else max(0, margin - d)^2 )

    0 when none counts. sentence-transformers' OnlineContrastiveLoss selects the same pairs and adds
    up where this takes the mean, so that its step grows with the batch.

    Attributes:
        score_range: Scores beyond it are refused before training.
    """

    required_fields = frozenset({"positive", "score"})
    takes_tokens = False
    score_range = (0.0, 1.0)

    def __init__(self, margin: float = 0.5) -> None:
        """Assign and check.

        Args:
            margin: Cosine distance (0 to 2) from which on a pair that is not similar costs nothing.

        Raises:
            ConfigError: if it is out of range.
        """
        super().__init__()
        check_distance_margin(margin)
        self.margin = margin

    def forward(self, query: Tensor, positive: Tensor | None, *, scores: Tensor) -> Tensor:
        """The loss of this process's pairs. Collective: every process must call it.

        Arguments and errors are those of `check_scored_pairs`.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.
        """
        with full_precision(query.device):
            pairs = check_scored_pairs(query, positive, scores)
            distance_B, similar_B = _distance(pairs), pairs.scores >= 0.5
            distance_Q = gather_rows(distance_B.detach())
            similar_Q = gather_rows(similar_B.to(torch.int8)).bool()
            nearest, farthest = _bounds(distance_Q, similar_Q)
            counts_B = torch.where(similar_B, distance_B > nearest, distance_B < farthest)
            far_B = functional.relu(self.margin - distance_B)
            loss_B = torch.where(similar_B, distance_B, far_B).square()
            return global_ratio(loss_B.masked_fill(~counts_B, 0).sum(), counts_B.sum())


def check_distance_margin(margin: float) -> None:
    """Raise ConfigError unless `margin` is a difference of cosine similarities above 0."""
    number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not (number and 0 < margin <= 2):
        raise ConfigError(
            "margin: expected a number above 0 and at most 2, on the scale of cosine distance. "
            f"Received: {margin!r}"
        )


def _distance(pairs: ScoredPairs) -> Tensor:
    return 1 - (unit_rows(pairs.first) * unit_rows(pairs.second)).sum(1)


def _bounds(distance_Q: Tensor, similar_Q: Tensor) -> tuple[Tensor, Tensor]:
    """What a similar pair must be farther than to count, and another one nearer than."""
    others = distance_Q.masked_fill(similar_Q, torch.inf).amin()
    own = distance_Q.masked_fill(~similar_Q, -torch.inf).amax()
    mean = distance_Q.mean()  # of one kind, where there is no other
    return torch.where(others.isinf(), mean, others), torch.where(own.isinf(), mean, own)
