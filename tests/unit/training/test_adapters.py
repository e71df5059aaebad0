"""Which layers get adapters, what goes on training beside them, and merging them in."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from tests.tiny import tiny_sentence_transformer
from tests.unit.models.families import MODALITIES, family_path, make_trainer, other_size, whole_mode
from tests.unit.models.test_model_types import SIZES
from tests.unit.training.test_dropout import IDS, hidden, tiny
from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.models.merging import merged
from vembed.training.adapters import (
    adapt,
    adapted_layers,
    adapters_of,
    count_names,
    describe_layers,
    find_targets,
)
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.parameters import named_parameters

# Families whose layers are unlike in name or kind: fused, transposed, shared by all depths ...
LAYERS = {
    "bert": "dense x6, key x2, query x2, value x2",
    "albert": "dense x1, embedding_hidden_mapping_in x1, ffn x1, ffn_output x1, key x1, query x1, "
    "value x1",
    "modernbert": "Wi x2, Wo x4, Wqkv x2",
    "deberta": "dense x6, in_proj x2",
    "xlm": "k_lin x2, lin1 x2, lin2 x2, out_lin x2, q_lin x2, v_lin x2",
    "gpt2": "c_attn x2, c_fc x2, c_proj x4",
    "falcon": "dense x2, dense_4h_to_h x2, dense_h_to_4h x2, query_key_value x2",
    "phi3": "down_proj x2, gate_up_proj x2, o_proj x2, qkv_proj x2",
    "qwen3": "down_proj x2, gate_proj x2, k_proj x2, o_proj x2, q_proj x2, up_proj x2, v_proj x2",
    "qwen3_moe": "k_proj x2, o_proj x2, q_proj x2, v_proj x2",
}
CONFIG = TrainConfig(use_lora=True, lora_r=4)


def shake(model: nn.Module, std: float = 0.1) -> None:
    """As if all that trains had been trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("model_type", LAYERS)
def test_every_linear_layer_of_a_family_is_adapted_and_merges(model_type, use_dora, recwarn):
    backbone = tiny(model_type).eval()
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    before = hidden(backbone, 0)
    config = CONFIG.model_copy(update={"use_dora": use_dora, "use_rslora": True})
    adapted = adapt(backbone, config).eval()
    assert count_names(adapted_layers(adapted)) == LAYERS[model_type]
    torch.testing.assert_close(hidden(adapted, 0), before, rtol=0, atol=1e-6)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names
    assert all(".lora_" in name for name in names)

    shake(adapted)
    expected = hidden(adapted, 0)
    found = hidden(merged(adapted), 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found - before).abs().max()) > 1e-2
    assert torch.equal(hidden(adapted, 0), expected), "merging is done in a copy"
    assert not [w for w in recwarn if "peft" in w.filename]


def test_kinds_differ_in_scale_and_parameters():
    def scale_and_names(**settings) -> tuple[float, set[str]]:
        adapted = adapt(tiny("bert"), CONFIG.model_copy(update=settings))
        layer = adapted.base_model.model.encoder.layer[0].attention.self.query
        kinds = {n.partition("lora_")[2].partition(".")[0] for n, _ in layer.named_parameters()}
        return layer.scaling["default"], kinds - {""}

    assert scale_and_names() == (32 / 4, {"A", "B"})
    assert scale_and_names(use_rslora=True) == (32 / 2, {"A", "B"})
    assert scale_and_names(use_dora=True) == (32 / 4, {"A", "B", "magnitude_vector"})


