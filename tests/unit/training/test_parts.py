"""Parts of an encoder by name: of their parameters, and how many of them train."""

import pytest
from torch import nn

from tests.unit.models.families import family_path, load
from vembed.training.parts import describe_trainable, part_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("backbone.layer.0.weight", "backbone"),
        ("backbone.vision_model.encoder.layers.0.weight", "vision_model"),
        ("backbone.base_model.model.text_model.q_proj.lora_A.default.weight", "text_model"),
        ("backbone.visual_projection.weight", "visual_projection"),
        ("backbone.visual.blocks.0.attn.qkv.weight", "visual"),
        ("projections.image.linear.weight", "projections"),
        # The image half of a composed encoder may be a CLIP's.
        ("image.backbone.vision_model.post_layernorm.weight", "image"),
        ("weight", "weight"),
    ],
)
def test_the_part_of_a_parameter(name, part):
    assert part_of(name) == part


def test_what_trains_is_told_by_part():
    encoder = load(family_path("siglip"))
    total = sum(p.numel() for p in encoder.parameters())
    text = sum(p.numel() for p in encoder.backbone.text_model.parameters())
    encoder.restrict_to({"t"})
    line = describe_trainable(encoder, text)
    assert line.startswith(f"{text:,} of {total:,} train: ")
    told = line.partition(": ")[2].split(", ")
    assert set(told) == {f"text_model {text:,}", "vision_model frozen"}
    encoder.backbone.text_model.head.requires_grad_(False)
    some = sum(p.numel() for p in encoder.backbone.text_model.parameters() if p.requires_grad)
    assert f"text_model {some:,} of {text:,}" in describe_trainable(encoder, some)


def test_of_one_part_there_is_nothing_to_tell_apart():
    assert describe_trainable(nn.ModuleDict({"backbone": nn.Linear(2, 3)}), 10) == "10 of 9 train"
