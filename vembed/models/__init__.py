"""Encoders: the only part of vembed that knows the backbone.

`load_encoder` answers for a wrong name, folder or model type before torch is imported.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from vembed import registry
from vembed.errors import ConfigError
from vembed.models.checkpoint_format import NO_POOLING, is_router, read_backbone_config
from vembed.models.model_types import MODEL_TYPES
from vembed.models.paths import resolve_model_path
from vembed.models.remote_code import check_remote_code

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from vembed.models.protocol import Encoder

__all__ = ["ENCODERS", "check_layers", "compose_encoder", "load_encoder", "resolve_model_path"]

ENCODERS = {
    "text": "vembed.models.text:load_text_encoder",
    "dual": "vembed.models.dual:load_dual_encoder",
    "vision": "vembed.models.vision:load_vision_encoder",
    "vlm": "vembed.models.vlm:load_vlm_encoder",
    "composed": "vembed.models.composed:load_composed_encoder",
}
"""Encoder kinds by name, each with its loader `(path, **options) -> Encoder` for a local folder."""


def load_encoder(
    model_name: str,
    *,
    encoder_mode: str | Callable[..., Encoder] = "auto",
    pooling_method: str | None = None,
    normalize: bool | None = None,
    projection_dim: int | None = None,
    keep_layers: int | Sequence[int] | None = None,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    freeze_towers: Collection[str] = (),
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization: str | None = None,
) -> Encoder:
    """Load a pretrained encoder with its processor, in eval mode, on the CPU.

    Args:
        model_name: Local folder, `package:NAME[/subdir]`, or hub id.
        encoder_mode: `"auto"` lets the checkpoint's model_type decide; or a name of `ENCODERS`,
            `"package.module:Name"`, or a loader `(path, **options) -> Encoder`.
        pooling_method: Tokens to one vector, or `"none"` to keep one for each. None here and below:
            the checkpoint's own, or the default of its kind.
        normalize: Whether vectors have unit length.
        projection_dim: Size of the vectors: a linear layer is added behind a model of another size,
            which starts random and has to be trained.
        keep_layers: Layers of the backbone to keep: how many, evenly chosen, or which, from 0.
        max_seq_length: Tokens kept of a text, special tokens included.
        query_prompt: Text put before every query; `""` for none.
        document_prompt: Text put before every document; `""` for none.
        freeze_towers: Of a model for texts and images, the halves not to train: `"text"`,
            `"image"`.
        torch_dtype: Type of the weights: float32, bfloat16, float16, or auto for the checkpoint's.
        attn_implementation: Attention kernel by transformers' name; None lets transformers choose.
        trust_remote_code: Run Python code that lies beside the model's weights; see
            `check_remote_code`.
        revision: Commit, tag or branch of a hub model.
        quantization: `4bit` or `8bit` weights, on the current GPU, which can only be trained
            through adapters; None for none.

    Raises:
        ConfigError: if the name cannot be resolved, the model type has no encoder, an option does
            not fit, or what an own loader returns lacks something.
        CheckpointError: if the folder is not a model, or is incomplete.
    """
    path = resolve_model_path(model_name, revision)
    if trust_remote_code:
        check_remote_code(model_name, path, revision)
    kind = _kind_of(path) if encoder_mode == "auto" else encoder_mode
    load = registry.resolve("encoder_mode", kind, ENCODERS)
    if pooling_method == NO_POOLING and kind in ("dual", "composed"):
        raise ConfigError(
            f"pooling_method: none keeps a vector for each token, but {model_name!r} is "
            f"encoder_mode {kind}, whose towers meet in one vector. Use a text, vision or vlm "
            f"encoder, or leave it unset"
        )
    options = {
        "pooling_method": pooling_method,
        "normalize": normalize,
        "projection_dim": projection_dim,
        "keep_layers": keep_layers,
        "max_seq_length": max_seq_length,
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "freeze_towers": tuple(freeze_towers),
        "torch_dtype": torch_dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "quantization": quantization,
    }
    named = f"{encoder_mode!r}" if kind == encoder_mode else f"auto, which is {kind!r} here"
    encoder: Encoder = load(path, **_fitting(load, options, f"encoder_mode {named}"))
    # After the loader, because it imports torch.
    from vembed.models.protocol import check_encoder

    check_encoder(encoder, name=f"encoder_mode {named}")
    return encoder


def check_layers(encoder: Encoder, layers: Sequence[int]) -> None:
    """Check that an encoder can give, in one forward pass, what its first layers alone would.

    Args:
        encoder: The model.
        layers: Numbers of layers, each less than it has.

    Raises:
        ConfigError: if it has not one stack of that many layers, or is no encoder of vembed's own.
    """
    from vembed.models.pooled import PooledEncoder

    if not isinstance(encoder, PooledEncoder):
        raise ConfigError(
            "mrl_layers: needs a model of texts or of images with one stack of layers. Received: "
            f"{type(encoder).__name__}. Leave it unset"
        )
    encoder.check_layers(layers)


def compose_encoder(
    *,
    text_model_name: str,
    image_model_name: str,
    projection_dim: int | None = None,
    normalize: bool | None = None,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    freeze_towers: Collection[str] = (),
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> Encoder:
    """Put a text and an image encoder together, each with a new projection that has to be trained.

    Args:
        text_model_name: Named as `load_encoder` takes it; a model with two towers gives its own.
        image_model_name: Likewise.
        projection_dim: Size of the vectors; None for the smaller of the towers' sizes.
        normalize: Whether vectors have unit length.
        max_seq_length: As in `load_encoder`, as are the following, which concern both towers or
            texts alone.
        query_prompt: See `max_seq_length`.
        document_prompt: See `max_seq_length`.
        freeze_towers: Towers not to train, `"text"` or `"image"`; their projections train.
        torch_dtype: See `max_seq_length`.
        attn_implementation: See `max_seq_length`.
        trust_remote_code: See `max_seq_length`.
        quantization: See `max_seq_length`.

    Raises:
        ConfigError: as `load_encoder` does, or if a model does not embed what it is for.
        CheckpointError: as `load_encoder` does.
    """
    from vembed.models.composed import compose

    text = load_encoder(
        text_model_name,
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        torch_dtype=torch_dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    image = load_encoder(
        image_model_name,
        torch_dtype=torch_dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    return compose(
        text,
        image,
        projection_dim=projection_dim,
        normalize=normalize,
        freeze_towers=freeze_towers,
    )


def _kind_of(path: str) -> str:
    if is_router(path):
        return "composed"
    config = read_backbone_config(path)
    model_type = config["model_type"]
    if model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    forced = (
        "If it gives a vector for each token of a text, set encoder_mode=text; if for each patch "
        "of an image, encoder_mode=vision; if it chats about images, encoder_mode=vlm"
    )
    raise ConfigError(
        f"model {path!r} has model_type {model_type!r}, which no encoder of vembed claims"
        f"{registry.did_you_mean(model_type, MODEL_TYPES)}. Known: {', '.join(MODEL_TYPES)}. "
        f"{forced}; for anything else write an encoder and set encoder_mode=package.module:Name"
    )


def _fitting(load: Callable[..., Encoder], options: dict[str, Any], what: str) -> dict[str, Any]:
    """The options that `load` takes; one that it does not take must have been left unset."""
    defaults = inspect.signature(load_encoder).parameters
    taken = registry.accepted_arguments(load, options)
    ignored = [name for name in options if name not in taken]
    if lost := [name for name in ignored if options[name] != defaults[name].default]:
        raise ConfigError(f"{what}: it does not take {', '.join(lost)}; leave them unset")
    return taken
