"""The student ranks as its teacher does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vembed.distributed import gather_numbers, gather_rows, process_count, process_index
from vembed.losses.distillation.rows import check_rows, documents_of
from vembed.losses.similarity import check_temperature, full_precision, unit_rows
from vembed.losses.tiling import TILE_BYTES


class SimilarityKL(nn.Module):
    r"""The student shall rank documents as its teacher does (Hinton et al., 2015, on similarities).

    For a query, over the positives and hard negatives of all processes:

        loss(q) = T^2 * KL( softmax(cos_teacher(q, .) / T) || softmax(cos_student(q, .) / T) )

    and the result is the mean over the queries. `bidirectional` adds the same for every positive,
    over the queries of all processes, and takes the mean of the two. The factor T^2 keeps the
    gradient's size from falling as the temperature grows. Embedding sizes of student and teacher
    may differ.

    Where the teacher embeds one side only, or rows have one side only, that side's rows are ranked
    for each of its rows, itself left out.

    Memory grows with the batch, not its square: rows are compared a tile at a time and once more in
    backward.
    """

    def __init__(self, temperature: float = 0.05, *, bidirectional: bool = False) -> None:
        """Assign and check.

        Args:
            temperature: Divides the cosine similarities of student and teacher, above 0.
            bidirectional: Whether queries are ranked for each positive too.

        Raises:
            ConfigError: if temperature is out of range.
        """
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.bidirectional = bidirectional

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The loss of this process's rows. Collective: every process must call it.

        Args:
            student: Embeddings by role, `query` `[B, D]`, `positive` `[M, D]` and, where this
                process has some, `negative` `[K, D]`.
            teacher: The same of the teacher, of any other D; no gradient flows into them. It may
                lack the queries, or the documents.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if the teacher's rows are not the student's.
        """
        check_rows(student, teacher)
        with full_precision(next(iter(student.values())).device):
            taught = {role: student[role] for role in teacher}
            own = _Sides.of(taught)
            sides = own, _Sides.of(teacher).like(own)
            total = self._ranking(_Pair.rows(*sides), _Pair.columns(*sides), itself=own.alone)
            if not self.bidirectional or own.alone:
                return total
            positives = (side.columns[: len(taught["positive"])] for side in sides)
            back = self._ranking(_Pair(*positives), _Pair.rows(*sides), itself=False)
            return (total + back) / 2

    def _ranking(self, rows: _Pair, columns: _Pair, *, itself: bool) -> Tensor:
        """The mean divergence over the rows of all processes.

        Args:
            rows: This process's.
            columns: This process's; they are gathered.
            itself: Whether rows and columns are the same, so that a row must not rank itself.
        """
        sizes = gather_numbers([len(rows.student), len(columns.student)], rows.student.device)
        counts = [num_columns for _, num_columns in sizes]
        everyone = _Pair(*(gather_rows(side, counts) for side in columns))
        height = max(1, TILE_BYTES // (everyone.student.element_size() * len(everyone.student)))
        # Where this process's rows are among the columns.
        first = sum(counts[: process_index()]) if itself else None
        tiles = [
            checkpoint(
                _divergence,
                _Pair(own, taught),
                everyone,
                self.temperature,
                None if first is None else first + number * height,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for number, (own, taught) in enumerate(
                zip(*(torch.split(side, height) for side in rows), strict=True)
            )
        ]
        num_rows = sum(of_process for of_process, _ in sizes)
        return torch.stack(tiles).sum() * (self.temperature**2 * process_count() / num_rows)


class _Sides(NamedTuple):
    """What is ranked for, and what is ranked; the same rows where there is one side only."""

    rows: Tensor
    columns: Tensor
    alone: bool

    @classmethod
    def of(cls, embeddings: Mapping[str, Tensor]) -> _Sides:
        documents = documents_of(embeddings)
        if documents is not None and "query" in embeddings:
            return cls(unit_rows(embeddings["query"]), unit_rows(documents), alone=False)
        only = unit_rows(embeddings["query"] if documents is None else documents)
        return cls(only, only, alone=True)

    def like(self, student: _Sides) -> _Sides:
        """Without a graph, in the student's type."""
        rows, columns = (t.detach().to(student.rows.dtype) for t in (self.rows, self.columns))
        return _Sides(rows, columns, self.alone)


class _Pair(NamedTuple):
    """The same rows as student and teacher embed them."""

    student: Tensor
    teacher: Tensor

    @classmethod
    def rows(cls, student: _Sides, teacher: _Sides) -> _Pair:
        return cls(student.rows, teacher.rows)

    @classmethod
    def columns(cls, student: _Sides, teacher: _Sides) -> _Pair:
        return cls(student.columns, teacher.columns)


def _divergence(rows: _Pair, columns: _Pair, temperature: float, itself: int | None) -> Tensor:
    """KL(teacher || student) over columns, summed over rows.

    Args:
        rows: `[r, D]` each.
        columns: `[C, D]` each.
        temperature: Divides the products.
        itself: The column that is the first row, and so on; such pairs do not count.
    """
    logs = []
    for of_rows, of_columns in zip(rows, columns, strict=True):
        scores = of_rows @ of_columns.T / temperature
        if itself is not None and len(of_columns) > 1:
            # The least number instead of -inf, whose difference with itself is not a number.
            least = torch.finfo(scores.dtype).min
            scores = torch.diagonal_scatter(
                scores, scores.new_full((len(of_rows),), least), offset=itself
            )
        logs.append(functional.log_softmax(scores, dim=1))
    log_student, log_teacher = logs
    return functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
