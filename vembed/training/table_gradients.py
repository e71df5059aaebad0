"""The gradient of embedding tables, made once for many chunks.

The gradient of a table is as large as the table, however few of its rows were looked up: each chunk
of a step would fill one with zeros and add it to the last (for all-MiniLM-L6-v2, 47 MB; a twelfth
of a step of short texts on a CPU). Here a table's rows and their gradients are kept until backward
has seen all chunks, and are added up as those of a single lookup would be.

# Shapes: n tokens of a lookup, V rows of a table, D size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEAST_ROWS = 4096
"""Of a table. Smaller ones cost little."""


def large_tables(model: nn.Module) -> list[nn.Embedding]:
    """The embedding tables of a model that `merged_table_gradients` can be used for."""
    return [
        module
        for module in model.modules()
        if type(module) is nn.Embedding
        and module.num_embeddings >= _LEAST_ROWS
        and not (module.sparse or module.scale_grad_by_freq or module.max_norm)
    ]


@contextmanager
def merged_table_gradients(tables: Iterable[nn.Embedding]) -> Iterator[None]:
    """Inside, `backward` adds to a table's `.grad` at the end, or when much has gathered.

    Only `.grad` is filled: `torch.autograd.grad` does not see these tables. Those that are frozen
    or whose gradient somebody listens to stay as they are.
    """
    merged = [_Merged(table) for table in tables if _is_plain(table)]
    for of_table in merged:
        # In place of the method of the class, for as long as this lasts.
        of_table.table.forward = of_table.look_up  # type: ignore[method-assign]
    try:
        yield
    finally:
        for of_table in merged:
            del of_table.table.forward
    for of_table in merged:
        of_table.add_to_grad()


def _is_plain(table: nn.Embedding) -> bool:
    weight: Any = table.weight
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return weight.requires_grad and not hooks and "forward" not in vars(table)


class _Merged:
    """One table, and the gradients of its rows that are not in its `.grad` yet."""

    def __init__(self, table: nn.Embedding) -> None:
        self.table = table
        self._ids: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._tokens = 0

    def look_up(self, input: Tensor) -> Tensor:  # noqa: A002 - as `nn.Embedding` names it
        take = partial(self._take, input)
        found: Tensor = _LookUp.apply(self.table.weight, input, take)  # type: ignore[no-untyped-call]
        return found

    def _take(self, ids: Tensor, grad: Tensor) -> None:
        self._ids.append(ids.reshape(-1))
        self._grads.append(grad.reshape(-1, grad.shape[-1]))
        self._tokens += ids.numel()
        # What is kept never takes more room than the gradient itself.
        if self._tokens > self.table.num_embeddings:
            self.add_to_grad()

    @torch.no_grad()
    def add_to_grad(self) -> None:
        if not self._ids:
            return
        weight, pad = self.table.weight, self.table.padding_idx
        grad_VD = torch.ops.aten.embedding_dense_backward(
            torch.cat(self._grads),
            torch.cat(self._ids),
            len(weight),
            -1 if pad is None else pad,
            scale_grad_by_freq=False,
        )
        if weight.grad is None:
            weight.grad = grad_VD
        else:
            weight.grad += grad_VD
        self._ids, self._grads, self._tokens = [], [], 0


class _LookUp(torch.autograd.Function):
    """As `functional.embedding`, but the gradient of the rows goes to a function."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, take: Any) -> Tensor:
        ctx.take = take
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.take(grads[0])
        return None, None, None
