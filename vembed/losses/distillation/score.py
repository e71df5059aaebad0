"""The student scores a query's own candidates as a teacher did.

# Shapes: B queries, M positives, K negatives of this process; C most candidates of a query
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.distributed import all_reduce_sum, process_count
from vembed.errors import ConfigError, DataError
from vembed.losses.distillation.rows import check_rows
from vembed.losses.similarity import check_temperature, full_precision, unit_rows
from vembed.placing import on_host, to_device

Form = Literal["kl", "margin_mse"]


class ScoreDistillation(nn.Module):
    r"""A query's own positives and negatives are scored as by a teacher, such as a cross-encoder.

    With the student's cosines s_c and the teacher's scores t_c of a query's candidates c:

        kl:          loss(q) = T^2 * KL( softmax(t / T_t) || softmax(s / T) )
                     (Hinton et al., 2015)
        margin_mse:  loss(q) = mean_{p, n} ( (s_p - s_n) - (t_p - t_n) / T_t )^2
                     (Hofstaetter et al., 2020), p its positives, n its negatives

    and the result is the mean over the queries that have what to compare: two candidates, or a
    positive and a negative. Scores come with the rows (`teacher_scores`); without them they are the
    cosines of the teacher's embeddings. `dot` takes products instead of cosines, as the second
    paper does.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        form: Form = "kl",
        teacher_temperature: float | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
    ) -> None:
        """Assign and check.

        Args:
            temperature: T, above 0; `margin_mse` does not use it.
            form: `kl` or `margin_mse`.
            teacher_temperature: T_t, what the teacher's scores are divided by: they may be on
                another scale, as the logits of a cross-encoder are. None: T, or 1 for `margin_mse`.
            similarity: The student's score, `cosine` or `dot`.

        Raises:
            ConfigError: if an argument is none that exists, or out of range.
        """
        super().__init__()
        check_temperature(temperature)
        if form not in get_args(Form):
            raise ConfigError(f"form: expected kl or margin_mse. Received: {form!r}")
        if similarity not in ("cosine", "dot"):
            raise ConfigError(f"similarity: expected cosine or dot. Received: {similarity!r}")
        if teacher_temperature is None:
            teacher_temperature = temperature if form == "kl" else 1.0
        check_temperature(teacher_temperature)
        self.temperature = temperature
        self.form = form
        self.teacher_temperature = teacher_temperature
        self.similarity = similarity

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        teacher_scores: Tensor | None = None,
        counts_positive: Tensor | None = None,
        counts_negative: Tensor | None = None,
    ) -> Tensor:
        """The loss of this process's queries. Collective: every process must call it.

        Args:
            student: Embeddings by role, `query` `[B, D]`, `positive` `[M, D]`, and `negative`
                `[K, D]` where there are some.
            teacher: The same of the teacher; not looked at where there are scores.
            teacher_scores: `[B, C]`, a query's positives, then its negatives, then -inf.
            counts_positive: `[B]` positives of each query; None: one each.
            counts_negative: `[B]` negatives of each query; None: none.

        Returns:
            A scalar whose mean over processes is the loss of the global batch.

        Raises:
            ConfigError: if there are no scores, nor embeddings of both sides to make them from.
            DataError: if scores and candidates are not as many.
        """
        candidates = Candidates(student, counts_positive, counts_negative)
        with full_precision(candidates.device):
            scores_BC = candidates.scores(student, self.similarity)
            if teacher_scores is None:
                _check_both_sides(student, teacher)
                taught_BC = candidates.scores(teacher, self.similarity).detach()
            else:
                taught_BC = candidates.fit(teacher_scores)
            taught_BC = taught_BC.to(scores_BC.dtype) / self.teacher_temperature
            if self.form == "kl":
                losses_B, counted_B = self._divergence(scores_BC, taught_BC, candidates)
            else:
                losses_B, counted_B = _margins(scores_BC, taught_BC, candidates)
            return _mean_of_counted(losses_B, counted_B)

    def _divergence(
        self, scores_BC: Tensor, taught_BC: Tensor, candidates: Candidates
    ) -> tuple[Tensor, Tensor]:
        least = torch.finfo(scores_BC.dtype).min
        log_student, log_teacher = (
            functional.log_softmax(scores.masked_fill(~candidates.real_BC, least), dim=1)
            for scores in (scores_BC / self.temperature, taught_BC)
        )
        terms = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
        losses_B = self.temperature**2 * terms.masked_fill(~candidates.real_BC, 0).sum(1)
        return losses_B, candidates.real_BC.sum(1) > 1


