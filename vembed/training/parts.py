"""The parts of an encoder that people know by name: what reports count and compare one by one."""

from __future__ import annotations

from torch import nn

# As transformers names the parts of a backbone for texts and images.
_OF_BACKBONE = frozenset(
    {
        "language_model",
        "multi_modal_projector",
        "text_model",
        "text_projection",
        "vision_model",
        "vision_tower",
        "visual",
        "visual_projection",
    }
)


def part_of(name: str) -> str:
    """`backbone` of `backbone.layer.0.weight`, `vision_model` of `backbone.vision_model.x`."""
    first, *rest = name.split(".")
    if first != "backbone":
        return first
    return next((part for part in rest if part in _OF_BACKBONE), first)


def describe_trainable(encoder: nn.Module, trainable: int) -> str:
    """How many numbers train, and in which parts, where there are several.

    Args:
        encoder: What is trained.
        trainable: Numbers that train, those of the loss included.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.numel() == 1:
            continue  # a scale of the checkpoint's own loss
        parts.setdefault(part_of(name), []).append(parameter)
    total = sum(parameter.numel() for parameter in encoder.parameters())
    line = f"{trainable:,} of {total:,} train"
    if len(parts) < 2:
        return line
    return f"{line}: {', '.join(_count(name, of_part) for name, of_part in parts.items())}"


def _count(part: str, parameters: list[nn.Parameter]) -> str:
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    if trained == 0:
        return f"{part} frozen"
    return f"{part} {trained:,}" if trained == total else f"{part} {trained:,} of {total:,}"
