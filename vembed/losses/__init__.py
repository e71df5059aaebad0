"""Losses: functions of embeddings. This module imports none of them until one is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from vembed.errors import ConfigError
from vembed.registry import accepted_arguments, construct, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from vembed.losses.distillation.weighted import WeightedDistillation

LOSSES = {
    "infonce": "vembed.losses.info_nce:InfoNCE",
    "sigmoid": "vembed.losses.sigmoid:PairwiseSigmoid",
    "triplet": "vembed.losses.triplet:Triplet",
    "margin_mse": "vembed.losses.margin_mse:MarginMSE",
    "cosent": "vembed.losses.cosent:CoSENT",
    "angle": "vembed.losses.cosent:AnglE",
    "cosine_mse": "vembed.losses.cosine_mse:CosineMSE",
    "contrastive": "vembed.losses.contrastive:Contrastive",
    "online_contrastive": "vembed.losses.contrastive:OnlineContrastive",
    "supcon": "vembed.losses.supcon:SupervisedContrastive",
    "label_triplet": "vembed.losses.triplet:LabelTriplet",
    "arcface": "vembed.losses.proxies:ArcFace",
    "normalized_softmax": "vembed.losses.proxies:NormalizedSoftmax",
    "maxsim": "vembed.losses.late_interaction:MaxSimInfoNCE",
    "colbert": "vembed.losses.late_interaction:MaxSimInfoNCE",
}
"""Losses by the name that `loss_type` takes; maxsim and colbert are one."""

DISTILLATION_LOSSES = {
    "similarity_kl": "vembed.losses.distillation.similarity:SimilarityKL",
    "embedding": "vembed.losses.distillation.embedding:EmbeddingDistillation",
    "relational": "vembed.losses.distillation.relational:RelationalDistillation",
    "score": "vembed.losses.distillation.score:ScoreDistillation",
}
"""Distillation losses by the name that `distillation_loss` takes."""


_DEFAULT_TEMPERATURE = 0.05
"""Of a loss that takes one and has none of its own."""


class Criterion(Protocol):
    """A loss: embeddings to a scalar.

    It is called with the query embeddings `[B, D]` and, by name, those of these that its signature
    has: `positive` `[M, D]` and `negative` `[K, D]` (None where the batch has none),
    `counts_positive` and `counts_negative` `[B]`, `ids_query` `[B]`, `ids_positive` `[M]`,
    `ids_negative` `[K]` (equal ids are equal contents), `labels` `[B]`, `scores` `[B]`,
    `teacher_scores` `[B, ...]`. Rows of positives and negatives are in the order of their queries.

    Models that keep a vector for each token give `[B, T, D]` and so on, see `vembed.token_vectors`.

    It returns a scalar whose mean over processes is the loss of the global batch: for a loss of one
    number per row, `vembed.distributed.global_mean` of them, which counts every row once also where
    processes have unequally many. A loss that looks at other rows gathers them with `gather_rows`.

    A loss that has learned vectors as long as the embeddings, to be used with `use_mrl`, takes
    `prefix_dim` too: how many numbers the embeddings of this call have, of all that there are.

    A guided loss gets `guide_query`, `guide_positive` and `guide_negative` too, a guide model's
    embeddings of the same rows.

    Five things are read from it if it has them: `required_fields`, the row fields without which it
    cannot work; `takes_tokens`, whether embeddings must be token vectors or must not;
    `score_range`, the lowest and the highest score that it takes; `batch_sampler`, how batches
    should be made where the user does not say; and the method `clamp()`, called after each
    optimizer step.

    The smallest valid one, usable as `loss_type: my_losses:cosine_distance`:

        def cosine_distance(query, positive):
            return global_mean(1 - torch.cosine_similarity(query, positive))

    or as a class, an `nn.Module` where it has parameters, whose constructor takes what it wants of
    `temperature`, `learn_temperature`, `bidirectional`, `tile_size`, `guided`, `num_classes`,
    `embedding_dim` and `loss_kwargs`:

        class CosineDistance(torch.nn.Module):
            required_fields = frozenset({"positive"})

            def forward(self, query, positive):
                return global_mean(1 - torch.cosine_similarity(query, positive))
    """

    def __call__(self, query: Tensor, **rows: Any) -> Tensor:
        """The loss of this process's rows."""
        ...


