"""Dual towers against transformers and sentence-transformers, and what is theirs alone."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from tests.pictures import picture
from tests.tiny import write_rows
from tests.unit.models.families import (
    batch_for,
    family_path,
    items,
    load,
    make_trainer,
    vectors,
)
from vembed.config import TrainConfig
from vembed.errors import CheckpointError, ConfigError, DataError
from vembed.images import load_image
from vembed.losses import build_criterion, own_temperature
from vembed.modes import Item
from vembed.training.learned_scale import keep_in_model, resolve_temperature
from vembed.training.model_builder import apply_lora, build_model
from vembed.training.optimizer_builder import build_optimizer
from vembed.training.run import run_training
from vembed.training.trainer import Trainer

FAMILIES = ["clip", "siglip", "siglip2"]
TEXTS = [item.text for item in items("t")]
IMAGES = [load_image(item.image) for item in items("i")]


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_transformers(family):
    path = family_path(family)
    model = AutoModel.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    padding = {"padding": True} if family == "clip" else {"padding": "max_length", "max_length": 24}
    images = {"max_num_patches": 16, "patch_size": 8} if family == "siglip2" else {}
    processor.tokenizer.padding_side = "right"  # as published; learned positions start on the left
    text = processor.tokenizer(TEXTS, truncation=True, return_tensors="pt", **padding)
    if family != "clip":
        del text["attention_mask"]  # trained without, as their published tokenizers say
    image = processor.image_processor(IMAGES, return_tensors="pt", **images)
    with torch.no_grad():
        expected = {
            "t": model.get_text_features(**text).pooler_output,
            "i": model.get_image_features(**image).pooler_output,
        }
    encoder = load(path, normalize=False)
    for letter, vector in expected.items():
        np.testing.assert_allclose(vectors(encoder, items(letter)), vector.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projection_dim", [None, 8])
def test_sentence_transformers_reads_a_saved_folder_to_the_same_vectors(
    family, projection_dim, tmp_path
):
    encoder = load(family_path(family), query_prompt="find ", projection_dim=projection_dim)
    encoder.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")

    for ours, other in (
        (vectors(encoder, items("t")), theirs.encode(TEXTS)),
        (vectors(encoder, items("i")), theirs.encode(IMAGES)),
        (vectors(encoder, items("t"), "query"), theirs.encode_query(TEXTS)),
    ):
        np.testing.assert_allclose(ours, other, atol=1e-6)
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def test_a_folder_that_sentence_transformers_wrote_is_read(tmp_path):
    theirs = SentenceTransformer(str(family_path("clip")), device="cpu")
    theirs.save(str(tmp_path), create_model_card=False)
    encoder = load(tmp_path)

    assert not encoder.normalize
    np.testing.assert_allclose(vectors(encoder, items("t")), theirs.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(vectors(encoder, items("i")), theirs.encode(IMAGES), atol=1e-5)


def test_the_layout_of_published_clip_models_is_read(tmp_path):
    """Before version 5.4, sentence-transformers had a module for CLIP, in a folder of its own."""
    shutil.copytree(family_path("clip"), tmp_path / "0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}  # fmt: skip # noqa: E501
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    encoder, theirs = load(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")

    np.testing.assert_allclose(vectors(encoder, items("t")), theirs.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(vectors(encoder, items("i")), theirs.encode(IMAGES), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_with_an_image_is_the_mean_of_their_unit_vectors(family):
    encoder = load(family_path(family), normalize=False)
    text, image = (vectors(encoder, items(letter), normalize=True) for letter in "ti")
    mean = (text + image) / 2

    np.testing.assert_allclose(vectors(encoder, items("m")), mean, atol=1e-6)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(encoder, items("m"), normalize=True), unit, atol=1e-6)


def test_prompts_go_before_texts_and_not_before_images():
    encoder = load(family_path("clip"), query_prompt="find ")
    for letter in "tm":
        of = items(letter)
        found = [Item(text=f"find {item.text}", image=item.image) for item in of]
        np.testing.assert_allclose(
            vectors(encoder, of, "query"), vectors(encoder, found), atol=1e-6
        )
    assert np.array_equal(vectors(encoder, items("i"), "query"), vectors(encoder, items("i")))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_side_that_a_tokenizer_pads_on_changes_nothing(family, side, tmp_path):
    shutil.copytree(family_path(family), tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side}))
    expected = vectors(load(family_path(family)), items("t"))
    np.testing.assert_allclose(vectors(load(tmp_path / "model"), items("t")), expected, atol=1e-6)


def test_a_long_text_keeps_its_end_token():
    encoder = load(family_path("clip"), max_seq_length=9)
    long = Item(text="the quick brown fox " * 9)
    ids = encoder.processor([long], role="query")["input_ids"][0]
    assert len(ids) == 9
    assert ids[-1] == encoder.backbone.config.text_config.eos_token_id
    with pytest.raises(ConfigError, match="positions for 40 tokens"):
        load(family_path("clip"), max_seq_length=41)


@pytest.mark.parametrize(
    ("mixed", "says"),
    [
        ([*items("t")[:1], *items("i")[:1]], "images and texts"),
        ([*items("t")[:1], *items("m")[:1]], "texts and texts with images"),
        ([], "no items"),
    ],
)
def test_a_batch_of_different_things_is_refused(mixed, says):
    with pytest.raises(DataError, match=says):
        load(family_path("clip")).processor(mixed, role="query")


def test_items_of_every_kind_are_encoded_in_one_call():
    encoder = load(family_path("clip"))
    mixed = [items(letter)[i] for i in range(4) for letter in "itm"]
    alone = np.concatenate([vectors(encoder, [item]) for item in mixed])
    np.testing.assert_allclose(vectors(encoder, mixed), alone, atol=1e-6)


# --- temperature


def trainer_of(path, tmp_path, loss, **settings):
    config = TrainConfig(
        model_name=str(path),
        retrieval_mode="t2i",
        output_dir=str(tmp_path),
        loss_type=loss,
        lr=0.1,
        optimizer="sgd",
        max_steps=3,
        progress=False,
        **settings,
    )
    encoder = build_model(config)
    resolve_temperature(config, encoder)
    criterion = build_criterion(
        loss,
        temperature=config.temperature,
        learn_temperature=config.learn_temperature,
        **config.loss_kwargs,
    )
    optimizer = build_optimizer(encoder, config, criterion)
    batch = batch_for(encoder, "t2i")
    return Trainer(encoder, optimizer, [batch], criterion, Accelerator(cpu=True), config)


@pytest.mark.parametrize(
    ("settings", "temperature", "learned"),
    [
        ({}, math.exp(-3), True),
        ({"temperature": 0.2}, 0.2, False),
        ({"learn_temperature": False}, math.exp(-3), False),
        ({"temperature": 0.2, "learn_temperature": True}, 0.2, True),
        ({"loss_type": "sigmoid"}, math.exp(-3), True),
        ({"loss_type": "supcon"}, 0.05, False),
        ({"loss_type": "arcface"}, 1 / 64, False),
        ({"loss_type": "normalized_softmax"}, 0.05, False),
        ({"loss_type": "cosent"}, 0.05, False),
        ({"loss_type": "margin_mse"}, 0.05, False),
        ({"loss_type": "tests.numerics.broken_losses:WithoutGather"}, 0.05, False),
    ],
)
def test_where_the_temperature_comes_from(tmp_path, settings, temperature, learned):
    path = with_logits("clip", tmp_path / "model", logit_scale=3.0)
    config = TrainConfig(model_name=str(path), retrieval_mode="i2i", **settings)
    resolve_temperature(config, build_model(config))
    assert (config.temperature, config.learn_temperature) == (pytest.approx(temperature), learned)


@pytest.mark.parametrize(
    ("settings", "temperature", "learned"),
    [
        ({}, 0.05, False),
        ({"loss_type": "sigmoid"}, 0.1, True),
        ({"loss_type": "sigmoid", "temperature": 0.1}, 0.1, False),
        ({"loss_type": "arcface"}, 1 / 64, False),
    ],
)
def test_a_model_without_a_temperature(settings, temperature, learned):
    """The temperature is the loss's own, and so it is without a run."""
    config = TrainConfig(model_name=str(family_path("vit")), retrieval_mode="i2i", **settings)
    resolve_temperature(config, build_model(config))
    assert (config.temperature, config.learn_temperature) == (temperature, learned)
    criterion = build_criterion(
        config.loss_type, temperature=settings.get("temperature"), num_classes=2, embedding_dim=4
    )
    scale = getattr(criterion, "logit_scale", None)
    assert (criterion.temperature, scale is not None) == (temperature, learned)


