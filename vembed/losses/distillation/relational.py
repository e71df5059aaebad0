"""The student's vectors lie among each other as its teacher's do.

# Shapes: N rows of all roles and processes, n of them for angles, D size; r rows of a tile
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vembed.distributed import gather_rows, process_count, process_index
from vembed.errors import ConfigError
from vembed.losses.distillation.rows import check_rows, gather_all
from vembed.losses.similarity import full_precision, unit_rows
from vembed.losses.tiling import TILE_BYTES

_SAME_POINT = 1e-12
"""Squared distance below which two unit vectors have no direction from one to the other."""


class RelationalDistillation(nn.Module):
    r"""Distances and angles among rows are those of the teacher (Park et al., 2019, RKD).

    With unit vectors x of all queries and documents of all processes, h the Huber loss with delta 1
    and m the mean distance of two rows:

        distance = mean_{i != j} h( |s_i - s_j| / m_s, |t_i - t_j| / m_t )
        angle    = mean_{i, j, k}  h( cos(angle s_i s_j s_k), cos(angle t_i t_j t_k) )
        loss     = distance_weight * distance + angle_weight * angle

    Vectors are scaled to length one, because they are searched by cosine; the paper takes them as
    they are. Angles are taken among `angle_rows` rows, evenly spread over the batch, since their
    number grows with the cube. Sizes of student and teacher may differ, and m makes up for spaces
    of another spread.
    """

    def __init__(
        self, *, distance_weight: float = 1.0, angle_weight: float = 2.0, angle_rows: int = 64
    ) -> None:
        """Assign and check.

        Args:
            distance_weight: Weight of the distances, at least 0.
            angle_weight: Weight of the angles, at least 0; the paper's is twice that of distances.
            angle_rows: Most rows among which angles are compared, at least 3.

        Raises:
            ConfigError: if a number is out of range.
        """
        super().__init__()
        for name, weight in (("distance_weight", distance_weight), ("angle_weight", angle_weight)):
            if not weight >= 0:
                raise ConfigError(f"{name}: must be at least 0. Received: {weight!r}")
        if angle_rows < 3:
            raise ConfigError(f"angle_rows: an angle has 3 points. Received: {angle_rows!r}")
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.angle_rows = angle_rows

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """The loss of the global batch. Collective: every process must call it.

        Args:
            student: Embeddings by role, each `[n, D]`.
            teacher: The teacher's of the same rows, of all roles or some; no gradient flows into
                them.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if the teacher's rows are not the student's.
        """
        check_rows(student, teacher)
        with full_precision(next(iter(student.values())).device):
            student_ND = unit_rows(gather_all({role: student[role] for role in teacher}))
            teacher_ND = unit_rows(gather_all(teacher)).detach().to(student_ND.dtype)
            loss = student_ND.sum() * 0.0
            if self.distance_weight:
                loss = loss + self.distance_weight * _distance_loss(student_ND, teacher_ND)
            if self.angle_weight:
                spread = _spread(len(student_ND), self.angle_rows, student_ND.device)
                angles = _angle_loss(student_ND[spread], teacher_ND[spread])
                loss = loss + self.angle_weight * angles
            return loss


def _distance_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Over the pairs of this process's share of the rows, times the number of processes."""
    count = len(student_ND)
    pairs = count * (count - 1)
    if not pairs:
        return student_ND.sum() * 0.0
    tiles = _own_tiles(student_ND)
    means = [
        _over_processes(
            torch.stack([_run(_sum_of_distances, rows_ND[tile], rows_ND) for tile in tiles]).sum()
            if tiles
            else rows_ND.sum() * 0.0
        ).clamp_min(torch.finfo(rows_ND.dtype).tiny)
        / pairs
        for rows_ND in (student_ND, teacher_ND)
    ]
    parts = [
        _run(
            _sum_of_huber,
            (student_ND[tile], student_ND, means[0]),
            (teacher_ND[tile], teacher_ND, means[1]),
        )
        for tile in tiles
    ]
    # A process without a tile still takes part in the backward pass of the means.
    total = torch.stack([*parts, means[0] * 0.0]).sum()
    return total * (process_count() / pairs)


def _own_tiles(rows_ND: Tensor) -> list[Tensor]:
    """Row numbers of this process's tiles: every row is one process's, whoever embedded it."""
    own = torch.arange(process_index(), len(rows_ND), process_count(), device=rows_ND.device)
    height = max(1, TILE_BYTES // (rows_ND.element_size() * len(rows_ND)))
    return list(torch.split(own, height)) if len(own) else []


def _over_processes(value: Tensor) -> Tensor:
    """The sum over processes of a scalar, with gradient."""
    return gather_rows(value[None], [1] * process_count()).sum()


def _run(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call it, and once more in backward instead of keeping what it made."""
    made: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return made


def _distances(rows_rD: Tensor, all_ND: Tensor) -> Tensor:
    """`[r, N]`; without the matrix product, whose rounding drowns small ones."""
    return torch.cdist(rows_rD, all_ND, compute_mode="donot_use_mm_for_euclid_dist")


def _sum_of_distances(rows_rD: Tensor, all_ND: Tensor) -> Tensor:
    return _distances(rows_rD, all_ND).sum()


def _sum_of_huber(
    student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    own, taught = (_distances(rows, everyone) / mean for rows, everyone, mean in (student, teacher))
    return functional.smooth_l1_loss(own, taught, reduction="sum")


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of `count` row numbers, evenly spread."""
    kept = min(count, most)
    return torch.arange(kept, device=device) * count // kept


def _angle_loss(student_nD: Tensor, teacher_nD: Tensor) -> Tensor:
    """Over all triples of different rows."""
    count = len(student_nD)
    triples = count * (count - 1) * (count - 2)
    if not triples:
        return student_nD.sum() * 0.0
    total = torch.stack(
        [_run(_sum_of_angles, student_nD, teacher_nD, vertex) for vertex in range(count)]
    ).sum()
    return total / triples


def _sum_of_angles(student_nD: Tensor, teacher_nD: Tensor, vertex: int) -> Tensor:
    own, taught = (
        directions @ directions.T
        for directions in (_directions(student_nD, vertex), _directions(teacher_nD, vertex))
    )
    # The angle of a row with itself is the same in both, so it adds nothing.
    return functional.smooth_l1_loss(own, taught, reduction="sum")


def _directions(rows_nD: Tensor, vertex: int) -> Tensor:
    """Unit vectors from one row to each; zero, without gradient, to a row that is the same."""
    difference = rows_nD - rows_nD[vertex]
    squares = difference.square().sum(1, keepdim=True)
    apart = squares > _SAME_POINT
    return torch.where(apart, difference, 0) * torch.where(apart, squares, 1).rsqrt()
