from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

import vembed
from tests.pictures import write_pictures
from tests.tiny import tiny_clip
from vembed.errors import CheckpointError, ConfigError, DataError
from vembed.images import as_image_source
from vembed.inference import VEmbedFactoryPredictor
from vembed.modes import Item
from vembed.quantized_vectors import Ranges

TEXTS = ["the red apple", "a blue ocean", "an old book of the king"]


@pytest.fixture(scope="module")
def predictor(tiny_st_path):
    return vembed.Predictor(str(tiny_st_path), device="cpu")


@pytest.fixture(scope="module")
def theirs(tiny_st_path):
    return SentenceTransformer(str(tiny_st_path), device="cpu")


def test_every_method_agrees_with_sentence_transformers(predictor, theirs):
    for ours, expected in [
        (predictor.encode(TEXTS), theirs.encode(TEXTS)),
        (predictor.encode_text(TEXTS), theirs.encode(TEXTS)),
        (predictor.encode_query(TEXTS), theirs.encode_query(TEXTS)),
        (predictor.encode_document(TEXTS), theirs.encode_document(TEXTS)),
        (predictor.encode(TEXTS, prompt="see: "), theirs.encode(TEXTS, prompt="see: ")),
        (predictor.encode(TEXTS, role="query", prompt=""), theirs.encode(TEXTS)),
    ]:
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_results_are_two_dimensional(predictor):
    assert predictor.embedding_dim == 32
    assert predictor.encode_text("one text").shape == (1, 32)
    assert predictor.encode_text(TEXTS).shape == (3, 32)
    assert predictor.encode_text([]).shape == (0, 32)
    assert predictor.encode(Item(text="one text")).shape == (1, 32)


def test_normalize_overrides_the_models_own_and_leaves_it(predictor):
    raw = predictor.encode_text(TEXTS, normalize=False)
    unit = predictor.encode_text(TEXTS)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(lengths, 1, atol=0.1)
    np.testing.assert_allclose(raw / lengths, unit, atol=1e-6)
    np.testing.assert_allclose(predictor.encode_text(TEXTS, normalize=True), unit, atol=1e-7)


def test_batch_size_is_the_most_items_of_a_forward_pass(predictor):
    sizes = []
    hook = predictor.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    small = predictor.encode_text(TEXTS, batch_size=2)
    hook.remove()
    assert sum(sizes) == 3
    assert max(sizes) <= 2
    np.testing.assert_allclose(small, predictor.encode_text(TEXTS), atol=1e-6)


def test_similarity_of_texts_and_vectors(predictor):
    vectors = predictor.encode_text(TEXTS, normalize=False)
    scores = predictor.similarity(TEXTS, vectors[:2])
    assert scores.shape == (3, 2)
    np.testing.assert_allclose(np.diag(scores), 1, atol=1e-6)
    np.testing.assert_allclose(scores, predictor.similarity(vectors[:2], TEXTS).T, atol=1e-6)
    assert predictor.similarity("a", "b").shape == (1, 1)
    with pytest.raises(DataError, match="one size"):
        predictor.similarity(vectors, np.ones((2, 5)))


@pytest.mark.parametrize("inputs", [[3], [None], ["a", b"b"], [["a"]]])
def test_what_is_not_a_text_is_an_error(predictor, inputs):
    with pytest.raises(DataError, match=f"position {len(inputs) - 1}"):
        predictor.encode_text(inputs)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"role": "positive"}])
