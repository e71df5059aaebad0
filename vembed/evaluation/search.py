"""Exact nearest neighbours by cosine or MaxSim, in blocks of queries: never an N x N matrix.

# Shapes: Q queries, q queries of one block, N documents, D size, K documents kept per query
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vembed.errors import VembedError
from vembed.quantized_vectors import BinaryVectors, paired_rescored, search_scores
from vembed.token_vectors import TokenVectors, Vectors, max_sim, paired_max_sim

# Cosines this close are a tie: more than rounding makes of equal vectors, less than means
# something.
TIE = 1e-6
_BLOCK_ENTRIES = 2**22  # similarities held at once: 32 MB
_BLOCK_QUERIES = 16  # at least: with fewer, reading a large corpus takes longer than computing
_TWO_KINDS = (
    "evaluation: encode must give one vector per item for queries and documents, or token vectors "
    "for both. Received: one of each"
)
_DOCUMENTS = 2**14  # documents held in float64 at once


SearchVectors = Vectors | BinaryVectors
"""What can be ranked."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest documents of each query; ties stand least relevant first (see `metrics`).

    Attributes:
        documents_QK: Document numbers, best first; -1 where a query has fewer than K candidates.
        cosines_QK: Their cosines, to TIE; 0 where the document is -1.
        right_document_Q: The relevant document that stands highest, at whatever rank; -1 when there
            is none.
        right_rank_Q: Its rank, from 1; 0 when there is none.
    """

    documents_QK: NDArray[np.int64]
    cosines_QK: NDArray[np.float32]
    right_document_Q: NDArray[np.int64]
    right_rank_Q: NDArray[np.int64]


@dataclass(frozen=True)
class Judgements:
    """What is known of some pairs of a block of queries and documents: three equal columns.

    Attributes:
        rows: Row of the query in the block.
        documents: Document number.
        gains: Relevance grade: above 0 relevant, 0 not relevant, negative: not a candidate for this
            query.
    """

    rows: NDArray[np.int64]
    documents: NDArray[np.int64]
    gains: NDArray[np.float64]


def find_neighbours(
    queries: SearchVectors,
    documents: SearchVectors,
    judge: Callable[[range], Judgements],
    *,
    depth: int,
) -> Neighbours:
    """Rank all documents for every query and keep the first `depth`.

    By cosine, of token vectors by MaxSim, as the mean over a query's tokens, or of binary vectors
    by Hamming distance with rescoring.

    Args:
        queries: Q query vectors, of any length.
        documents: N document vectors, of any length.
        judge: Judgements of a range of queries, asked for block by block.
        depth: Documents kept per query (K is smaller when there are fewer documents).
    """
    count = len(documents)
    kept = min(depth, count)
    found = Neighbours(
        documents_QK=np.full((len(queries), kept), -1, dtype=np.int64),
        cosines_QK=np.zeros((len(queries), kept), dtype=np.float32),
        right_document_Q=np.full(len(queries), -1, dtype=np.int64),
        right_rank_Q=np.zeros(len(queries), dtype=np.int64),
    )
    for block in _blocks(len(queries), count):
        judgements = judge(block)
        cosines_qN = _similarities(queries[block.start : block.stop], documents)
        keys_qN = _sort_keys(cosines_qN, judgements)
        _keep_best(keys_qN, block, found)
        _place_right_document(keys_qN, block, judgements, found)
    return found


def paired_cosines(first: SearchVectors, second: SearchVectors) -> NDArray[np.float64]:
    """Cosine (or MaxSim) of item i of both sides; a zero vector is near nothing.

    Raises:
        VembedError: if one side is token vectors and the other is not.
    """
    if isinstance(first, BinaryVectors) and isinstance(second, BinaryVectors):
        return paired_rescored(first, second)
    if isinstance(first, TokenVectors) and isinstance(second, TokenVectors):
        return paired_max_sim(first, second)
    if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray)):
        raise VembedError(_TWO_KINDS)
    cosines = (_unit_rows(first) * _unit_rows(second)).sum(1)
    return np.asarray(cosines.numpy())


def _similarities(queries: SearchVectors, documents: SearchVectors) -> Tensor:
    """`[q, N]`, in float64."""
    if isinstance(queries, BinaryVectors) and isinstance(documents, BinaryVectors):
        return torch.from_numpy(search_scores(queries, documents))
    if isinstance(queries, TokenVectors) and isinstance(documents, TokenVectors):
        return torch.from_numpy(max_sim(queries, documents))
    if not (isinstance(queries, np.ndarray) and isinstance(documents, np.ndarray)):
        raise VembedError(_TWO_KINDS)
    return _cosines(queries, documents)


def _unit_rows(rows_ND: NDArray[np.float32]) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(rows_ND).double(), dim=1)


def _cosines(queries_qD: NDArray[np.float32], documents_ND: NDArray[np.float32]) -> Tensor:
    """In float64: what rounding does to a row depends on its place, and must stay far below TIE."""
    queries = _unit_rows(queries_qD)
    cosines_qN = torch.empty(len(queries_qD), len(documents_ND), dtype=torch.float64)
    for start in range(0, len(documents_ND), _DOCUMENTS):
        chunk = slice(start, start + _DOCUMENTS)
        cosines_qN[:, chunk] = queries @ _unit_rows(documents_ND[chunk]).T
    return cosines_qN


def _blocks(queries: int, documents: int) -> Iterator[range]:
    size = max(_BLOCK_QUERIES, _BLOCK_ENTRIES // max(1, documents))
    for start in range(0, queries, size):
        yield range(start, min(start + size, queries))


def _sort_keys(cosines_qN: Tensor, judgements: Judgements) -> Tensor:
    """Cosines, in place, where a relevant document loses half to all of TIE, by its grade.

    Sorting by them puts ties least relevant first, so that one `topk` does both.
    """
    gains = judgements.gains
    share = gains / (1.0 + gains.max(initial=0.0))
    loss = np.where(gains < 0, np.inf, np.where(gains > 0, TIE * (0.5 + share / 2), 0.0))
    rows, columns = torch.from_numpy(judgements.rows), torch.from_numpy(judgements.documents)
    cosines_qN[rows, columns] -= torch.from_numpy(loss)
    return cosines_qN


def _keep_best(keys_qN: Tensor, block: range, found: Neighbours) -> None:
    best = torch.topk(keys_qN, found.documents_QK.shape[1], dim=1)
    candidates = torch.isfinite(best.values)
    rows = slice(block.start, block.stop)
    found.documents_QK[rows] = torch.where(candidates, best.indices, -1).numpy()
    found.cosines_QK[rows] = torch.where(candidates, best.values, 0.0).numpy()


def _place_right_document(
    keys_qN: Tensor, block: range, judgements: Judgements, found: Neighbours
) -> None:
    relevant = judgements.gains > 0
    rows, documents = judgements.rows[relevant], judgements.documents[relevant]
    keys = keys_qN.numpy()[rows, documents]
    # Highest key first within a row, so the first entry of each row is the one that stands highest.
    order = np.lexsort((documents, -keys, rows))
    rows, documents, keys = rows[order], documents[order], keys[order]
    rows, first = np.unique(rows, return_index=True)
    documents, keys = documents[first], keys[first]
    index = torch.from_numpy(rows)
    above = (keys_qN[index] > torch.from_numpy(keys)[:, None]).sum(1).numpy()
    found.right_document_Q[rows + block.start] = documents
    found.right_rank_Q[rows + block.start] = above + 1
