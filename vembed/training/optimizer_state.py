"""What an optimizer and a schedule remember, as tensors and JSON: no pickle, no rounding.

`Optimizer.load_state_dict` casts what it loads to the type of the parameter; this does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vembed.errors import CheckpointError
from vembed.training.sharding import own_part, share_like


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer remembers.

    Attributes:
        tensors: By `number of the parameter.name`; of those that are shared out, this process's.
        facts: Everything else, as JSON can hold it.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def optimizer_state(optimizer: Optimizer) -> OptimizerState:
    """What the optimizer remembers now, its tensors on the CPU, and not copied if they are there.

    Raises:
        CheckpointError: if it remembers what is neither a tensor nor a plain value.
    """
    optimizer = plain_optimizer(optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    on_cpu: list[str] = []
    shared: list[str] = []
    for number, parameter in _parameters(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            key = f"{number}.{name}"
            if isinstance(value, Tensor):
                own = own_part(value)
                tensors[key] = own.detach().cpu().contiguous()
                if value.is_cpu:
                    on_cpu.append(key)
                if own is not value:
                    shared.append(key)
            else:
                values.setdefault(str(number), {})[name] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    facts = {
        "values": values, "on_cpu": on_cpu, "shared": shared, "groups": groups, "sizes": sizes
    }  # fmt: skip
    require_json(facts, f"optimizer {type(optimizer).__name__}")
    return OptimizerState(tensors, facts)


def load_optimizer_state(
    optimizer: Optimizer, state: OptimizerState, *, keep_settings: bool = False
) -> None:
    """Put back what `optimizer_state` gave.

    Args:
        optimizer: Over the same parameters in the same order.
        state: What to put back.
        keep_settings: Leave learning rates and the like as the optimizer has them.

    Raises:
        CheckpointError: if it is of another optimizer.
    """
    optimizer = plain_optimizer(optimizer)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != state.facts["sizes"]:
        raise CheckpointError(
            "the optimizer has other parameters than when it was saved: groups of "
            f"{sizes}, not of {state.facts['sizes']}"
        )
    remembered: dict[int, dict[str, Any]] = {}
    for number, values in state.facts["values"].items():
        remembered[int(number)] = dict(values)
    on_cpu, shared = set(state.facts["on_cpu"]), set(state.facts["shared"])
    parameters = dict(_parameters(optimizer))
    for key, tensor in state.tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        placed = tensor if key in on_cpu else tensor.to(parameter.device)
        whole = share_like(parameter, placed) if key in shared else placed
        remembered.setdefault(int(number), {})[name] = whole
    optimizer.state.clear()
    for number in sorted(remembered):
        optimizer.state[parameters[number]] = remembered[number]
    if keep_settings:
        return
    for group, saved in zip(optimizer.param_groups, state.facts["groups"], strict=True):
        for name, value in saved.items():
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value


def schedule_state(scheduler: LRScheduler | None) -> dict[str, Any] | None:
    """Where a schedule stands, as JSON can hold it.

    Raises:
        CheckpointError: if it holds more than that.
    """
    if scheduler is None:
        return None
    state = dict(scheduler.state_dict())
    require_json(state, f"scheduler {type(scheduler).__name__}")
    return state


def load_schedule_state(
    scheduler: LRScheduler | None, state: dict[str, Any] | None, *, keep_settings: bool = False
) -> None:
    """Put back what `schedule_state` gave.

    Args:
        scheduler: Built as the one that was saved.
        state: What to put back.
        keep_settings: Only go to the same step, with the learning rates of the schedule as it is.
    """
    if scheduler is None or state is None:
        return
    if not keep_settings:
        scheduler.load_state_dict(state)
        return
    # The first step of a schedule would be told to come after one of the optimizer.
    scheduler._step_count = max(2, state["_step_count"])
    scheduler.last_epoch = state["last_epoch"] - 1
    scheduler.step()


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer without what Accelerate puts around it."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def require_json(value: Any, what: str) -> None:
    """Raise CheckpointError unless JSON can hold the value, and gives it back as it is."""

    def unfit(found: Any) -> Any:
        raise CheckpointError(
            f"{what} remembers a {type(found).__name__}, which a checkpoint cannot hold: tensors, "
            "numbers, texts, lists and mappings only. Set save_steps: 0, or use another one"
        )

    json.dumps(value, default=unfit)


def _parameters(optimizer: Optimizer) -> Iterator[tuple[int, nn.Parameter]]:
    yield from enumerate(p for group in optimizer.param_groups for p in group["params"])