def test_options_that_do_not_exist_are_errors(predictor, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        predictor.encode(TEXTS, **options)


def test_load_options_reach_the_encoder(tiny_st_path):
    predictor = vembed.Predictor(str(tiny_st_path), "cpu", torch_dtype="bfloat16", max_seq_length=5)
    assert predictor.encoder.backbone.dtype == torch.bfloat16
    assert predictor.encoder.processor.max_seq_length == 5


def test_a_folder_that_is_not_a_model_is_one_clear_error(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"is not a model folder.*Found there: notes\.txt"):
        vembed.Predictor(str(tmp_path))
    with pytest.raises(ConfigError, match="there is no folder"):
        vembed.Predictor(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("device", ["cud", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_an_error(tiny_st_path, device):
    with pytest.raises(ConfigError, match="device"):
        vembed.Predictor(str(tiny_st_path), device=device)


def test_items_by_role_as_evaluation_asks_for_them(predictor):
    items = [Item(text=text) for text in TEXTS]
    assert np.array_equal(predictor.encode_items(items, "query"), predictor.encode_query(TEXTS))


def test_the_longer_name_is_the_same_class():
    assert VEmbedFactoryPredictor is vembed.Predictor is vembed.VEmbedFactoryPredictor


def test_images_in_every_form_give_one_vector(tmp_path):
    from tests.tiny import tiny_clip, tiny_images
    from vembed.images import load_image

    predictor = vembed.Predictor(tiny_clip(tmp_path / "clip"))
    (source,) = tiny_images(1)
    file = tmp_path / "image.png"
    file.write_bytes(source.read())
    forms = [str(file), file, source, load_image(source)]
    vectors = predictor.encode_image(forms)

    assert vectors.shape == (4, 16)
    alone = predictor.encode_image(file)
    np.testing.assert_allclose(vectors, alone.repeat(4, axis=0), atol=1e-6)
    assert np.array_equal(predictor.encode([Item(image=source)]), alone)
    assert not np.allclose(predictor.encode_text(str(file)), vectors[0]), "a str is a text"


# --- a vector for each token


@pytest.fixture(scope="module")
def late(tiny_bert_path):
    return vembed.Predictor(
        str(tiny_bert_path), device="cpu", pooling_method="none", projection_dim=8
    )


def test_tokens_come_as_a_list_of_arrays(late):
    found = late.encode_text(["red apple", "the old king of the ocean", "red apple"])
    assert isinstance(found, list)
    assert {array.shape[1] for array in found} == {8}
    assert len(found[0]) < len(found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert len(late.encode_text("red apple")) == 1
    assert len(late.encode_text(TEXTS, batch_size=1)) == 3


def test_similarity_of_tokens_is_max_sim(late):
    query, document = late.encode_text(TEXTS[0])[0], late.encode_text(TEXTS[1])[0]
    scores = late.similarity(TEXTS, TEXTS)
    assert scores.shape == (3, 3)
    assert scores[0, 1] == pytest.approx((query @ document.T).max(1).mean(), abs=1e-6)
    np.testing.assert_allclose(scores.diagonal(), 1, atol=1e-6)
    np.testing.assert_allclose(late.similarity([query], TEXTS)[0], scores[0], atol=1e-6)
    with pytest.raises(DataError, match="one size and kind"):
        late.similarity(TEXTS, np.ones((2, 8)))


@pytest.mark.parametrize("dim", [32, 20, 8])
def test_prefixes_are_those_of_sentence_transformers(tiny_st_path, theirs, dim):
    predictor = vembed.Predictor(str(tiny_st_path), device="cpu", truncate_dim=dim)
    short = SentenceTransformer(str(tiny_st_path), device="cpu", truncate_dim=dim)
    expected = short.encode(TEXTS, normalize_embeddings=True)
    assert predictor.embedding_dim == dim
    np.testing.assert_allclose(predictor.encode(TEXTS), expected, atol=1e-6)
    raw = theirs.encode(TEXTS)[:, :dim]
    assert (dim == 32) == np.allclose(raw, expected, atol=1e-3)
    unscaled = predictor.encode(TEXTS, normalize=False)
    np.testing.assert_allclose(
        unscaled / np.linalg.norm(unscaled, axis=1, keepdims=True), expected, atol=1e-6
    )
    np.testing.assert_allclose(predictor.similarity(TEXTS, TEXTS), expected @ expected.T, atol=1e-6)
    assert predictor.encode([]).shape == (0, dim)


@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary"])
def test_other_precisions_are_those_of_sentence_transformers(predictor, theirs, precision):
    vectors = predictor.encode(TEXTS)
    ranges = Ranges.of(vectors)
    ours = predictor.encode(TEXTS, precision=precision, ranges=ranges)
    stacked = np.stack([ranges.lowest_D, ranges.highest_D])
    np.testing.assert_array_equal(ours, quantize_embeddings(vectors, precision, ranges=stacked))
    with pytest.raises(DataError, match="codes of another precision"):
        predictor.similarity(ours, ours)


@pytest.mark.parametrize("dim", [0, 33])
def test_a_size_that_vectors_do_not_have_is_refused(tiny_st_path, dim):
    with pytest.raises(ConfigError, match=f"from 1 to 32, .* Received: {dim}"):
        vembed.Predictor(str(tiny_st_path), device="cpu", truncate_dim=dim)


# --- images, told from texts by their type


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return vembed.Predictor(tiny_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    write_pictures(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return [f"photos/{name}.png" for name in ("red", "blue")]


def test_paths_and_open_images_are_images(clip, photos):
    expected = clip.encode_image(photos)
    opened = [Image.open(photo) for photo in photos]
    for images in ([Path(p) for p in photos], opened, [as_image_source(p) for p in photos]):
        np.testing.assert_allclose(clip.encode(images), expected, atol=1e-6)
        scores = clip.similarity("a red circle", images)
        np.testing.assert_allclose(scores, clip.encode_text("a red circle") @ expected.T, atol=1e-6)
        one = clip.similarity("a red circle", images[0])
        np.testing.assert_allclose(one, scores[:, :1], atol=1e-6)


@pytest.mark.parametrize("call", ["similarity", "encode", "encode_query", "encode_document"])
def test_a_text_that_names_an_image_file_is_asked_about(clip, photos, call):
    """It would be embedded as a text, and the similarity be a number like any other."""
    side = ["a red circle"] if call == "similarity" else []
    with pytest.raises(DataError) as caught:
        getattr(clip, call)(*side, photos)
    assert str(caught.value) == (
        "'photos/red.png' names an image file, but a str is embedded as a text. For the image, "
        "give pathlib.Path('photos/red.png'), or use encode_image; for the text, encode_text"
    )


def test_names_of_files_stay_texts_where_nothing_else_can_be_meant(clip, predictor, photos):
    assert predictor.similarity("a red circle", photos).shape == (1, 2)
    assert clip.similarity("a red circle", ["photos/gone.png", "photos"]).shape == (1, 2)
    assert not np.allclose(clip.encode_text(photos), clip.encode_image(photos), atol=1e-3)


def test_a_path_of_the_program_is_told_whole(clip, tmp_path):
    with pytest.raises(DataError) as caught:
        clip.encode_image(tmp_path / "gone.png")
    gone = str(tmp_path / "gone.png")
    assert str(caught.value) == f"there is no such image file. Received: {gone!r}."
