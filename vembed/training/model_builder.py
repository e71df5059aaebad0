"""Student and teacher from the configuration: loading, freezing, adapters, recomputation, DDP."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vembed.config import SettingsError, TrainConfig, find_conflicts
from vembed.errors import ConfigError
from vembed.models import compose_encoder, load_encoder, resolve_model_path
from vembed.models.checkpoint_format import NO_POOLING
from vembed.models.composed import ComposedEncoder
from vembed.models.cross_encoder import is_cross_encoder
from vembed.models.quantization import check_quantization
from vembed.models.towers import TOWERS
from vembed.modes import RetrievalMode
from vembed.training.adapter_files import load_adapters
from vembed.training.adapters import adapt, describe_layers, find_targets, freeze_all_but_heads
from vembed.training.dropout import set_dropout
from vembed.training.freezing import freeze

if TYPE_CHECKING:
    from vembed.models.protocol import Encoder

logger = logging.getLogger(__name__)


def build_model(config: TrainConfig | Mapping[str, Any]) -> Encoder:
    """Load the encoder that is to be trained, on the CPU and in training mode.

    Dropout is as the settings say, and what they freeze for good is frozen.

    Raises:
        ConfigError: if the model is not named, or cannot be what the settings ask for.
        CheckpointError: if its files are missing or do not fit.
    """
    config = TrainConfig.coerce(config)
    if config.lora_quantization is not None:
        found = [p for p in find_conflicts(config) if p.keys[0] == "lora_quantization"]
        if found:
            raise SettingsError(found)
        check_quantization(config.lora_quantization)
    encoder = _load(config)
    _check_backbones(encoder, config)
    for tower in _towers(encoder):
        if config.dropout is not None:
            set_dropout(tower.backbone, config.dropout)
        if config.gradient_checkpointing:
            _recompute_activations(tower.backbone)
    _freeze_unused(encoder, config)
    freeze(encoder, config.freeze, until_later=config.unfreeze_at_step)
    encoder.train()
    return encoder


def _load(config: TrainConfig) -> Encoder:
    options: dict[str, Any] = {
        "normalize": config.normalize_embeddings,
        "projection_dim": config.projection_dim,
        "freeze_towers": config.freeze_towers,
        "max_seq_length": config.max_seq_length,
        "query_prompt": config.query_prompt,
        "document_prompt": config.document_prompt,
        "torch_dtype": config.torch_dtype,
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "quantization": config.lora_quantization,
    }
    if config.text_model_name is not None and config.image_model_name is not None:
        return compose_encoder(
            text_model_name=config.text_model_name,
            image_model_name=config.image_model_name,
            **options,
        )
    if config.model_name is None:
        raise ConfigError("model_name: required. Received: null. Name a hub id, folder or package:")
    return load_encoder(
        config.model_name,
        encoder_mode=config.encoder_mode,
        pooling_method=config.pooling_method,
        keep_layers=config.keep_layers,
        revision=config.revision,
        **options,
    )


def _freeze_unused(encoder: Encoder, config: TrainConfig) -> None:
    """Freeze what the retrieval mode never uses, such as the text tower when images seek images."""
    mode = RetrievalMode.parse(config.retrieval_mode)
    restrict = getattr(encoder, "restrict_to", None)  # a user's own encoder need not have it
    if restrict is not None:
        restrict({mode.query, mode.document})


def _towers(encoder: Encoder) -> Sequence[Any]:
    """What has a backbone each; a user's own encoder may have one and know nothing of towers."""
    towers: Sequence[Any] = getattr(encoder, "towers", (encoder,))
    return towers


def _check_backbones(encoder: Encoder, config: TrainConfig) -> None:
    """Raise ConfigError where a setting changes a backbone that a user's own encoder has not."""
    asked = {
        "dropout": config.dropout is not None,
        "gradient_checkpointing": config.gradient_checkpointing,
        "use_lora": config.use_lora,
    }
    keys = ", ".join(key for key, is_set in asked.items() if is_set)
    if keys and not all(hasattr(tower, "backbone") for tower in _towers(encoder)):
        raise ConfigError(
            f"{keys}: changes the encoder's `backbone`, a module, which {type(encoder).__name__} "
            f"has not. Name it so, or leave the setting out"
        )


def _recompute_activations(backbone: Any) -> None:
    # transformers 5 has a new name for it and warns about the old one, which 4 has only.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(backbone, name) for name in names if hasattr(backbone, name)), None)
    if enable is None:
        raise ConfigError(
            f"gradient_checkpointing: needs a backbone with {names[1]}(settings), as those of "
            f"transformers have. Received: {type(backbone).__name__}"
        )
    enable({"use_reentrant": False})


