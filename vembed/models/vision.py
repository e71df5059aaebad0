"""Image encoders: ViT, DINOv2, DINOv3, MAE, or any model that returns a vector for each patch.

# Shapes: B images, T tokens of an image: class token, registers and patches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vembed.errors import ConfigError
from vembed.models import layers
from vembed.models.checkpoint_format import NO_POOLING, OWN_POOLING, read_settings
from vembed.models.image_processor import ImageProcessor, load_image_processor
from vembed.models.options import Choice, choose, origins_of
from vembed.models.pooled import PooledEncoder, check_token_rules
from vembed.models.projection import load_projections
from vembed.models.weights import load_backbone
from vembed.modes import IMAGE
from vembed.registry import did_you_mean

_POOLINGS = ("cls", "mean", "max", NO_POOLING, OWN_POOLING)
_MASKED_AUTOENCODER = "vit_mae"


def load_vision_encoder(
    path: str,
    *,
    pooling_method: str | None = None,
    normalize: bool | None = None,
    projection_dim: int | None = None,
    keep_layers: int | Sequence[int] | None = None,
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PooledEncoder:
    """Load an image encoder from a local folder; the arguments are those of `load_encoder`.

    Pooling is, unless the checkpoint or the caller says otherwise, the model's own pooled output:
    the head that a ViT was trained with where the checkpoint has its weights, else the class token.
    MAE trains neither, so its tokens are averaged. `mean`, `max` and `none` take all tokens, class
    token and registers too, as sentence-transformers does.

    Raises:
        ConfigError: if an option does not fit the model.
        CheckpointError: if the folder is incomplete or has parts that vembed does not read.
    """
    stored = read_settings(path)
    backbone = load_backbone(
        stored.backbone_folder,
        torch_dtype=torch_dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    if keep_layers is not None:
        layers.keep_layers(backbone, keep_layers)
    pooling = _choose_pooling(pooling_method, stored.pooling_method, backbone)
    check_token_rules(pooling, stored)
    chosen_normalize = choose(normalize, stored.normalize, True)
    _freeze_mask_token(backbone)
    image_processor = load_image_processor(
        stored.backbone_folder, trust_remote_code=trust_remote_code
    )
    encoder = PooledEncoder(
        backbone,
        ImageProcessor(image_processor),
        modalities=IMAGE,
        settings=replace(
            stored,
            pooling_method=pooling.value,
            normalize=chosen_normalize.value,
            calls={"image": "forward"},
        ),
        projections=load_projections(
            stored.dense_folders,
            input_size=backbone.config.hidden_size,
            projection_dim=projection_dim,
            dtype=backbone.dtype,
        ),
        origins=origins_of({"pooling_method": pooling, "normalize": chosen_normalize}),
        add_inputs=_see_everything(backbone),
    )
    return encoder.eval()


def _choose_pooling(given: str | None, stored: str | None, backbone: Any) -> Choice:
    model_type = backbone.config.model_type
    has_head = getattr(backbone, "pooler", None) is not None
    default = "mean" if model_type == _MASKED_AUTOENCODER else OWN_POOLING if has_head else "cls"
    choice = choose(given, stored, default)
    if choice.value not in _POOLINGS:
        raise ConfigError(
            f"pooling_method: {choice.value!r} is not one for images"
            f"{did_you_mean(choice.value, _POOLINGS)}. One of: {', '.join(_POOLINGS)}"
        )
    lacks_head = model_type == _MASKED_AUTOENCODER or getattr(backbone, "pooler", "") is None
    if choice.value == OWN_POOLING and lacks_head:
        raise ConfigError(
            f"pooling_method: {OWN_POOLING} is the model's own head, but this {model_type} "
            f"checkpoint has none. Use cls or mean"
        )
    return choice


def _freeze_mask_token(backbone: Any) -> None:
    """Stop training the vector that stands for hidden patches in pre-training: none is hidden."""
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def _see_everything(backbone: Any) -> Any:
    """Keep a masked autoencoder from hiding patches and from shuffling those that it keeps.

    Its config would hide three quarters of every image, at random, in evaluation too. It is saved
    as changed here, so that other libraries hide none either.
    """
    if backbone.config.model_type != _MASKED_AUTOENCODER:
        return None
    backbone.config.mask_ratio = 0.0
    return partial(_ascending_noise, backbone.embeddings.patch_embeddings.num_patches)


def _ascending_noise(patches: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The numbers that the model sorts its patches by: in the order that they have."""
    pixels = inputs["pixel_values"]
    return {"noise": torch.arange(patches, device=pixels.device).expand(len(pixels), patches)}
