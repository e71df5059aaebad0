"""Write a model folder that sentence-transformers, transformers and vembed all load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vembed.config import TrainConfig
from vembed.errors import CheckpointError

logger = logging.getLogger(__name__)

CONFIG_NAME = "vembed_config.json"
LOSS_NAME = "loss.safetensors"
STEP_FOLDER = "step-{step:06d}"


def save_checkpoint(
    path: str | Path,
    model: nn.Module | None,
    accelerator: Accelerator,
    processor: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    criterion: Any = None,
) -> None:
    """Save the model, its tokenizer and the settings of the run in one folder.

    The folder is written under a temporary name and then renamed, so `path` is always whole.
    Collective: every process must call it; the main process writes.

    Args:
        path: Folder to write; an earlier one is replaced.
        model: The encoder, prepared by the Accelerator or not; None where it is not the main
            process that calls (see `Trainer.model_to_save`).
        accelerator: Says which process writes.
        processor: Tokenizer or image processor to save beside the model, when it is not the
            encoder's own, which is always saved.
        config: Settings of the run, kept in `vembed_config.json` for the reader.
        criterion: The loss, whose own parameters (a temperature, the vectors of classes) are kept
            beside the model to go on training with `load_loss`; None where the model is all that
            is wanted.
    """
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        encoder = accelerator.unwrap_model(model)
        _write(Path(path), encoder, processor=processor, config=config, criterion=criterion)
    accelerator.wait_for_everyone()


def load_loss(path: str | Path, criterion: nn.Module) -> None:
    """Put the parameters that `save_checkpoint` kept back into a loss, in place.

    Args:
        path: A checkpoint folder of a run.
        criterion: The loss, as the settings of that run build it.

    Raises:
        CheckpointError: if there are none, or they are those of another loss.
    """
    file = Path(path) / LOSS_NAME
    if not file.is_file():
        raise CheckpointError(f"{file}: expected the parameters of the loss. There is no such file")
    try:
        criterion.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: does not fit {type(criterion).__name__}: {error}. Use the settings of the "
            "run that wrote it, on the same labels"
        ) from error


def _write(
    path: Path,
    encoder: Any,
    *,
    processor: Any,
    config: TrainConfig | Mapping[str, Any] | None,
    criterion: Any,
) -> None:
    fresh, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    encoder.save_pretrained(fresh)
    if processor is not None:
        processor.save_pretrained(fresh)
    if config is not None:
        settings = TrainConfig.coerce(config).model_dump(mode="json")
        (fresh / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if isinstance(criterion, nn.Module) and (state := criterion.state_dict()):
        save_file({name: value.contiguous() for name, value in state.items()}, fresh / LOSS_NAME)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def remove_old_checkpoints(folder: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest step folders under `folder`; None keeps all."""
    if keep is None or not folder.exists():
        return
    steps = sorted(p for p in folder.glob("step-*") if p.is_dir())
    for path in steps[: max(0, len(steps) - keep)]:
        shutil.rmtree(path)
