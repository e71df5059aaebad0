"""Compares every case's gradient with its reference: here, and on processes that it starts."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from safetensors.torch import load_file, save_file

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.training.run import raise_problems
from vembed.training.verification.cases import (
    MAX_PAIRS,
    VARIATIONS,
    Case,
    Precision,
    Scope,
    Step,
    Variation,
    chunk_size,
)
from vembed.training.verification.comparison import (
    CaseResult,
    GroupDifference,
    Suspicion,
    compare,
    explain,
)
from vembed.training.verification.gradients import (
    Gradients,
    cutting_error,
    replayed_gradients,
    step_gradients,
    whole_batch_gradients,
)
from vembed.training.verification.processes import LocalProcesses
from vembed.training.verification.subject import (
    DoesNotApplyError,
    Prepared,
    Subject,
    load_subject,
    prepare,
)

OnCase = Callable[[CaseResult], None]

# An encoder is as good as deterministic if its own differences are well below what is looked for.
_CUTTING_SHARE = 0.1
_SUSPICIOUS_CUTTING_ERROR = 1e-3


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        scope: Processes, precision and rows.
        facts: What a reader should know about the comparison, by label.
        results: All cases, in the order in which they were run.
        suspicions: One for each case that failed.
    """

    scope: Scope
    facts: Mapping[str, str]
    results: list[CaseResult]
    suspicions: list[Suspicion]

    @property
    def passed(self) -> bool:
        """Whether every case is within its tolerance."""
        return not self.suspicions


def verify_gradients(
    config: TrainConfig | Mapping[str, Any],
    *,
    processes: int = 2,
    precision: Precision = "float64",
    pairs: int | None = None,
    on_case: OnCase = lambda result: None,
) -> Verification:
    """Compare the gradients of a run's first rows with those of one graph over all of them.

    Weights are converted to `precision`, and everything runs on the CPU. An Accelerator that was
    made in this process before is of no further use.

    Args:
        config: The settings of the run.
        processes: Processes to share the rows among; 1 starts none.
        precision: `float64` shows every mistake; `float32` is what most runs compute in.
        pairs: Rows per process and micro-batch; None takes the batch size, or 8 if that is less.
        on_case: Called after each case.

    Raises:
        ConfigError: if settings cannot work, or this process was started by a launcher.
        DataError: if a row cannot be used, or there are too few.
        DistributedError: if a process fails or does not come to an end.
    """
    config = TrainConfig.coerce(config)
    raise_problems(config)
    scope = _scope(config, processes, precision, pairs)
    with (
        _share_of_threads(processes),
        LocalProcesses(processes) if processes > 1 else nullcontext() as group,
    ):
        return verify_on(group, config, scope, on_case=on_case)


def verify_on(
    group: LocalProcesses | None,
    config: TrainConfig,
    scope: Scope,
    *,
    variations: Sequence[Variation] = VARIATIONS,
    on_case: OnCase = lambda result: None,
) -> Verification:
    """As `verify_gradients`, on processes that already run; None for this one alone."""
    subject = load_subject(config, scope)
    if group is not None:
        group.run(_load, config, scope, what="reading the rows")
    results: list[CaseResult] = []
    with tempfile.TemporaryDirectory(prefix="vembed-verify-") as folder:
        for variation in variations:
            for step in get_args(Step):
                found = _verify_step(subject, variation, step, group, Path(folder))
                results += found
                for result in found:
                    on_case(result)
    return Verification(scope, _facts(config, scope, results), results, explain(results))


def quiet() -> None:
    """Silence what libraries, and advice on training, say each time that a model is built."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("vembed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def _share_of_threads(processes: int) -> Iterator[None]:
    """As many threads here as each of the processes has.

    More than there are free cores would wait for each other in a loop, and take many times longer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scope(config: TrainConfig, processes: int, precision: Precision, pairs: int | None) -> Scope:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise ConfigError(
            f"verifying starts its own processes. Received: one of {started} that a launcher "
            "started. Run it by itself"
        )
    for name, number, least in (("processes", processes, 1), ("pairs", pairs, 1)):
        if number is not None and number < least:
            raise ConfigError(f"{name}: must be at least {least}. Received: {number}")
    if precision not in get_args(Precision):
        expected = " or ".join(get_args(Precision))
        raise ConfigError(f"precision: expected {expected}. Received: {precision!r}")
    return Scope(processes, precision, pairs or min(config.batch_size, MAX_PAIRS))