@pytest.mark.parametrize("loss", ["arcface", "normalized_softmax", "supcon"])
def test_a_loss_on_labels_leaves_the_temperature_of_the_checkpoint(tmp_path, loss):
    """It compares images with classes, and the scale is of texts with images."""
    path = with_logits("clip", tmp_path / "model", logit_scale=3.0)
    colors = ["red", "green", "blue", "white"]
    for color in colors:
        (tmp_path / f"{color}.png").write_bytes(picture(color))
    rows = [{"image": f"{c}.png", "label": f"class {n % 2}"} for n, c in enumerate(colors * 2)]
    result = run_training(
        {
            "model_name": str(path),
            "retrieval_mode": "i2i",
            "loss_type": loss,
            "data_path": str(write_rows(tmp_path / "rows.jsonl", rows)),
            "image_root": str(tmp_path),
            "holdout_ratio": 0,
            "batch_size": 4,
            "max_steps": 1,
            "device": "cpu",
            "progress": False,
            "output_dir": str(tmp_path / "run"),
        }
    )
    assert load(result.model_path).logits == {"logit_scale": pytest.approx(3.0)}
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["temperature"] == own_temperature(loss)
    assert resolved["learn_temperature"] is False


def with_logits(family, folder, **values):
    """A copy of the tiny model that has these values."""
    model = AutoModel.from_pretrained(family_path(family))
    shutil.copytree(family_path(family), folder)
    with torch.no_grad():
        for name, value in values.items():
            getattr(model, name).fill_(value)
    model.save_pretrained(folder)
    return folder


