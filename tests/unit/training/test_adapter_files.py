"""Adapters kept by themselves come back bit by bit, in peft and in vembed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from tests.tiny import PAIRS, tiny_sentence_transformer, write_rows
from tests.unit.models.families import (
    MODALITIES,
    family_path,
    items,
    load,
    make_trainer,
    other_size,
    whole_mode,
)
from tests.unit.models.families import vectors as encode
from tests.unit.training.test_adapters import CONFIG, shake, two_towers
from vembed.errors import CheckpointError, ConfigError
from vembed.modes import Item
from vembed.training.adapter_files import load_adapters, save_adapters
from vembed.training.adapters import adapt
from vembed.training.checkpoint import save_checkpoint
from vembed.training.loss_files import load_losses, loss_state, save_losses
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.run import run_training

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "heads.safetensors",
    "losses.safetensors",
}


class Loss(nn.Module):
    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(scale))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny_sentence_transformer(tmp_path_factory.mktemp("model") / "st", dense_features=8)


def build(model_path, **settings):
    config = {"model_name": str(model_path), "use_lora": True, "lora_r": 4, **settings}
    encoder = build_model(config)
    apply_lora(encoder, config, Accelerator(cpu=True))
    return encoder.eval()


def vectors(encoder) -> torch.Tensor:
    inputs = encoder.processor([Item(text=pair["query"]) for pair in PAIRS], role="query")
    with torch.no_grad():
        return encoder(**inputs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "use_rslora": True}, {"lora_target_modules": ["output.dense"]}],
    ids=["all", "dora", "some"],
)
def test_reload_bit_by_bit(model_path, settings, tmp_path):
    encoder = build(model_path, **settings)
    shake(encoder)
    expected = vectors(encoder)
    for folder in (tmp_path / "adapter", tmp_path / "again"):
        save_adapters(folder, encoder)
        save_losses(folder, loss_state(Loss(0.5)))
    for file in FILES:
        one, two = (tmp_path / name / file for name in ("adapter", "again"))
        assert one.read_bytes() == two.read_bytes(), file
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == FILES

    ours = build(model_path, **settings)
    assert not torch.equal(vectors(ours), expected)
    load_adapters(tmp_path / "adapter", ours)
    assert torch.equal(vectors(ours), expected)
    trainable = [[n for n, p in e.named_parameters() if p.requires_grad] for e in (encoder, ours)]
    assert trainable[0] == trainable[1]

    # As anyone would, without vembed; the model then still has its pooler.
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(model_path), tmp_path / "adapter")
    inputs = encoder.processor([Item(text="red apple")], role="query")
    with torch.no_grad():
        hidden = [m(**inputs).last_hidden_state for m in (theirs.eval(), encoder.backbone)]
    assert torch.equal(*hidden)

    criterion = Loss()
    load_losses(tmp_path / "adapter", criterion)
    assert float(criterion.logit_scale.detach()) == 0.5
    load_losses(tmp_path / "adapter", "a function")


def test_heads_of_a_backbone_are_kept_with_its_adapters(tmp_path):
    holders = []
    for _ in range(2):
        holder = nn.Module()
        holder.backbone = adapt(two_towers("clip"), CONFIG)
        holders.append(holder)
    one, two = holders
    shake(one)
    save_adapters(tmp_path, one)
    assert any("visual_projection" in n for n in load_file(tmp_path / "adapter_model.safetensors"))
    load_adapters(tmp_path, two)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def test_several_backbones_have_a_folder_each(model_path, tmp_path):
    pairs = []
    for _ in range(2):
        pair = nn.Module()
        pair.query, pair.document = build(model_path), build(model_path)
        pairs.append(pair)
    shake(pairs[0])
    save_adapters(tmp_path, pairs[0])
    assert {p.name for p in tmp_path.iterdir()} == {"query", "document", "heads.safetensors"}
    load_adapters(tmp_path, pairs[1])
    assert torch.equal(vectors(pairs[0].document), vectors(pairs[1].document))


def test_a_run_keeps_the_adapter_and_another_goes_on_from_it(model_path, tmp_path):
    settings = {
        "model_name": str(model_path),
        "data_path": str(write_rows(tmp_path / "pairs.jsonl", PAIRS)),
        "use_lora": True,
        "learn_temperature": True,
        "batch_size": 4,
        "max_steps": 2,
        "lr": 0.01,
        "device": "cpu",
        "progress": False,
    }
    first = run_training({**settings, "output_dir": str(tmp_path / "one")})
    kept = first.model_path / "adapter"
    assert {file.name for file in kept.iterdir()} == FILES
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        str(model_path)
    )
    again = run_training(
        {**settings, "output_dir": str(tmp_path / "two"), "adapter_path": str(kept), "lr": 0}
    )
    # At a rate of 0 nothing is learned: what it starts from is what the first run ended with.
    for file in (
        "model.safetensors",
        "2_Dense/model.safetensors",
        "adapter/heads.safetensors",
        "adapter/losses.safetensors",
    ):
        one, two = load_file(first.model_path / file), load_file(again.model_path / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file
    assert again.proof.before.metrics == first.proof.after.metrics


@pytest.fixture
def kept(model_path, tmp_path):
    save_adapters(tmp_path / "adapter", build(model_path))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 8}, r"lora_r: 8, but the adapter at .* was made with 4\. Set lora_r: 4"),
        ({"lora_alpha": 16}, "lora_alpha: 16.0, but"),
        ({"use_dora": True}, r"use_dora: True, .* Set use_dora: false"),
        ({"use_rslora": True}, "use_rslora: True, but"),
    ],
)
def test_another_kind_of_adapter_is_refused(model_path, kept, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(model_path, adapter_path=str(kept), **settings)


def test_other_layers_are_refused(model_path, kept):
    with pytest.raises(
        CheckpointError, match=r"does not fit the model and lora_target_modules: of"
    ):
        build(model_path, adapter_path=str(kept), lora_target_modules=["query"])


def test_other_shapes_are_refused(model_path, kept):
    heads = load_file(kept / "heads.safetensors")
    save_file({n: t[:2].clone() for n, t in heads.items()}, kept / "heads.safetensors")
    with pytest.raises(CheckpointError, match=r"another shape: projections\.0\.linear"):
        build(model_path, adapter_path=str(kept))


def test_what_is_not_an_adapter_is_refused(model_path, kept, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not the folder of an adapter"):
        build(model_path, adapter_path=str(tmp_path))
    (kept / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        build(model_path, adapter_path=str(kept))


def test_an_adapter_of_peft_alone_has_no_heads(model_path, tmp_path, caplog):
    plain = build(model_path)
    shake(plain.backbone)
    plain.backbone.save_pretrained(tmp_path / "peft")
    encoder = build(model_path, adapter_path=str(tmp_path / "peft"))
    assert torch.equal(vectors(encoder), vectors(plain))
    (warning,) = [text for text in caplog.messages if "adapter_path" in text]
    assert "has no heads.safetensors: projections.0.linear.weight" in warning


def test_heads_of_our_own_adapters_must_be_there(model_path, kept):
    (kept / "heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks heads\.safetensors.* projections\.0\.linear"):
        build(model_path, adapter_path=str(kept))


def test_a_model_without_heads_needs_none(tmp_path, caplog):
    path = family_path("bert")
    save_adapters(tmp_path / "adapter", build(path))
    assert not (tmp_path / "adapter" / "heads.safetensors").exists()
    build(path, adapter_path=str(tmp_path / "adapter"))
    assert not caplog.messages


DORA = {"use_dora": True, "use_rslora": True}


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, {}) for family in MODALITIES]
    + [(family, DORA) for family in ("siglip2", "vit", "composed", "qwen3_vl")],
)
def test_of_every_family_adapters_come_back_and_are_merged(family, kind, tmp_path):
    def build_family() -> nn.Module:
        settings = {"use_lora": True, "projection_dim": other_size(family), **kind}
        trainer = make_trainer(family_path(family), whole_mode(family), tmp_path, **settings)
        return trainer.model.eval()

    def all_vectors(encoder) -> np.ndarray:
        return np.concatenate([encode(encoder, items(letter)) for letter in MODALITIES[family]])

    encoder = build_family()
    base = all_vectors(encoder)
    shake(encoder, std=0.05)
    expected = all_vectors(encoder)
    save_checkpoint(tmp_path / "saved", encoder, Accelerator(cpu=True))

    merged = all_vectors(load(tmp_path / "saved"))
    assert np.abs(merged - expected).max() <= 1e-5
    assert np.abs(merged - base).max() > 1e-2
    again = build_family()
    assert not np.array_equal(all_vectors(again), expected)
    load_adapters(tmp_path / "saved" / "adapter", again)
    assert np.array_equal(all_vectors(again), expected)


@pytest.mark.parametrize("family", ["clip", "composed"])
def test_a_locked_tower_has_no_adapter_to_keep(family, tmp_path):
    """LiT: the image tower stays; what is beside it comes back all the same."""

    def build_locked() -> nn.Module:
        settings = {
            "use_lora": True,
            "freeze_towers": ["image"],
            "projection_dim": other_size(family),
        }
        return make_trainer(family_path(family), "t2i", tmp_path, **settings).model.eval()

    encoder = build_locked()
    before = encode(encoder, items("i"))
    shake(encoder, std=0.05)
    save_adapters(tmp_path / "adapter", encoder)
    names = [n for f in (tmp_path / "adapter").rglob("*.safetensors") for n in load_file(f)]
    assert not [n for n in names if "vision" in n or n.startswith("image")]
    again = build_locked()
    load_adapters(tmp_path / "adapter", again)
    for letter in "ti":
        assert np.array_equal(encode(again, items(letter)), encode(encoder, items(letter)))
    # Its projection learned.
    assert not np.array_equal(before, encode(encoder, items("i")))


def tower_without_adapters(tmp_path, **settings) -> nn.Module:
    """BERT beside ViT, whose pooler trains although none of its layers is adapted."""
    settings = {"use_lora": True, "lora_target_modules": ["attention.self.query"], **settings}
    return make_trainer(family_path("composed"), "t2i", tmp_path, **settings).model.eval()


def test_heads_of_a_tower_without_adapters_are_kept(tmp_path):
    encoder = tower_without_adapters(tmp_path)
    shake(encoder)
    save_adapters(tmp_path / "adapter", encoder)
    stored = set(load_file(tmp_path / "adapter" / "heads.safetensors"))
    pooler = {f"image.backbone.pooler.dense.{name}" for name in ("weight", "bias")}
    assert stored == pooler | {f"projections.{t}.linear.weight" for t in ("text", "image")}
    again = tower_without_adapters(tmp_path)
    load_adapters(tmp_path / "adapter", again)
    for letter in "ti":
        assert np.array_equal(encode(again, items(letter)), encode(encoder, items(letter)))


def test_a_folder_without_such_heads_is_refused(tmp_path):
    encoder = tower_without_adapters(tmp_path)
    save_adapters(tmp_path / "adapter", encoder)
    file = tmp_path / "adapter" / "heads.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "pooler" not in n}, file)
    with pytest.raises(CheckpointError, match=r"heads.*missing.*image\.backbone\.pooler\.dense"):
        load_adapters(tmp_path / "adapter", encoder)


def test_heads_that_were_trained_and_are_frozen_now_come_back(tmp_path):
    encoder = tower_without_adapters(tmp_path)
    shake(encoder)
    save_adapters(tmp_path / "adapter", encoder)
    frozen = tower_without_adapters(tmp_path, freeze=["image.backbone.pooler"])
    load_adapters(tmp_path / "adapter", frozen)
    assert np.array_equal(encode(frozen, items("i")), encode(encoder, items("i")))
    assert not any(p.requires_grad for p in frozen.image.parameters())


def test_heads_that_join_later_are_kept_from_the_first_checkpoint_on(tmp_path):
    settings = {"unfreeze_at_step": {"image": 3}, "save_steps": 2}
    encoder = tower_without_adapters(tmp_path)
    make_trainer(
        family_path("composed"), "t2i", tmp_path, max_steps=2,
        use_lora=True, lora_target_modules=["attention.self.query"], **settings,
    ).train()  # fmt: skip
    kept = tmp_path / "checkpoints" / "step-000002" / "adapter"
    backbone = [n for n in load_file(kept / "heads.safetensors") if ".backbone." in n]
    assert backbone == [f"image.backbone.pooler.dense.{n}" for n in ("bias", "weight")]
    load_adapters(kept, encoder)
