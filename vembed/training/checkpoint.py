"""Write a model folder that sentence-transformers, transformers and vembed all load."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
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
from vembed.training.manifest import replaced_folder

logger = logging.getLogger(__name__)

CONFIG_NAME = "vembed_config.json"


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
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Save the model, its tokenizer and the settings of the run in one folder.

    Adapters are merged into what is saved, which is then compared with the model, and also kept by
    themselves. The folder is written under a temporary name, with a manifest of its files, and then
    takes its place, so `path` is always whole. Collective: every process must call it; the main
    process writes.

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
        facts: Noted in the manifest, such as the step.

    Raises:
        CheckpointError: if the merged model is not the one with adapters. Whatever is raised, is
            raised on every process.
    """
    accelerator.wait_for_everyone()
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            with replaced_folder(Path(path), facts) as folder:
                write_model(
                    folder, accelerator.unwrap_model(model), processor, config, losses=losses,
                    resumable=resumable, probe=probe, check_merge=check_merge, name=str(path),
                )  # fmt: skip
        except Exception as error:
            failure = error
    if any_process(failure is not None, accelerator.device):
        raise failure or CheckpointError(f"{path}: the main process could not save the model")


def write_model(
    folder: Path,
    encoder: nn.Module,
    processor: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    losses: Mapping[str, Tensor] | None = None,
    resumable: bool = False,
    probe: Probe | None = None,
    check_merge: bool = True,
    name: str,
) -> None:
    """Fill a folder with a model, on one process.

    Args:
        folder: Empty.
        encoder: As it is, unwrapped.
        processor: As for `save_checkpoint`; so are `config`, `losses`, `resumable`, `probe` and
            `check_merge`.
        config: See there.
        losses: See there.
        resumable: See there.
        probe: See there.
        check_merge: See there.
        name: What the folder is called in errors.
    """
    _fill(folder, encoder, processor, config)
    settings = TrainConfig.coerce(config or {})
    if check_merge:
        check_saved(encoder, folder, probe, settings, name=name)
    if settings.save_adapter and adapters_of(encoder):
        save_adapters(folder / ADAPTER_FOLDER, encoder, later=settings.unfreeze_at_step)
        save_losses(folder / ADAPTER_FOLDER, losses or {})
    elif resumable:
        save_losses(folder, losses or {})


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
