"""How the gradient of a batch is computed: in chunks, with or without keeping their activations.

The loss sees embeddings only, so its gradient with respect to the parameters splits in two:
d(loss)/d(embeddings), for which no encoder graph is needed, and d(embeddings)/d(parameters), which
can be taken chunk by chunk (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup"). A chunk either keeps its graph until then or is encoded a second time under
the random state of the first: same dropout masks, same gradient. With every chunk kept this is the
plain step; with none kept it is the classical gradient cache.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vembed.chunking import chunk_overhead, plan_chunks, take_rows
from vembed.distributed import any_process, local_processes, min_over_processes
from vembed.placing import index_tensor
from vembed.token_vectors import cat_items
from vembed.training.copies import Copies, Place
from vembed.training.memory import SavedBytes, available_bytes
from vembed.training.objective import Embeddings, StepLoss

logger = logging.getLogger(__name__)

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

    @property
    def padded_tokens(self) -> int:
        return len(self.rows) * self.longest


@dataclass(frozen=True)
class _Chunk:
    """The embeddings of a plan.

    Attributes:
        plan: Which rows.
        output: With a graph when it is kept.
        random_state: What it takes to make the graph again; None when it is kept.
    """

    plan: _Plan
    output: Tensor
    random_state: RandomState | None


class GradientCache:
    """Computes exact gradients of any function of a batch's embeddings, one chunk at a time."""

    def __init__(
        self,
        *,
        chunk_size: int | Literal["auto"] | None = None,
        chunk_tokens: int | None = None,
        keep: int | Literal["auto", "all"] = 0,
        memory_share: float = 0.6,
    ) -> None:
        """Assign.

        Args:
            chunk_size: Most items in a chunk; None for no limit. `auto` takes as many tokens as
                fit by a first measurement, and fewer whenever memory runs out all the same.
            chunk_tokens: Most padded tokens in a chunk; None for no limit.
            keep: Chunks whose graph is kept rather than made again: a number, `all`, or `auto` for
                as many as fit into `memory_share`.
            memory_share: Share of the memory that is free at the first step for `auto` to use.
        """
        self.chunk_size = None if chunk_size == "auto" else chunk_size
        self.chunk_tokens = chunk_tokens
        self.keep = keep
        self.memory_share = memory_share
        self._backs_off = chunk_size == "auto"
        self._budget: int | None = None
        self._bytes_per_token: dict[str, float] = {}

    def measured(self) -> dict[str, Any]:
        """What `auto` has found out on this process, as JSON can hold it.

        It decides how batches are cut, and so which dropout masks are drawn.
        """
        return {
            "chunk_tokens": self.chunk_tokens,
            "budget": self._budget,
            "bytes_per_token": self._bytes_per_token,
        }

    def take_measured(self, found: Mapping[str, Any]) -> None:
        """Cut batches as the cache did whose `measured` this is."""
        if self._measures:
            self.chunk_tokens, self._budget = found["chunk_tokens"], found["budget"]
            self._bytes_per_token = dict(found["bytes_per_token"])

    def backward(
        self,
        *,
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
        objective: Callable[[Embeddings], StepLoss],
        backward: Callable[[Tensor], None],
        keys: Mapping[str, Sequence[int]] | None = None,
    ) -> StepLoss:
        """Add the gradient of `objective` to the parameters' `.grad`.

        Nothing here reduces gradients across processes; the objective may gather embeddings.

        Args:
            encode: Model inputs of n rows to embeddings [n, D], or [n, T, D] (see
                `vembed.token_vectors`), whose T may differ from chunk to chunk.
            inputs: Padded model inputs by role.
            lengths: Real tokens per row, by role: what chunks are planned from.
            objective: Embeddings by role to the loss.
            backward: Differentiates a scalar. Loss scaling is applied in it, once, and reaches the
                encoder through the embeddings' gradient.
            keys: By role, a number for each row; rows of the same number have the same input, which
                is encoded once (see `vembed.training.copies`). None encodes every row.

        Returns:
            The loss, its total without a graph.
        """
        copies = Copies.find(lengths, keys or {})
        chunks = self._encode_all(encode, inputs, lengths, copies)
        leaves = _in_row_order(chunks, copies)
        for leaf in leaves.values():
            leaf.requires_grad_()
        loss = objective(leaves)
        backward(loss.total)
        _backward_chunks(chunks, encode, inputs, leaves, copies)
        return StepLoss(loss.total.detach(), loss.parts, loss.weights)

    def embed(
        self,
        *,
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
        keys: Mapping[str, Sequence[int]] | None = None,
    ) -> Embeddings:
        """Embeddings by role without gradient, through the same chunks."""
        copies = Copies.find(lengths, keys or {})
        plans = self.plan(inputs, lengths, copies)
        chunks = [_encode_chunk(plan, encode, inputs, kept=False) for plan in plans]
        return _in_row_order(chunks, copies)

    def plan(
        self,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
        copies: Copies | None = None,
    ) -> list[_Plan]:
        """How a batch would be cut: chunks of each role in turn, the longest sequences first."""
        if not lengths:
            return []
        overhead = chunk_overhead(_device_of(inputs).type)
        plans = []
        for role, rows in (copies or Copies.find(lengths, {})).encoded.items():
            of_rows = [lengths[role][row] for row in rows]
            chunks = plan_chunks(
                of_rows,
                max_items=self.chunk_size,
                max_tokens=self.chunk_tokens,
                overhead=overhead,
            )
            plans += [
                _Plan(role, [rows[i] for i in chunk], max(of_rows[i] for i in chunk))
                for chunk in chunks
            ]
        return plans

    def _encode_all(
        self,
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
        copies: Copies,
    ) -> list[_Chunk]:
        """The first pass; with an automatic chunk size, in smaller chunks until it fits."""
        device = _device_of(inputs)
        if self._measures and self._budget is None:
            self._look_at_memory(encode, inputs, lengths)
        if not self._backs_off:
            return self._encode_plans(self.plan(inputs, lengths, copies), encode, inputs)
        before = RandomState(device)
        while True:
            plans = self.plan(inputs, lengths, copies)
            chunks: list[_Chunk] | None = None
            try:
                chunks = self._encode_plans(plans, encode, inputs)
            except torch.OutOfMemoryError:
                logger.warning("memory ran out in the first pass; starting it over")
            if not any_process(chunks is None, device):
                return chunks or []
            # No gradient exists yet, so that starting over changes nothing but time.
            before.restore()
            smallest = max(len(plan.rows) for plan in plans) == 1
            if any_process(chunks is None and smallest, device):
                raise _too_long(max(plan.longest for plan in plans))
            largest = max(plan.padded_tokens for plan in plans)
            self._set_chunk_tokens(largest // 2, device)

    def _encode_plans(
        self, plans: list[_Plan], encode: Encode, inputs: Mapping[str, Mapping[str, Tensor]]
    ) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        kept_bytes = 0.0
        for number, plan in enumerate(plans):
            needed = self._bytes_per_token.get(plan.role, 0.0) * plan.padded_tokens
            kept = self._is_kept(number, kept_bytes + needed)
            # The longest chunk of a role shows in the first pass whether the second will fit.
            if self._backs_off and all(chunk.plan.role != plan.role for chunk in chunks):
                kept = True
            chunks.append(_encode_chunk(plan, encode, inputs, kept=kept))
            kept_bytes += needed if kept else 0.0
        return chunks

    @property
    def _measures(self) -> bool:
        return self.keep == "auto" or self._backs_off

    def _is_kept(self, number: int, kept_bytes: float) -> bool:
        if self.keep == "all":
            return True
        if self.keep == "auto":
            return self._budget is not None and kept_bytes <= self._budget
        return number < self.keep

    def _look_at_memory(
        self,
        encode: Encode,
        inputs: Mapping[str, Mapping[str, Tensor]],
        lengths: Mapping[str, Sequence[int]],
    ) -> None:
        """Measure what a token keeps, on the longest item of each role, and what there is."""
        device = _device_of(inputs)
        before = RandomState(device)
        self._budget = int(self.memory_share * available_bytes(device, local_processes()))
        fits = True
        for role, of_role in lengths.items():
            longest = max(range(len(of_role)), key=lambda row: of_role[row])
            plan = _Plan(role, [longest], of_role[longest])
            try:
                with SavedBytes() as saved:
                    _encode_chunk(plan, encode, inputs, kept=True)
            except torch.OutOfMemoryError:
                fits = False
            self._bytes_per_token[role] = saved.total / plan.padded_tokens
        if any_process(not fits, device):
            raise _too_long(max(max(of_role) for of_role in lengths.values()))
        before.restore()
        if self._backs_off and self.chunk_tokens is None:
            per_token = max(1.0, *self._bytes_per_token.values())
            fitting = int(self._budget / per_token)
            self._set_chunk_tokens(min(fitting, _largest_useful(device)), device)

    def _set_chunk_tokens(self, tokens: int, device: torch.device) -> None:
        """The same on every process, so that all run out of memory, or none."""
        self.chunk_tokens = max(1, min_over_processes(tokens, device))
        logger.info("gradient cache: at most %d padded tokens per chunk", self.chunk_tokens)


def _largest_useful(device: torch.device) -> int:
    """Padded tokens beyond which a chunk gets no faster."""
    return 4096 if device.type == "cpu" else 2**17


def _too_long(longest: int) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"memory runs out on a single item, the longest of which has {longest} tokens. Set "
        "max_seq_length lower, or gradient_checkpointing: true"
    )


