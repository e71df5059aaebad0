"""Which candidates are too similar to be negatives.

A candidate that is nearly as similar to a query as the query's positive is often relevant too, only
not marked as such (Moreira et al., 2024). The margin is taken off the similarity, never a share of
a number that may be below zero. Who judges is the model that trains, or a frozen guide model
(GISTEmbed: Solatorio, 2024), whose similarities then stand in the place of the model's own.

# Shapes: B queries and M positives of this process, C documents of all processes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vembed.errors import ConfigError
from vembed.losses.global_batch import GlobalBatch
from vembed.losses.tiling import Limits

_ROUNDING = 64
"""By how many epsilons two ways to compute a cosine may differ: 27 were seen at size 4,096."""


@dataclass(frozen=True)
class Margins:
    """How far a candidate must stay below a positive's similarity to be a negative.

    Attributes:
        absolute: A candidate more similar than `positive - absolute` is left out. Below zero, it
            must be more similar than the positive by that much.
        relative: A candidate more similar than `positive - relative * |positive|` is left out.
    """

    absolute: float | None = None
    relative: float | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: if a margin is no number, or one that no cosine similarity can meet.
        """
        # With a relative margin above 1 a better positive would leave fewer negatives.
        for name, margin, bound in (("absolute", self.absolute, 2), ("relative", self.relative, 1)):
            number = isinstance(margin, int | float) and not isinstance(margin, bool)
            if margin is not None and not (number and abs(margin) <= bound):
                raise ConfigError(
                    f"{name}_margin: expected a number from -{bound} to {bound}, on the scale of "
                    f"cosine similarity, or null. Received: {margin!r}"
                )

    @classmethod
    def of(cls, absolute: float | None, relative: float | None, *, guided: bool) -> Margins:
        """Margins as a loss is given them; a guide without one leaves out what it ranks higher."""
        if guided and absolute is None and relative is None:
            absolute = 0.0
        return cls(absolute, relative)

    def limits(self, similarity: Tensor) -> Tensor | None:
        """The similarity from which on candidates are left out; None without margins.

        Args:
            similarity: Cosine similarities to positives.

        Returns:
            Of the same shape, without gradient. A copy of the positive is left out at a margin of
            0, whichever way the last digits of its similarity were rounded.
        """
        positive = similarity.detach()
        limit = positive.new_full(positive.shape, math.inf)
        if self.absolute is not None:
            limit = torch.minimum(limit, positive - self.absolute)
        if self.relative is not None:
            limit = torch.minimum(limit, positive - self.relative * positive.abs())
        if self.absolute is None and self.relative is None:
            return None
        return limit - _ROUNDING * torch.finfo(limit.dtype).eps


@dataclass(frozen=True)
class PairLimits:
    """The similarities from which on candidates are left out, of the rows of this process.

    Attributes:
        positive_M: Of each positive, by the query of its own row.
        query_B: Of each query, by the most similar of its positives, which leaves out the fewest.
    """

    positive_M: Tensor
    query_B: Tensor


def find_pair_limits(
    margins: Margins, batch: GlobalBatch, similarity_M: Tensor
) -> PairLimits | None:
    """Limits of this process's positives and queries.

    Args:
        margins: Taken off similarities to positives.
        batch: The batch. With a guide in it, it is the guide's similarities that are limited.
        similarity_M: Cosine similarity of each positive of this process to its query.

    Returns:
        None without margins.
    """
    if batch.guide is not None:
        similarity_M = (batch.guide.query_BG[batch.owner_M] * batch.guide.positive_MG).sum(1)
    limit_M = margins.limits(similarity_M)
    if limit_M is None:
        return None
    limit_B = limit_M.new_full((len(batch.query_BD),), math.inf)
    limit_B.scatter_reduce_(0, batch.owner_M, limit_M, "amax", include_self=False)
    return PairLimits(limit_M, limit_B)


def find_limits(
    margins: Margins, batch: GlobalBatch, similarity_M: Tensor, *, of_documents: bool = False
) -> Limits | None:
    """Limits of queries and, if they rank queries as well, of documents.

    Collective with `of_documents`: every process must call it. Arguments are those of
    `find_pair_limits`, and `of_documents` says whether positives rank queries.

    Returns:
        Limits over `query_BD` x `documents_CD`; None without margins.
    """
    limits = find_pair_limits(margins, batch, similarity_M)
    if limits is None:
        return None
    of_columns = batch.gather_of_positives(limits.positive_M) if of_documents else None
    return Limits(limits.query_B, of_columns, batch.judge)