class DistillationLoss(Protocol):
    """A loss on student and teacher embeddings, each by role (`query`, `positive`, `negative`).

    A teacher may embed some of the roles only, and none where it gave scores. By name the loss also
    gets those of a `Criterion`'s extras that its signature has. It returns a scalar as a
    `Criterion` does.
    """

    def __call__(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], **rows: Any
    ) -> Tensor:
        """The loss of this process's rows."""
        ...


def build_criterion(
    loss_type: str | type | Criterion,
    *,
    temperature: float | None = None,
    learn_temperature: bool | None = None,
    bidirectional: bool = False,
    tile_size: int | Literal["auto"] = "auto",
    guided: bool = False,
    num_classes: int | None = None,
    embedding_dim: int | None = None,
    **loss_kwargs: Any,
) -> Criterion:
    """Make the loss that `loss_type` names.

    Args:
        loss_type: A name from `LOSSES`, `package.module:Name`, or a class, function or instance.
        temperature: Passed on if the loss has such an argument; None for the loss's own.
        learn_temperature: Likewise; None for the loss's own, or no where a temperature is given.
        bidirectional: Likewise.
        tile_size: Likewise.
        guided: Likewise; whether the batches bring the embeddings of a guide model.
        num_classes: Likewise; labels of the data.
        embedding_dim: Likewise; size of the embeddings.
        **loss_kwargs: Passed on as they are.

    Raises:
        ConfigError: if the loss is unknown, the arguments do not fit it, or `learn_temperature`,
            `bidirectional`, `guided` or a `tile_size` is asked of a loss without it.
    """
    if learn_temperature is None:
        learn_temperature = temperature is None and learns_temperature(loss_type)
    settings = {
        "temperature": own_temperature(loss_type) if temperature is None else temperature,
        "learn_temperature": learn_temperature,
        "bidirectional": bidirectional,
        "tile_size": tile_size,
        "guided": guided,
        "num_classes": num_classes,
        "embedding_dim": embedding_dim,
    }
    chosen = resolve("loss_type", loss_type, LOSSES)
    makes_one = _makes_a_loss(chosen)
    accepted = accepted_arguments(chosen, settings) if makes_one else {}
    asked = [name for name in ("learn_temperature", "bidirectional", "guided") if settings[name]]
    asked += ["tile_size"] if tile_size != "auto" else []
    unfit = [name for name in asked if name not in accepted]
    if unfit:
        raise ConfigError(
            f"loss_type {loss_type!r} has no {' or '.join(_SETTINGS[name] for name in unfit)}: "
            "leave that out, or choose a loss that has it: "
            + ", ".join(name for name in LOSSES if all(takes_argument(name, a) for a in unfit))
        )
    if loss_kwargs and not makes_one:
        raise ConfigError(
            f"loss_type {loss_type!r} is a function of embeddings and has no "
            f"{' or '.join(loss_kwargs)}: leave that out"
        )
    if not makes_one:
        return cast(Criterion, chosen)
    made = construct("loss_type", loss_type, LOSSES, accepted | loss_kwargs)
    return cast(Criterion, made)


_SETTINGS = {
    "learn_temperature": "learn_temperature",
    "bidirectional": "loss_bidirectional",
    "guided": "guide (guide_model_name)",
    "tile_size": "loss_tile_size",
}
"""What the settings call arguments of a loss."""


def takes_argument(loss_type: str | type | Criterion, name: str) -> bool:
    """Whether the loss that `loss_type` names is made with an argument of that name."""
    chosen = resolve("loss_type", loss_type, LOSSES)
    return _makes_a_loss(chosen) and name in accepted_arguments(chosen, {name: None})


def own_temperature(loss_type: str | type | Criterion) -> float:
    """The temperature of the loss that `loss_type` names where nobody sets one."""
    own = _default_of(loss_type, "temperature")
    return _DEFAULT_TEMPERATURE if own is None else float(own)


