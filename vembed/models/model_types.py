"""The transformers model types that vembed has an encoder for; an unlisted one is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BIDIRECTIONAL_MODEL_TYPES = (
    "albert",
    "bert",
    "camembert",
    "data2vec-text",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "gte",
    "megatron-bert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "rembert",
    "roberta",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
CAUSAL_MODEL_TYPES = (
    "bloom",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
DUAL_MODEL_TYPES = ("clip", "siglip", "siglip2")
VISION_MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_mae")
VLM_MODEL_TYPES = ("llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
MODEL_TYPES = {
    **dict.fromkeys(BIDIRECTIONAL_MODEL_TYPES + CAUSAL_MODEL_TYPES, "text"),
    **dict.fromkeys(DUAL_MODEL_TYPES, "dual"),
    **dict.fromkeys(VISION_MODEL_TYPES, "vision"),
    **dict.fromkeys(VLM_MODEL_TYPES, "vlm"),
}
"""`model_type` of a checkpoint's config.json -> name in `vembed.models.ENCODERS`."""


def attends_causally(config: Mapping[str, Any]) -> bool:
    """Whether a token sees only those before it, by the backbone's config as a mapping.

    Decoder families are also published with the causal mask taken off (EmbeddingGemma and others);
    their configs say so.
    """
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        return False
    if config["model_type"] in BIDIRECTIONAL_MODEL_TYPES:
        return bool(config.get("is_decoder"))
    if config["model_type"] in CAUSAL_MODEL_TYPES:
        return True
    # Only reached with encoder_mode=text on an unlisted type: its head is the best evidence there
    # is.
    return any(name.endswith("ForCausalLM") for name in config.get("architectures") or [])
