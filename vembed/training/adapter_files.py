"""Adapters in a folder of their own: written without the base model, and taken up again."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vembed.errors import CheckpointError, ConfigError
from vembed.training.adapters import adapters_of, is_in_head
from vembed.training.parameters import matches

logger = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_HEADS_FILE = "heads.safetensors"

# In the metadata of adapters; those that peft wrote by itself have no heads beside them. Alone,
# because safetensors writes several keys in any order.
_WRITER = {"written_by": "vembed"}

_PEFT_NAMES = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora",
}  # fmt: skip


def save_adapters(folder: Path, encoder: nn.Module, *, later: Collection[str] = ()) -> None:
    """Write what was trained, without the base model: loads with peft on it.

    Writes `adapter_model.safetensors` and `adapter_config.json` as peft does, with several
    backbones in a folder each, and `heads.safetensors`: parameters of the encoder outside its
    backbones, such as projections, and what trains in a backbone without adapters.

    Args:
        folder: Made when missing.
        encoder: With adapters.
        later: Patterns of parameters that train from a later step on (`unfreeze_at_step`).
    """
    from peft import get_peft_model_state_dict

    adapters = adapters_of(encoder)
    for name, model in adapters.items():
        target = folder_of(folder, name, adapters)
        target.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        _save(weights, target / _WEIGHTS)
        settings = copy.copy(model.peft_config["default"])
        settings.inference_mode = True
        if isinstance(settings.target_modules, set):
            settings.target_modules = sorted(settings.target_modules)  # a set has no fixed order
        settings.save_pretrained(str(target))
    heads = _heads(encoder, later)
    if heads:
        _save(heads, folder / _HEADS_FILE)


def load_adapters(folder: Path, encoder: nn.Module) -> None:
    """Take up adapters, and the encoder's own parameters beside them, as `save_adapters` left them.

    Args:
        folder: What `save_adapters` wrote, or peft for a model of one backbone.
        encoder: With new adapters of the same kind. Changed in place.

    Raises:
        CheckpointError: if files are missing or hold other layers or shapes, or nothing for a
            parameter that trains.
        ConfigError: if the adapters were made with other settings than the encoder's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    adapters = adapters_of(encoder)
    for name, model in adapters.items():
        source = folder_of(folder, name, adapters)
        _check_same_kind(source, model.peft_config["default"])
        weights = _load(source / _WEIGHTS)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        _check_same_tensors(source / _WEIGHTS, weights, own)
        set_peft_model_state_dict(model, weights)
    needed = _heads(encoder)
    if not (folder / _HEADS_FILE).is_file():
        sources = [folder_of(folder, name, adapters) for name in adapters]
        _tell_missing_heads(folder, needed, ours=any(map(_is_ours, sources)))
        return
    stored = _load(folder / _HEADS_FILE)
    # What was trained once and is frozen now comes back as well.
    chosen = {n: p for n, p in _outside_adapters(encoder) if n in needed or n in stored}
    _check_same_tensors(folder / _HEADS_FILE, stored, chosen)
    _copy(stored, chosen)


def folder_of(folder: Path, name: str, adapters: Mapping[str, Any]) -> Path:
    """Where the adapters of a backbone are kept: by its name, where there are several."""
    if len(adapters) == 1:
        return folder
    return folder / (name.removesuffix("backbone").rstrip(".") or "backbone")


def _heads(encoder: nn.Module, later: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """What is kept beside adapters.

    A part of a backbone, if it trains; anything else also if it does not, because it may be new.
    """
    return {
        name: parameter
        for name, parameter in _outside_adapters(encoder)
        if "backbone" not in name.split(".")
        or parameter.requires_grad
        or (is_in_head(name) and any(matches(name, pattern) for pattern in later))
    }


def _outside_adapters(encoder: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    adapted = tuple(f"{name}." for name in adapters_of(encoder))
    for name, parameter in encoder.named_parameters():
        if not name.startswith(adapted):
            yield name, parameter


def _tell_missing_heads(folder: Path, needed: Collection[str], *, ours: bool) -> None:
    if not needed:
        return
    names = f"{', '.join(list(needed)[:3])}{' ...' if len(needed) > 3 else ''}"
    if ours:
        raise CheckpointError(
            f"adapter_path: {folder} lacks {_HEADS_FILE}, where vembed keeps what trains beside "
            f"adapters; of this model: {names}. Copy the whole folder, or build the model as it "
            f"was when the adapter was trained"
        )
    logger.warning(
        "adapter_path: %s has no %s: %s are as in the model, and random where that has none",
        folder,
        _HEADS_FILE,
        names,
    )


def _is_ours(folder: Path) -> bool:
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return bool(file.metadata() == _WRITER)


def _check_same_kind(folder: Path, own: Any) -> None:
    try:
        stored = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"adapter_path: {folder} is not the folder of an adapter: {_CONFIG} cannot be read "
            f"({error})"
        ) from error
    for name, key in _PEFT_NAMES.items():
        if stored.get(name, False) != getattr(own, name):
            raise ConfigError(
                f"{key}: {getattr(own, name)}, but the adapter at {folder} was made with "
                f"{stored.get(name)}. Set {key}: {json.dumps(stored.get(name))}"
            )


def _check_same_tensors(
    file: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    odd = sorted(stored.keys() ^ own.keys())
    odd += [n for n in stored.keys() & own.keys() if stored[n].shape != own[n].shape]
    if odd:
        raise CheckpointError(
            f"adapter_path: {file} does not fit the model and lora_target_modules: of "
            f"{len(own)} tensors, {len(odd)} are missing on one side or of another shape: "
            f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
        )


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(whole, file, metadata=_WRITER)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"adapter_path: {file} cannot be read ({error})") from error
