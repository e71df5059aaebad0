"""What the rest of vembed asks of an encoder and its processor; a user's own classes need nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from vembed.modes import Item

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
        """Padded inputs of `items`, among them `attention_mask` `[B, T]`.

        Args:
            items: B things to embed.
            role: Decides the prompt; None stands for the checkpoint's default prompt.
            prompts: One per item, instead of the role's; None as an entry keeps the role's, `""` means no prompt.
        """
        ...


class Encoder(Protocol):
    """A `torch.nn.Module` from model inputs to embeddings.

    Attributes:
        backbone: The pretrained model inside, which training may wrap (LoRA) or reconfigure (checkpointing).
        processor: Items to the inputs of `forward`.
        modalities: Letters of what it embeds: `t` text, `i` image, `m` both.
        embedding_dim: Columns of the output.
        pooling_method: How tokens become one vector.
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

    def __call__(self, *, normalize: bool | None = None, **inputs: Tensor) -> Tensor:
        """Embeddings `[B, D]`, float32 or wider; `normalize` overrides the attribute of that name."""
        ...

    def describe(self) -> dict[str, str | int]:
        """What it is and where each setting came from, for the log."""
        ...

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `load_encoder` reads back to the same vectors."""
        ...

    # The rest every torch.nn.Module has.
    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Every module, this one included."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...

    def to(self, device: Any) -> Any:
        """Move to a device."""
        ...
