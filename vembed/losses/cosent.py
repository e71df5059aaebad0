"""Ranking losses for pairs with graded scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.distributed import gather_counts, gather_rows
from vembed.losses.scored_pairs import check_scored_pairs
from vembed.losses.similarity import check_temperature, full_precision, unit_rows


class CoSENT(nn.Module):
    r"""CoSENT (Huang et al., 2024): a pair with a higher score shall have a higher similarity.

    Over all pairs i, j of all processes:

        loss = log(1 + sum_{score_i > score_j} exp((cos_j - cos_i) / temperature))

    Pairs of equal score are not compared; 0 when all scores are equal. The loss is one logarithm
    over the global batch, not a mean over rows, so every process computes all of it.

    sentence-transformers' CoSENTLoss is the same at `scale = 1 / temperature`.
    """

    required_fields = frozenset({"positive", "score"})
    takes_tokens = False

    def __init__(self, temperature: float = 0.05) -> None:
        """Assign and check.

        Args:
            temperature: Divides cosine similarities, above 0.

        Raises:
            ConfigError: if temperature is out of range.
        """
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, query: Tensor, positive: Tensor | None, *, scores: Tensor) -> Tensor:
        """The loss of the global batch. Collective: every process must call it.

        Arguments and errors are those of `check_scored_pairs`; scores may have any unit: only their
        order counts.

        Returns:
            A scalar, the same on every process.
        """
        with full_precision(query.device):
            pairs = check_scored_pairs(query, positive, scores)
            cosine = (unit_rows(pairs.first) * unit_rows(pairs.second)).sum(1)
            return _rank_all(cosine / self.temperature, pairs.scores)


class AnglE(nn.Module):
    r"""The angle term of AnglE (Li and Li, 2023): as CoSENT, by the angle of complex vectors.

    Of two unit vectors, the halves are taken for the real and the imaginary parts of complex
    vectors z and w; a vector of odd size gets a 0 at its end. Where z w* is their product with one
    of them conjugated:

        angle = | sum_d (Re(z w*)_d + Im(z w*)_d) |
        loss = log(1 + sum_{score_i > score_j} exp((angle_j - angle_i) / temperature))

    The real parts add up to the cosine similarity, whose gradient fades as it nears 1; that of the
    imaginary parts does not. The published objective adds CoSENT and in-batch negatives, which this
    term leaves out.

    sentence-transformers' AnglELoss is the same at `scale = 1 / temperature`.
    """

    required_fields = frozenset({"positive", "score"})
    takes_tokens = False

    def __init__(self, temperature: float = 0.05) -> None:
        """Assign and check.

        Args:
            temperature: Divides the angles, above 0.

        Raises:
            ConfigError: if temperature is out of range.
        """
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, query: Tensor, positive: Tensor | None, *, scores: Tensor) -> Tensor:
        """The loss of the global batch. Collective: every process must call it.

        Arguments and errors are those of `check_scored_pairs`; scores may have any unit: only their
        order counts.

        Returns:
            A scalar, the same on every process.
        """
        with full_precision(query.device):
            pairs = check_scored_pairs(query, positive, scores)
            angle = _angle(unit_rows(pairs.first), unit_rows(pairs.second))
            return _rank_all(angle / self.temperature, pairs.scores)


def _angle(first: Tensor, second: Tensor) -> Tensor:
    """`[B]`, of unit rows."""
    real_1, imaginary_1 = functional.pad(first, (0, first.shape[1] % 2)).chunk(2, dim=1)
    real_2, imaginary_2 = functional.pad(second, (0, second.shape[1] % 2)).chunk(2, dim=1)
    real = real_1 * real_2 + imaginary_1 * imaginary_2
    imaginary = imaginary_1 * real_2 - real_1 * imaginary_2
    return (real + imaginary).sum(1).abs()


def _rank_all(logits: Tensor, scores: Tensor) -> Tensor:
    """The rank loss of the pairs of all processes. Collective."""
    counts = gather_counts(len(logits), logits.device)
    return _rank_loss(gather_rows(logits, counts), gather_rows(scores, counts))


def _rank_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """`log(1 + sum exp(logit_j - logit_i))` over score_i > score_j, in O(n log n).

    With rows by score, the partners of j are a suffix: a running log-sum-exp from the end has the
    sums for all rows at once.
    """
    scores, order = scores.sort()
    logits = logits[order]
    suffixes = torch.logcumsumexp(-logits.flip(0), dim=0).flip(0)
    suffixes = torch.cat([suffixes, suffixes.new_full((1,), -torch.inf)])
    first_higher = torch.searchsorted(scores, scores, right=True)
    terms = logits + suffixes[first_higher]
    return torch.cat([terms.new_zeros(1), terms]).logsumexp(0)