def test_a_learned_temperature_starts_from_the_checkpoint_and_is_saved_with_it(tmp_path):
    path = with_logits("clip", tmp_path / "model", logit_scale=3.0)
    trainer = trainer_of(path, tmp_path / "run", "infonce")
    assert float(trainer.criterion.logit_scale) == pytest.approx(3.0)
    assert trainer.config.temperature == pytest.approx(math.exp(-3))

    trainer.train()

    learned = float(trainer.criterion.logit_scale)
    assert abs(learned - 3) > 1e-3
    saved = AutoModel.from_pretrained(tmp_path / "run" / "final")
    assert float(saved.logit_scale) == pytest.approx(learned)
    assert load(tmp_path / "run" / "final").logits == {"logit_scale": pytest.approx(learned)}


def test_scale_and_bias_of_siglip(tmp_path):
    path = with_logits("siglip", tmp_path / "model", logit_scale=2.0, logit_bias=-7.0)
    trainer = trainer_of(path, tmp_path / "run", "sigmoid")
    assert float(trainer.criterion.logit_bias) == pytest.approx(-7)
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.criterion.parameters()} <= owned

    trainer.train()

    saved = AutoModel.from_pretrained(tmp_path / "run" / "final")
    for name, before in (("logit_scale", 2.0), ("logit_bias", -7.0)):
        learned = float(getattr(trainer.criterion, name))
        assert float(getattr(saved, name)) == pytest.approx(learned)
        assert abs(learned - before) > 1e-3


def test_a_published_scale_beyond_the_clamp_starts_at_its_end(tmp_path):
    path = with_logits("siglip", tmp_path / "model", logit_scale=4.77)
    assert trainer_of(path, tmp_path / "run", "sigmoid").config.temperature == 0.01


def test_a_temperature_that_the_user_sets_wins(tmp_path):
    settings = {"temperature": 0.5, "learn_temperature": True}
    trainer = trainer_of(family_path("clip"), tmp_path, "infonce", **settings)
    assert float(trainer.criterion.logit_scale) == pytest.approx(-math.log(0.5))


def test_a_temperature_that_is_not_learned_leaves_that_of_the_checkpoint(tmp_path):
    encoder = load(family_path("clip"))
    before = encoder.logits
    config = TrainConfig(temperature=0.5)
    resolve_temperature(config, encoder)
    keep_in_model(build_criterion("infonce", temperature=0.5), encoder)
    assert (encoder.logits, config.temperature) == (before, 0.5)


# --- what trains


def test_a_mode_freezes_the_tower_that_it_does_not_use():
    def trained(mode):
        encoder = build_model({"model_name": str(family_path("clip")), "retrieval_mode": mode})
        names = [name for name, p in encoder.named_parameters() if p.requires_grad]
        return {name.split(".")[1] for name in names}

    text, image = {"text_model", "text_projection"}, {"vision_model", "visual_projection"}
    assert trained("t2t") == text
    assert trained("i2i") == image
    assert trained("t2i") == trained("m2m") == text | image


@pytest.mark.parametrize(("tower", "letter"), [("image", "i"), ("text", "t")])
@pytest.mark.parametrize("use_lora", [False, True])
def test_a_frozen_tower_stays_as_it_is(tower, letter, use_lora, tmp_path):
    path = family_path("siglip")
    trainer = make_trainer(path, "t2i", tmp_path, freeze_towers=[tower], use_lora=use_lora, lr=0.1)
    trainer.train()
    before, after = load(path), load(tmp_path / "final")
    other = {"t": "i", "i": "t"}[letter]
    assert np.array_equal(vectors(before, items(letter)), vectors(after, items(letter)))
    assert np.abs(vectors(before, items(other)) - vectors(after, items(other))).max() > 1e-5


def test_an_unknown_tower_is_refused():
    with pytest.raises(ConfigError, match="unknown tower 'images' \\(did you mean 'image'"):
        load(family_path("clip"), freeze_towers=["images"])


def test_no_adapter_where_torch_would_not_call_it():
    """The attention pooling of SigLIP reads the weight of its output layer by itself."""
    encoder = build_model({"model_name": str(family_path("siglip")), "retrieval_mode": "i2i"})
    apply_lora(encoder, {"use_lora": True}, Accelerator(cpu=True))
    adapted = [name for name, _ in encoder.named_parameters() if "lora" in name]
    assert any("vision_model.encoder" in name for name in adapted)
    assert not any("head.attention" in name or "text_model" in name for name in adapted)


# --- errors


def test_another_pooling_is_refused():
    with pytest.raises(ConfigError, match=r"pools by itself \(pooler\)\. Received: 'mean'"):
        load(family_path("clip"), pooling_method="mean")


def test_its_own_pooling_may_be_named():
    assert load(family_path("clip"), pooling_method="pooler").pooling_method == "pooler"


def test_a_folder_without_image_processor_is_named(tmp_path):
    shutil.copytree(family_path("clip"), tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no image processor \(preprocessor_config.json\)"):
        load(tmp_path / "model")
