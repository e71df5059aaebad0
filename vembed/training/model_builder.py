"""Student and teacher from the configuration: loading, LoRA, checkpointing of activations, DDP."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.models import compose_encoder, load_encoder, resolve_model_path
from vembed.models.cross_encoder import is_cross_encoder
from vembed.modes import RetrievalMode

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
    encoder = _load(config)
    _freeze_unused(encoder, config)
    if config.gradient_checkpointing:
        for tower in _towers(encoder):
            _recompute_activations(tower.backbone)
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


def _recompute_activations(backbone: Any) -> None:
    # transformers 5 has a new name for it and warns about the old one, which 4 has only.
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})


def build_teacher_model(config: TrainConfig | Mapping[str, Any]) -> Encoder | None:
    """Load the teacher, frozen and in evaluation mode; None when the config names none."""
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
    for tower in _towers(model):
        # Nothing in it is to be trained: it takes no part, or was frozen on purpose.
        if any(p.requires_grad for p in tower.backbone.parameters()):
            tower.backbone = _with_adapters(tower.backbone, config)
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


def _with_adapters(backbone: Any, config: TrainConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or "all-linear",
        exclude_modules=_without_adapter(backbone) or None,
    )
    try:
        return get_peft_model(backbone, settings)
    except ValueError as error:
        linear = sorted(
            {n.rpartition(".")[2] for n, m in backbone.named_modules() if _is_linear(m)}
        )
        raise ConfigError(
            f"lora_target_modules: {config.lora_target_modules}: {error} "
            f"The backbone's linear layers are named: {', '.join(linear)}"
        ) from error


def _without_adapter(backbone: nn.Module) -> list[str]:
    """Linear layers to leave alone: frozen ones, and those whose adapter would have no effect.

    torch's own attention reads the weight of its output layer instead of calling the layer.
    """
    read_only = {
        id(part)
        for module in backbone.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
        and (id(module) in read_only or not module.weight.requires_grad)
    ]


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
