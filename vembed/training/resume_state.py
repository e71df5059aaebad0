"""What a checkpoint holds beside the model: all that a run needs to go on as if it had never ended.

```
state/run.json                    where the run stands; schedule, loss scale, fingerprints
state/metrics.jsonl               the lines up to here
state/weights.safetensors         what trains, as it is in memory, and every buffer
state/optimizer.safetensors       (shared-out weights: both once for each process)
state/process-0.json, .safetensors  of each process: random states, the open logging window
```

Weights are kept apart from the model folder, in which adapters are merged and names are those of
transformers. Frozen weights are not kept: they come from the base model, and a fingerprint tells
whether they still are what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vembed.errors import CheckpointError
from vembed.losses.matryoshka import innermost
from vembed.training.optimizer_state import (
    OptimizerState,
    load_optimizer_state,
    load_schedule_state,
    optimizer_state,
    plain_optimizer,
    require_json,
)
from vembed.training.parameters import DISTILLATION, LOSS
from vembed.training.random_states import RandomStates
from vembed.training.recorder import RecordedWindow
from vembed.training.sharding import own_part

if TYPE_CHECKING:
    from vembed.training.trainer import Trainer

STATE = "state"
_MODEL = "model."
_RANDOM, _WINDOW = "random.", "window."
_SAMPLED_NUMBERS = 4096


@dataclass(frozen=True)
class RunFacts:
    """`state/run.json`: what is the same on every process.

    Attributes:
        state: The fields of `TrainState`, without its history.
        identity: What must be the same to go on exactly; see `RunIdentity`.
        schedule: Where the learning-rate schedule stands; None without one.
        loss_scale: State of the gradient scaler; None without one.
    """

    state: dict[str, Any]
    identity: dict[str, Any]
    schedule: dict[str, Any] | None
    loss_scale: dict[str, Any] | None

    @classmethod
    def read(cls, checkpoint: Path) -> RunFacts:
        """Those of a checkpoint.

        Raises:
            CheckpointError: if it has none: it is a model folder, or of another version.
        """
        file = checkpoint / STATE / "run.json"
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(
                f"{checkpoint}: is no checkpoint of a run: it has no {STATE}/run.json. Name a "
                "folder checkpoints/step-... or the output_dir that it is in"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None

    def write(self, folder: Path) -> None:
        """Into a checkpoint that is being made."""
        content = vars(self)
        require_json(content, "the run")
        _write_json(folder / "run.json", content)


def write_shared_state(folder: Path, trainer: Trainer, facts: RunFacts, lines: str) -> None:
    """Write what the main process writes for all.

    Args:
        folder: `state/` of a checkpoint that is being made.
        trainer: Prepared.
        facts: Where the run stands.
        lines: `metrics.jsonl` up to here.
    """
    for index in range(trainer.accelerator.num_processes):
        if not (folder / f"process-{index}.json").is_file():
            raise CheckpointError(
                f"{folder}: process {index} has written its part elsewhere. output_dir must be on "
                "a disk that all machines share"
            )
    facts.write(folder)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if not trainer.shares_weights:
        _write_training_state(folder, trainer, "")


def write_own_state(
    folder: Path, trainer: Trainer, random: RandomStates, window: RecordedWindow
) -> None:
    """Write what each process writes for itself.

    Args:
        folder: `state/` of a checkpoint that is being made.
        trainer: Prepared.
        random: Where the generators of this process stand.
        window: What the recorder holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"process-{trainer.accelerator.process_index}"
    tensors = {
        **{_RANDOM + name: tensor for name, tensor in random.tensors.items()},
        **{_WINDOW + name: tensor for name, tensor in window.tensors.items()},
    }
    _write_tensors(folder / f"{prefix}.safetensors", tensors)
    facts = {
        "random": random.others,
        "window": window.facts,
        "gradient_cache": trainer.gradient_cache.measured(),
        "frozen": frozen_fingerprint(trainer),
    }
    _write_json(folder / f"{prefix}.json", facts)
    if trainer.shares_weights:
        _write_training_state(folder, trainer, f"{prefix}-")


@dataclass(frozen=True)
class OwnState:
    """What a process goes on with once everything is in its place.

    Attributes:
        random: To be restored right before the first batch.
        window: For the recorder.
    """

    random: RandomStates
    window: RecordedWindow


def load_training_state(checkpoint: Path, trainer: Trainer, *, keep_settings: bool = False) -> None:
    """Put weights, optimizer, schedule and loss scale in their places.

    Args:
        checkpoint: Whole; its identity is checked.
        trainer: Prepared.
        keep_settings: Leave learning rates and the like as they are set now.

    Raises:
        CheckpointError: if it does not fit.
    """
    folder = checkpoint / STATE
    index = trainer.accelerator.process_index
    prefix = f"process-{index}-" if trainer.shares_weights else ""
    file = folder / f"{prefix}weights.safetensors"
    _load_weights(file, _read_tensors(file), dict(_trained_tensors(trainer)))
    tensors = _read_tensors(folder / f"{prefix}optimizer.safetensors")
    facts = _read_json(folder / f"{prefix}optimizer.json")
    load_optimizer_state(
        trainer.optimizer, OptimizerState(tensors, facts), keep_settings=keep_settings
    )
    run = RunFacts.read(checkpoint)
    load_schedule_state(trainer.scheduler, run.schedule, keep_settings=keep_settings)
    if trainer.accelerator.scaler is not None and run.loss_scale is not None:
        trainer.accelerator.scaler.load_state_dict(run.loss_scale)