def learns_temperature(loss_type: str | type | Criterion) -> bool:
    """Whether the loss that `loss_type` names trains its temperature where nobody says."""
    return bool(_default_of(loss_type, "learn_temperature"))


def _default_of(loss_type: str | type | Criterion, name: str) -> Any:
    """The default of an argument of the loss; None where it has no such argument, or no default."""
    chosen = resolve("loss_type", loss_type, LOSSES)
    if not takes_argument(chosen, name):
        return None
    parameter = inspect.signature(chosen).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _makes_a_loss(chosen: Any) -> bool:
    """Whether it is to be called for a loss, rather than being one."""
    return isinstance(chosen, type) or (
        inspect.isroutine(chosen) and "query" not in inspect.signature(chosen).parameters
    )


def build_distillation_loss(
    loss_type: str | type = "similarity_kl",
    *,
    temperature: float = 0.05,
    student_dim: int | None = None,
    teacher_dim: int | None = None,
    **loss_kwargs: Any,
) -> DistillationLoss:
    """Make the distillation loss that `loss_type` names.

    Args:
        loss_type: A name from `DISTILLATION_LOSSES`, `package.module:Name`, or a class or function.
        temperature: Passed on if the loss has such an argument.
        student_dim: Size of the student's vectors; likewise.
        teacher_dim: Size of the teacher's vectors; likewise.
        **loss_kwargs: Passed on as they are.

    Raises:
        ConfigError: if the loss is unknown or the arguments do not fit it.
    """
    chosen = resolve("distillation_loss", loss_type, DISTILLATION_LOSSES)
    if inspect.isroutine(chosen) and "student" in inspect.signature(chosen).parameters:
        if loss_kwargs:
            raise ConfigError(
                f"distillation_loss {loss_type!r} is a function of embeddings and has no "
                f"{' or '.join(loss_kwargs)}: leave that out"
            )
        return cast(DistillationLoss, chosen)
    settings = {
        "temperature": temperature,
        "student_dim": student_dim,
        "teacher_dim": teacher_dim,
    }
    accepted = accepted_arguments(chosen, settings)
    made = construct("distillation_loss", loss_type, DISTILLATION_LOSSES, accepted | loss_kwargs)
    return cast(DistillationLoss, made)


