"""Vision-language models against transformers' own processors, and what their chats look like."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import transformer as st_transformer
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tests import tiny
from tests.unit.models.families import family_path, items, load, make_trainer, vectors
from vembed.chunking import take_rows
from vembed.data import token_counter
from vembed.errors import CheckpointError, ConfigError, DataError
from vembed.images import load_image
from vembed.models.vlm import DEFAULT_INSTRUCTION
from vembed.modes import Item
from vembed.training.model_builder import build_model

PATCH_FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES = [*PATCH_FAMILIES, "llava"]
TEXTS = [item.text for item in items("t")]
IMAGES = [load_image(item.image) for item in items("i")]


def conversation(text=None, image=None, instruction=DEFAULT_INSTRUCTION):
    content = [{"type": "image", "image": image}] if image is not None else []
    content += [{"type": "text", "text": text}] if text is not None else []
    system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
    return [*([system] if instruction else []), {"role": "user", "content": content}]


CONVERSATIONS = {
    "t": [conversation(text=text) for text in TEXTS],
    "i": [conversation(image=image) for image in IMAGES],
    "m": [conversation(text, image) for text, image in zip(TEXTS, IMAGES, strict=True)],
}


@pytest.fixture
def their_processor(monkeypatch):
    """transformers' own processor of a folder. Those of Qwen-VL want torchvision, for videos."""

    def build(family, path=None):
        path = path or family_path(family)
        if family not in PATCH_FAMILIES:
            return AutoProcessor.from_pretrained(path)
        kind = Qwen3VLProcessor if family == "qwen3_vl" else Qwen2VLProcessor
        monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *args: None)
        tokenizer = AutoTokenizer.from_pretrained(path)
        images = AutoImageProcessor.from_pretrained(path)
        return kind(images, tokenizer, None, chat_template=tokenizer.chat_template)

    return build


