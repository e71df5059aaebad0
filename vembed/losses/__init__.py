"""Losses: functions of embeddings. This module imports none of them until one is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from vembed.errors import ConfigError
from vembed.registry import accepted_arguments, construct, resolve

if TYPE_CHECKING:
    from torch import Tensor

LOSSES = {
    "infonce": "vembed.losses.info_nce:InfoNCE",
    "sigmoid": "vembed.losses.sigmoid:PairwiseSigmoid",
    "cosent": "vembed.losses.cosent:CoSENT",
    "supcon": "vembed.losses.supcon:SupervisedContrastive",
    "maxsim": "vembed.losses.late_interaction:MaxSimInfoNCE",
    "colbert": "vembed.losses.late_interaction:MaxSimInfoNCE",
}
"""Losses by the name that `loss_type` takes; maxsim and colbert are one."""

DISTILLATION_LOSSES = {"similarity_kl": "vembed.losses.distillation:SimilarityKL"}
"""Distillation losses by name."""


DEFAULT_TEMPERATURE = 0.05
"""What similarities are divided by where nothing else says."""


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

    Three things are read from it if it has them: `required_fields`, the row fields without which it
    cannot work, `takes_tokens`, whether embeddings must be token vectors or must not, and the
    method `clamp()`, called after each optimizer step.

    The smallest valid one, usable as `loss_type: my_losses:cosine_distance`:

        def cosine_distance(query, positive):
            return global_mean(1 - torch.cosine_similarity(query, positive))

    or as a class, an `nn.Module` where it has parameters, whose constructor takes what it wants of
    `temperature`, `learn_temperature`, `bidirectional`, `tile_size` and `loss_kwargs`:

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

    By name it also gets those of a `Criterion`'s extras that its signature has. It returns a scalar
    as a `Criterion` does.
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
    learn_temperature: bool | None = False,
    bidirectional: bool = False,
    tile_size: int | Literal["auto"] = "auto",
    **loss_kwargs: Any,
) -> Criterion:
    """Make the loss that `loss_type` names.

    Args:
        loss_type: A name from `LOSSES`, `package.module:Name`, or a class, function or instance.
        temperature: Passed on if the loss has such an argument; None for `DEFAULT_TEMPERATURE`.
        learn_temperature: Likewise; None for no.
        bidirectional: Likewise.
        tile_size: Likewise.
        **loss_kwargs: Passed on as they are.

    Raises:
        ConfigError: if the loss is unknown, the arguments do not fit it, or `learn_temperature`,
            `bidirectional` or a `tile_size` is asked of a loss without it.
    """
    settings = {
        "temperature": DEFAULT_TEMPERATURE if temperature is None else temperature,
        "learn_temperature": bool(learn_temperature),
        "bidirectional": bidirectional,
        "tile_size": tile_size,
    }
    chosen = resolve("loss_type", loss_type, LOSSES)
    makes_one = _makes_a_loss(chosen)
    accepted = accepted_arguments(chosen, settings) if makes_one else {}
    asked = [name for name in ("learn_temperature", "bidirectional") if settings[name]]
    asked += ["tile_size"] if tile_size != "auto" else []
    unfit = [name for name in asked if name not in accepted] + ([] if makes_one else [*loss_kwargs])
    if unfit:
        raise ConfigError(
            f"loss_type {loss_type!r} has no {' or '.join(unfit)}: leave that out, or choose a "
            "loss that has it"
        )
    if not makes_one:
        return cast(Criterion, chosen)
    made = construct("loss_type", loss_type, LOSSES, accepted | loss_kwargs)
    return cast(Criterion, made)


def takes_argument(loss_type: str | type | Criterion, name: str) -> bool:
    """Whether the loss that `loss_type` names is made with an argument of that name."""
    chosen = resolve("loss_type", loss_type, LOSSES)
    return _makes_a_loss(chosen) and name in accepted_arguments(chosen, {name: None})


def _makes_a_loss(chosen: Any) -> bool:
    """Whether it is to be called for a loss, rather than being one."""
    return isinstance(chosen, type) or (
        inspect.isroutine(chosen) and "query" not in inspect.signature(chosen).parameters
    )


def build_distillation_loss(
    loss_type: str | type = "similarity_kl", *, temperature: float = 0.05, **loss_kwargs: Any
) -> DistillationLoss:
    """Make the distillation loss that `loss_type` names.

    Args:
        loss_type: A name from `DISTILLATION_LOSSES`, `package.module:Name`, or a class.
        temperature: Passed on if the loss has such an argument.
        **loss_kwargs: Passed on as they are.

    Raises:
        ConfigError: if the loss is unknown or the arguments do not fit it.
    """
    chosen = resolve("distillation_loss", loss_type, DISTILLATION_LOSSES)
    accepted = accepted_arguments(chosen, {"temperature": temperature})
    made = construct("distillation_loss", loss_type, DISTILLATION_LOSSES, accepted | loss_kwargs)
    return cast(DistillationLoss, made)


def missing_fields(criterion: Criterion, fields: Collection[str]) -> list[str]:
    """What a loss cannot work without and rows with these fields do not have."""
    return sorted(_required_fields(criterion) - set(fields))


def check_row_fields(criterion: Criterion, fields: Collection[str]) -> None:
    """Check that every row has what the loss cannot work without.

    Args:
        criterion: A loss; one without `required_fields` fits any row.
        fields: The fields that every row has.

    Raises:
        ConfigError: naming the missing fields and the built-in losses that fit the data.
    """
    missing = missing_fields(criterion, fields)
    if not missing:
        return
    required = {name: _required_fields(resolve("loss_type", name, LOSSES)) for name in LOSSES}
    # Those that use most of the data first.
    fitting = sorted(
        (name for name in required if required[name] <= set(fields)),
        key=lambda name: -len(required[name]),
    )
    name = getattr(criterion, "__name__", type(criterion).__name__)
    raise ConfigError(
        f"loss_type: {name} needs {' and '.join(missing)} in every row. Received rows with: "
        f"{', '.join(sorted(fields))}. Losses that fit these rows: {', '.join(fitting) or 'none'}. "
        "If a column has another name, name it in column_mapping"
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