def build_distillation(
    kinds: str | Mapping[str, float],
    *,
    temperature: float = 0.05,
    student_dim: int | None = None,
    teacher_dim: int | None = None,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> WeightedDistillation:
    """The weighted sum of distillation losses.

    Args:
        kinds: One as `build_distillation_loss` names it, or several with their weights.
        temperature: Passed on to those that have such an argument.
        student_dim: Likewise.
        teacher_dim: Likewise.
        arguments: Further arguments by kind.

    Raises:
        ConfigError: as `build_distillation_loss` does, or if a kind has arguments and is not used.
    """
    from vembed.losses.distillation.weighted import Term, WeightedDistillation

    weights = {kinds: 1.0} if isinstance(kinds, str) else kinds
    unused = sorted(set(arguments or {}) - set(weights))
    if unused:
        raise ConfigError(
            f"distillation_kwargs: {', '.join(unused)} is not among the losses, "
            f"{', '.join(weights)}; arguments are written by kind, as in "
            "{embedding: {distance: mse}}"
        )
    return WeightedDistillation(
        [
            Term(
                f"distillation.{kind.rpartition(':')[2]}",
                build_distillation_loss(
                    kind,
                    temperature=temperature,
                    student_dim=student_dim,
                    teacher_dim=teacher_dim,
                    **(arguments or {}).get(kind, {}),
                ),
                weight,
            )
            for kind, weight in weights.items()
        ]
    )


def missing_fields(criterion: Criterion | type[Criterion], fields: Collection[str]) -> list[str]:
    """What a loss cannot work without and rows with these fields do not have."""
    return sorted(_required_fields(criterion) - set(fields))


def check_row_fields(
    criterion: Criterion | type[Criterion],
    fields: Collection[str],
    *,
    tokens: bool | None = None,
    gaps: Mapping[str, str] | None = None,
) -> None:
    """Check that every row has what the loss cannot work without.

    Args:
        criterion: A loss; one without `required_fields` fits any row.
        fields: The fields that every row has.
        tokens: Whether the model gives a vector for each token; None where nothing is known of it.
        gaps: Of the fields that only some rows have, which rows lack it, in words.

    Raises:
        ConfigError: naming the missing fields and the built-in losses that fit data and model, or
            the rows that lack what others have.
    """
    missing = missing_fields(criterion, fields)
    if not missing:
        return
    name = getattr(criterion, "__name__", type(criterion).__name__)
    if gaps and (field := next((f for f in missing if f in gaps), None)):
        raise ConfigError(
            f"loss_type: {name} needs {field} in every row. Received: none in {gaps[field]}. "
            "Fill it in, or remove such rows"
        )
    losses = {name: resolve("loss_type", name, LOSSES) for name in LOSSES}
    required = {
        name: _required_fields(loss)
        for name, loss in losses.items()
        if tokens is None or loss.takes_tokens == tokens
    }
    # Those that use most of the data first.
    fitting = sorted(
        (name for name in required if required[name] <= set(fields)),
        key=lambda name: -len(required[name]),
    )
    advice = "If a column has another name, name it in column_mapping"
    if "score" in missing and {"positive", "label"} <= set(fields):
        advice = (
            "A label of a pair, such as 0 or 1, is a score: column_mapping: {score: YOUR_COLUMN}"
        )
    if missing == ["teacher_scores"]:
        advice += ". A cross-encoder gives them through teacher_model_name and teacher_cache"
    raise ConfigError(
        f"loss_type: {name} needs {' and '.join(missing)} in every row. Received rows with: "
        f"{', '.join(sorted(fields))}. Losses that fit these rows: {', '.join(fitting) or 'none'}. "
        f"{advice}"
    )


def check_scores(criterion: Criterion, *, lowest: float, highest: float) -> None:
    """Check that scores are on the scale that the loss is about.

    Args:
        criterion: A loss; one without `score_range` fits any scores.
        lowest: The lowest score of the data.
        highest: The highest.

    Raises:
        ConfigError: if one of them is out of the range.
    """
    least, most = getattr(criterion, "score_range", (lowest, highest))
    if least <= lowest and highest <= most:
        return
    scaled = hasattr(criterion, "score_scale")
    advice = (
        f"Set loss_kwargs: {{score_scale: {max(abs(lowest), abs(highest)):g}}}"
        if scaled
        else "Bring them onto that scale"
    )
    raise ConfigError(
        f"loss_type: {type(criterion).__name__} takes scores from {least:g} to {most:g}. Received: "
        f"scores from {lowest:g} to {highest:g}. {advice}, or use cosent, for which only their "
        "order counts"
    )


def check_embeddings(criterion: Criterion, *, tokens: bool) -> None:
    """Check that a loss takes what the encoder gives.

    Args:
        criterion: A loss; one without `takes_tokens` fits any encoder.
        tokens: Whether it is a vector for each token.

    Raises:
        ConfigError: naming the built-in losses that fit the encoder.
    """
    takes_tokens = getattr(criterion, "takes_tokens", tokens)
    if takes_tokens == tokens:
        return
    fitting = [n for n in LOSSES if resolve("loss_type", n, LOSSES).takes_tokens == tokens]
    name = getattr(criterion, "__name__", type(criterion).__name__)
    raise ConfigError(
        f"loss_type: {name} compares {_KINDS[takes_tokens]}. Received: a model that gives "
        f"{_KINDS[tokens]}. Losses that fit it: {', '.join(fitting)}; or "
        + ("for an encoder of a single tower " if takes_tokens else "")
        + "set pooling_method: "
        + ("none" if takes_tokens else "mean, or another that gives one vector")
    )


_KINDS = {True: "a vector for each token", False: "one vector for each item"}


def _required_fields(criterion: Any) -> frozenset[str]:
    return frozenset(getattr(criterion, "required_fields", ()))
