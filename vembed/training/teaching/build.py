"""What a run distils from: a teacher beside the student, a cache of one, or scores in the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vembed.config import TrainConfig
from vembed.data import Collator, Record
from vembed.errors import ConfigError
from vembed.losses import Criterion, build_distillation
from vembed.losses.distillation.weighted import WeightedDistillation
from vembed.models.checkpoint_format import NO_POOLING
from vembed.models.protocol import Encoder
from vembed.training.data_utils import TEACHER_PREFIX
from vembed.training.model_builder import build_teacher_model
from vembed.training.second_inputs import SecondInputsCollator
from vembed.training.teaching.cache import CachedTeacherCollator, TeacherCache
from vembed.training.teaching.identity import taught_roles

_SCORES = frozenset({"teacher_scores"})
_FROM_EMBEDDINGS = ("similarity_kl", "embedding", "relational")


@dataclass(frozen=True)
class Teaching:
    """The teacher's side of a run; nothing of it where there is no distillation.

    Attributes:
        loss: What the student is told.
        model: The teacher, where it runs beside the student.
        cache: What it said, where it does not.
        roles: The roles that it embeds.
    """

    loss: WeightedDistillation | None = None
    model: Encoder | None = None
    cache: TeacherCache | None = None
    roles: tuple[str, ...] = ()

    def collator(self, student: Encoder) -> Callable[[list[Record]], Any]:
        """Makes batches for the student, with what the teacher needs or said beside them."""
        collate = Collator(student.processor)
        if self.cache is not None:
            return CachedTeacherCollator(collate, self.cache)
        if self.model is not None:
            return SecondInputsCollator(
                collate, Collator(self.model.processor, self.roles), prefix=TEACHER_PREFIX
            )
        return collate


def fields_of_teacher(config: TrainConfig) -> frozenset[str]:
    """Row fields that `teacher_cache` adds to every row: the scores of a cross-encoder."""
    if config.teacher_cache is None or not TeacherCache.open(config).has_scores:
        return frozenset()
    return _SCORES


def build_teaching(
    config: TrainConfig, student: Encoder, criterion: Criterion | None = None
) -> Teaching:
    """The teacher's side of a run, from the settings. With a cache, the teacher is not loaded.

    Args:
        config: The settings.
        student: The model to train.
        criterion: The task loss. One that learns from a teacher's scores itself is all that is made
            of these, where no `distillation_loss` is set.

    Raises:
        ConfigError: if teacher, cache or loss do not fit the settings.
    """
    if config.teacher_model_name is None and config.distillation_loss is None:
        return Teaching()
    if student.pooling_method == NO_POOLING:
        raise ConfigError(
            f"model_name: {config.model_label!r} gives a vector for each token, but distillation "
            "compares one for each item. Set a pooling_method other than none, or remove "
            f"{'distillation_loss' if config.teacher_model_name is None else 'teacher_model_name'}"
        )
    model = cache = teacher_dim = None
    roles: tuple[str, ...] = ()
    if config.teacher_cache is not None:
        cache = TeacherCache.open(config)
        roles = cache.roles
        teacher_dim = None if cache.has_scores else cache.facts.size
    elif config.teacher_model_name is not None:
        model = build_teacher_model(config)
    if model is not None:
        roles, teacher_dim = taught_roles(model.modalities, config), model.embedding_dim
    has_scores = cache is not None and cache.has_scores
    heard = frozenset(getattr(criterion, "required_fields", ())) >= _SCORES
    if has_scores and heard and config.distillation_loss is None:
        return Teaching(cache=cache)
    loss = build_distillation(
        config.distillation_loss or ("score" if has_scores else "similarity_kl"),
        temperature=config.distillation_temperature,
        student_dim=student.embedding_dim,
        teacher_dim=teacher_dim,
        arguments=config.distillation_kwargs,
    )
    return Teaching(loss, model, cache, roles)


def check_distillation_fields(teaching: Teaching, fields: frozenset[str]) -> None:
    """Raise ConfigError unless rows have the scores that nothing else would give."""
    names = {term.name for term in teaching.loss.terms} if teaching.loss is not None else set()
    has_both = {"query", "positive"} <= set(teaching.roles)
    if teaching.cache is not None and teaching.cache.has_scores:
        if others := sorted(names & {f"distillation.{kind}" for kind in _FROM_EMBEDDINGS}):
            raise ConfigError(
                f"distillation_loss: {others[0].partition('.')[2]} needs a teacher's embeddings, "
                "and a cross-encoder gives scores. Set distillation_loss: score"
            )
        return
    if "distillation.score" in names and not has_both and "teacher_scores" not in fields:
        raise ConfigError(
            "distillation_loss: score needs teacher_scores in every row, or a teacher of queries "
            f"and documents. Received rows with: {', '.join(sorted(fields))}. If the column has "
            "another name, name it in column_mapping"
        )
