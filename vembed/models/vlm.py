"""Vision-language models: texts and images are tokens of one sequence, of which the last counts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoProcessor

from vembed.errors import CheckpointError, ConfigError
from vembed.models.chat import ChatInputs, ChatProcessor, PatchInputs, ProcessorInputs
from vembed.models.checkpoint_format import CheckpointSettings, read_settings
from vembed.models.image_processor import load_image_processor
from vembed.models.json_files import read_object
from vembed.models.options import choose, origins_of, values_of
from vembed.models.pooled import PooledEncoder, check_token_rules
from vembed.models.pooling import check_pooling_method
from vembed.models.projection import load_projections
from vembed.models.prompts import Prompts
from vembed.models.tokenizing import choose_text_options, load_tokenizer
from vembed.models.towers import check_towers
from vembed.models.weights import load_backbone

DEFAULT_INSTRUCTION = "Represent the user's input."
"""Where neither caller nor checkpoint has one: what Qwen3-VL-Embedding was trained with."""

PATCH_MODEL_TYPES = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
"""Families whose images are patches in one flat tensor, with `image_grid_thw` beside it."""

# Read by others: by a processor that also takes videos.
_OTHER_FILES = ("video_preprocessor_config.json", "processor_config.json")


def load_vlm_encoder(
    path: str,
    *,
    pooling_method: str | None = None,
    normalize: bool | None = None,
    projection_dim: int | None = None,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    freeze_towers: Collection[str] = (),
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PooledEncoder:
    """Load a vision-language model from a local folder; the arguments are those of `load_encoder`.

    Prompts are instructions of the system, `max_seq_length` counts tokens of an item's text alone.
    An item with text and image has both in one message, so that the model itself fuses them.

    Raises:
        ConfigError: if an option does not fit the model, or it has no chat template.
        CheckpointError: if the folder is incomplete or has parts that vembed does not read.
    """
    check_towers(freeze_towers)
    stored = read_settings(path)
    backbone = load_backbone(
        stored.backbone_folder,
        torch_dtype=torch_dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    _freeze_behind_image_features(backbone)
    inputs = _load_inputs(stored, backbone, trust_remote_code)
    chosen = {
        "pooling_method": choose(pooling_method, stored.pooling_method, "last_token"),
        "normalize": choose(normalize, stored.normalize, True),
    }
    text_options = choose_text_options(
        stored,
        tokenizer=inputs.tokenizer,
        text_model=_text_model(backbone),
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        default_prompt=DEFAULT_INSTRUCTION,
    )
    _check_pooling(chosen["pooling_method"].value)
    check_token_rules(chosen["pooling_method"], stored)
    encoder = PooledEncoder(
        backbone,
        _chat_processor(inputs, stored, **values_of(text_options)),
        modalities="tim",
        settings=replace(
            stored,
            pooling_method=chosen["pooling_method"].value,
            normalize=chosen["normalize"].value,
            calls=dict.fromkeys(("text", "image", "message"), "forward"),
            processing={"chat_template": {"add_generation_prompt": True}},
        ),
        projections=load_projections(
            stored.dense_folders,
            input_size=backbone.config.get_text_config().hidden_size,
            projection_dim=projection_dim,
            dtype=backbone.dtype,
        ),
        origins=origins_of({**chosen, **text_options}),
        image_modules=_image_modules(backbone),
    )
    for tower in freeze_towers:
        encoder.freeze(tower)
    return encoder.eval()


def _chat_processor(
    inputs: ChatInputs,
    stored: CheckpointSettings,
    *,
    max_seq_length: int,
    query_prompt: str,
    document_prompt: str,
) -> ChatProcessor:
    """A processor whose items without a role get the checkpoint's default, else the document's."""
    default = stored.prompts.get(stored.default_prompt_name or "", document_prompt)
    prompts = Prompts(query=query_prompt, document=document_prompt, default=default)
    return ChatProcessor(inputs, max_seq_length=max_seq_length, prompts=prompts)


def _check_pooling(method: str) -> None:
    check_pooling_method(method)
    if method == "cls":
        raise ConfigError(
            "pooling_method: cls reads the first token, which is that of the chat template: every "
            "item would get the same vector. Use last_token or mean"
        )


def _load_inputs(stored: CheckpointSettings, backbone: Any, trust: bool) -> ChatInputs:
    folder = stored.backbone_folder
    if backbone.config.model_type not in PATCH_MODEL_TYPES:
        return ProcessorInputs(_load_processor(folder, trust))
    tokenizer = load_tokenizer(folder, do_lower_case=stored.do_lower_case, trust_remote_code=trust)
    tokenizer.chat_template = tokenizer.chat_template or _older_chat_template(folder)
    _check_chat_template(folder, tokenizer)
    files = [folder / name for name in _OTHER_FILES]
    return PatchInputs(
        tokenizer,
        load_image_processor(folder, trust_remote_code=trust),
        image_token_id=backbone.config.image_token_id,
        other_files={file.name: file.read_bytes() for file in files if file.is_file()},
    )


def _older_chat_template(folder: Path) -> str | None:
    """The template in chat_template.json, where transformers 4 put that of a processor."""
    return read_object(folder / "chat_template.json").get("chat_template")


def _check_chat_template(folder: Path, owner: Any) -> None:
    if not owner.chat_template:
        raise ConfigError(
            f"{folder}: no chat template, which says how texts and images are put together. A "
            f"vision-language model needs one (chat_template.jinja)"
        )


def _load_processor(folder: Path, trust: bool) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(
            folder, trust_remote_code=trust, local_files_only=True
        )
    except (OSError, TypeError) as error:
        raise CheckpointError(f"{folder}: the processor cannot be read ({error})") from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{folder}: the processor cannot be loaded here ({error})") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"{folder}: a processor for texts and images is expected. "
            f"Received: {type(processor).__name__}"
        )
    _check_chat_template(folder, processor)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _text_model(backbone: Any) -> Any:
    """The part that reads the tokens."""
    return backbone.get_decoder()


def _image_modules(backbone: Any) -> list[str]:
    """The parts beside the text model: vision tower, and what brings its output into the text."""
    text = _text_model(backbone)
    return [
        name
        for name, child in backbone.named_children()
        if not any(module is text for module in child.modules())
    ]


def _freeze_behind_image_features(backbone: Any) -> None:
    """Freeze the layers of a vision tower that come after the one whose output is taken.

    LLaVA takes the last but one; what comes after gets no gradient.
    """
    layer = getattr(backbone.config, "vision_feature_layer", None)
    tower = getattr(backbone, "vision_tower", None)
    if not isinstance(layer, int) or layer >= -1 or tower is None:
        return
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len)
    for unused in layers[layer + 1 :]:
        unused.requires_grad_(False)
    for name, module in tower.named_modules():
        if name.rpartition(".")[2] in ("post_layernorm", "head"):
            module.requires_grad_(False)
