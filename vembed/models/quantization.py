"""Weights in 4 or 8 bits (QLoRA, https://arxiv.org/abs/2305.14314), through bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from vembed.errors import ConfigError
from vembed.models.towers import HEADS


def check_quantization(quantization: str) -> None:
    """Raise ConfigError where there is no GPU; call it before any weights are loaded."""
    if not torch.accelerator.is_available():
        raise ConfigError(
            f"lora_quantization: {quantization} needs a GPU. Received: a machine without one. "
            "Set lora_quantization: null"
        )


def quantization_options(quantization: str, dtype: str) -> dict[str, Any]:
    """What `from_pretrained` takes for it.

    Args:
        quantization: `4bit` (NF4, its constants quantized too) or `8bit`.
        dtype: Type that 4-bit weights are unpacked to for computing; `auto` for bfloat16.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_skip_modules=list(HEADS)
            )
        }
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=list(HEADS),  # of 4 bits too, whatever the name says
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )
    return {"quantization_config": config}
