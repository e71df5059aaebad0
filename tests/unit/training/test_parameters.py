"""Names that users see, patterns on them, and the layers of real backbones."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel

from tests.unit.models.families import family_path
from tests.unit.models.test_model_types import SIZES
from tests.unit.training.test_dropout import tiny
from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.models import load_encoder
from vembed.training.adapters import adapt
from vembed.training.parameters import (
    check_patterns,
    last_match,
    layers_above,
    matches,
    named_parameters,
    visible_name,
)


@pytest.mark.parametrize(
    ("name", "visible"),
    [
        ("backbone.encoder.layer.0.query.weight", "backbone.encoder.layer.0.query.weight"),
        ("projections.0.linear.bias", "projections.0.linear.bias"),
        ("backbone.base_model.model.a.query.base_layer.weight", "backbone.a.query.weight"),
        ("backbone.base_model.model.a.q.lora_A.default.weight", "backbone.a.q.lora_A.weight"),
        (
            "backbone.base_model.model.q.lora_magnitude_vector.default.weight",
            "backbone.q.lora_magnitude_vector.weight",
        ),
        (
            "backbone.base_model.model.pooler.modules_to_save.default.dense.weight",
            "backbone.pooler.dense.weight",
        ),
        ("base_model.model.a.weight", "a.weight"),
        # Not peft's, although the words are the same.
        ("backbone.model.base_layer.default.weight", "backbone.model.base_layer.default.weight"),
    ],
)
def test_names_are_those_of_the_model_without_adapters(name, visible):
    assert visible_name(name) == visible


def test_adapters_rename_nothing_and_add_their_own(tiny_bert_path):
    encoder = load_encoder(str(tiny_bert_path))
    before = [name for name, _ in named_parameters(encoder)]
    encoder.backbone = adapt(encoder.backbone, TrainConfig(use_lora=True))
    after = [name for name, _ in named_parameters(encoder)]
    assert [name for name in after if ".lora_" not in name] == before
    assert len(set(after)) == len(after) > len(before)


def test_patterns():
    name = "backbone.encoder.layer.1.output.dense.weight"
    for pattern in (name, "backbone.encoder.*", "backbone.encoder", "*.dense.weight", "*.layer.?"):
        assert matches(name, pattern), pattern
    for pattern in ("backbone.enc", "encoder", "dense", "*.layer.0", "*.layer.10.*", ""):
        assert not matches(name, pattern), pattern
    assert last_match(name, {"*": 1, "*.dense": 2, "*.bias": 3}) == 2
    assert last_match(name, {"*.bias": 3}) is None


def test_a_pattern_without_a_match_is_answered_with_near_names():
    names = ["backbone.embeddings.word.weight", "backbone.encoder.0.weight", "loss.logit_scale"]
    check_patterns("freeze", ["backbone.*", "loss.logit_scale"], names)
    with pytest.raises(ConfigError) as caught:
        check_patterns("freeze", ["backbone.*", "backbone.embedings.*"], names)
    message = str(caught.value)
    assert message.startswith("freeze: 'backbone.embedings.*' matches no parameter")
    assert "did you mean 'backbone.embeddings.*'" in message
    assert "backbone.embeddings, backbone.encoder, loss" in message


def depths(backbone: nn.Module) -> dict[str, int]:
    holder = nn.Module()
    holder.backbone = backbone
    holder.projections = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    found = layers_above(holder)
    assert not [p for p in holder.projections.parameters() if id(p) in found]
    return {name: found[id(p)] for name, p in backbone.named_parameters()}


# By family: the first parameter below the layers, one of each layer, the last one above; with the
# layers above each.
EXPECTED = {
    "bert": ["embeddings.LayerNorm.weight 2", "encoder.layer.0 1", "encoder.layer.1 0", "pooler 0"],
    "modernbert": ["embeddings.norm.weight 2", "layers.0 1", "layers.1 0", "final_norm 0"],
    "deberta-v2": ["embeddings 2", "encoder.layer.0 1", "encoder.rel_embeddings 2",
                   "encoder.LayerNorm 0"],
    "gpt2": ["wte 2", "wpe 2", "h.0 1", "h.1 0", "ln_f 0"],
    "xlm": ["position_embeddings 2", "layer_norm_emb 2", "attentions.0 1", "ffns.1 0"],
    "albert": ["embeddings 1", "encoder.embedding_hidden_mapping_in 1",
               "encoder.albert_layer_groups 0"],
    "qwen3": ["embed_tokens 2", "layers.0.self_attn 1", "layers.1.mlp 0", "norm 0"],
}  # fmt: skip


@pytest.mark.parametrize("model_type", EXPECTED)
def test_layers_above_in_text_models(model_type):
    # DeBERTa's usual ones, with a table of distances that all layers read.
    relative = {"relative_attention": True, "norm_rel_ebd": "layer_norm"}
    found = depths(tiny(model_type, **(relative if model_type == "deberta-v2" else {})))
    for line in EXPECTED[model_type]:
        start, depth = line.split()
        of = {above for name, above in found.items() if name.startswith(start)}
        assert of == {int(depth)}, line


def test_each_tower_counts_its_own_layers():
    sizes = {**SIZES, "projection_dim": 8, "vocab_size": 40}
    text = {**sizes, "num_hidden_layers": 3}
    vision = {**sizes, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    found = depths(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)))
    for start, depth in (
        ("text_model.embeddings", 3),
        ("text_model.encoder.layers.0", 2),
        ("text_model.final_layer_norm", 0),
        ("vision_model.embeddings", 2),
        ("vision_model.pre_layrnorm", 2),
        ("vision_model.encoder.layers.0", 1),
        ("vision_model.post_layernorm", 0),
        ("text_projection", 0),
        ("visual_projection", 0),
    ):
        assert {above for name, above in found.items() if name.startswith(start)} == {depth}, start


def test_a_model_without_layers_to_count():
    config = AutoConfig.for_model("bert", **{**SIZES, "num_hidden_layers": 0})
    with pytest.raises(ConfigError, match="no list of layers"):
        depths(AutoModel.from_config(config))
    with pytest.raises(ConfigError, match="no backbone"):
        layers_above(nn.Linear(2, 2))


LAYERS_OF = {
    "clip": ["backbone.text_model.encoder.layers.0 1", "backbone.vision_model.pre_layrnorm 2"],
    "siglip": ["backbone.vision_model.embeddings 2", "backbone.vision_model.head 0"],
    "siglip2": ["backbone.vision_model.embeddings 2", "backbone.text_model.head 0"],
    "vit": ["backbone.embeddings 2", "backbone.layers.0 1", "backbone.pooler 0"],
    "dinov2": ["backbone.embeddings 2", "backbone.encoder.layer.0 1", "backbone.layernorm 0"],
    "dinov2_with_registers": ["backbone.embeddings.register_tokens 2"],
    "dinov3": ["backbone.embeddings 2", "backbone.model.layer.0 1", "backbone.norm 0"],
    "mae": ["backbone.embeddings 2", "backbone.layers.1 0"],
    "composed": ["text.backbone.embeddings 2", "image.backbone.layers.0 1"],
    "qwen2_vl": ["backbone.visual.patch_embed 2", "backbone.language_model.embed_tokens 2"],
    "qwen2_5_vl": ["backbone.visual.blocks.0 1", "backbone.visual.merger 0"],
    "qwen3_vl": ["backbone.visual.pos_embed 2", "backbone.language_model.layers.0 1",
                 "backbone.visual.merger 0"],
    "llava": ["backbone.vision_tower.embeddings 2", "backbone.language_model.layers.0 1",
              "backbone.multi_modal_projector 0"],
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS_OF)
def test_layers_above_in_every_family(family):
    encoder = load_encoder(str(family_path(family)))
    found = layers_above(encoder)
    above = {name: found.get(id(p)) for name, p in encoder.named_parameters()}
    for line in LAYERS_OF[family]:
        start, depth = line.split()
        assert {n for name, n in above.items() if name.startswith(start)} == {int(depth)}, line
    assert {n for name, n in above.items() if name.startswith("projections")} <= {None}


def test_a_shorter_list_beside_the_layers_has_none():
    """Such as Qwen3-VL's ways from some of its vision layers into the text."""
    backbone = nn.Module()
    backbone.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    backbone.ways = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
    assert list(depths(backbone).values()) == [2, 2, 1, 1, 0, 0] + [0] * 4
