"""Adapters in a folder of their own: written without the base model, and taken up again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vembed.errors import CheckpointError, ConfigError
from vembed.training.adapters import adapters_of

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_HEADS_FILE = "heads.safetensors"

_PEFT_NAMES = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora",
}  # fmt: skip


def save_adapters(folder: Path, encoder: nn.Module) -> None:
    """Write what was trained, without the base model: loads with peft on it.

    Writes `adapter_model.safetensors` and `adapter_config.json` as peft does, with several
    backbones in a folder each, and `heads.safetensors`: parameters of the encoder outside its
    backbones, such as projections.
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
    heads = {name: p.detach() for name, p in _heads(encoder)}
    if heads:
        _save(heads, folder / _HEADS_FILE)


def load_adapters(folder: Path, encoder: nn.Module) -> None:
    """Take up adapters, and the encoder's own parameters beside them, as `save_adapters` left them.

    Args:
        folder: What `save_adapters` wrote, or peft for a model of one backbone.
        encoder: With new adapters of the same kind. Changed in place.

    Raises:
        CheckpointError: if files are missing or hold other layers or shapes.
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
    heads = dict(_heads(encoder))
    if heads and (folder / _HEADS_FILE).is_file():
        stored = _load(folder / _HEADS_FILE)
        _check_same_tensors(folder / _HEADS_FILE, stored, heads)
        _copy(stored, heads)


def folder_of(folder: Path, name: str, adapters: Mapping[str, Any]) -> Path:
    """Where the adapters of a backbone are kept: by its name, where there are several."""
    if len(adapters) == 1:
        return folder
    return folder / (name.removesuffix("backbone").rstrip(".") or "backbone")


def _heads(encoder: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in encoder.named_parameters():
        if "backbone" not in name.split("."):
            yield name, parameter


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
    save_file(whole, file, metadata={"format": "pt"})


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"adapter_path: {file} cannot be read ({error})") from error
