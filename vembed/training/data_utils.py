"""Take a batch apart by role, and put model inputs together.

A batch is one flat dict. Keys that start with `query_`, `positive_` (or `pos_`) or `negative_` (or
`neg_`) are model inputs of that role; everything else says something about the rows (`labels`,
`ids_query`, `counts_negative`, `lengths_query` ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import pad

from vembed.chunking import count_rows as count_input_rows
from vembed.chunking import count_tokens
from vembed.data import BORROWED
from vembed.modes import IMAGE, TEXT, RetrievalMode
from vembed.placing import to_device

ROLES = ("query", "positive", "negative")
TEACHER_PREFIX = "teacher_"
TEACHER_VECTORS = "teacher_{role}_vectors"
"""Key of a teacher's embeddings of a role, `[rows, size]`, in a batch that comes with them."""
GUIDE_PREFIX = "guide_"

_PREFIXES = {
    "query": ("query_",),
    "positive": ("positive_", "pos_"),
    "negative": ("negative_", "neg_"),
}
_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})

Inputs = dict[str, Tensor]


def unpack_query_batch(batch: Mapping[str, Any], retrieval_mode: str | RetrievalMode) -> Inputs:
    """The model inputs of the queries, without their prefix.

    Raises:
        KeyError: if the batch has no query input of the mode's modality.
    """
    return _unpack(batch, "query", RetrievalMode.parse(retrieval_mode).query)


def unpack_positive_batch(batch: Mapping[str, Any], retrieval_mode: str | RetrievalMode) -> Inputs:
    """The model inputs of the positives, without their prefix.

    Raises:
        KeyError: if the batch has no positive input of the mode's modality.
    """
    return _unpack(batch, "positive", RetrievalMode.parse(retrieval_mode).document)


def unpack_roles(
    batch: Mapping[str, Any], retrieval_mode: str | RetrievalMode
) -> dict[str, Inputs]:
    """The model inputs of every role in the batch; labelled single items have queries only."""
    mode = RetrievalMode.parse(retrieval_mode)
    modality = {"query": mode.query, "positive": mode.document, "negative": mode.document}
    present = [role for role in ROLES if any(key.startswith(_PREFIXES[role]) for key in batch)]
    return {role: _unpack(batch, role, modality[role]) for role in present}


