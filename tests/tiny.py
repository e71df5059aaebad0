"""Tiny models, tokenizers and row files, built in milliseconds, loaded by the real code."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_COMMON = """
a about accept account after again air all animal answer apple apply area argument array ask at
author away baby back ball bank base be beach because before begin big bird blue board body book
box boy branch bread bridge bring brown build bus buy by cache call car card cat cause change
child city class clean clear close cloud code cold color column come common compute convert cook
copy count country create cup data date day deep delete desk dog door down dream drive dry early
earth east easy eat edge egg empty end error evening event example eye face fact fall family farm
fast field file find fire first fish floor flower fly food foot for forest form free friend from
fruit full game garden get girl give glass go gold good grass gray green group grow hand happy hat
have head heart heat heavy help high hill history home horse hot hour house how ice idea in index
input inside is iron island item join jump key kind king kitchen know lake land language large
last late law leaf learn left letter level life light line list little live load long look love
low machine make man map market milk mind mirror money moon morning mountain mouth move music name
near new night north number ocean of oil old on open order orange output page paint paper park
part path people person phone picture place plant play pocket point price print question quick
rain read red remove return river road rock room round run salt sand school sea search season see
seed sentence set sheep ship shoe short show side sign silver sing sister sky sleep slow small
snow soft soil song sort sound south space spring square star start station stone store storm
story street string strong sugar summer sun swim table tail talk tall teach test text the thing
time to town train tree turn under value village voice wait walk wall want warm wash watch water
week west wheel when white why wide wife wild wind window winter with woman wood word work world
write year yellow young zero
"""
WORDS = _COMMON.split()

PAIRS = [
    {"query": f"{adjective} {noun}", "positive": f"the {noun} is {adjective} and {extra}"}
    for adjective, noun, extra in [
        ("red", "apple", "sweet like sugar in the summer"),
        ("blue", "ocean", "deep"),
        ("green", "forest", "full of old trees, birds and wild animals near the river"),
        ("yellow", "sun", "warm in the morning"),
        ("white", "snow", "cold on the mountain"),
        ("gray", "cloud", "heavy before the storm"),
        ("brown", "horse", "fast when it runs over the grass field"),
        ("orange", "fruit", "on the kitchen table"),
        ("small", "mouse", "under the floor of the house at night"),
        ("big", "city", "loud: cars, buses and people in every street"),
        ("old", "book", "about the history of the king and his family"),
        ("young", "girl", "happy to learn a new song at school"),
        ("hot", "fire", "dry wood makes it strong"),
        ("cold", "ice", "hard as stone in winter"),
        ("tall", "tree", "its leaf falls late"),
        ("quick", "sort", "orders the array by value, in place"),
        ("empty", "string", "its length is zero"),
        ("large", "file", "read line by line to save space"),
        ("open", "door", "lets the wind in"),
        ("round", "wheel", "turns on the road"),
        ("soft", "voice", "easy to talk with"),
        ("heavy", "iron", "kept in the store at the station"),
        ("silver", "moon", "in the night sky over the lake"),
        ("wild", "sheep", "on the hill in the north"),
    ]
]
"""Text pairs with words in common, which even an untrained tiny model can learn to tell apart."""


def tiny_bert(path: str | Path, *, hidden_size: int = 32, seed: int = 0, **config: Any) -> Path:
    """A BertModel (pooler, dropout 0.1, 128 positions) and its WordPiece tokenizer, at `path`."""
    from transformers import BertConfig, BertModel

    tokenizer = wordpiece_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        **_WIDE_INIT,
        **config,
    }
    return _save(path, BertModel, BertConfig(**settings), tokenizer, seed)


def tiny_modernbert(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A ModernBertModel (one global, one local layer) and a WordPiece tokenizer, at `path`."""
    from transformers import ModernBertConfig, ModernBertModel

    tokenizer = wordpiece_tokenizer(token_type_ids=False)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        **_WIDE_INIT,
        **config,
    }
    return _save(path, ModernBertModel, ModernBertConfig(**settings), tokenizer, seed)


