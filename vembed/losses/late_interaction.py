"""The contrastive loss of models that keep a vector for each token."""

from __future__ import annotations

from typing import Literal

from vembed.errors import ConfigError
from vembed.losses.comparison import MaxSim
from vembed.losses.info_nce import InfoNCE
from vembed.losses.tiling import TileSize


class MaxSimInfoNCE(InfoNCE):
    r"""InfoNCE with MaxSim in the place of the cosine (Khattab and Zaharia, 2020, ColBERT).

        s(q, d) = 1 / (|q| temperature) sum_{i in q} max_{j in d} cos(q_i, d_j)

    over the tokens i of the query and j of the document. The rest is that of `InfoNCE`: negatives
    of all processes, several positives, masked copies, margins, both directions, own hard
    negatives, hardness, a guide, tiles; but MaxSim is not symmetric, so queries are not compared
    with queries, nor documents with documents.

    sentence-transformers' MultiVectorMultipleNegativesRankingLoss is the same on rows that share no
    content, with `mean_colbert_scores`, or with `colbert_scores` where `normalize_scores` is off.

    It takes token vectors `[B, T, D]`, `[M, T, D]` and `[K, T, D]`; rows of zeros are padding and
    count on neither side.
    """

    takes_tokens = True

    def __init__(
        self,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        bidirectional: bool = False,
        tile_size: TileSize = "auto",
        *,
        joint: bool = False,
        hard_negatives: Literal["all", "own"] = "all",
        hardness: float = 0.0,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guided: bool = False,
        normalize_scores: bool = True,
    ) -> None:
        """Assign and check; arguments beside the last one are those of `InfoNCE`.

        Args:
            temperature: Divides similarities.
            learn_temperature: Train it.
            bidirectional: Also rank the queries for each positive.
            tile_size: Queries and documents of a tile; it holds as many similarities of tokens as
                they have. `auto`: 8 or 32 MB of them.
            joint: One sum for both directions.
            hard_negatives: Those of `all` rows for each query, or its `own`.
            hardness: How much more similar negatives weigh.
            absolute_margin: On the scale of the mean over a query's tokens; with `guided`, of the
                guide's cosines.
            relative_margin: Likewise.
            guided: Judge by a guide model, which has one vector for each item.
            normalize_scores: Divide by the number of a query's tokens, so that a temperature means
                the same for short and long queries. ColBERT itself does not: it adds up.

        Raises:
            ConfigError: as `InfoNCE` does, or for a margin on scores that are not normalised.
        """
        super().__init__(
            temperature,
            learn_temperature,
            bidirectional,
            tile_size,
            joint=joint,
            hard_negatives=hard_negatives,
            hardness=hardness,
            absolute_margin=absolute_margin,
            relative_margin=relative_margin,
            guided=guided,
        )
        has_margin = (absolute_margin, relative_margin) != (None, None)
        if has_margin and not normalize_scores and not guided:
            raise ConfigError(
                "normalize_scores: margins are on the scale of cosines, which scores that add up "
                "leave. Received: false, with a margin. Set it to true, or leave the margin out"
            )
        self.comparison = MaxSim(mean=normalize_scores)