def _encode_chunk(
    plan: _Plan, encode: Encode, inputs: Mapping[str, Mapping[str, Tensor]], *, kept: bool
) -> _Chunk:
    taken = _take(plan, inputs)
    random_state = None if kept else RandomState(_device_of(inputs))
    with torch.set_grad_enabled(kept):
        return _Chunk(plan, encode(taken), random_state)


def _backward_chunks(
    chunks: list[_Chunk],
    encode: Encode,
    inputs: Mapping[str, Mapping[str, Tensor]],
    leaves: Embeddings,
    copies: Copies,
) -> None:
    grads = [_grad_rows(leaves, chunk, copies) for chunk in chunks]
    pairs = list(zip(chunks, grads, strict=True))
    # Together, so that gradients of one parameter are summed as in a single graph; and first, so
    # that their memory is free when the rest is encoded again.
    kept = [(chunk.output, grad) for chunk, grad in pairs if chunk.random_state is None]
    _backward([output for output, _ in kept], [grad for _, grad in kept])
    if len(kept) == len(pairs):
        return
    after = RandomState(_device_of(inputs))
    for chunk, grad in pairs:
        if chunk.random_state is not None:
            chunk.random_state.restore()
            _backward([encode(_take(chunk.plan, inputs))], [grad])
    after.restore()