def build_teacher_model(config: TrainConfig | Mapping[str, Any]) -> Encoder | None:
    """Load the teacher, frozen and in evaluation mode; None when the config names none.

    Raises:
        ConfigError: if it gives a vector for each token.
    """
    config = TrainConfig.coerce(config)
    if config.teacher_model_name is None:
        return None
    path = resolve_model_path(config.teacher_model_name, config.teacher_revision)
    if is_cross_encoder(path):
        raise ConfigError(
            f"teacher_model_name: {config.teacher_model_name} is a cross-encoder, which scores "
            "pairs and embeds nothing. Set teacher_cache, and run `vembed teach` first"
        )
    teacher = load_encoder(
        config.teacher_model_name,
        revision=config.teacher_revision,
        torch_dtype=config.teacher_dtype or config.torch_dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    if teacher.pooling_method == NO_POOLING:
        raise ConfigError(
            f"teacher_model_name: {config.teacher_model_name!r} gives a vector for each token, but "
            f"distillation compares one for each item. Name a model that pools"
        )
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


def apply_lora(
    model: Encoder, config: TrainConfig | Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Put low-rank adapters into the backbone, in place, and freeze the rest of it.

    Does nothing unless `use_lora` is set. Call it before the optimizer is built. What is outside
    the backbone, such as projections, goes on training, and so do the backbone's own heads.

    Raises:
        ConfigError: if `lora_target_modules` names layers that cannot be adapted, or `adapter_path`
            holds adapters of other settings.
        CheckpointError: if `adapter_path` cannot be read or does not fit.
    """
    config = TrainConfig.coerce(config)
    if not config.use_lora:
        return
    trained = [
        (name, tower)
        for name, tower in _named_towers(model, config)
        # Else it takes no part, or was frozen on purpose.
        if config.lora_quantization or any(p.requires_grad for p in tower.backbone.parameters())
    ]
    targets = find_targets([t.backbone for _, t in trained], config.lora_target_modules)
    for (name, tower), layers in zip(trained, targets, strict=True):
        if layers:
            tower.backbone = adapt(tower.backbone, config, targets=layers, model_name=name)
        else:
            freeze_all_but_heads(tower.backbone)
    if config.lora_quantization is not None:
        # Quantized layers never train by themselves, so it did not show which of them were frozen.
        for half in config.freeze_towers:
            model.freeze(half)  # type: ignore[operator]
        _freeze_unused(model, config)
        freeze(model, config.freeze, until_later=config.unfreeze_at_step)
    if config.adapter_path is not None:
        load_adapters(Path(config.adapter_path), model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if accelerator.is_main_process:
        logger.info(
            "%-14s %s of rank %d on %s; %s of %s parameters train (%.2f %%)",
            "adapters",
            _adapter_kind(config),
            config.lora_r,
            describe_layers(model),
            f"{trainable:,}",
            f"{total:,}",
            100 * trainable / total,
        )


def _named_towers(model: Encoder, config: TrainConfig) -> list[tuple[str | None, Any]]:
    """What has a backbone each, with the name that it was loaded by."""
    towers = _towers(model)
    names = [config.model_name] * len(towers)
    if config.text_model_name is not None:
        names = [config.text_model_name, config.image_model_name]
    elif isinstance(model, ComposedEncoder):
        names = [f"{config.model_name}/{tower}" for tower in TOWERS]
    return list(zip(names, towers, strict=True))


def _adapter_kind(config: TrainConfig) -> str:
    quantized = f" on {config.lora_quantization} weights" if config.lora_quantization else ""
    kind = "DoRA" if config.use_dora else "LoRA"
    return f"{'rs' if config.use_rslora else ''}{kind}{quantized}"


def enable_static_graph(
    model: nn.Module, config: TrainConfig | Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Tell DDP that every step uses the same parameters, so that it reduces during backward.

    Does nothing unless `ddp_static_graph` is set and several processes run.

    Args:
        model: The model as `accelerator.prepare` returned it.
        config: Reads `ddp_static_graph`, `use_gradient_cache`, `gradient_accumulation_steps`,
            `unfreeze_at_step`.
        accelerator: The Accelerator that prepared the model.

    Raises:
        ConfigError: with gradient caching or accumulation, which crash inside DDP ("expect autograd
            hooks" internal assert) because their first backward passes must not reduce; and with
            parameters that join later.
    """
    config = TrainConfig.coerce(config)
    if not config.ddp_static_graph:
        return
    for key, clash in (
        ("use_gradient_cache", config.use_gradient_cache),
        ("gradient_accumulation_steps", config.gradient_accumulation_steps > 1),
        ("unfreeze_at_step", bool(config.unfreeze_at_step)),
    ):
        if clash:
            raise ConfigError(
                f"ddp_static_graph: does not work with {key}: {config[key]}, because DDP with a "
                f"static graph must reduce the same gradients in every backward pass. Turn one of "
                f"them off"
            )
    if accelerator.num_processes > 1 and isinstance(model, DistributedDataParallel):
        model._set_static_graph()  # type: ignore[no-untyped-call]
