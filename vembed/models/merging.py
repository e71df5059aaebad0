"""Backbones with adapters: copies of them, and adapters merged into the weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def has_adapters(module: Any) -> bool:
    """Whether it is a `PeftModel`; without importing peft, which nobody needs who has none."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def merged(backbone: Any) -> Any:
    """The backbone with adapters merged in: itself when it has none, else a copy on the CPU."""
    if not has_adapters(backbone):
        return backbone
    # A copy, because unmerging rounds: it would not give the live weights back exactly.
    return plain_copy(backbone).merge_and_unload(safe_merge=True)


def plain_copy(backbone: Any) -> Any:
    """A copy of a backbone with adapters, on the CPU, in eval mode, its weights not quantized.

    Quantized weights were rounded, and adapters cannot be merged into them without rounding again:
    the copy has the weights of the checkpoint.
    """
    if getattr(backbone.get_base_model(), "hf_quantizer", None) is not None:
        return _on_loaded_weights(backbone)
    return copy_to_cpu(backbone).eval()


def copy_to_cpu(module: Any, replaced: Mapping[int, Any] | None = None) -> Any:
    """A deep copy on the CPU, without a copy on the module's device on the way.

    Args:
        module: To copy; may hold anything that can be copied.
        replaced: What takes the place of a part, by the part's id.
    """
    # A deep copy takes what it finds in the memo from there.
    memo: dict[int, Any] = dict(replaced or {})
    parts = [part for part in module.modules() if id(part) in memo]
    gone = {id(t) for part in parts for t in chain(part.parameters(), part.buffers())}
    memo |= {id(b): _on_cpu(b) for b in module.buffers() if id(b) not in gone}
    for parameter in module.parameters():
        if id(parameter) not in gone:
            memo[id(parameter)] = nn.Parameter(_on_cpu(parameter), parameter.requires_grad)
    return copy.deepcopy(module, memo)


def _on_cpu(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())


def _on_loaded_weights(backbone: Any) -> Any:
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    base = backbone.get_base_model()
    config = copy.deepcopy(base.config)  # as it was changed after loading
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(base).from_pretrained(
        base.name_or_path, config=config, dtype=torch.float32, local_files_only=True
    )
    if getattr(base, "pooler", plain) is None:
        plain.pooler = None
    with torch.no_grad():
        # The model's own beside its layers, such as a logit_scale that was learned by the loss.
        for name, parameter in base.named_parameters(recurse=False):
            getattr(plain, name).copy_(_on_cpu(parameter))
    adapters = get_peft_model_state_dict(backbone, save_embedding_layers=False)
    adapted = PeftModel(plain, copy.deepcopy(backbone.peft_config["default"]))
    set_peft_model_state_dict(adapted, {name: _on_cpu(t) for name, t in adapters.items()})
    return adapted.eval()