def unpack_extras(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch says about its rows: everything that is not a model input.

    Of a borrowed row, nothing: tensors and lists without entries.
    """
    prefixes = sum(_PREFIXES.values(), ())
    inputs = (*prefixes, *(f"{TEACHER_PREFIX}{prefix}" for prefix in prefixes), GUIDE_PREFIX)
    extras = {key: value for key, value in batch.items() if not key.startswith(inputs)}
    if extras.pop(BORROWED, False):
        return {key: value[:0] for key, value in extras.items()}
    return extras


def teacher_batch(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch that the teacher reads: its own inputs, or the student's where it has none.

    Without the prefix. A teacher that embeds one side only has inputs of that side.
    """
    known = tuple(f"{TEACHER_PREFIX}{role}_" for role in (*ROLES, "lengths"))
    own = {k.removeprefix(TEACHER_PREFIX): v for k, v in batch.items() if k.startswith(known)}
    return own or batch


def teacher_vectors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The teacher's embeddings by role that came with the batch; none where it has to make them."""
    keys = {role: TEACHER_VECTORS.format(role=role) for role in ROLES}
    given = {role: batch[key] for role, key in keys.items() if key in batch}
    return own_rows(given, batch)


def own_rows(embeddings: dict[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Embeddings by role of the rows that are this process's own: none of a borrowed one."""
    if not batch.get(BORROWED):
        return embeddings
    return {role: of_role[:0] for role, of_role in embeddings.items()}


def count_rows(batch: Mapping[str, Any]) -> int:
    """Queries in a batch, or labelled items, without a borrowed one."""
    if batch.get(BORROWED):
        return 0
    return len(next(value for key, value in batch.items() if key.startswith("query")))


def row_lengths(
    batch: Mapping[str, Any], inputs: Mapping[str, Inputs], prefix: str = ""
) -> dict[str, list[int]]:
    """What every row costs, by role: from the collator, or as `count_tokens` does."""
    return {
        role: batch.get(f"{prefix}lengths_{role}") or count_tokens(of_role)
        for role, of_role in inputs.items()
    }


def place_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on a device, without waiting for it; see `vembed.placing`."""

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return to_device(value, device)
        # Lists of numbers, one for each row, stay where they are: not each has to be asked.
        is_list = isinstance(value, list) and value and isinstance(value[0], int | float | str)
        return value if is_list else send_to_device(value, device)

    return {key: placed(value) for key, value in batch.items()}


def row_keys(batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """By role, what the collator says of which rows have the same input; empty if it does not."""
    keys = {role: batch.get(f"keys_{role}") for role in ROLES}
    return {role: of_role for role, of_role in keys.items() if of_role is not None}


def concat_batches(
    batches: Sequence[Mapping[str, Tensor]], pad_token_id: int = 0
) -> tuple[Inputs, list[int]]:
    """Stack the inputs of several roles into one, for an encoder that takes them in one forward.

    Token tensors `[B, T]` of different widths are padded on the right (`input_ids` with
    `pad_token_id`, everything else with 0); other tensors are concatenated along their first
    dimension.

    Args:
        batches: Model inputs, all with the same keys.
        pad_token_id: Token that pads `input_ids`.

    Returns:
        The stacked inputs, and the number of rows of each batch, to split the embeddings with.

    Raises:
        ValueError: if there are no batches, or their keys differ.
    """
    if not batches:
        raise ValueError("concat_batches: expected at least one batch. Received: none")
    keys = set(batches[0])
    for batch in batches[1:]:
        if set(batch) != keys:
            raise ValueError(
                "concat_batches: expected the same keys in every batch. "
                f"Received: {sorted(keys)} and {sorted(batch)}"
            )
    stacked = {
        key: _stack([b[key] for b in batches], pad_token_id if key == "input_ids" else 0)
        for key in batches[0]
    }
    return stacked, [count_input_rows(batch) for batch in batches]


def maybe_first(model_output: Any) -> Tensor:
    """The embeddings `[B, D]` in what a model returned: a tensor, or the first of a tuple.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(model_output, tuple) and model_output:
        model_output = model_output[0]
    if isinstance(model_output, Tensor):
        return model_output
    raise TypeError(
        "expected the model to return embeddings [B, D], or a tuple that starts with them. "
        f"Received: {type(model_output).__name__}"
    )


def embed(encoder: Callable[..., Any], inputs: Inputs, layers: Sequence[int] = ()) -> Tensor:
    """Embeddings `[n, D]` of model inputs; with `layers` `[n, L + 1, D]`, see `PooledEncoder`."""
    return maybe_first(encoder(**inputs, layers=layers) if layers else encoder(**inputs))


def _unpack(batch: Mapping[str, Any], role: str, modality: str) -> Inputs:
    inputs = {
        key.removeprefix(prefix): value
        for prefix in _PREFIXES[role]
        for key, value in batch.items()
        if key.startswith(prefix) and value is not None
    }
    if modality == TEXT:
        inputs = {key: value for key, value in inputs.items() if key in _TEXT_INPUTS}
    elif modality == IMAGE and "pixel_values" not in inputs:
        inputs = {}
    if not inputs:
        wanted = "pixel_values" if modality == IMAGE else "input_ids"
        raise KeyError(
            f"the batch has no {_PREFIXES[role][0]}{wanted}, which modality {modality!r} needs; "
            f"it has: {', '.join(sorted(batch))}"
        )
    return inputs


def _stack(tensors: list[Tensor], fill: int) -> Tensor:
    if all(t.dim() == 2 for t in tensors):
        width = max(t.shape[1] for t in tensors)
        tensors = [pad(t, (0, width - t.shape[1]), value=fill) for t in tensors]
    return torch.cat(tensors)
