"""Validation during training: the loss over a validation set, and retrieval metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vembed.chunking import DEFAULT_CHUNK_TOKENS
from vembed.distributed import (
    all_reduce_sum,
    any_process,
    fail_together,
    gather_counts,
    gather_rows,
)
from vembed.evaluation import EvalTask
from vembed.inference import encode_items
from vembed.modes import Item
from vembed.token_vectors import TokenVectors, Vectors
from vembed.training.data_utils import (
    maybe_first,
    own_rows,
    place_batch,
    row_keys,
    row_lengths,
    unpack_extras,
    unpack_roles,
)
from vembed.training.gradient_cache import GradientCache
from vembed.training.guide import Guide
from vembed.training.objective import Objective
from vembed.training.trackers import log_to_trackers


@dataclass(frozen=True)
class Validation:
    """What one validation found.

    Attributes:
        loss: Mean loss over the queries of the validation set, the same on every process; None
            without a validation dataloader.
        metrics: Metrics of the evaluation task, such as `ndcg@10`; empty without a task.
    """

    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def as_log(self) -> dict[str, float]:
        """The numbers under the names they have in `metrics.jsonl` and in the trackers."""
        loss = {} if self.loss is None else {"val_loss": self.loss}
        return {**loss, **{f"val_{name}": value for name, value in self.metrics.items()}}


class Evaluator:
    """Measures the model on validation data, in evaluation mode and without gradients."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        accelerator: Accelerator,
        retrieval_mode: str = "t2i",
        log_with: str | Sequence[str] | None = None,
        *,
        task: EvalTask | None = None,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        guide: Guide | None = None,
    ) -> None:
        """Assign.

        Args:
            model: The encoder, prepared by the Accelerator or not.
            criterion: The training loss, without distillation.
            accelerator: Device, processes and trackers.
            retrieval_mode: Modality of queries and documents, as in `t2t`.
            log_with: Whether (a tracker's name, or several) or not (None) to log to the trackers
                that the Accelerator has started.
            task: What to measure beside the loss.
            chunk_tokens: Padded tokens per forward.
            guide: Embeds each batch for a guided criterion.
        """
        self.model = model
        self.accelerator = accelerator
        self.retrieval_mode = retrieval_mode
        self.log_with = log_with
        self.task = task
        self.chunk_tokens = chunk_tokens
        self._guide = guide
        self._objective = Objective(criterion)

    def evaluate(self, val_dataloader: Iterable[Mapping[str, Any]], global_step: int = 0) -> float:
        """Mean loss over all queries of all processes, each counted once.

        Also measures the task and logs both, as `validate` does. Collective: every process must
        call it.
        """
        loss = self.validate(val_dataloader, global_step).loss
        if loss is None:
            raise ValueError("evaluate: expected a dataloader. Received: None; use validate()")
        return loss

    def validate(
        self, val_dataloader: Iterable[Mapping[str, Any]] | None, global_step: int = 0
    ) -> Validation:
        """The loss over `val_dataloader` and the metrics of the task, logged at `global_step`.

        Collective: every process must call it.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            loss = None if val_dataloader is None else self._mean_loss(val_dataloader)
            metrics = {} if self.task is None else self._measure(self.task)
        finally:
            self.model.train(was_training)
        result = Validation(loss, metrics)
        if self.log_with:
            log_to_trackers(self.accelerator, result.as_log(), global_step)
        return result

    def _mean_loss(self, val_dataloader: Iterable[Mapping[str, Any]]) -> float:
        encoder = self.accelerator.unwrap_model(self.model)
        cache = GradientCache(chunk_tokens=self.chunk_tokens)
        device = self.accelerator.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in self._batches(val_dataloader):
            placed = place_batch(batch, device)
            inputs = unpack_roles(placed, self.retrieval_mode)
            embeddings = cache.embed(
                encode=lambda inputs: maybe_first(encoder(**inputs)),
                inputs=inputs,
                lengths=row_lengths(placed, inputs),
                keys=row_keys(placed),
            )
            embeddings = own_rows(embeddings, batch)
            extras = unpack_extras(placed)
            if self._guide is not None:
                extras |= self._guide.embed(placed)
            with torch.no_grad():
                loss = self._objective(embeddings, extras).total
            # The mean of `loss` over processes is the mean over the queries of all of them.
            own = len(embeddings["query"])
            rows = sum(gather_counts(own, device)) / self.accelerator.num_processes
            total += torch.stack([loss.double() * rows, loss.new_tensor(own, dtype=torch.float64)])
        loss_sum, queries = all_reduce_sum(total).tolist()
        if queries == 0:
            raise ValueError("evaluate: expected at least one batch. Received: an empty dataloader")
        return float(loss_sum / queries)

    def _batches(self, dataloader: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The batches of a dataloader; where one process cannot make its own, all end alike."""
        batches = iter(dataloader)
        while True:
            with fail_together(self.accelerator.device):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _measure(self, task: EvalTask) -> dict[str, float]:
        encode = sharded_encode(self.model, self.accelerator, self.chunk_tokens)
        return dict(task.evaluate(encode).metrics)


def sharded_encode(
    model: nn.Module, accelerator: Accelerator, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Callable[[Sequence[Item], Literal["query", "document"]], Vectors]:
    """A function that encodes items, each process its share; every process gets all the vectors.

    The function is collective: every process must call it with the same items.
    """
    encoder = accelerator.unwrap_model(model)

    def encode(items: Sequence[Item], role: Literal["query", "document"]) -> Vectors:
        workers, this = accelerator.num_processes, accelerator.process_index
        with fail_together(accelerator.device):
            own = encode_items(
                encoder, items[this::workers], role=role, chunk_tokens=chunk_tokens,
                device=accelerator.device,
            )  # fmt: skip
        if workers == 1:
            return own
        counts = [len(range(process, len(items), workers)) for process in range(workers)]
        dealt = np.concatenate([np.arange(p, len(items), workers) for p in range(workers)])
        return _gather_vectors(own, counts, accelerator.device)[dealt.argsort()]

    return encode


def _gather_vectors(own: Vectors, counts: list[int], device: torch.device) -> Vectors:
    """The items of all processes, process by process. Collective: every process must call it.

    Args:
        own: Of this process; a process without items may have vectors of either kind.
        counts: Items of each process.
        device: Where the process group communicates from.
    """

    def gather(rows: np.ndarray, of_process: list[int] | None = None) -> np.ndarray:
        there = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        gathered: np.ndarray = gather_rows(there, of_process).cpu().numpy()
        return gathered

    if not any_process(isinstance(own, TokenVectors), device):
        return gather(np.asarray(own), counts)
    if not isinstance(own, TokenVectors):
        own = TokenVectors(own, np.zeros(1, dtype=np.int64))
    lengths = gather(own.lengths, counts)
    return TokenVectors(gather(own.flat_SD), np.concatenate([[0], lengths.cumsum()]))
