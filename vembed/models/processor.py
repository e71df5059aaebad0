"""Texts to padded token ids: prompts, truncation that never loses the end token, padding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from vembed.errors import ConfigError, DataError
from vembed.models.checkpoint_format import CheckpointSettings
from vembed.models.prompts import Prompts
from vembed.models.protocol import Role
from vembed.modes import Item
from vembed.tokens import Padding, Tokens


class TextProcessor:
    """Tokenises items for one model.

    Attributes:
        tokenizer: The model's own; its `model_max_length` is `max_seq_length`, so that it truncates
            alike elsewhere.
        prompts: Texts put before queries, documents, and items whose role is not given.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_seq_length: int,
        query_prompt: str = "",
        document_prompt: str = "",
        default_prompt: str = "",
        input_names: Sequence[str] = ("input_ids", "attention_mask"),
        fixed_length: bool = False,
    ) -> None:
        """Assign and check.

        Args:
            tokenizer: Of transformers.
            max_seq_length: Tokens kept of a text, special tokens included.
            query_prompt: Text put before every query; `""` for none.
            document_prompt: Text put before every document; `""` for none.
            default_prompt: Text put before an item whose role is not given.
            input_names: What the model takes of the tokenizer's outputs.
            fixed_length: Pad every text to `max_seq_length` and let the model see the padding, as
                some were trained.

        Raises:
            ConfigError: if `max_seq_length` has no room for a text.
        """
        special = tokenizer.num_special_tokens_to_add()
        if max_seq_length <= special:
            raise ConfigError(
                f"max_seq_length: must exceed the {special} special tokens of this model. "
                f"Received: {max_seq_length}"
            )
        self.tokenizer = tokenizer
        self.tokenizer.model_max_length = max_seq_length
        self.prompts = Prompts(query_prompt, document_prompt, default_prompt)
        names = [n for n in input_names if not (fixed_length and n == "attention_mask")]
        self._input_names = tuple(names)
        self._fixed_length = fixed_length

    @property
    def max_seq_length(self) -> int:
        """Tokens kept of a text, special tokens included."""
        return int(self.tokenizer.model_max_length)

    @property
    def query_prompt(self) -> str:
        """Text put before every query; `""` for none."""
        return self.prompts.query

    @property
    def document_prompt(self) -> str:
        """Text put before every document; `""` for none."""
        return self.prompts.document

    def prompt_for(self, role: Role | None) -> str:
        """The text put before an item of this role."""
        return self.prompts.of_role(role)

    def describe(self) -> dict[str, str]:
        """Its settings, for the log."""
        return {"max_seq_length": str(self.max_seq_length), **self.prompts.describe()}

    def complete(self, settings: CheckpointSettings) -> CheckpointSettings:
        """The settings of a checkpoint with this processor's own in place of what was read."""
        return replace(
            settings,
            max_seq_length=self.max_seq_length,
            do_lower_case=False,  # the saved tokenizer does it
            prompts=self.prompts.stored_among(settings.prompts),
        )

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Role | None,
        prompts: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """Token ids `[B, T]` and what goes with them, padded to the longest of `items`.

        The arguments are those of `tokenize`.
        """
        return self.padding.inputs(self.tokenize(items, role=role, prompts=prompts))

    def tokenize(
        self,
        items: Sequence[Item],
        *,
        role: Role | None,
        prompts: Sequence[str | None] | None = None,
    ) -> Tokens:
        """The tokens of each item, without padding.

        Args:
            items: B texts.
            role: Decides the prompt; None stands for the checkpoint's default prompt.
            prompts: One per item, instead of the role's; None as an entry keeps the role's, `""`
                means no prompt.

        Raises:
            DataError: if an item has no text, has an image, or gives no token at all.
        """
        chosen = self.prompts.of_items(len(items), role, prompts)
        texts = [prompt + _text_of(item) for prompt, item in zip(chosen, items, strict=True)]
        has_types = "token_type_ids" in self._input_names
        found = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_seq_length,
            return_token_type_ids=has_types,
            return_attention_mask=False,
        )
        ids = found["input_ids"]
        tokens = Tokens.of_lists(ids, found["token_type_ids"] if has_types else None)
        empty = np.flatnonzero(tokens.lengths == 0)
        if len(empty):
            raise DataError(
                f"a text gives no token, so it has no embedding. Received: {texts[empty[0]]!r}"
            )
        return tokens

    @property
    def padding(self) -> Padding:
        """How tokens are padded."""
        return Padding(
            self._input_names,
            token_id=self.tokenizer.pad_token_id,
            token_type=self.tokenizer.pad_token_type_id,
            side=self.tokenizer.padding_side,
            width=self.max_seq_length if self._fixed_length else None,
        )

    @property
    def can_store_tokens(self) -> bool:
        """Whether `token_key` knows all about the tokenizer: not of one that is code of its own."""
        is_own_code = type(self.tokenizer).__module__.startswith("transformers_modules")
        return self.tokenizer.is_fast and not is_own_code

    def token_key(self) -> str:
        """A hash of all that decides what `tokenize` returns, beside the items."""
        tokenizer = self.tokenizer
        rust = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call left behind.
        rust.pop("padding", None)
        rust.pop("truncation", None)
        settings = {
            name: value
            for name, value in tokenizer.init_kwargs.items()
            if isinstance(value, str | int | float | bool) and not _is_place(name)
        }
        parts = [
            rust,
            type(tokenizer).__name__,
            settings,
            tokenizer.truncation_side,
            self.max_seq_length,
            self._input_names,
            vars(self.prompts),
        ]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer, the same bytes whatever it was called with before."""
        save_tokenizer(self.tokenizer, path)


def save_tokenizer(tokenizer: Any, path: str | Path) -> None:
    """Write a tokenizer, the same bytes whatever it was called with before."""
    forget_calls(tokenizer)
    tokenizer.save_pretrained(path)


def forget_calls(tokenizer: Any) -> None:
    """Make a tokenizer ready to be saved, alone or in a processor."""
    if tokenizer.is_fast:
        # A call leaves its padding and truncation in the Rust object, and they would be written to
        # tokenizer.json.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    # Else a side that was changed here is left out, and readers take that of the class.
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side


def _is_place(name: str) -> bool:
    """Whether a setting says where a tokenizer was found, and not what it does."""
    return name.endswith(("_file", "_path", "_dir"))


def _text_of(item: Item) -> str:
    if item.image is not None:
        raise DataError(f"this model embeds text only. Received an image: {item.image}")
    if not isinstance(item.text, str):
        raise DataError(f"a text is expected. Received: {item.text!r}")
    return item.text


def ends_with_special_token(tokenizer: Any) -> bool:
    """Whether the tokenizer itself closes every text with a token such as EOS or SEP."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return bool(full[-len(plain) :] != plain)


