"""Student and teacher from the configuration: loading, LoRA, checkpointing of activations, DDP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.models import load_encoder

if TYPE_CHECKING:
    from vembed.models.protocol import Encoder

logger = logging.getLogger(__name__)


def build_model(config: TrainConfig | Mapping[str, Any]) -> Encoder:
    """Load the encoder that is to be trained, on the CPU and in training mode.

    Raises:
        ConfigError: if the model is not named, or cannot be what the settings ask for.
        CheckpointError: if its files are missing or do not fit.
    """
    config = TrainConfig.coerce(config)
    if config.model_name is None:
        raise ConfigError("model_name: required. Received: null. Name a hub id, folder or package:")
    encoder = load_encoder(
        config.model_name,
        encoder_mode=config.encoder_mode,
        pooling_method=config.pooling_method,
        normalize=config.normalize_embeddings,
        max_seq_length=config.max_seq_length,
        query_prompt=config.query_prompt,
        document_prompt=config.document_prompt,
        torch_dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    if config.gradient_checkpointing:
        _recompute_activations(encoder.backbone)
    encoder.train()
    return encoder


def _recompute_activations(backbone: Any) -> None:
    # transformers 5 has a new name for it and warns about the old one, which 4 has only.
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def build_teacher_model(config: TrainConfig | Mapping[str, Any]) -> Encoder | None:
    """Load the teacher, frozen and in evaluation mode; None when the config names none."""
    config = TrainConfig.coerce(config)
    if config.teacher_model_name is None:
        return None
    teacher = load_encoder(
        config.teacher_model_name,
        torch_dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
    )
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


def apply_lora(
    model: Encoder, config: TrainConfig | Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Put low-rank adapters into the backbone, in place, and freeze the rest of it.

    Does nothing unless `use_lora` is set. Call it before the optimizer is built.

    Raises:
        ConfigError: if `lora_target_modules` names layers that the backbone does not have.
    """
    config = TrainConfig.coerce(config)
    if not config.use_lora:
        return
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
    )
    try:
        model.backbone = get_peft_model(model.backbone, settings)
    except ValueError as error:
        linear = sorted(
            {n.rpartition(".")[2] for n, m in model.backbone.named_modules() if _is_linear(m)}
        )
        raise ConfigError(
            f"lora_target_modules: {config.lora_target_modules}: {error} "
            f"The backbone's linear layers are named: {', '.join(linear)}"
        ) from error
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if accelerator.is_main_process:
        logger.info(
            "LoRA: rank %d on %s; %s of %s parameters train (%.2f %%)",
            config.lora_r,
            ", ".join(config.lora_target_modules or ["all linear layers"]),
            f"{trainable:,}",
            f"{total:,}",
            100 * trainable / total,
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def enable_static_graph(
    model: nn.Module, config: TrainConfig | Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Tell DDP that every step uses the same parameters, so that it reduces during backward.

    Does nothing unless `ddp_static_graph` is set and several processes run.

    Args:
        model: The model as `accelerator.prepare` returned it.
        config: Reads `ddp_static_graph`, `use_gradient_cache`, `gradient_accumulation_steps`.
        accelerator: The Accelerator that prepared the model.

    Raises:
        ConfigError: with gradient caching or accumulation, which crash inside DDP ("expect autograd
            hooks" internal assert) because their first backward passes must not reduce.
    """
    config = TrainConfig.coerce(config)
    if not config.ddp_static_graph:
        return
    for key, clash in (
        ("use_gradient_cache", config.use_gradient_cache),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps > 1),
    ):
        if clash:
            raise ConfigError(
                f"ddp_static_graph: does not work with {key}: {config[key]}, because DDP with a "
                f"static graph must reduce in every backward pass. Turn one of them off"
            )
    if accelerator.num_processes > 1 and isinstance(model, DistributedDataParallel):
        model._set_static_graph()  # type: ignore[no-untyped-call]
