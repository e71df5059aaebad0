"""What the rest of vembed asks of an encoder and of its processor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from vembed.errors import ConfigError
from vembed.modes import Item
from vembed.registry import accepted_arguments

Role = Literal["query", "document"]


class Processor(Protocol):
    """Items to padded model inputs."""

    def __call__(
        self,
        items: Sequence[Item],
        *,
        role: Role | None,
        prompts: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """Padded inputs of `items`.

        Texts give `input_ids` `[B, T]` and, unless all are padded to one fixed length,
        `attention_mask` `[B, T]`; images give `pixel_values` `[B, ...]`, or `[patches of all
        images, ...]` with `image_grid_thw` `[B, 3]`. Both together give both.

        Args:
            items: B things to embed, all texts, all images, or all both.
            role: Decides the prompt; None stands for the checkpoint's default prompt.
            prompts: One per item, instead of the role's; None as an entry keeps the role's, `""`
                means no prompt.
        """
        ...


class Encoder(nn.Module):
    """Model inputs to embeddings: the interface, without any behaviour.

    A base class and not a Protocol, because an encoder is also an `nn.Module` wherever it goes, and
    Python's types cannot say "both". A user's own encoder need not inherit from it, but must have
    what `check_encoder` asks for.

    Attributes:
        backbone: The pretrained model inside, which training may wrap (LoRA) or reconfigure; what
            does not do that needs none.
        processor: Items to the inputs of `forward`; to show texts and what is cut of them
            (`vembed check`), it has `tokenizer`, `max_seq_length` and `prompt_for`.
        modalities: Letters of what it embeds: `t` text, `i` image, `m` both.
        embedding_dim: Columns of the output.
        pooling_method: How tokens become one vector; `pooler` where the model itself does it,
            `none` where they do not.
        normalize: Whether `forward` returns vectors of unit length unless told otherwise.
        model_type: The backbone's family, as in its config.json.
    """

    backbone: Any
    processor: Any
    modalities: frozenset[str]
    embedding_dim: int
    pooling_method: str
    normalize: bool
    model_type: str

    def forward(self, *, normalize: bool | None = None, **inputs: Tensor) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider; or token vectors (`vembed.token_vectors`).

        Args:
            normalize: Unit length or not; None takes the encoder's own.
            inputs: What the processor makes.
        """
        raise NotImplementedError

    @property
    def towers(self) -> Sequence[Encoder]:
        """The encoders that each have a backbone: itself, unless it is made of several."""
        return [self]

    def restrict_to(self, modalities: Collection[str]) -> None:
        """Freeze what takes no part in embedding these modalities, so would get no gradient.

        Nothing, unless an encoder says otherwise: one without such parts needs no method for it.
        """

    def describe(self) -> dict[str, str | int]:
        """What it is and where each setting came from, for the log."""
        raise NotImplementedError

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `load_encoder` reads back to the same vectors."""
        raise NotImplementedError


_NEEDED = (
    "processor",
    "modalities",
    "embedding_dim",
    "pooling_method",
    "model_type",
    "describe",
    "save_pretrained",
)
_NEEDED_TO_SHOW_TEXTS = ("tokenizer", "max_seq_length", "prompt_for")


def check_encoder(encoder: Any, *, name: str) -> None:
    """Refuse what is no encoder, saying all that it lacks.

    Args:
        encoder: What a loader returned.
        name: What to call it.

    Raises:
        ConfigError: if it is no module, or has not everything that vembed reads of every encoder.
    """
    if not isinstance(encoder, nn.Module):
        raise ConfigError(
            f"{name}: a torch.nn.Module is expected. Received: {type(encoder).__name__}"
        )
    missing = [attribute for attribute in _NEEDED if not hasattr(encoder, attribute)]
    if not accepted_arguments(encoder.forward, {"normalize": None}):
        missing.append("the argument normalize of forward")
    if missing:
        raise ConfigError(
            f"{name}: {type(encoder).__name__} is no encoder yet; it lacks {', '.join(missing)}. "
            f"vembed.models.protocol.Encoder says what each is"
        )


def check_shows_texts(processor: Any) -> None:
    """Raise ConfigError, saying all that it lacks, unless lengths of texts can be shown."""
    missing = [name for name in _NEEDED_TO_SHOW_TEXTS if not hasattr(processor, name)]
    if missing:
        raise ConfigError(
            f"vembed check: to show texts and their lengths, the encoder's processor needs "
            f"{', '.join(missing)}, which {type(processor).__name__} has not. "
            f"vembed.models.protocol.Encoder says more; training does without"
        )
