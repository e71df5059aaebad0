"""A text encoder and an image encoder in one space, saved and loaded with all that they learned."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests import tiny
from tests.unit.models.families import (
    family_path,
    items,
    load,
    make_trainer,
    vectors,
)
from vembed.errors import CheckpointError, ConfigError
from vembed.images import load_image
from vembed.models import compose_encoder
from vembed.training.model_builder import build_model

TEXTS = [item.text for item in items("t")]
IMAGES = [load_image(item.image) for item in items("i")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The towers that the tests put together, by name."""
    folder = tmp_path_factory.mktemp("towers")
    return {
        "bert": tiny.tiny_sentence_transformer(folder / "bert", dense_features=20),
        "qwen3": tiny.tiny_qwen3(folder / "qwen3"),
        **{family: family_path(family) for family in ("clip", "siglip", "dinov2", "mae", "vit")},
    }


PAIRS = [
    ("bert", "vit"),
    ("bert", "mae"),
    ("qwen3", "dinov2"),
    ("qwen3", "siglip"),
    ("clip", "dinov2"),
]


def composed(paths, text, image, **options):
    torch.manual_seed(0)
    return compose_encoder(
        text_model_name=str(paths[text]), image_model_name=str(paths[image]), **options
    )


@pytest.mark.parametrize(("text", "image"), PAIRS)
def test_saved_and_loaded_every_pair_gives_the_same_vectors(text, image, paths, tmp_path):
    encoder = composed(paths, text, image, query_prompt="find ")
    encoder.save_pretrained(tmp_path)
    again, theirs = load(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")

    for letter in "tim":
        expected = vectors(encoder, items(letter))
        alone = np.concatenate([vectors(encoder, [item]) for item in items(letter)])
        np.testing.assert_allclose(alone, expected, atol=1e-6)
        np.testing.assert_allclose(vectors(again, items(letter)), expected, atol=1e-7)
    query = vectors(encoder, items("t"), "query")
    np.testing.assert_allclose(vectors(again, items("t"), "query"), query, atol=1e-7)
    np.testing.assert_allclose(theirs.encode(TEXTS), vectors(encoder, items("t")), atol=1e-6)
    np.testing.assert_allclose(theirs.encode_query(TEXTS), query, atol=1e-6)
    np.testing.assert_allclose(theirs.encode(IMAGES), vectors(encoder, items("i")), atol=1e-6)


@pytest.mark.parametrize("use_lora", [False, True])
def test_both_trained_towers_and_projections_come_back(use_lora, paths, tmp_path):
    settings = {
        "text_model_name": str(paths["bert"]),
        "image_model_name": str(paths["vit"]),
        "projection_dim": 12,
        "use_lora": use_lora,
        "lr": 0.1,
    }
    trainer = make_trainer(None, "t2i", tmp_path, **settings)
    encoder = trainer.model
    torch.manual_seed(0)
    before = build_model({"retrieval_mode": "t2i", **settings}).eval()
    trainer.train()
    again = load(tmp_path / "final")

    for tower, letter in (("text", "t"), ("image", "i")):
        moved = [np.abs(vectors(getattr(m, tower), items(letter))) for m in (before, again)]
        assert np.abs(moved[0] - moved[1]).max() > 1e-5, f"the {tower} tower must have been trained"
        weights = [m.projections[tower].linear.weight.detach() for m in (before, encoder, again)]
        assert not torch.equal(weights[0], weights[1])
        assert torch.equal(weights[1], weights[2])
        np.testing.assert_allclose(
            vectors(again, items(letter)), vectors(encoder, items(letter)), atol=2e-6
        )
    assert again.embedding_dim == 12


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("use_lora", [False, True])
def test_a_locked_tower_stays_and_its_projection_learns(tower, use_lora, tmp_path):
    settings = {"freeze_towers": [tower], "use_lora": use_lora, "lr": 0.1}
    trainer = make_trainer(family_path("composed"), "t2i", tmp_path, **settings)
    trainer.train()
    before, after = load(family_path("composed")), load(tmp_path / "final")

    for name, letter in (("text", "t"), ("image", "i")):
        towers = [vectors(getattr(m, name), items(letter)) for m in (before, after)]
        assert np.array_equal(*towers) == (name == tower)
        projections = [m.projections[name].linear.weight for m in (before, after)]
        assert not torch.equal(*projections)


def test_each_tower_is_a_model_of_its_own(paths, tmp_path):
    encoder = composed(paths, "bert", "vit")
    encoder.save_pretrained(tmp_path)
    for name, letter, path in (("text", "t", paths["bert"]), ("image", "i", paths["vit"])):
        expected = vectors(load(path), items(letter))
        np.testing.assert_allclose(
            vectors(load(tmp_path / name), items(letter)), expected, atol=1e-6
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projections_have_the_type_of_the_towers(paths, dtype, tmp_path):
    encoder = composed(paths, "bert", "vit", torch_dtype=dtype)
    encoder.save_pretrained(tmp_path)
    for one in (encoder, load(tmp_path, torch_dtype=dtype)):
        assert {str(p.dtype) for p in one.parameters()} == {f"torch.{dtype}"}
    assert vectors(encoder, items("t")).dtype == np.float32


def test_what_it_is(paths):
    encoder = composed(paths, "bert", "vit", max_seq_length=9)
    described = encoder.describe()
    assert described["model_type"] == "bert + vit"
    assert encoder.embedding_dim == 20, "the smaller of 20 and 32"
    assert described["text max_seq_length"] == "9 (given)"
    assert described["image pooling_method"] == "pooler (default)"
    assert described["parameters"] == sum(p.numel() for p in encoder.parameters())


def test_of_a_dual_model_only_the_half_in_use_is_trained(paths):
    encoder = composed(paths, "bert", "clip")
    trained = [name for name, p in encoder.image.named_parameters() if p.requires_grad]
    assert {name.split(".")[1] for name in trained} == {"vision_model", "visual_projection"}


def test_a_tower_must_embed_what_it_is_for(paths):
    with pytest.raises(ConfigError, match="text_model_name: a text encoder is expected.*vit"):
        composed(paths, "vit", "vit")
    with pytest.raises(ConfigError, match="image_model_name: an image encoder is expected.*bert"):
        composed(paths, "bert", "bert")


def test_another_size_than_the_saved_one_is_refused():
    assert load(family_path("composed"), projection_dim=16).embedding_dim == 16
    with pytest.raises(ConfigError, match="gives vectors of size 16. Received: 8"):
        load(family_path("composed"), projection_dim=8)


def test_a_folder_without_a_part_is_named(tmp_path):
    shutil.copytree(family_path("composed"), tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "image_projection")
    with pytest.raises(CheckpointError, match="no folder 'image_projection'"):
        load(tmp_path / "model")


def test_a_router_for_other_things_is_named(tmp_path):
    shutil.copytree(family_path("composed"), tmp_path / "model")
    file = tmp_path / "model" / "router_config.json"
    router = json.loads(file.read_text())
    router["structure"]["query"] = router["structure"].pop("text")
    file.write_text(json.dumps(router))
    with pytest.raises(CheckpointError, match="reads a Router for text and image.*image, query"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_model_name": "a"}, "has no use alone. Set image_model_name"),
        ({"model_name": "c"}, "is about one model, but text_model_name names one of two"),
        ({"encoder_mode": "dual"}, "two models make a composed encoder, not dual"),
        ({"pooling_method": "mean"}, "pooling_method: is about one model"),
    ],
)
def test_settings_that_do_not_go_together(settings, says):
    from vembed.config import check

    both = {} if "text_model_name" in settings else {"image_model_name": "b"}
    problems = check({"text_model_name": "a", **both, **settings}, required=("model_name",))
    assert len(problems) == 1
    assert says in problems[0]


def test_two_names_stand_for_a_model():
    from vembed.config import check

    assert not check({"text_model_name": "a", "image_model_name": "b"}, required=("model_name",))