def append_end_token(tokenizer: Any) -> None:
    """Make the tokenizer close every text with its EOS token, in its own post-processor.

    There, truncation leaves room for it, and the saved tokenizer does the same in every other
    library.

    Raises:
        ConfigError: if it has no EOS token, or is not a fast tokenizer.
    """
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise ConfigError(
            "pooling_method: last_token reads the end token, but this tokenizer has no EOS token "
            "or is not a fast one; choose another pooling_method"
        )
    backend = tokenizer.backend_tokenizer
    whole = json.loads(backend.to_str())
    whole["post_processor"] = _with_end_token(
        whole["post_processor"], tokenizer.eos_token, tokenizer.eos_token_id
    )
    backend.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor


def _with_end_token(old: dict[str, Any] | None, token: str, token_id: int) -> dict[str, Any]:
    """The JSON form of a post-processor that also appends `token`.

    A second template behind an existing one would take the tokens that the first put in for a
    sequence of their own, so an existing one is extended.
    """
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    entry = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    if old is None:
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        return {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": entry,
        }
    if old["type"] == "TemplateProcessing":
        return old | {
            "single": [*old["single"], end],
            "pair": [*old["pair"], end],
            "special_tokens": old["special_tokens"] | entry,
        }
    steps = old["processors"] if old["type"] == "Sequence" else [old]
    others = [step for step in steps if step["type"] != "TemplateProcessing"]
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    return {
        "type": "Sequence",
        "processors": [*others, _with_end_token(template, token, token_id)],
    }


def lower_case(tokenizer: Any) -> None:
    """Make the tokenizer lower-case texts first.

    Raises:
        ConfigError: if it is not a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise ConfigError("do_lower_case of this checkpoint needs a fast tokenizer")
    backend = tokenizer.backend_tokenizer
    after = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *after])
