"""How similar a query and a document are: the one thing in which losses on them may differ.

# Shapes: R rows, C columns, M pairs, T tokens of a row and S of a column, D size; r, c the rows and
# columns of a tile. A matrix of embeddings is `[R, D]`, or `[R, T, D]` for token vectors.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from vembed.losses.similarity import paired_dots, unit_rows
from vembed.token_vectors import real_tokens

PAIR_BYTES = 32 * 2**20
"""Similarities of tokens of pairs that are held at once."""


class Comparison(Protocol):
    """A similarity that is linear in positive factors of its rows."""

    def prepare_queries(self, query: Tensor) -> Tensor:
        """Embeddings as they come, in the form that the other functions take as rows."""
        ...

    def prepare_documents(self, documents: Tensor) -> Tensor:
        """The same for columns."""
        ...

    def entries(self, rows: Tensor, columns: Tensor) -> int:
        """Numbers that are held for one similarity of a tile."""
        ...

    def compare(self, rows: Tensor, columns: Tensor, bias: Tensor, out_rc: Tensor) -> Any:
        """Write similarities plus `bias` to `out_rc`; returns what `add_gradients` wants of it."""
        ...

    def add_gradients(
        self,
        seen: Any,
        weights_rc: Tensor,
        rows: Tensor,
        columns: Tensor,
        *,
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
    ) -> None:
        """Add the derivatives of `sum(weights * similarities)`, in place."""
        ...

    def paired(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`[M]`, of row i and column i; differentiable."""
        ...


class Cosine:
    """Of one vector for each item."""

    def prepare_queries(self, query: Tensor) -> Tensor:
        """`[B, D]`, of length one."""
        return unit_rows(query)

    def prepare_documents(self, documents: Tensor) -> Tensor:
        """`[C, D]`, of length one."""
        return unit_rows(documents)

    def entries(self, rows: Tensor, columns: Tensor) -> int:
        """One."""
        return 1

    def compare(self, rows: Tensor, columns: Tensor, bias: Tensor, out_rc: Tensor) -> None:
        """See `Comparison`."""
        torch.addmm(bias, rows, columns.T, out=out_rc)

    def add_gradients(
        self,
        seen: None,
        weights_rc: Tensor,
        rows: Tensor,
        columns: Tensor,
        *,
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
    ) -> None:
        """See `Comparison`."""
        if grad_rows is not None:
            grad_rows.addmm_(weights_rc, columns)
        if grad_columns is not None:
            grad_columns.addmm_(weights_rc.T, rows)

    def paired(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See `Comparison`."""
        return paired_dots(rows, columns)


class MaxSim:
    """Of a vector for each token: the best cosine of each token of the query, added up.

    Khattab and Zaharia, 2020. A query's padding adds nothing, a document's is never the best, and
    with a document without tokens every similarity is 0. Where several tokens of a document are
    equally good, the gradient goes to one of them.
    """

    def __init__(self, *, mean: bool) -> None:
        """Assign.

        Args:
            mean: Divide by the number of the query's tokens.
        """
        self.mean = mean

    def prepare_queries(self, query: Tensor) -> Tensor:
        """`[B, T, D]`, of length one, or one over the number of the query's tokens."""
        unit = self.prepare_documents(query)
        if not self.mean:
            return unit
        return unit / real_tokens(query).sum(1).clamp(min=1)[:, None, None]

    def prepare_documents(self, documents: Tensor) -> Tensor:
        """`[C, T, D]`, of length one; zeros stay zeros, and get no gradient."""
        return unit_rows(documents).masked_fill(~real_tokens(documents)[..., None], 0)

    def entries(self, rows: Tensor, columns: Tensor) -> int:
        """Similarities of their tokens."""
        return max(1, rows.shape[1] * columns.shape[1])

    def compare(self, rows: Tensor, columns: Tensor, bias: Tensor, out_rc: Tensor) -> Tensor:
        """See `Comparison`; returns `[r, T, c]`, which token of the column is best."""
        size = (len(rows), rows.shape[1], len(columns), columns.shape[1])
        tokens_rTcS = (rows.flatten(0, 1) @ columns.flatten(0, 1).T).view(size)
        best = tokens_rTcS.masked_fill_(~real_tokens(columns), -math.inf).max(-1)
        torch.sum(_zero_if_none(best.values), 1, out=out_rc)
        out_rc.add_(bias)
        return best.indices

    def add_gradients(
        self,
        seen: Tensor,
        weights_rc: Tensor,
        rows: Tensor,
        columns: Tensor,
        *,
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
    ) -> None:
        """See `Comparison`."""
        # Dense products of a sparse matrix: no gather as large as the tile times D, and unlike a
        # scatter of vectors they add up in the same order on every device.
        weights = weights_rc.new_zeros(*seen.shape, columns.shape[1])
        given = weights_rc[:, None, :, None].expand(*seen.shape, 1)
        weights.scatter_(3, seen.unsqueeze(-1), given)
        of_tokens = weights.view(rows.shape[0] * rows.shape[1], -1)
        if grad_rows is not None:
            grad_rows.flatten(0, 1).addmm_(of_tokens, columns.flatten(0, 1))
        if grad_columns is not None:
            grad_columns.flatten(0, 1).addmm_(of_tokens.T, rows.flatten(0, 1))

    def paired(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See `Comparison`."""
        with torch.no_grad():
            step = max(1, PAIR_BYTES // (rows.element_size() * self.entries(rows, columns)))
            parts = zip(torch.split(rows, step), torch.split(columns, step), strict=True)
            best_MT = torch.cat([_best_tokens(*part) for part in parts])
        index = best_MT.unsqueeze(-1).expand(-1, -1, columns.shape[2])
        # No product of matrices, which backward inside autocast would take in half precision.
        return (rows * columns.gather(1, index)).sum((1, 2))


def _best_tokens(rows_MTD: Tensor, columns_MSD: Tensor) -> Tensor:
    tokens_MTS = rows_MTD @ columns_MSD.mT
    absent_M1S = ~real_tokens(columns_MSD)[:, None]
    return tokens_MTS.masked_fill_(absent_M1S, -math.inf).argmax(-1)


def _zero_if_none(best: Tensor) -> Tensor:
    """-inf, the maximum over no tokens, replaced by 0."""
    return best.masked_fill(best == -math.inf, 0)


COSINE = Cosine()
