"""Any loss on the first dimensions of the embeddings as well, so that these are good alone.

The same for the embeddings that fewer layers of the encoder give.

# Shapes: B queries, D size of the embeddings, d of a prefix, L numbers of layers, all of them last
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vembed.errors import ConfigError
from vembed.losses.similarity import unit_rows
from vembed.registry import accepted_arguments

CUT = ("positive", "negative")
"""What is cut beside the query; a guide's embeddings are not."""

PART = "mrl."
"""What the name of a dimension's loss begins with, as in `mrl.256`."""

LAYERS_PART = "mrl.layers{layers}."
"""The same for fewer layers, as in `mrl.layers4.256`."""

_HALVINGS = 4
_LEAST_DIM = 8


class Matryoshka(nn.Module):
    r"""A loss of nested prefixes (Kusupati et al., 2022, Matryoshka Representation Learning).

    With the first d numbers of each embedding, brought to length one, and the weights w:

        loss = sum_d w_d * criterion(query[:d], positive[:d], ...)

    With `layers`, the sum goes over these numbers of layers too, with weight 1 each and for all of
    them (2D Matryoshka: Li et al., 2024). Each is what the encoder would give with its first so
    many layers alone: embeddings come as `[B, L, D]`, the whole encoder's last.

    The encoder runs once, and whatever the criterion has learned is shared by all dimensions, a
    temperature among it. Class vectors are cut as the embeddings are (the paper's MRL-E), by a
    criterion whose `forward` takes `prefix_dim`.

    Vectors of all dimensions have length one, the whole one too, so a criterion that looks at
    lengths (`margin_mse` on dot products) sees cosines here.

    sentence-transformers' MatryoshkaLoss gives the same values. Its AdaptiveLayerLoss and
    Matryoshka2dLoss do not: they draw layers (and dimensions) at random in each step, take the mean
    over fewer layers, without a norm that follows the last, and pull their vectors to the last's.

    Attributes:
        criterion: The loss that is wrapped.
        weights: By dimension, largest first.
        layers: Numbers of layers beside all.
    """

    takes_tokens = False

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        layers: Sequence[int] = (),
    ) -> None:
        """Assign and check.

        Args:
            criterion: See `vembed.losses.Criterion`.
            dims: Sizes of the prefixes, in any order.
            weights: One for each of `dims`, in their order; None: 1.
            layers: What embeddings bring of fewer layers, in their order.

        Raises:
            ConfigError: if dimensions or weights are out of range or do not fit each other, or the
                criterion compares a vector for each token, or has vectors of the whole size that
                it cannot cut.
        """
        super().__init__()
        _check_criterion(criterion)
        self.criterion = criterion
        self.weights = weigh_dims(dims, weights)
        self.layers = tuple(layers)
        self.required_fields = frozenset(getattr(criterion, "required_fields", ()))

    def clamp(self) -> None:
        """Bring what the criterion has learned back into its range, if it has one."""
        clamp = getattr(self.criterion, "clamp", None)
        if clamp is not None:
            clamp()

    @property
    def total_weight(self) -> float:
        """Of all losses that are added up."""
        return sum(self.weights.values()) * (1 + len(self.layers))

    def each(self, query: Tensor, rows: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of each dimension by name, without its weight. Collective if the criterion is.

        Args:
            query: `[B, D]`; with `layers` `[B, L, D]`, and so are other embeddings.
            rows: Other embeddings and what the batch says of them, by the names that a criterion
                has for them; it gets what its signature names.

        Raises:
            ConfigError: if a dimension is larger than D, or embeddings are token vectors.
        """
        self._check_shape(query)
        if not self.layers:
            return {f"{PART}{dim}": loss for dim, loss in self.of_dims(query, rows).items()}
        losses = {}
        # The whole encoder first, as the largest dimension is.
        for number, prefix in reversed(list(enumerate(self._parts()))):
            documents = {r: rows[r][:, number] for r in CUT if rows.get(r) is not None}
            for dim, loss in self.of_dims(query[:, number], {**rows, **documents}).items():
                losses[f"{prefix}{dim}"] = loss
        return losses

    def of_dims(self, query: Tensor, rows: Mapping[str, Any]) -> dict[int, Tensor]:
        """The loss of each dimension of `[B, D]`, as `each` says."""
        signature = getattr(self.criterion, "forward", self.criterion)
        wanted = accepted_arguments(signature, {k: v for k, v in rows.items() if k != "query"})
        # Widened before they are cut: gradients of all dimensions add up in the wider type.
        whole = {role: _widen(wanted[role]) for role in CUT if wanted.get(role) is not None}
        query = _widen(query)
        losses = {}
        for dim in self.weights:
            cut: dict[str, Any] = {
                role: unit_rows(embeddings[:, :dim]) for role, embeddings in whole.items()
            }
            of_prefix = accepted_arguments(signature, {"prefix_dim": dim})
            losses[dim] = self.criterion(
                unit_rows(query[:, :dim]), **{**wanted, **cut, **of_prefix}
            )
        return losses

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Of what `each` gave."""
        weights = {f"{part}{dim}": w for part in self._parts() for dim, w in self.weights.items()}
        total: Tensor = sum(weights[name] * loss for name, loss in losses.items())  # type: ignore[assignment]
        return total

    def whole(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings by role, `[n, D]`: of fewer layers, nothing."""
        return {r: e[:, -1] if self.layers else e for r, e in embeddings.items()}

    def _parts(self) -> list[str]:
        """What the names of losses begin with, in the order of the embeddings."""
        return [*(LAYERS_PART.format(layers=count) for count in self.layers), PART]

    def _check_shape(self, query: Tensor) -> None:
        largest = next(iter(self.weights))
        levels = (1 + len(self.layers),) if self.layers else ()
        if query.shape[1:-1] != levels or query.shape[-1] < largest:
            raise ConfigError(
                f"mrl_dims: expected one vector of at least {largest} numbers for each item"
                + (f" and of {levels[0]} numbers of layers" if levels else "")
                + f". Received: embeddings of shape {list(query.shape)}"
            )

    def forward(self, query: Tensor, **rows: Any) -> Tensor:
        """The weighted sum over dimensions; see `each`."""
        return self.weighted_sum(self.each(query, rows))


def innermost(criterion: Any) -> Any:
    """The loss itself, of one that may be wrapped; all that is learned is in it."""
    return criterion.criterion if isinstance(criterion, Matryoshka) else criterion


def whole_embeddings(criterion: Any, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`[n, D]` by role, of those that a criterion compares, which may be of several layers too."""
    return criterion.whole(embeddings) if isinstance(criterion, Matryoshka) else dict(embeddings)


def layers_of(criterion: Any) -> tuple[int, ...]:
    """Numbers of layers that a criterion wants embeddings of, beside those of all."""
    return criterion.layers if isinstance(criterion, Matryoshka) else ()


def weigh_dims(dims: Sequence[int], weights: Sequence[float] | None = None) -> dict[int, float]:
    """Weights by dimension, largest first; a weight stays with its dimension.

    Raises:
        ConfigError: if they are out of range or do not fit each other.
    """
    if not dims or len(set(dims)) < len(dims) or min(dims) < 1:
        raise ConfigError(
            f"mrl_dims: expected different numbers from 1 up, as in [256, 64]. Received: {[*dims]}"
        )
    given = [1.0] * len(dims) if weights is None else [*weights]
    if len(given) != len(dims) or not all(0 < weight < math.inf for weight in given):
        raise ConfigError(
            f"mrl_weights: expected a number above 0 for each of the {len(dims)} mrl_dims. "
            f"Received: {given}"
        )
    by_dim = dict(zip(dims, given, strict=True))
    return {dim: by_dim[dim] for dim in sorted(by_dim, reverse=True)}


def complete_dims(
    dims: Sequence[int] | None, weights: Sequence[float] | None, *, embedding_dim: int
) -> dict[int, float]:
    """Weights by dimension, the whole one among them.

    Args:
        dims: As configured; None: the whole, and halves of it down to a sixteenth or 8.
        weights: One for each of `dims`; None: 1.
        embedding_dim: The whole. Where `dims` lacks it, it is added with weight 1.

    Raises:
        ConfigError: if a dimension is larger than the whole, and as `weigh_dims` does.
    """
    if dims is None:
        halves = [embedding_dim >> n for n in range(_HALVINGS + 1)]
        dims = [dim for dim in halves if dim >= min(_LEAST_DIM, embedding_dim)]
    found = weigh_dims(dims, weights)
    largest = next(iter(found))
    if largest > embedding_dim:
        raise ConfigError(
            f"mrl_dims: the model's vectors have {embedding_dim} numbers. Received: {largest}"
        )
    return {embedding_dim: found.get(embedding_dim, 1.0), **found}


def _widen(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _check_criterion(criterion: Callable[..., Tensor]) -> None:
    name = getattr(criterion, "__name__", type(criterion).__name__)
    if getattr(criterion, "takes_tokens", False):
        raise ConfigError(
            f"use_mrl: {name} compares a vector for each token, which has no Matryoshka form here. "
            "Set use_mrl: false, or a loss that compares one vector for each item"
        )
    if isinstance(criterion, Matryoshka):
        raise ConfigError("use_mrl: the loss is a Matryoshka already. Set use_mrl: false")
    knows_size = isinstance(criterion, nn.Module) and (
        "embedding_dim" in inspect.signature(type(criterion)).parameters
    )
    signature = getattr(criterion, "forward", criterion)
    if knows_size and not accepted_arguments(signature, {"prefix_dim": 0}):
        raise ConfigError(
            f"use_mrl: {name} is made for embeddings of one size, and cannot compare a part of "
            "them. Let its forward take prefix_dim and compare that many numbers, or set use_mrl: "
            "false"
        )
