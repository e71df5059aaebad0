"""Image encoders against transformers and sentence-transformers, and MAE, which hides patches."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel

from tests import tiny
from tests.unit.models.families import (
    family_path,
    gradients,
    items,
    load,
    make_trainer,
    vectors,
)
from vembed.config import TrainConfig
from vembed.errors import ConfigError, DataError
from vembed.images import ImageBytes, load_image
from vembed.modes import Item
from vembed.training.run import check_mode

FAMILIES = ["vit", "dinov2", "dinov2_with_registers", "dinov3", "mae"]
IMAGES = [load_image(item.image) for item in items("i")]
DEFAULTS = {"vit": "pooler", "mae": "mean"}


def tokens_of(path, **inputs):
    """What transformers makes of the images: token vectors and pooled output."""
    model = AutoModel.from_pretrained(path).eval()
    processor = AutoImageProcessor.from_pretrained(path)
    with torch.no_grad():
        output = model(**processor(IMAGES, return_tensors="pt"), **inputs)
    return output.last_hidden_state, output.get("pooler_output")


@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_vectors_are_those_of_transformers(family):
    hidden, pooled = tokens_of(family_path(family))
    expected = {"cls": hidden[:, 0], "mean": hidden.mean(1), "max": hidden.amax(1)}
    expected["pooler"] = pooled
    for pooling, vector in expected.items():
        encoder = load(family_path(family), pooling_method=pooling, normalize=False)
        np.testing.assert_allclose(vectors(encoder, items("i")), vector, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", [None, "cls", "mean", "max", "pooler"])
def test_sentence_transformers_reads_a_saved_folder_to_the_same_vectors(family, pooling, tmp_path):
    if (family, pooling) == ("mae", "pooler"):
        pytest.skip("MAE has no head")
    encoder = load(family_path(family), pooling_method=pooling, projection_dim=12)
    assert encoder.pooling_method == (pooling or DEFAULTS.get(family, "cls"))
    encoder.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(IMAGES)

    np.testing.assert_allclose(vectors(encoder, items("i")), theirs, atol=2e-6)
    assert load(tmp_path).pooling_method == encoder.pooling_method
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def test_pooling_is_the_models_own_unless_asked_for():
    for family in FAMILIES:
        described = load(family_path(family)).describe()
        assert described["pooling_method"] == f"{DEFAULTS.get(family, 'cls')} (default)"
        assert described["image_size"] == "32 x 32"


def test_a_vit_without_its_head_takes_the_class_token(tmp_path):
    """Many ViTs are published without; transformers would make one of random numbers."""
    path = tiny.tiny_vit(tmp_path / "vit", pooler=False)
    encoder = load(path, normalize=False)
    assert encoder.pooling_method == "cls"
    np.testing.assert_allclose(vectors(encoder, items("i")), tokens_of(path)[0][:, 0], atol=2e-6)
    with pytest.raises(ConfigError, match="this vit checkpoint has none. Use cls or mean"):
        load(path, pooling_method="pooler")


def test_a_head_that_does_not_pool_is_saved_as_it_came(tmp_path):
    encoder = load(family_path("vit"), pooling_method="cls")
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    encoder.save_pretrained(tmp_path)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (family_path("vit"), tmp_path)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- masked autoencoders


def test_mae_sees_every_patch_in_order():
    hidden, _ = tokens_of(family_path("mae"))
    assert hidden.shape[1] == 1 + 4, "as published, it hides 12 of 16"
    encoder = load(family_path("mae"), normalize=False)
    model = AutoModel.from_pretrained(family_path("mae"), mask_ratio=0.0).eval()
    inputs = encoder.processor(items("i"), role=None)
    with torch.no_grad():
        whole = model(**inputs, noise=torch.arange(16.0).repeat(4, 1)).last_hidden_state
    assert whole.shape[1] == 1 + 16
    np.testing.assert_allclose(vectors(encoder, items("i")), whole.mean(1), atol=2e-6)


def test_mae_differs_when_any_patch_does():
    encoder = load(family_path("mae"))
    pixels = encoder.processor(items("i", 1), role=None)["pixel_values"]
    with torch.no_grad():
        whole = encoder(pixel_values=pixels)
        for row in range(0, 32, 8):
            for column in range(0, 32, 8):
                changed = pixels.clone()
                changed[..., row : row + 8, column : column + 8] += 1
                assert (encoder(pixel_values=changed) - whole).abs().max() > 1e-4


def test_mae_trains_without_hiding_anything(tmp_path):
    encoder = load(family_path("mae")).train()
    inputs = encoder.processor(items("i"), role=None)
    assert torch.equal(encoder(**inputs), encoder(**inputs))
    encoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mask_ratio"] == 0.0


def test_random_positions_of_dinov3_are_the_same_when_a_chunk_is_encoded_again(tmp_path):
    path = tiny.tiny_dinov3(tmp_path / "model", pos_embed_rescale=2.0)
    chunks = {"use_gradient_cache": True, "gradient_cache_chunk_size": 2}
    kept = gradients(make_trainer(path, "i2i", tmp_path, **chunks, gradient_cache_keep=9))
    again = gradients(make_trainer(path, "i2i", tmp_path, **chunks))
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-12, atol=1e-12)


# --- errors


@pytest.mark.parametrize("name", ["DINOv3ViTImageProcessor", "DINOv3ViTImageProcessorFast"])
def test_an_image_processor_that_needs_torchvision_says_so(name, tmp_path):
    shutil.copytree(family_path("dinov3"), tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": name}))
    with pytest.raises(ConfigError, match=r"needs torchvision, which is not installed"):
        load(tmp_path / "model")


def test_fast_names_of_processors_that_pillow_can_stand_in_for_are_read(tmp_path):
    shutil.copytree(family_path("vit"), tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    content = json.loads(file.read_text()) | {"image_processor_type": "ViTImageProcessorFast"}
    file.write_text(json.dumps(content))
    expected = vectors(load(family_path("vit")), items("i"))
    np.testing.assert_array_equal(vectors(load(tmp_path / "model"), items("i")), expected)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (Item(text="a dog"), "embeds images only. Received a text: 'a dog'"),
        (Item(), "an image is expected"),
        (Item(image=ImageBytes(b"no image")), "must be one of JPEG"),
    ],
)
def test_what_is_no_image_is_refused(item, says):
    with pytest.raises(DataError, match=says):
        vectors(load(family_path("vit")), [item])


def test_images_that_do_not_come_out_alike_are_refused(tmp_path):
    shutil.copytree(family_path("dinov2"), tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": False}))
    with pytest.raises(DataError, match=r"cannot make one batch of images of .*24 x 32"):
        vectors(load(tmp_path / "model"), items("i"))


def test_a_pooling_for_texts_is_refused():
    with pytest.raises(ConfigError, match="'last_token' is not one for images. One of: cls, mean"):
        load(family_path("vit"), pooling_method="last_token")


def test_a_mode_with_texts_does_not_fit():
    config = TrainConfig(model_name="vit", retrieval_mode="t2i")
    with pytest.raises(ConfigError, match=r"t2i does not fit 'vit' .*which can do: i2i"):
        check_mode(load(family_path("vit")), config)


def test_an_unlisted_type_can_be_forced(tmp_path):
    from transformers import IJepaConfig, IJepaModel

    shutil.copytree(family_path("vit"), tmp_path, dirs_exist_ok=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    patches = {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    IJepaModel(IJepaConfig(**sizes, **patches), add_pooling_layer=False).save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="'ijepa', which no encoder of vembed claims"):
        load(tmp_path)
    encoder = load(tmp_path, encoder_mode="vision", pooling_method="mean")
    assert vectors(encoder, items("i")).shape == (4, 32)
