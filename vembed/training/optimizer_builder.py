"""Optimizer, learning-rate schedule and trackers, from the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.registry import check_arguments, did_you_mean, resolve
from vembed.training.parameters import (
    DISTILLATION,
    LOSS,
    check_patterns,
    last_match,
    layers_above,
    named_parameters,
)
from vembed.training.trackers import tracker_arguments

OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "rmsprop": "torch.optim:RMSprop",
    "adafactor": "torch.optim:Adafactor",
}


class ScheduleAndWarmup(NamedTuple):
    """A learning-rate schedule and its warm-up, in optimizer steps."""

    scheduler: LRScheduler
    warmup_steps: int


class TrackerChoice(NamedTuple):
    """What `Accelerator(log_with=...)` and `init_trackers(init_kwargs=...)` take."""

    log_with: list[str]
    init_kwargs: dict[str, dict[str, Any]]


def build_optimizer(
    model: nn.Module,
    config: TrainConfig | Mapping[str, Any],
    criterion: Any = None,
    distillation_loss_fn: Any = None,
) -> Optimizer:
    """An optimizer over every trainable parameter of the model and of the losses.

    Weight decay spares vectors and scalars: biases, norms, class tokens, the temperature. A
    learning rate is `lr`, times `layerwise_lr_decay` for each layer above the parameter, times the
    factor of `lr_groups`, or the value there.

    Args:
        model: The encoder.
        config: Reads `optimizer`, `optimizer_betas`, `optimizer_eps`, `optimizer_kwargs`, `lr`,
            `lr_groups`, `layerwise_lr_decay`, `weight_decay`.
        criterion: The loss, whose own parameters, such as a temperature, train too if it has any.
        distillation_loss_fn: Likewise, such as a projection to the teacher's size.

    Raises:
        ConfigError: if the optimizer is unknown, its arguments do not fit, nothing is trainable, or
            a pattern of `lr_groups` matches nothing.
    """
    config = TrainConfig.coerce(config)
    if not trainable_parameters(model, criterion, distillation_loss_fn):
        raise ConfigError(
            "build_optimizer: expected at least one trainable parameter. Received: none, all are "
            "frozen. Set requires_grad for those to train, or use_lora: true"
        )
    factory = resolve("optimizer", config.optimizer, OPTIMIZERS)
    arguments = _optimizer_arguments(factory, config)
    parts = (model, criterion, distillation_loss_fn)
    groups = _parameter_groups(parts, config, base_lr=arguments.get("lr", config.lr))
    check_arguments(f"optimizer {config.optimizer!r}", factory, {"params": groups, **arguments})
    optimizer: Optimizer = factory(groups, **arguments)
    return optimizer


def describe_groups(optimizer: Optimizer) -> list[str]:
    """For the log: how many parameters have which learning rate and weight decay."""
    sizes: dict[tuple[float, float], int] = {}
    for group in optimizer.param_groups:
        key = (group.get("initial_lr", group["lr"]), group["weight_decay"])
        sizes[key] = sizes.get(key, 0) + sum(p.numel() for p in group["params"])
    return [
        f"{size:,} parameters: lr {lr:.3g}, weight decay {decay:g}"
        for (lr, decay), size in sorted(sizes.items(), reverse=True)
    ]


def _optimizer_arguments(factory: Any, config: TrainConfig) -> dict[str, Any]:
    """The settings that this optimizer has; what the user wrote in `optimizer_kwargs` wins."""
    known = inspect.signature(factory).parameters
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": tuple(config.optimizer_betas),
        "eps": config.optimizer_eps,
    }
    # Adafactor's eps is a pair with another meaning.
    if config.optimizer == "adafactor":
        del settings["eps"]
    # One kernel for all parameters instead of a Python loop over them; CPU and CUDA have it.
    if config.optimizer in ("adamw", "adam"):
        settings["fused"] = True
    arguments = {name: value for name, value in settings.items() if name in known}
    return {**arguments, **config.optimizer_kwargs}


def _parameter_groups(
    parts: tuple[nn.Module, Any, Any], config: TrainConfig, *, base_lr: float
) -> list[dict[str, Any]]:
    """Parameters by learning rate and weight decay; those of the base rate come first.

    Parameters that FSDP2 shares out are not updated together with those that it leaves whole, so
    they are never in one group.
    """
    rates = _learning_rates(parts, config, base_lr=base_lr)
    groups: dict[tuple[bool, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters(*parts):
        if parameter.requires_grad:
            is_whole = parameter.ndim == 0 or name.startswith((LOSS, DISTILLATION))
            rate, is_spared = rates[name], _is_vector(parameter)
            key = (rate != base_lr, is_whole, -rate, is_spared)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": of, "lr": -rate, "weight_decay": 0.0 if is_spared else config.weight_decay}
        for (_, _, rate, is_spared), of in sorted(groups.items(), key=lambda item: item[0])
    ]


def _is_vector(parameter: nn.Parameter) -> bool:
    """Whether it is a vector or a scalar; tokens of image models are vectors `[1, 1, H]`."""
    is_token = parameter.ndim > 2 and parameter.numel() == parameter.shape[-1]
    return parameter.ndim <= 1 or is_token


def _learning_rates(
    parts: tuple[nn.Module, Any, Any], config: TrainConfig, *, base_lr: float
) -> dict[str, float]:
    """The peak learning rate of each trainable parameter, by visible name."""
    trained = {n: p for n, p in named_parameters(*parts) if p.requires_grad}
    check_patterns("lr_groups", config.lr_groups, list(trained), kind="trainable parameter")
    decay = config.layerwise_lr_decay
    depths = {} if decay is None else layers_above(parts[0])
    rates = {}
    for name, parameter in trained.items():
        rate = base_lr * (decay or 1.0) ** depths.get(id(parameter), 0)
        choice = last_match(name, config.lr_groups)
        if isinstance(choice, dict):
            rate = choice["lr"]
        elif choice is not None:
            rate *= choice
        rates[name] = rate
    return rates


def build_scheduler(
    optimizer: Optimizer,
    config: TrainConfig | Mapping[str, Any],
    num_epochs: int,
    steps_per_epoch: int,
) -> ScheduleAndWarmup:
    """A schedule that advances once per optimizer step, whatever the number of processes.

    Args:
        optimizer: Not yet prepared by Accelerate; the schedule must not be prepared either, or it
            would advance once per process.
        config: Reads `scheduler_type`, `scheduler_kwargs`, `warmup_steps`, `warmup_ratio`,
            `max_steps`.
        num_epochs: Passes over the data.
        steps_per_epoch: Optimizer steps in one pass.

    Raises:
        ConfigError: if the schedule is unknown or its arguments do not fit.
    """
    # Here, because they import peft where it is installed.
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    config = TrainConfig.coerce(config)
    names = [kind.value for kind in SchedulerType]
    if config.scheduler_type not in names:
        raise ConfigError(
            f"scheduler_type: unknown name {config.scheduler_type!r}"
            f"{did_you_mean(config.scheduler_type, names)}. One of: {', '.join(names)}"
        )
    total = config.max_steps or num_epochs * steps_per_epoch
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_ratio * total)
    try:
        scheduler = get_scheduler(
            config.scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=config.scheduler_kwargs or None,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"scheduler_type {config.scheduler_type!r} with scheduler_kwargs "
            f"{config.scheduler_kwargs}: {error}"
        ) from error
    return ScheduleAndWarmup(scheduler, warmup)


def resolve_tracker(
    report_to: str | Sequence[str] | None,
    *,
    run_name: str | None = None,
    tags: Sequence[str] = (),
    output_dir: str = ".",
) -> TrackerChoice:
    """The trackers to log to, and what each needs to start.

    `wandb` and `swanlab` run offline where nobody is logged in.

    Args:
        report_to: `wandb`, `tensorboard`, `swanlab`, several of them (a list, or with commas),
            `all`, or `none`.
        run_name: Name of the run.
        tags: Tags of the run.
        output_dir: Folder for what the trackers write.

    Raises:
        ConfigError: if a tracker is unknown or its package is not installed.
    """
    names = TrainConfig.coerce({"report_to": report_to}).report_to
    arguments = {
        name: tracker_arguments(name, run_name=run_name, tags=tags, output_dir=output_dir)
        for name in names
    }
    return TrackerChoice(list(names), {name: kw for name, kw in arguments.items() if kw})


def trainable_parameters(*modules: Any) -> list[nn.Parameter]:
    """Trainable parameters of those of `modules` that are `nn.Module`s, in a fixed order."""
    found = [m for m in modules if isinstance(m, nn.Module)]
    return [p for module in found for p in module.parameters() if p.requires_grad]
