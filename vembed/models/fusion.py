"""One vector for a text, an image, or both, where each has a tower of its own.

# Shapes: B items, D embedding size
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from vembed.chunking import IMAGE_INPUTS


def split_inputs(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model inputs of the text tower, and those of the image tower."""
    text = {name: tensor for name, tensor in inputs.items() if name not in IMAGE_INPUTS}
    image = {name: tensor for name, tensor in inputs.items() if name in IMAGE_INPUTS}
    return text, image


def fuse(text_BD: Tensor | None, image_BD: Tensor | None, *, normalize: bool) -> Tensor:
    """The embedding of what there is; of both, the mean of the two unit vectors.

    Unit vectors, because nothing says that the towers give vectors of like length: the longer one
    would drown the other. The mean lies at equal angles to both, so that an item is found by its
    text alone as well as by its image alone.

    Args:
        text_BD: From the text tower; None without a text.
        image_BD: From the image tower; None without an image.
        normalize: Whether the result has unit length.
    """
    if text_BD is not None and image_BD is not None:
        fused_BD = (F.normalize(text_BD, dim=-1) + F.normalize(image_BD, dim=-1)) / 2
    else:
        alone_BD = image_BD if text_BD is None else text_BD
        if alone_BD is None:
            raise ValueError("expected inputs of a text or an image. Received: neither")
        fused_BD = alone_BD
    return F.normalize(fused_BD, dim=-1) if normalize else fused_BD
