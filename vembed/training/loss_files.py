"""What the losses have learned, in a file of its own: kept to go on training, not in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vembed.errors import CheckpointError
from vembed.losses.matryoshka import innermost
from vembed.training.parameters import DISTILLATION, LOSS

LOSSES_FILE = "losses.safetensors"
"""In a checkpoint of a run, or among the adapters that were saved with it."""

ADAPTER_FOLDER = "adapter"
"""Where adapters are, in the folder of a saved model."""


def loss_state(criterion: Any, distillation_loss_fn: Any = None) -> dict[str, Tensor]:
    """Parameters and buffers, by `loss.NAME` and `distillation.NAME`, copied to the CPU.

    Args:
        criterion: The loss, which may be no module and have none.
        distillation_loss_fn: Likewise.
    """
    return {
        prefix + name: tensor.detach().cpu().clone().contiguous()
        for prefix, module in _modules(criterion, distillation_loss_fn)
        for name, tensor in module.state_dict().items()
    }


def save_losses(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write what `loss_state` gave; nothing where there is nothing."""
    if state:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(state), folder / LOSSES_FILE, metadata={"format": "pt"})


def load_losses(
    folder: str | Path,
    criterion: Any,
    distillation_loss_fn: Any = None,
    *,
    missing_ok: bool = False,
) -> None:
    """Put what `save_checkpoint` kept back into the losses, in place.

    Args:
        folder: A checkpoint of a run, or the adapters of one.
        criterion: The loss, as the settings of that run build it.
        distillation_loss_fn: Likewise, where there is a teacher.
        missing_ok: Leave a loss of which nothing was kept as it is.

    Raises:
        CheckpointError: if nothing was kept, or of another loss.
    """
    places = (Path(folder) / LOSSES_FILE, Path(folder) / ADAPTER_FOLDER / LOSSES_FILE)
    file = next((place for place in places if place.is_file()), None)
    kept = {} if file is None else _read(file)
    for prefix, module in _modules(criterion, distillation_loss_fn):
        own = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
        if not own and (missing_ok or not module.state_dict()):
            continue
        if not own:
            raise CheckpointError(
                f"{file or places[0]}: expected the parameters of {type(module).__name__}. There "
                f"{'is no such file' if file is None else 'are none'}"
            )
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(
                f"{file}: does not fit {type(module).__name__}: {error}. Use the settings of the "
                "run that wrote it, on the same labels"
            ) from error


def _modules(criterion: Any, distillation_loss_fn: Any) -> Iterator[tuple[str, nn.Module]]:
    for prefix, loss in ((LOSS, innermost(criterion)), (DISTILLATION, distillation_loss_fn)):
        if isinstance(loss, nn.Module):
            yield prefix, loss


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
