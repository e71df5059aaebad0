"""The facts of the first optimizer step, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vembed.redaction import redact
from vembed.training.first_step.candidates import Candidates, Softmax
from vembed.training.first_step.rows import Agreement, Copies, Geometry, Labels, Scores

FILE_NAME = "first_step.json"


@dataclass(frozen=True)
class BatchSize:
    """Queries of the first micro-batch, by process, and micro-batches in a step."""

    by_process: tuple[int, ...]
    micro_batches: int


@dataclass(frozen=True)
class Loss:
    """The loss of the first micro-batch, of all processes.

    Attributes:
        name: Of the criterion.
        total: What is differentiated.
        parts: Its terms; `task` is the criterion's.
        weights: What each term is multiplied by in the total.
    """

    name: str
    total: float
    parts: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Temperature:
    """What similarities are divided by, and whether it is trained."""

    value: float
    learned: bool


@dataclass(frozen=True)
class GradientNorm:
    """Norm of the step's gradient over some parameters, before clipping.

    Attributes:
        parameters: Trainable tensors.
        norm: Of their gradients; 0 when there are none.
    """

    parameters: int
    norm: float


@dataclass(frozen=True)
class RoleChunks:
    """How the rows of a role were encoded on the first process.

    Attributes:
        rows: Sequences.
        chunks: Forward passes.
        kept: Of these, passes whose activations are kept; the others are made again.
        padded_tokens: Tokens that were encoded.
        real_tokens: Tokens that are no padding.
    """

    rows: int
    chunks: int
    kept: int
    padded_tokens: int
    real_tokens: int


@dataclass(frozen=True)
class Memory:
    """Memory of the first micro-batch on the first process.

    Attributes:
        activation_bytes: What forward keeps for backward at most at a time: measured on the longest
            sequence of each role, scaled by the tokens of the chunks. Layers whose activations are
            checkpointed are not in it.
        peak_bytes: Most memory in use during the step, above what was in use before it; gradients
            and the loss are in it. None on a CPU.
    """

    activation_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class FirstStepReport:
    """What the first optimizer step showed; what does not apply is None or empty."""

    batch: BatchSize | None = None
    loss: Loss | None = None
    temperature: Temperature | None = None
    distillation_temperature: float | None = None
    candidates: Candidates | None = None
    copies: dict[str, Copies] = field(default_factory=dict)
    embeddings: Geometry | None = None
    labels: Labels | None = None
    scores: Scores | None = None
    teacher: Agreement | None = None
    gradients: dict[str, GradientNorm] = field(default_factory=dict)
    chunks: dict[str, RoleChunks] = field(default_factory=dict)
    memory: Memory | None = None

    def lines(self) -> list[tuple[str, str]]:
        """The table, as labels and facts."""
        facts = {
            "first batch": self.batch and _batch_line(self.batch),
            "loss": self.loss and _loss_line(self.loss, self.candidates),
            "temperature": self.temperature and _temperature_line(self.temperature),
            "negatives": self.candidates and _negatives_line(self.candidates),
            "softmax": self.candidates and _softmax_line(self.candidates),
            "copies": "; ".join(
                f"{c.rows - c.different} of {c.rows} {_plural(r)}" for r, c in self.copies.items()
            ),
            "labels": self.labels and _labels_line(self.labels),
            "scores": self.scores and _scores_line(self.scores),
            "teacher": self.teacher and _teacher_line(self.teacher),
            "similarity": self.embeddings and _similarity_line(self.embeddings),
            "norms": self.embeddings
            and "; ".join(f"{_plural(r)} {norm}" for r, norm in self.embeddings.norms.items()),
            "gradient norm": "; ".join(f"{g} {n.norm:.4g}" for g, n in self.gradients.items()),
            "chunks": "; ".join(_chunks_line(r, c) for r, c in self.chunks.items()),
            "memory": self.memory and _memory_line(self.memory),
        }
        return [(label, fact) for label, fact in facts.items() if fact]

    def write(self, folder: Path, warnings: Sequence[str]) -> None:
        """Write `first_step.json` into a folder."""
        content = {**_without_nan(asdict(self)), "warnings": redact(list(warnings))}
        text = json.dumps(content, indent=2, allow_nan=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def _batch_line(batch: BatchSize) -> str:
    one = sum(batch.by_process)
    per_process = " + ".join(map(str, batch.by_process))
    if len(set(batch.by_process)) == 1:
        per_process = f"{batch.by_process[0]} x {_count(len(batch.by_process), 'process')}"
    line = f"{one} {'query' if one == 1 else 'queries'} = {per_process}"
    if batch.micro_batches > 1:
        line += f"; {batch.micro_batches} such micro-batches a step, each with its own negatives"
    return line


def _loss_line(loss: Loss, candidates: Candidates | None) -> str:
    line = f"{loss.name} {loss.parts.get('task', loss.total):.4f}"
    if candidates is None or candidates.chance is None:
        line += " (chance is not defined for this loss)"
    else:
        line += f", at chance {candidates.chance:.4f} (mean ln of the candidates)"
    others = [f"{name} {value:.4f}" for name, value in loss.parts.items() if name != "task"]
    if not others:
        return line
    sum_ = " + ".join(f"{weight:.3g} {name}" for name, weight in loss.weights.items())
    return "; ".join([line, *others, f"total {loss.total:.4f}" + (f" = {sum_}" if sum_ else "")])


def _temperature_line(temperature: Temperature) -> str:
    return f"{temperature.value:.4g}, {'learned' if temperature.learned else 'fixed'}"


def _negatives_line(candidates: Candidates) -> str:
    similar = candidates.too_similar
    return (
        f"{candidates.negatives} per query: {candidates.local} of its process, "
        f"{candidates.other_processes} of other processes, {candidates.hard} hard; "
        f"masked as relevant: {candidates.masked}"
        + ("" if similar is None else f", as too similar: {similar}")
    )


def _softmax_line(candidates: Candidates) -> str:
    softmax = candidates.softmax
    if softmax is None:
        return ""
    return f"over candidates: {_softmax_words(softmax)}"


def _softmax_words(softmax: Softmax) -> str:
    return f"{softmax.evenness:.0%} even, {softmax.decided:.0%} of the queries decided"


def _labels_line(labels: Labels) -> str:
    return (
        f"{labels.labels} different on {labels.items} items; partners of an item: "
        f"{labels.partners}; without any: {labels.alone}"
    )


def _scores_line(scores: Scores) -> str:
    return f"{scores.different} different on {scores.pairs} pairs: {scores.spread}"


def _teacher_line(teacher: Agreement) -> str:
    return (
        f"ranks like the student: Spearman {teacher.spearman:.3f}, same best document "
        f"{teacher.same_best:.0%}; its similarities deviate by {teacher.teacher_deviation:.3g}, "
        f"softmax at temperature {teacher.temperature:.3g} {_softmax_words(teacher.softmax)}"
    )


def _similarity_line(geometry: Geometry) -> str:
    values = {"own pairs": geometry.own_pairs}
    values |= {f"random {_plural(role)}": v for role, v in geometry.random_pairs.items()}
    return "; ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)


def _chunks_line(role: str, chunks: RoleChunks) -> str:
    padding = 1 - chunks.real_tokens / max(1, chunks.padded_tokens)
    return (
        f"{_plural(role)} {chunks.rows} in {chunks.chunks}, {chunks.kept} kept, "
        f"{chunks.padded_tokens} tokens with {padding:.0%} padding"
    )


def _memory_line(memory: Memory) -> str:
    line = f"{_size(memory.activation_bytes)} of activations expected at a time"
    return line if memory.peak_bytes is None else f"{line}; {_size(memory.peak_bytes)} at the peak"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}es"


def _plural(role: str) -> str:
    return {"query": "queries", "positive": "positives", "negative": "negatives"}.get(role, role)


def _size(number: float) -> str:
    return f"{number / 2**20:,.1f} MB" if number < 2**30 else f"{number / 2**30:,.2f} GB"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(of_key) for key, of_key in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
