from __future__ import annotations

import pickle

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

from tests.tiny import byte_level_tokenizer, wordpiece_tokenizer
from vembed.errors import ConfigError, DataError
from vembed.models.processor import (
    TextProcessor,
    append_end_token,
    ends_with_special_token,
    lower_case,
)
from vembed.modes import Item


def items(*texts):
    return [Item(text=text) for text in texts]


def processor(**options):
    return TextProcessor(wordpiece_tokenizer(), **{"max_seq_length": 16, **options})


def decoded(processor, inputs):
    return [
        processor.tokenizer.decode(row, skip_special_tokens=True) for row in inputs["input_ids"]
    ]


def test_each_role_has_its_prompt():
    process = processor(query_prompt="find ", document_prompt="page ", default_prompt="any ")

    assert decoded(process, process(items("a dog"), role="query")) == ["find a dog"]
    assert decoded(process, process(items("a dog"), role="document")) == ["page a dog"]
    assert decoded(process, process(items("a dog"), role=None)) == ["any a dog"]


def test_an_item_can_have_a_prompt_of_its_own_or_none():
    process = processor(query_prompt="find ")
    inputs = process(items("a dog", "a cat", "a cow"), role="query", prompts=[None, "", "see "])
    assert decoded(process, inputs) == ["find a dog", "a cat", "see a c ##o ##w".replace(" ##", "")]


def test_prompts_must_be_as_many_as_items():
    with pytest.raises(ValueError, match="longer"):
        processor()(items("a", "b"), role="query", prompts=["x"])


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_end_token(append_eos, side):
    tokenizer = byte_level_tokenizer(append_eos=append_eos, padding_side=side)
    if not append_eos:
        append_end_token(tokenizer)
    process = TextProcessor(tokenizer, max_seq_length=8)

    inputs = process(items("a text of more than eight bytes", "ab", ""), role="document")

    assert inputs["input_ids"].shape == (3, 8)
    assert inputs["attention_mask"].sum(1).tolist() == [8, 3, 1]
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert ids[mask.bool()][-1] == tokenizer.eos_token_id


def test_an_appended_end_token_comes_once_and_is_saved(tmp_path):
    tokenizer = byte_level_tokenizer(append_eos=False)
    assert not ends_with_special_token(tokenizer)
    append_end_token(tokenizer)
    assert ends_with_special_token(tokenizer)
    TextProcessor(tokenizer, max_seq_length=8).save_pretrained(str(tmp_path))

    again = AutoTokenizer.from_pretrained(tmp_path)

    assert again("ab")["input_ids"] == [*tokenizer("ab", add_special_tokens=False)["input_ids"]] + [
        tokenizer.eos_token_id
    ]
    assert again.model_max_length == 8
    assert ends_with_special_token(wordpiece_tokenizer())


@pytest.mark.parametrize("in_sequence", [True, False])
def test_a_begin_token_stays_when_an_end_token_is_appended(in_sequence, tmp_path):
    tokenizer = byte_level_tokenizer(append_eos=False)
    begin, begin_id = tokenizer.pad_token, tokenizer.pad_token_id
    template = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, begin_id)]
    )
    tokenizer.backend_tokenizer.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        if in_sequence
        else template
    )
    append_end_token(tokenizer)
    process = TextProcessor(tokenizer, max_seq_length=4)
    process.save_pretrained(str(tmp_path))

    ids = process(items("abcdef"), role="query")["input_ids"][0].tolist()

    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert ids == [begin_id, a, b, tokenizer.eos_token_id]
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved("abcdef", truncation=True)["input_ids"] == ids


def test_an_end_token_is_appended_in_tokenizer_classes_of_their_own(tmp_path):
    """Those that build their post-processor themselves must not lose it on loading."""
    alphabet = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "a", "b", "<pad>"])}
    for tokenizer_class in (LlamaTokenizer, Qwen2Tokenizer, GemmaTokenizer):
        tokenizer = tokenizer_class(
            vocab=alphabet, merges=[], eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        if not ends_with_special_token(tokenizer):
            append_end_token(tokenizer)
        folder = tmp_path / tokenizer_class.__name__
        TextProcessor(tokenizer, max_seq_length=8).save_pretrained(str(folder))
        again = AutoTokenizer.from_pretrained(folder)
        assert again("ab")["input_ids"] == tokenizer("ab")["input_ids"]
        assert again("ab")["input_ids"].count(again.eos_token_id) == 1


def test_a_tokenizer_without_end_token_cannot_get_one():
    tokenizer = byte_level_tokenizer(append_eos=False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        append_end_token(tokenizer)


def test_lower_casing_is_part_of_the_tokenizer():
    tokenizer = byte_level_tokenizer()
    lower_case(tokenizer)
    assert tokenizer("A Dog")["input_ids"] == tokenizer("a dog")["input_ids"]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (Item(text=None), "a text is expected"),
        (Item(text=3), "a text is expected"),
        (Item(text="a", image="a.png"), "embeds text only"),
    ],
)
def test_what_is_not_a_text_is_an_error(item, says):
    with pytest.raises(DataError, match=says):
        processor()([item], role="query")


def test_a_text_without_tokens_is_an_error_and_one_with_end_token_is_not():
    bare = TextProcessor(byte_level_tokenizer(append_eos=False), max_seq_length=8)
    with pytest.raises(DataError, match="gives no token"):
        bare(items("a", ""), role="query")
    assert processor()(items(""), role="query")["attention_mask"].tolist() == [[1, 1]]


def test_a_length_that_leaves_no_room_for_text_is_an_error():
    with pytest.raises(ConfigError, match="2 special tokens"):
        processor(max_seq_length=2)


def test_saving_writes_the_same_bytes_whatever_was_tokenised_before(tmp_path):
    process = processor()
    process.save_pretrained(str(tmp_path / "before"))
    process(items("a", "a b c"), role="query")
    process.save_pretrained(str(tmp_path / "after"))

    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name


def test_it_travels_to_worker_processes():
    process = processor(query_prompt="find ")
    copied = pickle.loads(pickle.dumps(process))
    assert decoded(copied, copied(items("a dog"), role="query")) == ["find a dog"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fixed", [False, True])
def test_padding_is_that_of_the_tokenizer(side, fixed):
    texts = ["red apple", "a", "the big old house on the hill in the north"]
    names = ["input_ids", "token_type_ids", *([] if fixed else ["attention_mask"])]
    tokenizer = wordpiece_tokenizer()
    tokenizer.padding_side = side
    tokenizer._pad_token_type_id = 2
    expected = tokenizer(
        texts,
        padding="max_length" if fixed else True,
        truncation=True,
        max_length=8,
        return_tensors="pt",
    )
    made = TextProcessor(tokenizer, max_seq_length=8, input_names=names, fixed_length=fixed)
    inputs = made([Item(text) for text in texts], role=None)
    assert list(inputs) == names
    for name, tensor in inputs.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
