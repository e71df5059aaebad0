"""Write a model folder that sentence-transformers, transformers and vembed all load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from vembed.config import TrainConfig

logger = logging.getLogger(__name__)

CONFIG_NAME = "vembed_config.json"
LOSSES_NAME = "losses.safetensors"
STEP_FOLDER = "step-{step:06d}"


def save_checkpoint(
    path: str | Path,
    model: nn.Module | None,
    accelerator: Accelerator,
    processor: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    loss_state: Mapping[str, Tensor] | None = None,
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
        loss_state: What the losses have learned and the model has no place for, such as a
            projection to the teacher's size; kept in `losses.safetensors`, to go on from.
    """
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write(Path(path), accelerator.unwrap_model(model), processor, config, loss_state)
    accelerator.wait_for_everyone()


def _write(
    path: Path,
    encoder: Any,
    processor: Any,
    config: TrainConfig | Mapping[str, Any] | None,
    loss_state: Mapping[str, Tensor] | None,
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
    if loss_state:
        save_file(dict(loss_state), fresh / LOSSES_NAME)
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