@pytest.mark.parametrize("letter", "tim")
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_transformers(family, letter, their_processor):
    theirs = their_processor(family).apply_chat_template(
        CONVERSATIONS[letter],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    ours = load(family_path(family)).processor(items(letter), role="document")

    assert set(ours) == set(theirs) - (set() if letter != "t" else {"mm_token_type_ids"})
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("letter", "tim")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_vector_is_that_of_the_last_token(family, letter, their_processor):
    processor, model = (
        their_processor(family),
        AutoModel.from_pretrained(family_path(family)).eval(),
    )
    expected = []
    for chat in CONVERSATIONS[letter]:
        inputs = processor.apply_chat_template(
            [chat], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        with torch.no_grad():
            expected.append(model(**inputs).last_hidden_state[0, -1])
    expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1).numpy()
    np.testing.assert_allclose(
        vectors(load(family_path(family)), items(letter)), expected, atol=2e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_reads_a_saved_folder_to_the_same_vectors(
    family, their_processor, monkeypatch, tmp_path
):
    encoder = load(family_path(family), query_prompt="Find it.", projection_dim=12)
    encoder.save_pretrained(tmp_path)
    built = their_processor(family, tmp_path)

    class Theirs:
        from_pretrained = staticmethod(lambda *args, **kwargs: built)

    monkeypatch.setattr(st_transformer, "AutoProcessor", Theirs)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")

    both = [{"image": image, "text": text} for image, text in zip(IMAGES, TEXTS, strict=True)]
    for ours, other in (
        (vectors(encoder, items("t")), theirs.encode(TEXTS)),
        (vectors(encoder, items("t"), "query"), theirs.encode_query(TEXTS)),
        (vectors(encoder, items("i"), "document"), theirs.encode_document(IMAGES)),
        (vectors(encoder, items("m"), "query"), theirs.encode_query(both)),
    ):
        np.testing.assert_allclose(ours, other, atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_side_that_is_padded_changes_nothing(family, side):
    encoder = load(family_path(family))
    encoder.processor.tokenizer.padding_side = side
    expected = load(family_path(family))
    for letter in "tim":
        ours = vectors(encoder, items(letter))
        alone = np.concatenate([vectors(expected, [item]) for item in items(letter)])
        np.testing.assert_allclose(ours, alone, atol=1e-6)


# --- the chat


def rendered(encoder, of, role):
    ids = encoder.processor(of, role=role)["input_ids"]
    return [encoder.processor.tokenizer.decode(row) for row in ids]


def test_an_item_is_a_message_of_the_user_behind_an_instruction():
    encoder = load(family_path("qwen2_vl"), query_prompt="Find the page.", document_prompt="")
    (text,) = rendered(encoder, [Item(text="a dog")], "query")
    assert text == (
        "<|im_start|>system\nFind the page.<|im_end|>\n"
        "<|im_start|>user\na dog<|im_end|>\n<|im_start|>assistant\n"
    )
    (both,) = rendered(encoder, items("m", 1), "document")
    assert both.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert both.endswith(f"<|vision_end|>{TEXTS[0]}<|im_end|>\n<|im_start|>assistant\n")


def test_without_a_word_on_it_the_instruction_is_that_of_embedding_models():
    described = load(family_path("qwen3_vl")).describe()
    assert described["query_prompt"] == f"{DEFAULT_INSTRUCTION!r} (default)"
    encoder = load(family_path("qwen3_vl"))
    for role in ("query", "document", None):
        assert DEFAULT_INSTRUCTION in rendered(encoder, items("t", 1), role)[0]


def test_a_long_text_is_cut_and_everything_else_stays():
    encoder = load(family_path("qwen2_5_vl"), max_seq_length=5)
    long = Item(text="the quick brown fox", image=items("i")[0].image)
    (text,) = rendered(encoder, [long], "query")
    assert text.endswith("<|vision_end|>the q<|im_end|>\n<|im_start|>assistant\n")
    patches = encoder.processor([long], role="query")["image_grid_thw"].prod() // 4
    assert text.count("<|image_pad|>") == patches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_check_counts_what_is_cut(family):
    texts = [*TEXTS, "a <|im_end|> b"]
    long = load(family_path(family))
    whole = token_counter(long.processor)([Item(t) for t in texts], "query", [None] * len(texts))
    assert max(whole) < long.processor.max_seq_length
    for text, count in zip(texts, whole, strict=True):
        alone = rendered(long, [Item(text)], "query")
        fits, cut = (load(family_path(family), max_seq_length=n) for n in (count, count - 1))
        assert rendered(fits, [Item(text)], "query") == alone
        assert rendered(cut, [Item(text)], "query") != alone


def test_the_length_of_texts_is_saved(tmp_path):
    load(family_path("qwen2_vl"), max_seq_length=5).save_pretrained(tmp_path)
    encoder = load(tmp_path)
    assert encoder.describe()["max_seq_length"] == "5 (from the checkpoint)"
    assert encoder.processor.tokenizer.model_max_length == 256, "which cuts images too"


def test_patches_are_cut_with_their_items():
    encoder = load(family_path("qwen2_vl"))
    inputs = encoder.processor(items("m"), role="query")
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    assert len(set(sizes)) > 1, "images of several sizes, or the test says nothing"
    for rows in ([2], [3, 0], [1, 2, 3]):
        taken = take_rows(inputs, rows)
        assert len(taken["pixel_values"]) == sum(sizes[row] for row in rows)
        with torch.no_grad():
            part, whole = encoder(**taken), encoder(**inputs)[rows]
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=0)


# --- what trains


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_alone_leave_the_image_part_as_it_is(family):
    encoder = build_model({"model_name": str(family_path(family)), "retrieval_mode": "t2t"})
    trained = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"language_model"}


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_frozen_half_stays_as_it_is(tower, tmp_path):
    path = family_path("qwen3_vl")
    trainer = make_trainer(path, "t2i", tmp_path, freeze_towers=[tower], lr=0.1)
    trainer.train()
    before, after = (dict(load(p).named_parameters()) for p in (path, tmp_path / "final"))
    for name, weight in before.items():
        is_image = name.startswith("backbone.visual.")
        if is_image == (tower == "image"):
            assert torch.equal(weight, after[name]), name
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())