def two_towers(kind: str) -> nn.Module:
    sizes = {**SIZES, "num_hidden_layers": 1, "hidden_act": "gelu"}
    text, vision = {**sizes, "vocab_size": 40}, {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


HEADS = {
    "clip": {"text_projection", "visual_projection"},
    "siglip": {"text_model.head", "vision_model.head"},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_a_backbone_train_as_they_are_and_are_merged(kind):
    backbone = two_towers(kind).eval()
    backbone.logit_scale.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)

    @torch.no_grad()
    def features(model) -> torch.Tensor:
        found = [model.get_text_features(input_ids=IDS), model.get_image_features(images)]
        return torch.cat([getattr(f, "pooler_output", f) for f in found])

    before = features(backbone)
    adapted = adapt(backbone, CONFIG).eval()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    heads = {name.partition(".modules_to_save.")[0] for name in trained if ".lora_" not in name}
    assert {name.removeprefix("base_model.model.") for name in heads} == HEADS[kind]
    assert not [name for name in adapted_layers(adapted) if "head" in name or "projection" in name]
    assert "logit_scale" not in " ".join(trained)
    assert torch.equal(features(adapted), before)

    shake(adapted)
    expected = features(adapted)
    torch.testing.assert_close(features(merged(adapted)), expected, rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(features(adapted), before, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, before, atol=1e-2)


def test_a_frozen_tower_gets_no_adapter_and_keeps_its_head():
    backbone = two_towers("siglip")
    backbone.vision_model.requires_grad_(False)
    adapted = adapt(backbone, CONFIG)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in [*trained, *adapted_layers(adapted)] if "vision" in name]


def test_layers_that_torchs_own_attention_only_reads_get_none():
    backbone = nn.Module()
    backbone.attention = nn.MultiheadAttention(4, 2)
    backbone.mlp = nn.Linear(4, 4)
    assert find_targets([backbone], None) == [["mlp"]]


def test_layers_by_name():
    backbone = tiny("bert")
    assert count_names(*find_targets([backbone], ["query", "intermediate.dense"])) == (
        "dense x2, query x2"
    )
    assert find_targets([backbone], ["encoder.layer.1.output.dense"]) == [
        ["encoder.layer.1.output.dense"]
    ]
    settings = CONFIG.model_copy(update={"lora_target_modules": ["intermediate.dense"]})
    assert sorted(adapted_layers(adapt(backbone, settings))) == [
        f"base_model.model.encoder.layer.{n}.intermediate.dense" for n in (0, 1)
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["query", "qeury"],
            r"'qeury' is no linear layer .*did you mean 'query'.*key x2, query x2",
        ),
        (["pooler.dense"], "'pooler.dense' is no linear layer of BertModel that can be adapted"),
        (["word_embeddings"], "'word_embeddings' is no linear layer"),
    ],
)
def test_names_that_cannot_be_adapted_are_answered_with_those_that_can(names, message):
    with pytest.raises(ConfigError, match=f"lora_target_modules: {message}"):
        find_targets([tiny("bert")], names)


def test_nothing_left_to_adapt():
    with pytest.raises(ConfigError, match="use_lora: BertModel has no linear layer that is not fr"):
        find_targets([tiny("bert").requires_grad_(False)], None)


def test_projections_go_on_training_and_the_log_says_what_is_adapted(tmp_path, caplog):
    path = tiny_sentence_transformer(tmp_path / "st", dense_features=8)
    config = TrainConfig(
        model_name=str(path), use_lora=True, use_dora=True, use_rslora=True,
        freeze=["backbone.encoder.layer.0"],
    )  # fmt: skip
    encoder = build_model(config)
    with caplog.at_level(logging.INFO, logger="vembed"):
        apply_lora(encoder, config, Accelerator(cpu=True))
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    rest = [name for name in trained if ".lora_" not in name]
    assert rest == ["projections.0.linear.weight", "projections.0.linear.bias"]
    assert not [name for name in trained if "encoder.layer.0" in name]
    assert "rsDoRA of rank 16 on dense x3, key x1, query x1, value x1;" in caplog.messages[0]


DECODER = "down_proj x2, gate_proj x2, k_proj x2, o_proj x2, q_proj x2, up_proj x2, v_proj x2"
ENCODER = "fc1 x2, fc2 x2, k_proj x2, out_proj x2, q_proj x2, v_proj x2"
OF_FAMILY = {
    "bert": "dense x6, key x2, query x2, value x2",
    "modernbert": "Wi x2, Wo x4, Wqkv x2",
    "qwen3": DECODER,
    "clip": f"text_model: {ENCODER}; vision_model: {ENCODER}",
    "siglip": f"text_model: {ENCODER}; vision_model: {ENCODER}",
    "siglip2": f"text_model: {ENCODER}; vision_model: "
    "fc1 x2, fc2 x2, k_proj x2, out_proj x2, patch_embedding x1, q_proj x2, v_proj x2",
    "vit": "fc1 x2, fc2 x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2",
    "dinov2": "fc1 x2, fc2 x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2",
    "dinov2_with_registers": "fc1 x2, fc2 x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2",
    "dinov3": "down_proj x2, k_proj x2, o_proj x2, q_proj x2, up_proj x2, v_proj x2",
    "mae": "fc1 x2, fc2 x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2",
    "composed": "text: dense x6, key x2, query x2, value x2; "
    "image: fc1 x2, fc2 x2, k_proj x2, o_proj x2, q_proj x2, v_proj x2",
    "qwen2_vl": f"visual: fc1 x2, fc2 x2, mlp.0 x1, mlp.2 x1, proj x2, qkv x2; "
    f"language_model: {DECODER}",
    "qwen2_5_vl": "visual: down_proj x2, gate_proj x2, mlp.0 x1, mlp.2 x1, proj x2, qkv x2, "
    f"up_proj x2; language_model: {DECODER}",
    "qwen3_vl": f"visual: linear_fc1 x4, linear_fc2 x4, proj x2, qkv x2; language_model: {DECODER}",
    # Of its vision tower, the last layer's output is not read.
    "llava": "vision_tower: fc1 x1, fc2 x1, k_proj x1, out_proj x1, q_proj x1, v_proj x1; "
    f"multi_modal_projector: linear_1 x1, linear_2 x1; language_model: {DECODER}",
}

