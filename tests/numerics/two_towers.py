"""An encoder with a tower for queries and another one for documents, as CLIP has by modality."""

from __future__ import annotations

import torch
from torch import nn

from vembed.models.protocol import Encoder

ROWS = 97


class Towers(Encoder):
    """Each tower: a table of word hashes, dropout, a layer, the mean over words."""

    modalities = frozenset("t")
    embedding_dim = 6
    pooling_method = "mean"
    normalize = False
    model_type = "towers"

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.processor = WordHashes()
        self.backbone = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Embedding(ROWS, 8), nn.Dropout(dropout), nn.Linear(8, 6), nn.Tanh()
                )
                for name in ("text_model", "vision_model")
            }
        )

    def forward(self, *, input_ids, attention_mask, token_type_ids, normalize=None):
        # A chunk holds rows of one role, so that each forward uses one tower only.
        name = "vision_model" if bool(token_type_ids[0, 0]) else "text_model"
        tower = getattr(self.backbone, name)  # also through what LoRA wraps around it
        mask = attention_mask.unsqueeze(-1)
        return (tower(input_ids) * mask).sum(1) / mask.sum(1)

    def describe(self):
        return {"model_type": self.model_type}


class WordHashes:
    """Texts to padded word numbers; token_type_ids are 1 for documents."""

    max_seq_length = 64

    def __call__(self, items, *, role, prompts=None):
        rows = [[sum(map(ord, word)) % ROWS for word in item.text.split()] for item in items]
        width = max(map(len, rows))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "input_ids": padded,
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "token_type_ids": torch.full_like(padded, role == "document"),
        }


def load(path: str) -> Towers:
    return Towers()


def load_with_frozen_tower(path: str) -> Towers:
    towers = Towers()
    towers.backbone["vision_model"].requires_grad_(False)
    return towers


def load_with_spare_parameter(path: str) -> Towers:
    towers = Towers()
    towers.spare = nn.Parameter(torch.ones(2))
    return towers
