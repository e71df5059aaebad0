"""Compares every case's gradient with its reference: here, and on processes that it starts."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
    Subject,
    load_subject,
    prepare,
)

OnCase = Callable[[CaseResult], None]

# An encoder is as good as deterministic if its own differences are well below what is looked for.
_CUTTING_SHARE = 0.1
_SUSPICIOUS_CUTTING_ERROR = 1e-3
# What summing gradients in float32 may leave, where everything else is in float64: SigLIP 2 has
# 1e-8. More than this is a mistake of the encoder or of the step, which the cut graph would share.
_ROUNDING = 1e-6


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
        DataError: if there are no rows, or one cannot be used.
        DistributedError: if a process fails or does not come to an end.
    """
    config = TrainConfig.coerce(config)
    raise_problems(config)
    scope = _scope(config, processes, precision, pairs)
    if processes == 1:
        return verify_on(None, config, scope, on_case=on_case)
    with (
        _share_of_threads(processes + 1) as threads,
        LocalProcesses(processes, threads=threads) as group,
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
    with tempfile.TemporaryDirectory(prefix="vembed-verify-") as folder, _frozen_heap():
        for variation in variations:
            for result in _verify_variation(subject, variation, group, Path(folder)):
                results.append(result)
                on_case(result)
            # A Trainer and its Accelerator refer to each other, and a model is large.
            gc.collect()
    return Verification(scope, _facts(config, scope, results), results, explain(results))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, silence what libraries, and advice on training, say whenever a model is built."""
    logger = logging.getLogger("vembed")
    level = logger.level
    with warnings.catch_warnings():
        _silence()
        try:
            yield
        finally:
            logger.setLevel(level)
            transformers.utils.logging.enable_progress_bar()


def _silence() -> None:
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("vembed").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def _share_of_threads(parts: int) -> Iterator[int]:
    """Leave threads to the others that compute at the same time; gives how many each may have.

    More than there are cores would wait for each other in a loop, and take many times longer.
    """
    before = torch.get_num_threads()
    share = max(1, before // parts)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(before)


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Let the garbage collector look only at what is made from now on, after each case.

    The objects of torch and transformers alone cost it longer than a step of a small model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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


def _verify_variation(
    subject: Subject, variation: Variation, group: LocalProcesses | None, folder: Path
) -> Iterator[CaseResult]:
    scope = subject.scope
    counts = (1,) if group is None else (1, scope.processes)
    tolerance = scope.tolerance(variation)
    try:
        prepared = prepare(subject, Case(variation, "plain", 1))
    except DoesNotApplyError as reason:
        for step in get_args(Step):
            for count in counts:
                yield CaseResult(Case(variation, step, count), tolerance, skipped=str(reason))
        return
    trainer, batches = prepared.trainer, prepared.whole()
    shares = {count: [prepared.shares(p, count) for p in range(count)] for count in counts}
    path = folder / "gradients.safetensors"
    whole: Gradients = {}
    for step in get_args(Step):
        cases = [Case(variation, step, count) for count in counts]
        # The others compute while this process computes what they should find.
        several = cases[-1]
        call = group.start(_measure, several, path, what=several.name) if group else None
        trainer.config.use_gradient_cache = step == "cached"
        error = None
        # Under autocast a forward of other rows rounds otherwise, although it may be by little.
        if not (variation.autocast or variation.extra_dropout):
            error = cutting_error(trainer, batches, shares.values())
        exact = error is not None and error <= _CUTTING_SHARE * tolerance
        if exact and not whole:
            whole = whole_batch_gradients(trainer, batches)
        for case in cases:
            replay = partial(
                replayed_gradients, trainer, batches, shares[case.processes], seed=prepared.seed
            )
            expected = whole if exact else replay()
            if call is None or case.processes == 1:
                actual = step_gradients(trainer, batches, seed=prepared.seed)
            else:
                call.results()
                actual = load_file(path)
            kind = "whole" if exact else "replayed"
            result = CaseResult(case, tolerance, kind, error, compare(actual, expected))
            yield result if result.passed or not exact else _replayed(result, actual, whole, replay)


def _replayed(
    result: CaseResult, actual: Gradients, whole: Gradients, replay: Callable[[], Gradients]
) -> CaseResult:
    """The same case beside the other reference, if rounding explains it; otherwise as it was.

    An encoder may embed rows alike however they are cut and still sum up their gradients in less
    than the precision of its weights: SigLIP 2 resizes its positions in float32 on a CPU.
    """
    replayed = replay()
    groups = compare(actual, replayed)
    error = max(group.difference for group in compare(replayed, whole).values())
    again = replace(result, reference="replayed", cutting_error=error, groups=groups)
    return again if again.passed and error <= _ROUNDING else result


_loaded: list[Subject] = []
"""In a process that was started to verify: its copy of the rows, read once for all cases."""


def _load(config: TrainConfig, scope: Scope) -> None:
    _silence()
    _loaded[:] = [load_subject(config, scope)]
    gc.freeze()


def _measure(case: Case, path: Path) -> None:
    """One process's part of a case; the first one writes the gradients, which are all the same."""
    prepared = prepare(_loaded[0], case)
    accelerator = prepared.trainer.accelerator
    own = prepared.shares(accelerator.process_index, accelerator.num_processes)
    actual = step_gradients(prepared.trainer, own, seed=prepared.seed)
    if accelerator.is_main_process:
        save_file(actual, path)
    del prepared
    gc.collect()


def _facts(config: TrainConfig, scope: Scope, results: Sequence[CaseResult]) -> dict[str, str]:
    compared = [result for result in results if result.skipped is None]
    replayed = sum(result.reference == "replayed" for result in compared)
    calm = (r.cutting_error or 0.0 for r in compared if not r.case.variation.own_dropout)
    error = max(calm, default=0.0)
    leak = ": does padding reach them?" if error > _SUSPICIOUS_CUTTING_ERROR else ""
    how = f"gloo, {config.distributed_strategy}"
    several = f" and on {scope.processes} processes ({how})" if scope.processes > 1 else ""
    for_amp = ", for AMP float32" if scope.precision == "float64" else ""
    return {
        "model": f"{config.model_name}, loss_type {config.loss_type}",
        "rows": f"{scope.pairs} per process and micro-batch (batch_size: {config.batch_size}), "
        "the first ones of a run",
        "precision": f"{scope.precision}{for_amp}",
        "steps": f"plain and cached (chunks of {chunk_size(config, scope)} items, all but the "
        f"first encoded twice), on one process{several}, on the CPU",
        "reference": "one process, one graph of all rows; "
        f"in {replayed} of {len(compared)} cases with the chunks and dropout masks of the step",
        "cutting": f"embeddings or gradients change by {error:.0e} when rows are cut and padded "
        f"otherwise, without dropout{leak}",
    }
