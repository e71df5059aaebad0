"""Text encoders: any transformers model that reads tokens and returns a vector for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vembed.errors import ConfigError
from vembed.models import layers
from vembed.models.checkpoint_format import read_settings
from vembed.models.model_types import attends_causally
from vembed.models.options import CHECKPOINT, Choice, choose, origins_of, values_of
from vembed.models.pooled import PooledEncoder, check_token_rules
from vembed.models.pooling import check_pooling_method
from vembed.models.processor import TextProcessor, append_end_token, ends_with_special_token
from vembed.models.projection import load_projections
from vembed.models.tokenizing import (
    choose_text_options,
    input_names,
    load_tokenizer,
    pad_where_positions_allow,
)
from vembed.models.weights import load_backbone
from vembed.modes import TEXT


def load_text_encoder(
    path: str,
    *,
    pooling_method: str | None = None,
    normalize: bool | None = None,
    projection_dim: int | None = None,
    keep_layers: int | Sequence[int] | None = None,
    max_seq_length: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    torch_dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PooledEncoder:
    """Load a text encoder from a local folder; the arguments are those of `load_encoder`.

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
    tokenizer = load_tokenizer(
        stored.backbone_folder,
        do_lower_case=stored.do_lower_case,
        trust_remote_code=trust_remote_code,
    )
    pooling = _choose_pooling(pooling_method, stored.pooling_method, backbone.config)
    check_token_rules(pooling, stored)
    lacks_end = pooling.value == "last_token" and not ends_with_special_token(tokenizer)
    # A checkpoint that declares last-token pooling was trained with its tokenizer as it is.
    if lacks_end and pooling.origin != CHECKPOINT:
        append_end_token(tokenizer)
    pad_where_positions_allow(tokenizer, backbone)
    chosen_normalize = choose(normalize, stored.normalize, True)
    text_options = choose_text_options(
        stored,
        tokenizer=tokenizer,
        text_model=backbone,
        max_seq_length=max_seq_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    processor = TextProcessor(
        tokenizer,
        **values_of(text_options),
        default_prompt=stored.prompts.get(stored.default_prompt_name or "", ""),
        input_names=input_names(tokenizer, backbone),
    )
    encoder = PooledEncoder(
        backbone,
        processor,
        modalities=TEXT,
        settings=replace(stored, pooling_method=pooling.value, normalize=chosen_normalize.value),
        projections=load_projections(
            stored.dense_folders,
            input_size=backbone.config.hidden_size,
            projection_dim=projection_dim,
            dtype=backbone.dtype,
        ),
        origins=origins_of(
            {"pooling_method": pooling, "normalize": chosen_normalize, **text_options}
        ),
    )
    return encoder.eval()


def _choose_pooling(given: str | None, stored: str | None, config: Any) -> Choice:
    # to_dict leaves out what is not a setting of the class, which is_causal is for most.
    causal = attends_causally(config.to_dict() | {"is_causal": getattr(config, "is_causal", None)})
    choice = choose(given, stored, "last_token" if causal else "mean")
    check_pooling_method(choice.value)
    if causal and choice.value == "cls":
        raise ConfigError(
            f"pooling_method: cls reads the first token, which in a causal model "
            f"({config.model_type}) has seen nothing of the text: every text that starts alike "
            f"would get the same vector. Use last_token or mean"
        )
    return choice
