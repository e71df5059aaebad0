"""The student's vectors are its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.distributed import global_mean
from vembed.errors import ConfigError
from vembed.losses.distillation.rows import check_rows
from vembed.losses.similarity import full_precision, unit_rows

Distance = Literal["cosine", "mse"]

_PROJECTION_SEED = 0


class EmbeddingDistillation(nn.Module):
    r"""The student shall put every query and document where its teacher does.

    Over all rows x of all roles and processes, with student s(x) and teacher t(x):

        cosine:  loss = mean_x( 1 - cos(P s(x), t(x)) )
        mse:     loss = mean_x( |P s(x) - t(x)|^2 / size of t )   (Reimers and Gurevych, 2020)

    sentence-transformers' EmbedDistillLoss is the same where all roles have equally many rows.

    P is the identity where both have vectors of one size; otherwise a matrix that is trained with
    the student (as in Jiao et al., 2020, TinyBERT). It belongs to the training: the saved model
    does not have it.
    """

    def __init__(
        self,
        *,
        distance: Distance = "cosine",
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        """Assign and check.

        Args:
            distance: `cosine`, which no length changes, or `mse`.
            student_dim: Size of the student's vectors; None where it is the teacher's.
            teacher_dim: Size of the teacher's vectors; likewise.

        Raises:
            ConfigError: if the distance is unknown.
        """
        super().__init__()
        if distance not in get_args(Distance):
            raise ConfigError(f"distance: expected cosine or mse. Received: {distance!r}")
        self.distance = distance
        self.projection: nn.Parameter | None = None
        if student_dim is not None and teacher_dim is not None and student_dim != teacher_dim:
            # Drawn from a seed of its own: the same on every process, whatever was drawn before.
            generator = torch.Generator().manual_seed(_PROJECTION_SEED)
            matrix = torch.empty(student_dim, teacher_dim)
            self.projection = nn.Parameter(nn.init.orthogonal_(matrix, generator=generator))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The loss of this process's rows. Collective: every process must call it.

        Args:
            student: Embeddings by role, each `[n, D]`.
            teacher: The teacher's of the same rows, of all roles or some; no gradient flows into
                them.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if the teacher's rows are not the student's, or of an unexpected size.
        """
        check_rows(student, teacher)
        with full_precision(next(iter(student.values())).device):
            rows = torch.cat([student[role] for role in teacher])
            target = torch.cat(list(teacher.values())).detach()
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if self.projection is not None:
                rows = rows @ self.projection.to(rows.dtype)
            if rows.shape != target.shape:
                raise ConfigError(
                    "embedding: student_dim and teacher_dim must be the sizes of the vectors. "
                    f"Received: {rows.shape[1]} of the student, {target.shape[1]} of the teacher"
                )
            target = target.to(rows.dtype)
            if self.distance == "mse":
                return global_mean(functional.mse_loss(rows, target, reduction="none").mean(1))
            return global_mean(1 - (unit_rows(rows) * unit_rows(target)).sum(1))
