"""Ranking loss for pairs with graded scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vembed.distributed import gather_counts, gather_rows
from vembed.errors import ConfigError
from vembed.losses.similarity import check_temperature, full_precision, unit_rows


class CoSENT(nn.Module):
    r"""CoSENT (Huang et al., 2024): a pair with a higher score shall have a higher similarity.

    Over all pairs i, j of all processes:

        loss = log(1 + sum_{score_i > score_j} exp((cos_j - cos_i) / temperature))

    Pairs of equal score are not compared; 0 when all scores are equal. The loss is one logarithm
    over the global batch, not a mean over rows, so every process computes all of it.
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

        Args:
            query: `[B, D]`, the first item of each pair.
            positive: `[B, D]`, the second.
            scores: `[B]`, in any unit: only their order counts.

        Returns:
            A scalar, the same on every process.

        Raises:
            ConfigError: if the number of second items or scores is not that of the first.
        """
        received = [None if t is None else len(t) for t in (query, positive, scores)]
        if positive is None or len(set(received)) > 1:
            raise ConfigError(
                "this loss needs one positive and one score per query. Received: "
                f"{received[0]} queries, {received[1]} positives, {received[2]} scores"
            )
        with full_precision(query.device):
            counts = gather_counts(len(query), query.device)
            cosine = gather_rows((unit_rows(query) * unit_rows(positive)).sum(1), counts)
            return _rank_loss(cosine / self.temperature, gather_rows(scores, counts))


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