def _take(plan: _Plan, inputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return take_rows(inputs[plan.role], plan.rows, plan.longest)


def _device_of(inputs: Mapping[str, Mapping[str, Tensor]]) -> torch.device:
    return next(iter(next(iter(inputs.values())).values())).device


def _in_row_order(chunks: list[_Chunk], copies: Copies) -> Embeddings:
    """Embeddings by role, without a graph, in the order of the batch's rows."""
    outputs: dict[str, list[Tensor]] = {}
    position: dict[Place, int] = {}
    encoded: Counter[str] = Counter()
    for chunk in chunks:
        role = chunk.plan.role
        outputs.setdefault(role, []).append(chunk.output.detach())
        position |= {(role, row): encoded[role] + i for i, row in enumerate(chunk.plan.rows)}
        encoded[role] += len(chunk.plan.rows)
    embeddings: Embeddings = {}
    for role, origins in copies.origin.items():
        start: dict[str, int] = {}
        end = 0
        for used, _ in origins:
            if used not in start:
                start[used], end = end, end + encoded[used]
        stacked = cat_items([output for used in start for output in outputs[used]])
        order = [start[place[0]] + position[place] for place in origins]
        embeddings[role] = stacked.index_select(0, index_tensor(order, stacked.device))
    return embeddings


def _grad_rows(leaves: Embeddings, chunk: _Chunk, copies: Copies) -> Tensor:
    """The gradient of a chunk's output: of its rows and of all their copies."""
    role, rows = chunk.plan.role, chunk.plan.rows
    grad = _grad_of(leaves[role], rows, chunk.output)
    for found in copies.rounds(role, rows):
        of_copies = _grad_of(leaves[found.role], found.rows, chunk.output)
        grad.index_add_(0, index_tensor(found.positions, grad.device), of_copies)
    return grad


def _grad_of(leaf: Tensor, rows: list[int], output: Tensor) -> Tensor:
    """The gradient of some rows; zero where the loss did not use the role."""
    if leaf.grad is None:
        return output.new_zeros(len(rows), *output.shape[1:])
    # Of token vectors, without those that `cat_items` added.
    return leaf.grad.index_select(0, index_tensor(rows, leaf.device))[:, : output.shape[1]]


def _backward(outputs: list[Tensor], grads: list[Tensor]) -> None:
    """One backward through all outputs that have a graph; a frozen tower has none."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
