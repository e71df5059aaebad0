"""The tokenizer of a checkpoint, and how much of a text its model can take."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from vembed.errors import CheckpointError, ConfigError
from vembed.models.checkpoint_format import CheckpointSettings
from vembed.models.options import Choice, choose
from vembed.models.processor import lower_case

_UNLIMITED = 10**9  # transformers writes 1e30 for "no limit"
_POSITION_TABLES = ("position_embeddings", "position_embedding", "wpe")


def load_tokenizer(folder: Path, *, do_lower_case: bool, trust_remote_code: bool) -> Any:
    """The tokenizer in `folder`, with a padding token.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
        ConfigError: if it cannot lower-case texts as the checkpoint asks for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:
        # Of files that are damaged, transformers raises whatever happens to it.
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error})") from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"{folder}: tokenizer_config.json: model_max_length: must be a number. "
            f"Received: {tokenizer.model_max_length!r}"
        )
    # Without its files, transformers makes an empty tokenizer of the model's class, to which every
    # word is unknown.
    names = tokenizer.vocab_files_names.values()
    if names and not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder}: no tokenizer (none of {', '.join(names)})")
    if do_lower_case:
        lower_case(tokenizer)
    if tokenizer.pad_token is None:
        # Any token will do: the mask, not the id, says what is padding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def choose_text_options(
    stored: CheckpointSettings,
    *,
    tokenizer: Any,
    text_model: Any,
    max_seq_length: int | None,
    query_prompt: str | None,
    document_prompt: str | None,
    default_prompt: str = "",
) -> dict[str, Choice]:
    """The settings of a `TextProcessor`, under its names for them.

    Args:
        stored: What the checkpoint says.
        tokenizer: Its tokenizer.
        text_model: The model that reads the tokens.
        max_seq_length: Given by the caller, as are the prompts.
        query_prompt: See `max_seq_length`.
        document_prompt: See `max_seq_length`.
        default_prompt: Where neither caller nor checkpoint has one.

    Raises:
        ConfigError: as `choose_length` does.
    """
    return {
        "max_seq_length": choose_length(
            max_seq_length,
            stored.max_seq_length,
            of_tokenizer=tokenizer.model_max_length,
            text_model=text_model,
        ),
        "query_prompt": choose(query_prompt, stored.prompt_for("query"), default_prompt),
        "document_prompt": choose(document_prompt, stored.prompt_for("document"), default_prompt),
    }


def choose_length(
    given: int | None, stored: int | None, *, of_tokenizer: int, text_model: Any
) -> Choice:
    """How many tokens of a text are kept.

    Args:
        given: By the caller.
        stored: By the checkpoint's settings.
        of_tokenizer: Its `model_max_length`.
        text_model: The model that reads the tokens.

    Raises:
        ConfigError: if more are asked for than the model has positions for, or nothing sets a
            limit.
    """
    limit = position_limit(text_model) or _UNLIMITED
    if given is not None and given > limit:
        raise ConfigError(
            f"max_seq_length: this model has positions for {limit} tokens. Received: {given}"
        )
    trained = getattr(text_model.config, "max_position_embeddings", None) or _UNLIMITED
    choice = choose(given, min(of_tokenizer, trained) if stored is None else stored, None)
    # A published length that the position table cannot serve would fail on the first long text.
    length = int(min(choice.value, limit))
    if length >= _UNLIMITED:
        raise ConfigError("max_seq_length: the checkpoint names no limit. Set one, such as 512")
    return replace(choice, value=length)


def pad_where_positions_allow(tokenizer: Any, text_model: Any) -> None:
    """Pad on the right where learned positions are counted from column 0: left would shift them."""
    if position_limit(text_model) is not None:
        tokenizer.padding_side = "right"


def position_limit(text_model: Any) -> int | None:
    """Tokens that a learned table of absolute positions has rows for; None without such a table."""
    for module in text_model.modules():
        for name in _POSITION_TABLES:
            table = getattr(module, name, None)
            if isinstance(table, nn.Embedding):
                # RoBERTa and its kin count positions from padding_idx + 1.
                first = table.padding_idx + 1 if table.padding_idx is not None else 0
                return table.num_embeddings - first
    return None


def input_names(tokenizer: Any, text_model: Any) -> list[str]:
    """The tokenizer's outputs that the model takes."""
    known = inspect.signature(text_model.forward).parameters
    uses_types = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in known
    return ["input_ids", "attention_mask", *(["token_type_ids"] if uses_types else [])]