def tiny_qwen3(
    path: str | Path,
    *,
    append_eos: bool = True,
    padding_side: str = "left",
    causal_lm_head: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A Qwen3 decoder and its byte-level BPE tokenizer, saved at `path`.

    Args:
        path: Folder to write.
        append_eos: Whether the tokenizer's post-processor appends EOS, as Qwen3-Embedding's does;
            Qwen3's does not.
        padding_side: Written into the tokenizer's settings.
        causal_lm_head: Save a Qwen3ForCausalLM rather than a Qwen3Model.
        seed: Of the random weights.
        config: Overrides of Qwen3Config.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = byte_level_tokenizer(append_eos=append_eos, padding_side=padding_side)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_WIDE_INIT,
        **config,
    }
    model = Qwen3ForCausalLM if causal_lm_head else Qwen3Model
    return _save(path, model, Qwen3Config(**settings), tokenizer, seed)


def tiny_sentence_transformer(
    path: str | Path,
    *,
    backbone: str | Path | None = None,
    pooling: str = "mean",
    normalize: bool = True,
    dense_features: int | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_seq_length: int | None = 64,
) -> Path:
    """A folder written by sentence-transformers itself.

    Args:
        path: Folder to write.
        backbone: Model folder to start from; None builds a tiny BERT beside `path`.
        pooling: A pooling mode by sentence-transformers' own name, such as `"lasttoken"`.
        normalize: Whether a Normalize module closes the pipeline.
        dense_features: Output size of a Dense (tanh) module after pooling; None for no such module.
        prompts: Prompt texts by name.
        default_prompt_name: The prompt used when none is asked for.
        max_seq_length: Tokens kept of a text; None leaves it to the tokenizer.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    path = Path(path)
    backbone = tiny_bert(path.with_name(path.name + "-backbone")) if backbone is None else backbone
    transformer = Transformer(str(backbone), max_seq_length=max_seq_length)
    hidden_size = transformer.get_embedding_dimension()
    modules: list[torch.nn.Module] = [transformer, Pooling(hidden_size, pooling_mode=pooling)]
    if dense_features is not None:
        torch.manual_seed(0)
        modules.append(Dense(hidden_size, dense_features))
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(
        modules=modules,
        prompts=dict(prompts or {}),
        default_prompt_name=default_prompt_name,
        device="cpu",
    )
    model.save(str(path), create_model_card=False)
    return path


def wordpiece_tokenizer(*, token_type_ids: bool = True) -> Any:
    """A lower-casing WordPiece tokenizer: English letters, digits, punctuation and `WORDS`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits
    pieces = [*special, *characters, *(f"##{c}" for c in characters), *string.punctuation, "##s"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *WORDS]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = ["input_ids", *(["token_type_ids"] if token_type_ids else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=names,
    )


def byte_level_tokenizer(*, append_eos: bool = True, padding_side: str = "left") -> Any:
    """A byte-level BPE tokenizer: every byte a token, no merges, pad and EOS two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    eos, pad = "<|im_end|>", "<|endoftext|>"
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, pad, eos])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if append_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}",
            pair=f"$A {eos} $B:1 {eos}:1",
            special_tokens=[(eos, vocabulary[eos])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        padding_side=padding_side,
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file with one line per row."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pairs(path: str | Path, count: int = len(PAIRS)) -> Path:
    """The first `count` of `PAIRS` as JSONL."""
    return write_rows(path, PAIRS[:count])


def write_beir(folder: str | Path) -> Path:
    """A BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv) made of `PAIRS`."""
    folder = Path(folder)
    write_rows(
        folder / "corpus.jsonl",
        ({"_id": f"d{i}", "title": "", "text": p["positive"]} for i, p in enumerate(PAIRS)),
    )
    write_rows(
        folder / "queries.jsonl",
        ({"_id": f"q{i}", "text": p["query"]} for i, p in enumerate(PAIRS)),
    )
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(len(PAIRS)))
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


# transformers' usual 0.02 leaves a tiny model almost linear: attention must matter for a masking
# bug to show.
_WIDE_INIT = {"initializer_range": 0.2}


def _save(path: str | Path, model_class: Any, config: Any, tokenizer: Any, seed: int) -> Path:
    import torch

    path = Path(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
