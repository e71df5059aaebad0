"""Encoders that keep a vector for each token: what counts as one, and who reads the folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from transformers import AutoModel, AutoTokenizer

from tests.tiny import PAIRS
from tests.unit.models.families import (
    FLOAT32_INSIDE,
    family_path,
    gradients,
    items,
    make_trainer,
)
from vembed.errors import CheckpointError, ConfigError
from vembed.inference import Predictor, encode_items
from vembed.models import compose_encoder, load_encoder
from vembed.modes import Item
from vembed.token_vectors import real_tokens

TEXTS = [pair["positive"] for pair in PAIRS[:4]] + ["sun", ""]
TEXT_ENCODERS = ["bert", "modernbert", "qwen3"]
IMAGE_ENCODERS = [
    ("vit", "i"),
    ("dinov2", "i"),
    ("qwen3_vl", "m"),
    ("qwen2_vl", "i"),
    ("llava", "m"),
]


@pytest.fixture(params=TEXT_ENCODERS)
def path(request):
    return request.getfixturevalue(f"tiny_{request.param}_path")


def load(path, **options):
    return load_encoder(str(path), pooling_method="none", **options)


def arrays(encoder, texts=TEXTS, **options):
    return list(encode_items(encoder, [Item(text) for text in texts], role="query", **options))


def assert_same(ours, theirs, atol=1e-6):
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=atol, rtol=0)


def test_every_token_is_kept_and_has_length_one(path):
    encoder = load(path, query_prompt="query: ")
    inputs = encoder.processor([Item(text) for text in TEXTS], role="query")
    output = encoder(**inputs)
    assert output.shape == (len(TEXTS), inputs["input_ids"].shape[1], encoder.embedding_dim)
    assert (real_tokens(output) == inputs["attention_mask"].bool()).all()
    norms = output.norm(dim=-1)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_padding_and_company_change_nothing(path):
    encoder = load(path, projection_dim=8)
    assert_same(arrays(encoder), [arrays(encoder, [text])[0] for text in TEXTS], atol=2e-6)


def test_tokens_are_the_backbones_own(path):
    """With transformers alone, and the projection by hand."""
    encoder = load(path, projection_dim=8)
    text = "the red apple"
    tokens = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path)(**tokens).last_hidden_state[0]
        projected = hidden @ encoder.projections[0].linear.weight.T
    expected = torch.nn.functional.normalize(projected, dim=-1).numpy()
    assert_same(arrays(encoder, [text], prompt=""), [expected])


@pytest.mark.parametrize("projection_dim", [None, 8])
def test_saved_folder_gives_the_same_elsewhere(path, projection_dim, tmp_path):
    encoder = load(path, projection_dim=projection_dim, query_prompt="query: ")
    expected = arrays(encoder)
    encoder.save_pretrained(tmp_path / "saved")

    again = Predictor(tmp_path / "saved", device="cpu")
    assert again.encoder.pooling_method == "none"
    assert_same(again.encode_query(TEXTS), expected)
    theirs = MultiVectorEncoder(str(tmp_path / "saved"), device="cpu")
    assert_same(theirs.encode_query(TEXTS, convert_to_numpy=True), expected, atol=2e-6)
    ours = again.similarity(expected, again.encode_document(TEXTS))
    scores = theirs.similarity(theirs.encode_query(TEXTS), theirs.encode_document(TEXTS))
    np.testing.assert_allclose(ours, scores.numpy(), atol=1e-6)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_same(Predictor(tmp_path / "theirs", device="cpu").encode_query(TEXTS), expected)
    if projection_dim is not None:
        assert set(load_file(tmp_path / "saved/1_Dense/model.safetensors")) == {"linear.weight"}


@pytest.mark.parametrize(("family", "letter"), IMAGE_ENCODERS)
def test_images_and_chats(family, letter, tmp_path):
    encoder = load(family_path(family), projection_dim=8)
    expected = list(encode_items(encoder, items(letter), role="document"))
    assert all(np.allclose(np.linalg.norm(array, axis=1), 1, atol=1e-5) for array in expected)
    if letter == "i" and encoder.modalities == {"i"}:
        # 16 patches and the class token; nothing is left out.
        assert {array.shape for array in expected} == {(17, 8)}
    one = [list(encode_items(encoder, [item], role="document"))[0] for item in items(letter)]
    assert_same(expected, one, atol=5e-6)
    encoder.save_pretrained(tmp_path)
    again = load_encoder(str(tmp_path))
    assert_same(list(encode_items(again, items(letter), role="document")), expected)


def test_a_vision_language_model_is_read_by_sentence_transformers(tmp_path):
    encoder = load(family_path("llava"), projection_dim=8)
    encoder.save_pretrained(tmp_path)
    theirs = MultiVectorEncoder(str(tmp_path), device="cpu")
    for text in TEXTS[:3]:  # one by one: another padding rounds in another way
        ours = list(encode_items(encoder, [Item(text)], role="document"))
        assert_same(ours, theirs.encode_document([text], convert_to_numpy=True))


@pytest.mark.parametrize(
    ("family", "mode"), [("qwen3_vl", "t2i"), ("llava", "t2m"), ("vit", "i2i")]
)
def test_cached_gradients_are_the_plain_ones(family, mode, tmp_path):
    """Of chunks of one item, each with as many tokens as it has."""
    settings = {"pooling_method": "none", "projection_dim": 8, "loss_type": "maxsim"}
    cached = {"use_gradient_cache": True, "gradient_cache_chunk_size": 1}
    plain, again = (
        gradients(make_trainer(family_path(family), mode, tmp_path, **settings, **extra))
        for extra in ({}, cached)
    )
    assert plain.keys() == again.keys()
    largest = max(float(grad.abs().max()) for grad in plain.values())
    assert largest > 1e-3
    tolerance = 1e-4 if family in FLOAT32_INSIDE else 1e-12
    for name, grad in plain.items():
        assert (grad - again[name]).abs().max() <= tolerance * largest, name


# --- what does not fit


def test_unit_length_is_no_choice(tiny_bert_path):
    with pytest.raises(ConfigError, match="normalize_embeddings.*unit length"):
        load(tiny_bert_path, normalize=False)
    with pytest.raises(ConfigError, match="normalize_embeddings.*unit length"):
        arrays(load(tiny_bert_path), normalize=False)


def test_towers_meet_in_one_vector():
    with pytest.raises(ConfigError, match="Use a text, vision or vlm encoder"):
        load(family_path("clip"))


def test_a_tower_of_a_composed_encoder_gives_one_vector(tiny_bert_path, tmp_path):
    load(tiny_bert_path).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pooling_method none"):
        compose_encoder(text_model_name=str(tmp_path), image_model_name=str(family_path("vit")))


# --- folders of others


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


@pytest.fixture
def saved(tiny_bert_path, tmp_path):
    load(tiny_bert_path, projection_dim=8).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "rule"),
    [
        ("2_MultiVectorMask/config.json", {"skiplist_words": ["."]}),
        ("2_MultiVectorMask/config.json", {"keep_only_token_ids": [7]}),
        ("sentence_bert_config.json", {"query_expansion": {"strategy": "fixed", "length": 32}}),
        ("sentence_bert_config.json", {"query_length": 32}),
    ],
)
def test_rules_about_tokens_are_not_passed_over(saved, file, rule, caplog):
    edit(saved / file, **rule)
    (name,) = rule
    with pytest.raises(CheckpointError, match=f"{name}.*pooling_method: none"):
        load_encoder(str(saved))
    load(saved)
    assert f"not followed by vembed: {name}" in caplog.text


def write_pylate(saved, **settings):
    """The layout of PyLate 1: Transformer and Dense, everything else in one file."""
    modules = json.loads((saved / "modules.json").read_text())[:2]
    modules[1]["type"] = "pylate.models.Dense.Dense"
    (saved / "modules.json").write_text(json.dumps(modules))
    dense = json.loads((saved / "1_Dense/config.json").read_text())
    del dense["module_input_name"], dense["module_output_name"]
    (saved / "1_Dense/config.json").write_text(json.dumps(dense | {"use_residual": False}))
    config = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] "}
    (saved / "config_sentence_transformers.json").write_text(json.dumps(config | settings))


def test_a_folder_of_pylate(saved):
    plain = {"do_query_expansion": False, "skiplist_words": []}
    expected = arrays(load_encoder(str(saved), query_prompt="[Q] "))
    write_pylate(saved, **plain)
    encoder = load_encoder(str(saved))
    assert encoder.processor.document_prompt == "[D] "
    assert_same(arrays(encoder), expected)
    theirs = MultiVectorEncoder(str(saved), device="cpu")
    assert_same(theirs.encode_query(TEXTS, convert_to_numpy=True), expected)


def test_what_pylate_does_unasked_is_a_rule(saved):
    write_pylate(saved)
    with pytest.raises(CheckpointError, match="do_query_expansion, skiplist_words"):
        load_encoder(str(saved))
