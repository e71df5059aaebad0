"""Items as chats: what vision-language models read, texts and images in one sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vembed.errors import ConfigError, DataError
from vembed.models.checkpoint_format import CheckpointSettings
from vembed.models.image_processor import load_images
from vembed.models.processor import forget_calls, save_tokenizer
from vembed.models.prompts import Prompts
from vembed.models.protocol import Role
from vembed.modes import Item

Message = dict[str, Any]


class ChatInputs(Protocol):
    """Conversations to padded model inputs, as one family of models takes them.

    Attributes:
        tokenizer: The model's own.
        image_token: What stands for an image in a rendered conversation; None if unknown.
    """

    tokenizer: Any
    image_token: str | None

    def __call__(self, conversations: list[list[Message]]) -> dict[str, Tensor]:
        """Inputs of conversations, which end where the model's answer would start."""
        ...

    def save_pretrained(self, path: str | Path) -> None:
        """Write what makes the same inputs again."""
        ...


class ChatProcessor:
    """Puts each item into a message of the user, behind an instruction of the system.

    A prompt is that instruction. The model's chat template decides how it all looks, and ends with
    the beginning of an answer: the last token has seen everything.

    A text that spells one of the model's control tokens, such as `<|im_end|>` or the one that
    stands for an image, gets a space behind the token's first character: it stays words. The
    template is one string with the text in it, so `split_special_tokens` of tokenizers, which would
    take the template apart too, is no way.

    Attributes:
        max_seq_length: Tokens kept of an item's text; template, instruction and image come on top,
            so that cutting a text never takes away a part of an image.
        prompts: Instructions for queries, documents, and items whose role is not given.
    """

    def __init__(self, inputs: ChatInputs, *, max_seq_length: int, prompts: Prompts) -> None:
        """Assign and check.

        Raises:
            ConfigError: if texts cannot be cut by tokens, or a prompt has a control token.
        """
        if not inputs.tokenizer.is_fast:
            raise ConfigError("a vision-language model needs a fast tokenizer (tokenizer.json)")
        self.inputs = inputs
        self.max_seq_length = max_seq_length
        self.prompts = prompts
        self._check_instructions([prompts.query, prompts.document, prompts.default])

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return self.inputs.tokenizer

    def prompt_for(self, role: Role | None) -> str:
        """The instruction for an item of this role."""
        return self.prompts.of_role(role)

    def describe(self) -> dict[str, str]:
        """Its settings, for the log."""
        return {"max_seq_length": str(self.max_seq_length), **self.prompts.describe()}

    def complete(self, settings: CheckpointSettings) -> CheckpointSettings:
        """The settings of a checkpoint with this processor's own in place of what was read."""
        return replace(
            settings,
            max_seq_length=self.max_seq_length,
            prompts=self.prompts.stored_among(settings.prompts),
            # Where no role is given, sentence-transformers must give the instruction too.
            default_prompt_name=settings.default_prompt_name or "document",
        )

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Role | None,
        prompts: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """Token ids `[B, T]`, and pixels where there are images.

        Args:
            items: B items, with images or all without.
            role: Decides the instruction.
            prompts: One per item, instead of the role's; `""` for no instruction.

        Raises:
            ConfigError: if an instruction has a control token.
            DataError: if some items have an image and some have none, an item has nothing, or it
                cannot be read.
        """
        with_image = {item.image is not None for item in items}
        if len(with_image) != 1:
            raise DataError(
                "items of one batch must all have an image, or none may. Received: "
                f"{'both' if with_image else 'no items'}"
            )
        chosen = self.prompts.of_items(len(items), role, prompts)
        self._check_instructions(chosen)
        texts = self._cut([item.text for item in items])
        images = load_images(items) if with_image.pop() else [None] * len(items)
        return self.inputs([_chat(*parts) for parts in zip(chosen, images, texts, strict=True)])

    def count_tokens(
        self,
        items: Sequence[Item],
        role: Role | None = None,
        prompts: Sequence[str | None] | None = None,
    ) -> list[int]:
        """Tokens of each item's text before it is cut: what `max_seq_length` is compared with.

        Args:
            items: Items with a text, or without, which counts 0.
            role: Makes no difference, and neither do prompts: instructions are never cut.
            prompts: See `role`.
        """
        texts = [self._words(item.text) or "" for item in items]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer, chat template and image processor."""
        self.inputs.save_pretrained(path)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds the tokens that are not words, the longest first."""
        tokens = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {*self.tokenizer.all_special_tokens, self.inputs.image_token or ""} - {""}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def _check_instructions(self, instructions: Sequence[str]) -> None:
        for instruction in dict.fromkeys(instructions):
            if found := self._control.search(instruction):
                raise ConfigError(
                    f"a prompt is an instruction in plain words, which the chat template puts "
                    f"where it belongs; it cannot have {found[0]}, a control token of this model. "
                    f"Received: {instruction!r}"
                )

    def _words(self, text: str | None) -> str | None:
        """The text without control tokens."""
        if text is None:
            return None
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _cut(self, texts: Sequence[str | None]) -> list[str | None]:
        """Texts of at most `max_seq_length` tokens, all of them words: the rest is left off."""
        words = [self._words(text) for text in texts]
        found = [text for text in words if text is not None]
        if not found:
            return words
        encoded = self.tokenizer(
            found, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        cut = iter(
            text[: offsets[self.max_seq_length - 1][1]]
            if len(offsets) > self.max_seq_length
            else text
            for text, offsets in zip(found, encoded["offset_mapping"], strict=True)
        )
        return [None if text is None else next(cut) for text in words]


def _chat(instruction: str, image: Any, text: str | None) -> list[Message]:
    content: list[Message] = []
    if image is not None:
        content.append({"type": "image", "image": image})
    if text is not None:
        content.append({"type": "text", "text": text})
    if not content:
        raise DataError("a text or an image is expected. Received: an item with neither")
    system = [{"role": "system", "content": [{"type": "text", "text": instruction}]}]
    return [*(system if instruction else []), {"role": "user", "content": content}]


class PatchInputs:
    """Inputs of Qwen2-VL and its kin: the patches of all images in one tensor, grids beside them.

    Does what transformers' processors for these models do, which need torchvision for videos.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        *,
        image_token_id: int,
        other_files: dict[str, bytes],
    ) -> None:
        """Assign.

        Args:
            tokenizer: Has the chat template.
            image_processor: Gives `pixel_values` and `image_grid_thw`.
            image_token_id: The token that stands for `merge_size ** 2` patches of an image.
            other_files: Settings that vembed does not read but that other libraries need, by name.
        """
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token: str | None = tokenizer.convert_ids_to_tokens(image_token_id)
        self._image_token_id = image_token_id
        self._other_files = other_files

    def __call__(self, conversations: list[list[Message]]) -> dict[str, Tensor]:
        """Token ids and mask; with images also patches, grids, and which tokens are theirs."""
        texts = [
            self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in conversations
        ]
        images = [
            part["image"]
            for chat in conversations
            for part in chat[-1]["content"]
            if part["type"] == "image"
        ]
        pixels: dict[str, Tensor] = {}
        if images:
            pixels = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = pixels["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
            token = str(self.image_token)
            texts = [
                text.replace(token, token * count)
                for text, count in zip(texts, counts.tolist(), strict=True)
            ]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt", verbose=False)
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        if images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._image_token_id).int()
        return {**inputs, **pixels}

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer, chat template and preprocessor_config.json."""
        for name, content in self._other_files.items():
            (Path(path) / name).write_bytes(content)
        save_tokenizer(self.tokenizer, path)
        self.image_processor.save_pretrained(path)


class ProcessorInputs:
    """Inputs of any model that brings a processor for texts and images (`AutoProcessor`)."""

    def __init__(self, processor: Any) -> None:
        """Assign.

        Args:
            processor: Of transformers, with a chat template.
        """
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = getattr(processor, "image_token", None)

    def __call__(self, conversations: list[list[Message]]) -> dict[str, Tensor]:
        """Whatever the model's own processor makes of the conversations."""
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        return dict(inputs)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the processor."""
        forget_calls(self.tokenizer)
        self.processor.save_pretrained(path)