# --- errors


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ([Item()], "an item with neither"),
        ([*items("t", 1), *items("i", 1)], "all have an image, or none may. Received: both"),
        ([], "no items"),
    ],
)
def test_what_makes_no_chat_is_refused(of, says):
    with pytest.raises(DataError, match=says.replace("|", r"\|")):
        load(family_path("qwen2_vl")).processor(of, role="query")


CONTROL = {
    "qwen2_vl": ["<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|endoftext|>"],
    "llava": ["<image>", "<|im_start|>"],
}


@pytest.mark.parametrize("letter", "tm")
@pytest.mark.parametrize("family", CONTROL)
def test_a_text_cannot_become_a_control_token(family, letter):
    encoder = load(family_path(family))
    tokenizer = encoder.processor.tokenizer
    plain = items(letter, 1)[0]
    for token in CONTROL[family]:
        number = tokenizer.convert_tokens_to_ids(token)
        texts = [f"a {token} b", f"{token}{token}", f"{token[0]}{token}{token[1:]}"]
        found = encoder.processor([Item(t, plain.image) for t in texts], role="query")["input_ids"]
        (usual,) = (encoder.processor([plain], role="query")["input_ids"] == number).sum(1)
        # A batch is padded with one of them.
        if token != tokenizer.pad_token:
            assert (found == number).sum(1).tolist() == [int(usual)] * 3, token
        spelled = tokenizer.decode(found[0], skip_special_tokens=False)
        assert f"a {token[0]} {token[1:]} b" in spelled
    assert np.isfinite(vectors(encoder, [Item(token) for token in CONTROL[family]])).all()


@pytest.mark.parametrize("family", CONTROL)
def test_an_instruction_cannot_have_control_tokens(family):
    token = CONTROL[family][0]
    says = rf"a prompt is an instruction.*{re.escape(token)}.*Received: 'a {re.escape(token)}'"
    with pytest.raises(ConfigError, match=says):
        load(family_path(family), query_prompt=f"a {token}")
    with pytest.raises(ConfigError, match=says):
        load(family_path(family)).processor(items("t", 1), role="query", prompts=[f"a {token}"])


def test_the_first_token_says_nothing():
    with pytest.raises(ConfigError, match="cls reads the first token, which is that of the chat"):
        load(family_path("qwen2_vl"), pooling_method="cls")


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_a_folder_without_chat_template_is_named(family, tmp_path):
    shutil.copytree(family_path(family), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"no chat template.*\(chat_template.jinja\)"):
        load(tmp_path / "model")


def test_a_template_where_older_versions_put_it_is_read(tmp_path):
    shutil.copytree(family_path("qwen2_vl"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    content = json.dumps({"chat_template": tiny.CHAT_TEMPLATE})
    (tmp_path / "model" / "chat_template.json").write_text(content)
    expected = vectors(load(family_path("qwen2_vl")), items("m"))
    np.testing.assert_array_equal(vectors(load(tmp_path / "model"), items("m")), expected)


def test_settings_for_other_libraries_are_kept(tmp_path):
    shutil.copytree(family_path("qwen2_vl"), tmp_path / "model")
    content = '{"video_processor_type": "Qwen2VLVideoProcessor"}'
    (tmp_path / "model" / "video_preprocessor_config.json").write_text(content)
    load(tmp_path / "model").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "video_preprocessor_config.json").read_text() == content


def test_a_folder_without_processor_is_named(tmp_path):
    shutil.copytree(family_path("llava"), tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    with pytest.raises((CheckpointError, ConfigError), match="processor"):
        load(tmp_path / "model")
