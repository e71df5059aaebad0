"""What a run brought: compared, shown in the terminal, written as a report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import accelerate
import torch
import transformers

from vembed import __version__
from vembed.config import TrainConfig
from vembed.evaluation import (
    EvalResult,
    MetricChange,
    MovedQueries,
    choose_gallery,
    compare,
    moved_queries,
)
from vembed.redaction import redact, redact_text
from vembed.training.training_loop import TrainState


@dataclass(frozen=True)
class Proof:
    """The test set before and after, metric by metric and query by query."""

    before: EvalResult
    after: EvalResult
    changes: list[MetricChange]
    moved: MovedQueries


@dataclass(frozen=True)
class RunResult:
    """What a run brought.

    Attributes:
        model_path: The best model by validation, or the final one without validation.
        state: Steps, epochs and the best validation value.
        train_seconds: Time of the training loop, validation and saving included.
        proof: The test set before and after; None when the run had no test set.
        report_path: The HTML report; None without a proof, and on all but the main process.
        failed_saves: What the disk did not take, checkpoints on the way among it.
    """

    model_path: Path
    state: TrainState
    train_seconds: float
    proof: Proof | None = None
    report_path: Path | None = None
    failed_saves: tuple[str, ...] = ()


def prove(before: EvalResult | None, after: EvalResult | None) -> Proof | None:
    """Compare the two sides; None when nothing was measured."""
    if before is None or after is None:
        return None
    return Proof(before, after, compare(before, after), moved_queries(before, after))


def report(result: RunResult, config: TrainConfig, facts: Mapping[str, str]) -> RunResult:
    """Write the HTML report into `output_dir/report`, if there is a proof.

    Args:
        result: What the run brought.
        config: Its settings.
        facts: What to tell about the run, by label.

    Returns:
        The result, with the report's path.
    """
    if result.proof is None:
        return result
    # matplotlib takes a second to import.
    from vembed.evaluation.report import write_report

    versions = ", ".join(
        f"{name} {version}"
        for name, version in (
            ("vembed", __version__),
            ("torch", torch.__version__),
            ("transformers", transformers.__version__),
            ("accelerate", accelerate.__version__),
            ("Python", platform.python_version()),
        )
    )
    path = write_report(
        Path(config.output_dir) / "report",
        title=f"{redact_text(config.model_label)}, fine-tuned",
        changes=result.proof.changes,
        moved=result.proof.moved,
        history=result.state.history,
        settings=config.redacted(),
        facts={
            **redact(facts),
            "training time": f"{result.train_seconds:.0f} s",
            "versions": versions,
        },
        gallery=choose_gallery(result.proof.before, result.proof.after),
    )
    return replace(result, report_path=path)


def show(result: RunResult) -> None:
    """Print the before/after table, the queries that moved, and where everything is."""
    from rich.console import Console

    from vembed.evaluation.report import render_moved, render_table

    console = Console()
    if result.proof is not None:
        console.print(render_table(result.proof.changes))
        if result.proof.after.rankings is not None:
            console.print(render_moved(result.proof.moved))
    if result.state.best_step == 0:
        console.print("No step beat the model as it was loaded on the validation set.")
    console.print(f"model   {result.model_path}", soft_wrap=True, highlight=False)
    if result.report_path is not None:
        console.print(f"report  {result.report_path}", soft_wrap=True, highlight=False)