class Candidates:
    """Which documents are a query's own: `[B, C]`, its positives, then its negatives."""

    def __init__(
        self,
        student: Mapping[str, Tensor],
        counts_positive: Tensor | None,
        counts_negative: Tensor | None,
    ) -> None:
        """Lay them out.

        Raises:
            ConfigError: if there are no positives.
            DataError: if counts and rows disagree.
        """
        query, positive = student["query"], student.get("positive")
        negative = student.get("negative")
        if positive is None:
            raise ConfigError("score: needs positives. Received: a batch without them")
        device, rows = query.device, len(query)
        ones = torch.ones(rows, dtype=torch.int64)
        # On the host: the layout decides sizes.
        of_positive = ones if counts_positive is None else on_host(counts_positive)
        of_negative = ones * 0
        if counts_negative is not None and negative is not None:
            of_negative = on_host(counts_negative)
        negatives = 0 if negative is None else len(negative)
        if rows and (int(of_positive.sum()), int(of_negative.sum())) != (len(positive), negatives):
            raise DataError(
                "score: counts_positive and counts_negative must add up to the rows. Received: "
                f"{int(of_positive.sum())} and {int(of_negative.sum())} for {len(positive)} "
                f"positives and {negatives} negatives"
            )
        width = int((of_positive + of_negative).max()) if rows else 0
        column_C = torch.arange(width)
        positive_BC = column_C < of_positive[:, None]
        real_BC = column_C < (of_positive + of_negative)[:, None]
        first_positive = (of_positive.cumsum(0) - of_positive)[:, None]
        first_negative = (of_negative.cumsum(0) - of_negative - of_positive)[:, None]
        document_BC = torch.where(
            positive_BC,
            first_positive + column_C,
            len(positive) + first_negative + column_C,
        )
        self.device = device
        self.positive_BC = to_device(positive_BC, device)
        self.real_BC = to_device(real_BC, device)
        self._document_BC = to_device(document_BC.masked_fill(~real_BC, 0), device)

    def scores(self, embeddings: Mapping[str, Tensor], similarity: str = "cosine") -> Tensor:
        """`[B, C]`; those of no candidate are arbitrary."""
        documents = [embeddings[role] for role in ("positive", "negative") if role in embeddings]
        query, document = embeddings["query"], torch.cat(documents)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, document = query.to(wide), document.to(wide)
        if similarity == "cosine":
            query, document = unit_rows(query), unit_rows(document)
        return (query[:, None] * document[self._document_BC]).sum(-1)

    def fit(self, teacher_scores: Tensor) -> Tensor:
        """Scores of the rows, without columns that no row of this process has."""
        width = self.real_BC.shape[1]
        real, expected = on_host(teacher_scores).isfinite(), on_host(self.real_BC)
        if teacher_scores.shape[1] < width or not torch.equal(real[:, :width], expected):
            raise DataError(
                "teacher_scores: expected one for each positive and negative. Received: "
                f"{real.sum(1).tolist()} scores for {expected.sum(1).tolist()} candidates"
            )
        return teacher_scores[:, :width].masked_fill(~self.real_BC, 0)


def _margins(scores_BC: Tensor, taught_BC: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
    positive, negative = candidates.positive_BC, candidates.real_BC & ~candidates.positive_BC
    pairs_BCC = positive[:, :, None] & negative[:, None, :]
    off_BC = scores_BC - taught_BC
    squares = (off_BC[:, :, None] - off_BC[:, None, :]).square().masked_fill(~pairs_BCC, 0)
    count_B = pairs_BCC.sum((1, 2))
    return squares.sum((1, 2)) / count_B.clamp_min(1), count_B > 0


def _mean_of_counted(losses_B: Tensor, counted_B: Tensor) -> Tensor:
    """Mean over the queries of all processes that count; 0, with a graph, where none does."""
    counted = all_reduce_sum(counted_B.sum())
    total = losses_B.masked_fill(~counted_B, 0).sum()
    return total * process_count() / counted.clamp_min(1)


def _check_both_sides(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    if not {"query", "positive"} <= set(teacher):
        raise ConfigError(
            "score: needs teacher_scores in every row, or a teacher of queries and documents. "
            f"Received: neither; the teacher embeds {', '.join(teacher) or 'nothing'}"
        )
    check_rows(student, teacher)
