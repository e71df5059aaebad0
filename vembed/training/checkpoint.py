"""Write a model folder that sentence-transformers, transformers and vembed all load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from vembed.config import TrainConfig
from vembed.distributed import any_process
from vembed.errors import CheckpointError
from vembed.training.adapter_files import save_adapters
from vembed.training.adapter_gate import Probe, check_saved
from vembed.training.adapters import adapters_of
from vembed.training.loss_files import ADAPTER_FOLDER, save_losses

logger = logging.getLogger(__name__)

CONFIG_NAME = "vembed_config.json"
STEP_FOLDER = "step-{step:06d}"


def save_checkpoint(
    path: str | Path,
    model: nn.Module | None,
    accelerator: Accelerator,
    processor: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    losses: Mapping[str, Tensor] | None = None,
    resumable: bool = False,
    probe: Probe | None = None,
    check_merge: bool = True,
) -> None:
    """Save the model, its tokenizer and the settings of the run in one folder.

    Adapters are merged into what is saved, which is then compared with the model, and also kept by
    themselves. The folder is written under a temporary name and then renamed, so `path` is always
    whole. Collective: every process must call it; the main process writes.

    Args:
        path: Folder to write; an earlier one is replaced.
        model: The encoder, prepared by the Accelerator or not; None where it is not the main
            process that calls (see `Trainer.model_to_save`).
        accelerator: Says which process writes.
        processor: Tokenizer or image processor to save beside the model, when it is not the
            encoder's own, which is always saved.
        config: Settings of the run, kept in `vembed_config.json` for the reader.
        losses: What the losses have learned, as `loss_state` gives it. Kept where adapters are
            saved, which go on training, among them.
        resumable: Keep it without adapters, too.
        probe: What to compare on; None for a list of texts.
        check_merge: Whether to compare; see `adapter_gate` for what it costs.

    Raises:
        CheckpointError: if the merged model is not the one with adapters. Whatever is raised, is
            raised on every process.
    """
    accelerator.wait_for_everyone()
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            with _replacing(Path(path)) as folder:
                encoder = accelerator.unwrap_model(model)
                _fill(folder, encoder, processor, config)
                settings = TrainConfig.coerce(config or {})
                if check_merge:
                    check_saved(encoder, folder, probe, settings, name=str(path))
                if settings.save_adapter and adapters_of(encoder):
                    save_adapters(folder / ADAPTER_FOLDER, encoder, later=settings.unfreeze_at_step)
                    save_losses(folder / ADAPTER_FOLDER, losses or {})
                elif resumable:
                    save_losses(folder, losses or {})
        except Exception as error:
            failure = error
    if any_process(failure is not None, accelerator.device):
        raise failure or CheckpointError(f"{path}: the main process could not save the model")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` if nothing goes wrong."""
    fresh, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _fill(
    folder: Path, encoder: Any, processor: Any, config: TrainConfig | Mapping[str, Any] | None
) -> None:
    encoder.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if config is not None:
        settings = TrainConfig.coerce(config).redacted()
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_run_settings(path: str | Path) -> dict[str, Any]:
    """The settings of the run that made a model folder; empty where no run of vembed did.

    Raises:
        CheckpointError: if they are there and cannot be read.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: must be JSON. Received: {error}") from None
    return settings if isinstance(settings, dict) else {}


def remove_old_checkpoints(folder: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest step folders under `folder`; None keeps all."""
    if keep is None or not folder.exists():
        return
    steps = sorted(p for p in folder.glob("step-*") if p.is_dir())
    for path in steps[: max(0, len(steps) - keep)]:
        shutil.rmtree(path)
