"""What a student is taught by a teacher's embeddings of the same rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vembed.distributed import gather_numbers, gather_rows, process_count
from vembed.errors import ConfigError
from vembed.losses.similarity import check_temperature, full_precision, unit_rows
from vembed.losses.tiling import TILE_BYTES


class SimilarityKL(nn.Module):
    r"""The student shall rank documents as its teacher does (Hinton et al., 2015, on similarities).

    For a query, over the positives and hard negatives of all processes:

        loss(q) = T^2 * KL( softmax(cos_teacher(q, .) / T) || softmax(cos_student(q, .) / T) )

    and the result is the mean over the queries. The factor T^2 keeps the gradient's size from
    falling as the temperature grows. Embedding sizes of student and teacher may differ.

    Memory grows with the batch, not its square: rows are compared a tile at a time and once more in
    backward.
    """

    required_fields = frozenset({"positive"})

    def __init__(self, temperature: float = 0.05) -> None:
        """Assign and check.

        Args:
            temperature: Divides the cosine similarities of student and teacher, above 0.

        Raises:
            ConfigError: if temperature is out of range.
        """
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The loss of this process's queries. Collective: every process must call it.

        Args:
            student: Embeddings by role, `query` `[B, D]`, `positive` `[M, D]` and, where this
                process has some, `negative` `[K, D]`.
            teacher: The same of the teacher, of any other D; no gradient flows into them.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if there are no positives, or the teacher's rows are not the student's.
        """
        _check_roles(student, teacher)
        device = student["query"].device
        with full_precision(device):
            query_BD, documents = _queries_and_documents(student)
            teacher_BD, teacher_documents = _queries_and_documents(teacher)
            sizes = gather_numbers([len(query_BD), len(documents)], device)
            counts = [num_documents for _, num_documents in sizes]
            documents_CD = gather_rows(documents, counts)
            teacher_CD = gather_rows(teacher_documents.detach(), counts)
            height = max(1, TILE_BYTES // (documents_CD.element_size() * len(documents_CD)))
            total = torch.stack(
                [
                    checkpoint(
                        _divergence,
                        (rows, documents_CD),
                        (teacher_rows, teacher_CD),
                        self.temperature,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                    for rows, teacher_rows in zip(
                        torch.split(query_BD, height),
                        torch.split(teacher_BD.detach(), height),
                        strict=True,
                    )
                ]
            ).sum()
        num_queries = sum(queries for queries, _ in sizes)
        return total * (self.temperature**2 * process_count() / num_queries)


def _divergence(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], temperature: float
) -> Tensor:
    """KL(teacher || student) over columns, summed over rows; each side is (rows, columns)."""
    log_student, log_teacher = (
        functional.log_softmax(rows @ columns.T / temperature, dim=1)
        for rows, columns in (student, teacher)
    )
    return functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def _queries_and_documents(embeddings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    documents = [embeddings[role] for role in ("positive", "negative") if role in embeddings]
    return unit_rows(embeddings["query"]), unit_rows(torch.cat(documents))


def _check_roles(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    rows, taught = (
        {role: len(of_role) for role, of_role in embeddings.items()}
        for embeddings in (student, teacher)
    )
    if rows != taught or "positive" not in rows:
        raise ConfigError(
            "this distillation loss needs queries and positives, and the teacher's embeddings of "
            f"the same rows. Received: {rows} of the student, {taught} of the teacher"
        )
