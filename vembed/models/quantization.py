"""Weights in 4 or 8 bits (QLoRA, https://arxiv.org/abs/2305.14314), through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from vembed.errors import ConfigError


def check_quantization(quantization: str, *, on_cpu: bool) -> None:
    """Raise ConfigError unless quantized weights can be had here; before any are loaded."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"lora_quantization: {quantization} needs the package bitsandbytes, which is not "
            "installed. Install it (pip install bitsandbytes), or set lora_quantization: null"
        )
    if on_cpu or not torch.accelerator.is_available():
        raise ConfigError(
            f"lora_quantization: {quantization} needs a GPU. Received: "
            f"{'device: cpu' if on_cpu else 'a machine without one'}. Set lora_quantization: null"
        )


def quantization_options(quantization: str, dtype: str) -> dict[str, Any]:
    """What `from_pretrained` takes for it.

    Args:
        quantization: `4bit` (NF4, its constants quantized too) or `8bit`.
        dtype: Type that 4-bit weights are unpacked to for computing; `auto` for bfloat16.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )
    return {"quantization_config": config}
