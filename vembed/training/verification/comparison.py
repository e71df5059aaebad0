"""How far a gradient is from its reference, group by group, and what such a distance points to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vembed.training.parts import part_of
from vembed.training.verification.cases import ACCUMULATION, LOSS_SCALING, Case

_ENCODER = "encoder."
_SAME_NUMBER = 1e-3
_SAME_DIRECTION = 1 - 1e-6


@dataclass(frozen=True)
class GroupDifference:
    """A group of parameters: its gradient beside the reference.

    Attributes:
        ratio: Norm of the gradient over that of the reference.
        cosine: Cosine between the two.
        difference: Largest difference of an element, relative to the largest element of the group
            in the reference. For a parameter of the loss, relative to the largest of all groups if
            that is larger: a temperature's gradient is one sum over all pairs, with the rounding
            errors of terms that may be much larger than the sum.
        is_zero: Whether the reference is zero, which nothing can be learned from.
    """

    ratio: float
    cosine: float
    difference: float
    is_zero: bool


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Attributes:
        case: What was compared.
        tolerance: Largest difference that passes.
        reference: How the reference was computed: `whole` or `replayed` (see `gradients`).
        cutting_error: See `gradients.cutting_error`; where embeddings stay the same and gradients
            do not, how much these change. None where it is known to be large.
        groups: By name of the group; empty if the case was skipped.
        skipped: Why the case does not apply; None if it does.
    """

    case: Case
    tolerance: float
    reference: str = ""
    cutting_error: float | None = None
    groups: Mapping[str, GroupDifference] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def failing(self) -> list[str]:
        """Groups beyond the tolerance; NaN is."""
        return [n for n, g in self.groups.items() if not g.difference <= self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether every group is within the tolerance."""
        return not self.failing


@dataclass(frozen=True)
class Suspicion:
    """A case that failed and what is likely wrong."""

    case: Case
    setting: str
    text: str


def compare(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, GroupDifference]:
    """Compare gradients by group; a parameter without a gradient has the gradient zero.

    Args:
        actual: By parameter, as `gradients.Gradients`.
        expected: Those of the reference.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*expected, *actual]):
        groups.setdefault(group_of(name), []).append(name)
    largest = {group: _largest_of(expected, names) for group, names in groups.items()}
    overall = max(largest.values(), default=0.0)
    return {
        group: _compare_group(
            names, actual, expected, largest[group] if names[0].startswith(_ENCODER) else overall
        )
        for group, names in groups.items()
    }


def group_of(name: str) -> str:
    """`backbone` of `encoder.backbone.layer.0...`, `logit_scale` of `loss.logit_scale`.

    The towers of a backbone with several are groups of their own.
    """
    owner, _, rest = name.partition(".")
    if name.startswith(_ENCODER):
        return part_of(rest)
    return rest if owner == "loss" else name


def _compare_group(
    names: Sequence[str],
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scale: float,
) -> GroupDifference:
    dot, actual_square, expected_square, differences = 0.0, 0.0, 0.0, [0.0]
    for name in names:
        a, e = actual.get(name), expected.get(name)
        a = torch.zeros_like(expected[name]) if a is None else a
        e = torch.zeros_like(a) if e is None else e
        dot += _dot(a, e)
        actual_square += _dot(a, a)
        expected_square += _dot(e, e)
        differences.append(_largest(a - e))
    is_zero = expected_square == 0
    same = is_zero and actual_square == 0
    return GroupDifference(
        ratio=1.0 if same else _over(math.sqrt(actual_square), math.sqrt(expected_square)),
        cosine=1.0 if same else _over(dot, math.sqrt(actual_square * expected_square)),
        difference=0.0 if same else _over(_maximum(differences), scale),
        is_zero=is_zero,
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(torch.linalg.vector_norm(tensor, math.inf)) if tensor.numel() else 0.0


def _largest_of(gradients: Mapping[str, Tensor], names: Sequence[str]) -> float:
    return _maximum([0.0, *(_largest(gradients[name]) for name in names if name in gradients)])


def _maximum(numbers: Sequence[float]) -> float:
    """NaN if there is one, which Python's `max` does not say."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.inf


def explain(results: Sequence[CaseResult]) -> list[Suspicion]:
    """For each case that failed, the likeliest cause."""
    return [_explain_one(result, results) for result in results if not result.passed]


def _explain_one(result: CaseResult, results: Sequence[CaseResult]) -> Suspicion:
    case = result.case
    alone = case.processes == 1 or _passes(results, case, processes=1)
    factor = _common_factor(result)
    found = None if factor is None else _explain_factor(result, factor, by_processes=alone)
    if found is not None:
        return found
    if case.processes > 1 and alone:
        return Suspicion(
            case,
            "loss_type",
            "the same rows give the right gradient on one process: rows of other processes do not "
            "reach the loss, or their gradient does not come back (gather them with "
            "vembed.distributed.gather_rows)",
        )
    if case.step == "cached" and _passes(results, case, step="plain"):
        cause = "a chunk's second pass is not its first one"
        if result.reference == "replayed":
            cause += ": it draws other random numbers, as for dropout"
        return Suspicion(case, "use_gradient_cache", cause)
    return Suspicion(
        case, case.variation.setting, "the gradient is not that of the whole batch in one graph"
    )


def _explain_factor(result: CaseResult, factor: float, *, by_processes: bool) -> Suspicion | None:
    """What a gradient of the right direction and the wrong length points to.

    Args:
        result: A case that failed.
        factor: By how much.
        by_processes: Whether the number of processes can be to blame.
    """
    case, variation = result.case, result.case.variation
    only_loss = len(result.failing) < len(result.groups)
    suspects: list[tuple[float, str, str]] = []
    if case.processes > 1 and by_processes:
        where = "a parameter of the loss is scaled unlike the encoder by" if only_loss else ""
        where = where or "the loss or the reduction multiplies or divides by"
        suspects.append((case.processes, "loss_type", f"{where} the number of processes"))
    if variation is ACCUMULATION:
        why = "the divisor of accumulation is applied more or less than once"
        suspects.append((2, variation.setting, why))
    if variation is LOSS_SCALING and variation.loss_scale is not None:
        why = "the loss scale is applied more or less than once"
        suspects.append((variation.loss_scale, variation.setting, why))
    groups = ", ".join(result.failing)
    for number, setting, why in suspects:
        for times in (number, 1 / number):
            if math.isclose(factor, times, rel_tol=_SAME_NUMBER):
                text = f"the gradient of {groups} is {times:.6g} times what it should be: {why}"
                return Suspicion(case, setting, text)
    return None


def _common_factor(result: CaseResult) -> float | None:
    """The one factor by which all failing groups are too long or short; None if there is none."""
    groups = [result.groups[name] for name in result.failing]
    ratio = groups[0].ratio
    same = all(
        g.cosine > _SAME_DIRECTION and math.isclose(g.ratio, ratio, rel_tol=_SAME_NUMBER)
        for g in groups
    )
    return ratio if same and not math.isclose(ratio, 1, rel_tol=_SAME_NUMBER) else None


def _passes(results: Sequence[CaseResult], case: Case, **changes: object) -> bool:
    """Whether the case that differs from this one in `changes` was seen to pass."""
    wanted = (
        case.variation,
        changes.get("step", case.step),
        changes.get("processes", case.processes),
    )
    return any(
        r.passed and r.skipped is None
        for r in results
        if (r.case.variation, r.case.step, r.case.processes) == wanted
    )
