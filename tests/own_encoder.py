"""A user's own encoder of texts, images and both, with its own processor: `package.module:Name`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tests.tiny import wordpiece_tokenizer
from vembed.images import load_image

SIZE = 8


class PictureProcessor:
    """Token ids where items have a text, pixels where they have an image."""

    max_seq_length = 16

    def __init__(self):
        self.tokenizer = wordpiece_tokenizer(token_type_ids=False)

    def prompt_for(self, role):
        return ""

    def __call__(self, items, *, role, prompts=None):
        inputs = {}
        if items[0].text is not None:
            own = prompts or [""] * len(items)
            texts = [(p or "") + i.text for p, i in zip(own, items, strict=True)]
            inputs |= self.tokenizer(
                texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
            )
        if items[0].image is not None:
            images = [load_image(item.image).resize((4, 4)) for item in items]
            pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
            inputs["pixel_values"] = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
            inputs.setdefault("attention_mask", torch.ones(len(items), 1, dtype=torch.int64))
        return dict(inputs)


class PictureEncoder(nn.Module):
    modalities = frozenset("tim")
    embedding_dim = SIZE
    pooling_method = "mean"
    normalize = True
    model_type = "own"

    def __init__(self):
        super().__init__()
        self.processor = PictureProcessor()
        self.backbone = nn.ModuleDict(
            {
                "words": nn.Embedding(len(self.processor.tokenizer), SIZE),
                "pixels": nn.Linear(3 * 4 * 4, SIZE),
            }
        )

    def forward(self, *, normalize=None, attention_mask=None, input_ids=None, pixel_values=None):
        vectors = 0
        if input_ids is not None:
            words = self.backbone["words"](input_ids) * attention_mask[..., None]
            vectors = vectors + words.sum(1) / attention_mask.sum(1, keepdim=True)
        if pixel_values is not None:
            vectors = vectors + self.backbone["pixels"](pixel_values.flatten(1))
        return functional.normalize(vectors) if normalize in (None, True) else vectors

    def describe(self):
        return {"model_type": self.model_type}

    def save_pretrained(self, path):
        Path(path).mkdir(parents=True, exist_ok=True)
        weights = {name: value.tolist() for name, value in self.state_dict().items()}
        (Path(path) / "weights.json").write_text(json.dumps(weights))


def load_pictures_encoder(path: str) -> PictureEncoder:
    """A loader for `encoder_mode: tests.own_encoder:load_pictures_encoder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PictureEncoder().eval()
