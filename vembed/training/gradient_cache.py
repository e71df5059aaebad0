"""How the gradient of a batch is computed: in chunks, with or without keeping their activations.

The loss sees embeddings only, so its gradient with respect to the parameters splits in two:
d(loss)/d(embeddings), for which no encoder graph is needed, and d(embeddings)/d(parameters), which
can be taken chunk by chunk (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup"). A chunk either keeps its graph until then or is encoded a second time under
the random state of the first: same dropout masks, same gradient. With every chunk kept this is the
plain step; with none kept it is the classical gradient cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vembed.chunking import chunk_overhead, plan_chunks, take_rows
from vembed.training.objective import Embeddings, StepLoss

Encode = Callable[[dict[str, Tensor]], Tensor]


class RandomState:
    """The random state of the CPU and of one accelerator device, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        """Take the state as it is now.

        Args:
            device: Where the encoder runs; its generator is part of the state unless it is the CPU.
        """
        self._cpu = torch.get_rng_state()
        self._device = device
        self._accelerator = None
        if device.type != "cpu":
            self._accelerator = torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        """Make every later draw continue from this state."""
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)


@dataclass(frozen=True)
class _Plan:
    """Some rows of one role that are encoded together."""

    role: str
    rows: list[int]
    longest: int


@dataclass(frozen=True)
class _Chunk:
    """The embeddings of a plan, and what it takes to encode it again."""

    plan: _Plan
    output: Tensor
    random_state: RandomState


class GradientCache:
    """Computes exact gradients of any function of a batch's embeddings, one chunk at a time."""

    def __init__(
        self,
        *,
        chunk_size: int | None = None,
        chunk_tokens: int | None = None,
        keep_activations: bool = False,
    ) -> None:
        """Assign.

        Args:
            chunk_size: Most items in a chunk; None for no limit.
            chunk_tokens: Most padded tokens in a chunk; None for no limit.
            keep_activations: Keep every chunk's graph instead of encoding it a second time.
        """
        self.chunk_size = chunk_size
        self.chunk_tokens = chunk_tokens
        self.keep_activations = keep_activations

    def backward(
        self,
        *,
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
        objective: Callable[[Embeddings], StepLoss],
        backward: Callable[[Tensor], None],
    ) -> StepLoss:
        """Add the gradient of `objective` to the parameters' `.grad`.

        Nothing here reduces gradients across processes; the objective may gather embeddings.

        Args:
            encode: Model inputs of n rows to embeddings [n, D].
            inputs: Padded model inputs by role.
            lengths: Real tokens per row, by role: what chunks are planned from.
            objective: Embeddings by role to the loss.
            backward: Differentiates a scalar. Loss scaling and the divisor of gradient accumulation
                are applied in it, once, and reach the encoder through the embeddings' gradient.

        Returns:
            The loss, its total without a graph.
        """
        chunks = [
            _encode_chunk(plan, encode, inputs, with_graph=self.keep_activations)
            for plan in self._plan(inputs, lengths)
        ]
        leaves = _in_row_order(chunks)
        for leaf in leaves.values():
            leaf.requires_grad_()
        loss = objective(leaves)
        backward(loss.total)
        self._backward_chunks(chunks, encode, inputs, leaves)
        return StepLoss(loss.total.detach(), loss.parts)

    def embed(
        self,
        *,
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
    ) -> Embeddings:
        """Embeddings by role without gradient, through the same chunks."""
        plans = self._plan(inputs, lengths)
        return _in_row_order([_encode_chunk(p, encode, inputs, with_graph=False) for p in plans])

    def _plan(
        self, inputs: Mapping[str, Mapping[str, Tensor]], lengths: Mapping[str, Sequence[int]]
    ) -> list[_Plan]:
        return [
            _Plan(role, rows, max(of_role[row] for row in rows))
            for role, of_role in lengths.items()
            for rows in plan_chunks(
                of_role,
                max_items=self.chunk_size,
                max_tokens=self.chunk_tokens,
                overhead=chunk_overhead(next(iter(inputs[role].values())).device.type),
            )
        ]

    def _backward_chunks(
        self,
        chunks: list[_Chunk],
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        leaves: Embeddings,
    ) -> None:
        grads = [_grad_rows(leaves[chunk.plan.role], chunk.plan.rows) for chunk in chunks]
        if self.keep_activations:
            _backward([chunk.output for chunk in chunks], grads)
            return
        after = RandomState(chunks[0].output.device)
        for chunk, grad in zip(chunks, grads, strict=True):
            chunk.random_state.restore()
            _backward([encode(_take(chunk.plan, inputs))], [grad])
        after.restore()


def _encode_chunk(
    plan: _Plan, encode: Encode, inputs: Mapping[str, Mapping[str, Tensor]], *, with_graph: bool
) -> _Chunk:
    taken = _take(plan, inputs)
    random_state = RandomState(next(iter(taken.values())).device)
    with torch.set_grad_enabled(with_graph):
        return _Chunk(plan, encode(taken), random_state)


def _take(plan: _Plan, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return take_rows(inputs[plan.role], plan.rows, plan.longest)


def _in_row_order(chunks: list[_Chunk]) -> Embeddings:
    """Embeddings by role, without a graph, in the order of the batch's rows."""
    embeddings: Embeddings = {}
    for role in dict.fromkeys(chunk.plan.role for chunk in chunks):
        of_role = [chunk for chunk in chunks if chunk.plan.role == role]
        stacked = torch.cat([chunk.output.detach() for chunk in of_role])
        order = torch.tensor([row for chunk in of_role for row in chunk.plan.rows])
        embeddings[role] = stacked[order.argsort().to(stacked.device)]
    return embeddings


def _grad_rows(leaf: Tensor, rows: list[int]) -> Tensor:
    """The gradient of these rows; zero where the loss did not use the role."""
    if leaf.grad is None:
        return leaf.new_zeros(len(rows), *leaf.shape[1:])
    return leaf.grad.index_select(0, torch.tensor(rows, device=leaf.device))


def _backward(outputs: list[Tensor], grads: list[Tensor]) -> None:
    """One backward through all outputs that have a graph; a frozen tower has none."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