def read_own_state(checkpoint: Path, trainer: Trainer) -> OwnState:
    """Read what this process has written, and take over what its gradient cache had measured.

    Raises:
        CheckpointError: if there is nothing of this process, or the base model is another one.
    """
    prefix = f"process-{trainer.accelerator.process_index}"
    folder = checkpoint / STATE
    facts = _read_json(folder / f"{prefix}.json")
    if facts["frozen"] != frozen_fingerprint(trainer):
        raise CheckpointError(
            f"{checkpoint}: the frozen weights are not those that the run was started with. Has "
            f"{trainer.config.model_label} changed since? Restore it, or start a new run"
        )
    trainer.gradient_cache.take_measured(facts["gradient_cache"])
    device = trainer.accelerator.device
    tensors = _read_tensors(folder / f"{prefix}.safetensors")
    random = {n.removeprefix(_RANDOM): t for n, t in tensors.items() if n.startswith(_RANDOM)}
    window = {
        n.removeprefix(_WINDOW): t.to(device) for n, t in tensors.items() if n.startswith(_WINDOW)
    }
    return OwnState(RandomStates(random, facts["random"]), RecordedWindow(window, facts["window"]))


def read_history(checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` up to a checkpoint."""
    text = (checkpoint / STATE / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def frozen_fingerprint(trainer: Trainer) -> str:
    """A hash of the parameters that never train: all of a small one, 4096 numbers of a large one.

    They come from the base model, which may have been replaced where it lies.
    """
    owned = _owned(trainer)
    encoder = trainer.accelerator.unwrap_model(trainer.model)
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in encoder.named_parameters():
        if id(parameter) not in owned:
            flat = own_part(parameter).detach().reshape(-1)
            digest.update(repr((name, tuple(parameter.shape), str(flat.dtype))).encode())
            if len(flat) > _SAMPLED_NUMBERS:
                places = torch.linspace(0, len(flat) - 1, _SAMPLED_NUMBERS, dtype=torch.float64)
                flat = flat[places.long().to(flat.device)]
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_training_state(folder: Path, trainer: Trainer, prefix: str) -> None:
    _write_tensors(folder / f"{prefix}weights.safetensors", dict(_trained_tensors(trainer)))
    state = optimizer_state(trainer.optimizer)
    _write_tensors(folder / f"{prefix}optimizer.safetensors", state.tensors)
    _write_json(folder / f"{prefix}optimizer.json", state.facts)


def _trained_tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """What a step may change: parameters that the optimizer holds, and all buffers, by name."""
    owned = _owned(trainer)
    seen = set()
    for prefix, module in _modules(trainer):
        for name, parameter in module.named_parameters():
            if id(parameter) in owned:
                seen.add(id(parameter))
                yield prefix + name, parameter
        for name, buffer in module.named_buffers():
            yield f"{prefix}{name}", buffer
    if owned - seen:
        raise CheckpointError(
            f"the optimizer trains {len(owned - seen)} parameters that are part of neither the "
            "model nor a loss, so a checkpoint would lack them. Put them into one, or set "
            "save_steps: 0"
        )


def _modules(trainer: Trainer) -> Iterator[tuple[str, nn.Module]]:
    yield _MODEL, trainer.accelerator.unwrap_model(trainer.model)
    for prefix, loss in (
        (LOSS, innermost(trainer.criterion)),
        (DISTILLATION, trainer.distillation_loss_fn),
    ):
        if isinstance(loss, nn.Module):
            yield prefix, loss


def _owned(trainer: Trainer) -> set[int]:
    groups = plain_optimizer(trainer.optimizer).param_groups
    return {id(parameter) for group in groups for parameter in group["params"]}


@torch.no_grad()
def _load_weights(file: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    parts = {name: own_part(tensor) for name, tensor in own.items()}
    odd = sorted(stored.keys() ^ parts.keys())
    odd += [
        name
        for name in sorted(stored.keys() & parts.keys())
        if (stored[name].shape, stored[name].dtype) != (parts[name].shape, parts[name].dtype)
    ]
    if odd:
        raise CheckpointError(
            f"{file}: does not fit the model and the losses: {len(odd)} tensors are missing on one "
            f"side, or of another shape or type: {', '.join(odd[:3])}"
            f"{' ...' if len(odd) > 3 else ''}. Use the settings of the run that wrote it"
        )
    for name, tensor in stored.items():
        parts[name].copy_(tensor)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    whole, seen = {}, set()
    for name, tensor in tensors.items():
        own = own_part(tensor).detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        # Views of one piece of memory, which a parameter may be, would be refused.
        whole[name] = own.clone() if memory in seen else own
        seen.add(memory)
    save_file(whole, file)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    return content


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot be read ({error}). Every process reads its own file there: output_dir "
        "must be on a disk that all machines share"
    )
