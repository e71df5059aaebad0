"""A guide: a frozen model that says which candidates are too similar to be negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vembed.chunking import chunk_tokens_on
from vembed.config import TrainConfig
from vembed.data import Collator, Record
from vembed.errors import ConfigError
from vembed.models import load_encoder
from vembed.models.checkpoint_format import NO_POOLING
from vembed.models.protocol import Encoder
from vembed.training.data_utils import (
    GUIDE_PREFIX,
    maybe_first,
    own_rows,
    row_keys,
    row_lengths,
    unpack_roles,
)
from vembed.training.gradient_cache import GradientCache
from vembed.training.second_inputs import SecondInputsCollator

Batch = Mapping[str, Any]
Collate = Callable[[list[Record]], dict[str, Any]]


class Guide:
    """Embeds the items of a batch for a guided loss (GISTEmbed: Solatorio, 2024).

    It may have another tokenizer and another size than the model that trains: batches bring its own
    inputs, under `guide_...`. It is not trained, wrapped or saved.
    """

    def __init__(self, encoder: Encoder, *, retrieval_mode: str, chunk_tokens: int) -> None:
        """Freeze the encoder.

        Args:
            encoder: The guide model.
            retrieval_mode: Modality of queries and documents.
            chunk_tokens: Padded tokens per forward.
        """
        self.encoder = encoder.requires_grad_(False).eval()
        self._mode = retrieval_mode
        self._cache = GradientCache(chunk_tokens=chunk_tokens)

    def collator(self, collate: Collate) -> SecondInputsCollator:
        """A collator that adds the guide's inputs to the batches of another."""
        return SecondInputsCollator(collate, Collator(self.encoder.processor), prefix=GUIDE_PREFIX)

    @torch.no_grad()
    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """What a guided loss asks for: `guide_query` and so on, of this process's own rows.

        Args:
            batch: With the guide's inputs, on its device.
        """
        own = {
            key.removeprefix(GUIDE_PREFIX): value
            for key, value in batch.items()
            if key.startswith(GUIDE_PREFIX)
        }
        inputs = unpack_roles(own, self._mode)
        embeddings = self._cache.embed(
            encode=lambda inputs: maybe_first(self.encoder(**inputs)),
            inputs=inputs,
            lengths=row_lengths(own, inputs),
            keys=row_keys(batch),
        )
        of_rows = own_rows(embeddings, batch)
        return {f"{GUIDE_PREFIX}{role}": rows for role, rows in of_rows.items()}


def build_guide(config: TrainConfig, device: torch.device) -> Guide | None:
    """Load the guide that the settings name; None where they name none.

    Args:
        config: The settings.
        device: Where it will run.

    Raises:
        ConfigError: if it cannot be what the settings ask for.
        CheckpointError: if its files are missing or do not fit.
    """
    if config.guide_model_name is None:
        return None
    encoder = load_encoder(
        config.guide_model_name,
        torch_dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
    )
    if encoder.pooling_method == NO_POOLING:
        raise ConfigError(
            f"guide_model_name: {config.guide_model_name!r} gives a vector for each token, but a "
            "guide compares one for each item. Name a model that pools"
        )
    tokens = chunk_tokens_on(device.type, config.chunk_tokens)
    return Guide(encoder, retrieval_mode=config.retrieval_mode, chunk_tokens=tokens)