HEADS_OF = {
    "clip": ["text_projection", "visual_projection"],
    "siglip": ["head"],
    "siglip2": ["head"],
    "vit": ["pooler"],
    "composed": ["pooler"],
}


@pytest.mark.parametrize("family", MODALITIES)
def test_of_every_family_the_layers_are_found_and_listed(family, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="vembed"):
        trainer = make_trainer(
            family_path(family),
            whole_mode(family),
            tmp_path,
            use_lora=True,
            projection_dim=other_size(family),
        )
    (line,) = [text for text in caplog.messages if text.startswith("adapters")]
    assert f"LoRA of rank 16 on {OF_FAMILY[family]}; " in line
    trained = {n for n, p in named_parameters(trainer.model) if p.requires_grad}
    rest = {n for n in trained if ".lora_" not in n}
    assert {n for n in rest if "projections." in n} == {
        n for n, _ in named_parameters(trainer.model) if "projections." in n
    }
    heads = {n.rpartition(f".{head}.")[0] for n in rest for head in HEADS_OF.get(family, ())}
    assert (heads - {""} != set()) == (family in HEADS_OF)
    assert all(
        "projections." in n or any(f".{head}." in n for head in HEADS_OF[family]) for n in rest
    )


def test_a_layer_of_one_tower_is_enough(tmp_path):
    """And what trains in the other are its head and projection."""
    settings = {"use_lora": True, "lora_target_modules": ["query"]}
    trainer = make_trainer(family_path("composed"), "t2i", tmp_path, **settings)
    assert describe_layers(trainer.model) == "query x2"
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert [n for n in trained if ".lora_" not in n] == [
        "image.backbone.pooler.dense.weight", "image.backbone.pooler.dense.bias",
        "projections.text.linear.weight", "projections.image.linear.weight",
    ]  # fmt: skip
    trainer.train()
    with pytest.raises(ConfigError, match=r"'kquery' is no linear layer of BertModel or ViTModel"):
        make_trainer(
            family_path("composed"), "t2i", tmp_path,
            use_lora=True, lora_target_modules=["query", "kquery"],
        )  # fmt: skip


def test_what_an_adapter_belongs_to(tmp_path):
    names = {
        "text_model_name": str(family_path("clip")),
        "image_model_name": str(family_path("mae")),
    }
    for path, settings, expected in (
        (None, names, list(names.values())),
        (
            family_path("composed"),
            {},
            [f"{family_path('composed')}/{t}" for t in ("text", "image")],
        ),
    ):
        trainer = make_trainer(path, "t2i", tmp_path, use_lora=True, **settings)
        found = adapters_of(trainer.model).values()
        assert [m.peft_config["default"].base_model_name_or_path for m in found] == expected


@pytest.mark.parametrize("settings", [{"freeze_towers": ["image"]}, {"retrieval_mode": "t2t"}])
def test_quantized_layers_of_a_frozen_tower_do_not_train(settings):
    config = TrainConfig(model_name=str(family_path("clip")), retrieval_mode="t2i", use_lora=True)
    config = config.model_copy(update=settings)
    encoder = build_model(config)
    for module in encoder.backbone.vision_model.modules():
        if isinstance(module, nn.Linear):  # as bitsandbytes holds 8 bits
            module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    config = config.model_copy(update={"lora_quantization": "8bit"})
    apply_lora(encoder, config, Accelerator(cpu=True))
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert any("text_model" in name for name in trained)
    assert not [name for name in trained if "vision" in name or "visual" in name]