def _verify_step(
    subject: Subject,
    variation: Variation,
    step: Step,
    group: LocalProcesses | None,
    folder: Path,
) -> list[CaseResult]:
    """The cases of one process and of several."""
    scope = subject.scope
    cases = [Case(variation, step, processes) for processes in sorted({1, scope.processes})]
    tolerance = scope.tolerance(variation)
    try:
        prepared = prepare(subject, cases[0])
    except DoesNotApplyError as reason:
        return [CaseResult(case, tolerance, skipped=str(reason)) for case in cases]
    error = cutting_error(prepared.trainer, prepared.whole()[0])
    # Under autocast a forward of other rows rounds otherwise, although it may be by little.
    exact = not variation.autocast and error <= _CUTTING_SHARE * tolerance
    kind = "whole" if exact else "replayed"
    path = folder / "reference.safetensors"
    results = []
    reference: Gradients = {}
    for case in cases:
        if not reference or kind == "replayed":
            reference = _reference(prepared, kind, case.processes)
        if group is None or case.processes == 1:
            actual = step_gradients(prepared.trainer, prepared.whole(), seed=prepared.seed)
            groups = compare(actual, reference)
        else:
            save_file(reference, path)
            groups = group.run(_measure, case, str(path), what=case.name)[0]
        results.append(CaseResult(case, tolerance, kind, error, groups))
    del prepared
    # A Trainer and its Accelerator refer to each other, and a model is large.
    gc.collect()
    return results


def _reference(prepared: Prepared, kind: str, processes: int) -> Gradients:
    batches = prepared.whole()
    if kind == "whole":
        return whole_batch_gradients(prepared.trainer, batches)
    shares = [prepared.shares(process, processes) for process in range(processes)]
    return replayed_gradients(prepared.trainer, batches, shares, seed=prepared.seed)


_loaded: list[Subject] = []
"""In a process that was started to verify: its copy of the rows, read once for all cases."""


def _load(config: TrainConfig, scope: Scope) -> None:
    quiet()
    _loaded[:] = [load_subject(config, scope)]


def _measure(case: Case, reference: str) -> dict[str, GroupDifference] | None:
    """One process's part of a case; the first one compares."""
    prepared = prepare(_loaded[0], case)
    accelerator = prepared.trainer.accelerator
    own = prepared.shares(accelerator.process_index, accelerator.num_processes)
    actual = step_gradients(prepared.trainer, own, seed=prepared.seed)
    del prepared
    gc.collect()
    return compare(actual, load_file(reference)) if accelerator.is_main_process else None


def _facts(config: TrainConfig, scope: Scope, results: Sequence[CaseResult]) -> dict[str, str]:
    compared = [result for result in results if result.skipped is None]
    whole = sum(result.reference == "whole" for result in compared)
    calm = (r.cutting_error for r in compared if not _is_random(r.case.variation))
    error = max(calm, default=0.0)
    leak = ": does padding reach them?" if error > _SUSPICIOUS_CUTTING_ERROR else ""
    amp = ", for AMP to float32" if scope.precision == "float64" else ""
    return {
        "weights": f"converted to {scope.precision}{amp}",
        "rows": f"{scope.pairs} per process and micro-batch (batch_size: {config.batch_size}), on "
        f"{scope.processes} {'processes (gloo, CPU)' if scope.processes > 1 else 'process (CPU)'}",
        "cached": f"chunks of {chunk_size(config, scope)} items; the first one's activations kept, "
        "the others encoded again",
        "reference": f"{whole} of {len(compared)} cases: one forward for all rows of a role; the "
        "others: the chunks and random numbers of the step, in one graph",
        "cutting": f"without dropout, cutting and padding rows otherwise changes embeddings by "
        f"{error:.0e}{leak}",
    }


def _is_random(variation: Variation) -> bool:
    return variation.own_dropout or variation.autocast
