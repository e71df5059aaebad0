"""Tiny models, tokenizers and row files, built in milliseconds, loaded by the real code."""

from __future__ import annotations

import functools
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


def tiny_cross_encoder(
    path: str | Path, *, labels: int = 1, seed: int = 0, family: str = "Bert", max_length: int = 128
) -> Path:
    """A BERT, or one of its kin, for sequence classification: a query and a document to a score."""
    import transformers

    tokenizer = wordpiece_tokenizer(token_type_ids=family == "Bert", max_length=max_length)
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=labels,
        pad_token_id=tokenizer.pad_token_id, **_WIDE_INIT,
    )  # fmt: skip
    model_class = getattr(transformers, f"{family}ForSequenceClassification")
    return _save(path, model_class, settings, tokenizer, seed)


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


def tiny_clip(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A CLIPModel (16 patches of 8 x 8 pixels, 40 tokens), its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = wordpiece_tokenizer(token_type_ids=False, max_length=40)
    settings = {
        "text_config": {**_TOWER, **_special_tokens(tokenizer), "projection_dim": 16},
        "vision_config": {**_TOWER, **_PATCHES, "projection_dim": 16},
        "projection_dim": 16,
        "initializer_factor": 4.0,
        **config,
    }
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return _save(path, CLIPModel, CLIPConfig(**settings), tokenizer, seed, images=images)


def tiny_siglip(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A SiglipModel, which pads every text to 24 tokens, its tokenizer and image processor."""
    from transformers import SiglipConfig, SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = wordpiece_tokenizer(token_type_ids=False, max_length=24)
    settings = {
        "text_config": {**_TOWER, **_special_tokens(tokenizer), "max_position_embeddings": 24},
        "vision_config": {**_TOWER, **_PATCHES},
        **config,
    }
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(path, SiglipModel, SiglipConfig(**settings), tokenizer, seed, images=images)


def tiny_siglip2(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A Siglip2Model, which cuts an image of any shape into at most 16 patches of 8 x 8 pixels."""
    from transformers import Siglip2Config, Siglip2Model
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    tokenizer = wordpiece_tokenizer(token_type_ids=False, max_length=24)
    settings = {
        "text_config": {**_TOWER, **_special_tokens(tokenizer), "max_position_embeddings": 24},
        "vision_config": {**_TOWER, "patch_size": 8, "num_patches": 16},
        **config,
    }
    images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return _save(path, Siglip2Model, Siglip2Config(**settings), tokenizer, seed, images=images)


def tiny_vit(path: str | Path, *, pooler: bool = True, seed: int = 0, **config: Any) -> Path:
    """A ViTModel of 16 patches, with or without the head that it was pre-trained with."""
    from transformers import ViTConfig, ViTModel

    settings = {**_TOWER, **_PATCHES, **_WIDE_INIT, **config}
    build = functools.partial(ViTModel, add_pooling_layer=pooler)
    return _save(path, build, ViTConfig(**settings), None, seed, images=_vit_images())


def tiny_dinov2(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A Dinov2Model of 16 patches; images are resized and then cropped."""
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    settings = {**_TOWER, **_PATCHES, **_WIDE_INIT, **config}
    images = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    return _save(path, Dinov2Model, Dinov2Config(**settings), None, seed, images=images)


def tiny_dinov2_with_registers(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A Dinov2WithRegistersModel of 16 patches and 4 registers."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    settings = Dinov2WithRegistersConfig(**{**_TOWER, **_PATCHES, **_WIDE_INIT, **config})
    return _save(path, Dinov2WithRegistersModel, settings, None, seed, images=_vit_images())


def tiny_dinov3(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A DINOv3ViTModel of 16 patches and 4 registers, with ViT's image processor.

    Its own image processor needs torchvision. Positions are not stretched at random in training, as
    published ones are.
    """
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    settings = {
        **_TOWER,
        **_PATCHES,
        **_WIDE_INIT,
        "num_register_tokens": 4,
        "pos_embed_rescale": None,
        **config,
    }
    return _save(
        path, DINOv3ViTModel, DINOv3ViTConfig(**settings), None, seed, images=_vit_images()
    )


def tiny_mae(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A ViTMAEForPreTraining of 16 patches, three quarters of which it hides by its config."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    settings = {
        **_TOWER, **_PATCHES, **_WIDE_INIT,
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, **config,
    }  # fmt: skip
    model = ViTMAEForPreTraining
    return _save(path, model, ViTMAEConfig(**settings), None, seed, images=_vit_images())


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""How Qwen-VL renders a conversation."""


def tiny_qwen2_vl(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A Qwen2VLForConditionalGeneration: 4 x 4 pixel patches, merged 2 x 2 to a token."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen_vl(
        path,
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        vision=vision,
        sections=[1, 1, 2],
        seed=seed,
        config=config,
    )


def tiny_qwen2_5_vl(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A Qwen2_5_VLForConditionalGeneration with a layer of windowed attention."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
        "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen_vl(
        path,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        vision=vision,
        sections=[1, 1, 2],
        seed=seed,
        config=config,
    )


def tiny_qwen3_vl(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A Qwen3VLForConditionalGeneration, one of whose vision layers feeds the text model."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
        "intermediate_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen_vl(
        path,
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        vision=vision,
        sections=[2, 1, 1],
        seed=seed,
        config=config,
    )


def tiny_llava(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """A LlavaForConditionalGeneration: a CLIP tower, whose last layer is not used, and a Llama.

    Its processor is read by AutoProcessor.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {**_TOWER, **_special_tokens(tokenizer), **_WIDE_INIT, "max_position_embeddings": 256}
    vision = {**_TOWER, **_PATCHES, "model_type": "clip_vision_model", "initializer_factor": 4.0}
    settings = {
        "text_config": {"model_type": "llama", **text},
        "vision_config": vision,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": 16,
        **_WIDE_INIT,
        **config,
    }
    edges = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=edges),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<image>\n"
        ),
    )
    model = LlavaForConditionalGeneration
    return _save(path, model, LlavaConfig(**settings), processor, seed)


def _qwen_vl(
    path: str | Path,
    model_class: Any,
    config_class: Any,
    *,
    vision: dict[str, Any],
    sections: list[int],
    seed: int,
    config: dict[str, Any],
) -> Path:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = chat_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    text = {
        **_TOWER, **_special_tokens(tokenizer), **_WIDE_INIT,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
    }  # fmt: skip
    if config_class.__name__ != "Qwen3VLConfig":
        del text["head_dim"]
    settings = {
        "text_config": text,
        "vision_config": {"patch_size": 4, **vision, **_WIDE_INIT},
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        **config,
    }
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 24 * 24}
    )
    return _save(path, model_class, config_class(**settings), tokenizer, seed, images=images)


def chat_tokenizer(*, padding_side: str = "left") -> Any:
    """A byte-level tokenizer with the tokens and the chat template of Qwen-VL."""
    tokenizer = byte_level_tokenizer(append_eos=False, padding_side=padding_side, max_length=256)
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, "<|video_pad|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_composed(
    path: str | Path, *, text: str | Path | None = None, image: str | Path | None = None
) -> Path:
    """A text and an image encoder put together: a BERT and a ViT, or those in two folders.

    The BERT has no dropout.
    """
    import torch

    from vembed.models import compose_encoder

    path = Path(path)
    if text is None:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        text = tiny_bert(path.with_name(f"{path.name}-text"), **quiet)
    image = tiny_vit(path.with_name(f"{path.name}-image")) if image is None else image
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = compose_encoder(
            text_model_name=str(text), image_model_name=str(image), projection_dim=16
        )
    encoder.save_pretrained(path)
    return path


def tiny_images(count: int = 4) -> list[Any]:
    """Pictures as `ImageBytes`, of several shapes and no two alike."""
    import io

    import numpy as np
    from PIL import Image

    from vembed.images import ImageBytes

    images = []
    for number in range(count):
        height, width = 20 + 12 * (number % 3), 44 - 20 * (number % 2)
        rows, columns = np.mgrid[:height, :width]
        waves = [
            np.sin(rows / (2 + number) + shift) + np.cos(columns / (3 + shift) + number)
            for shift in range(3)
        ]
        pixels = np.stack(waves, axis=-1) * 60 + 128
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
        images.append(ImageBytes(file.getvalue()))
    return images


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


def wordpiece_tokenizer(*, token_type_ids: bool = True, max_length: int = 128) -> Any:
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
        model_max_length=max_length,
        model_input_names=names,
    )


def byte_level_tokenizer(
    *, append_eos: bool = True, padding_side: str = "left", max_length: int = 128
) -> Any:
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
        model_max_length=max_length,
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


_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_PATCHES = {"image_size": 32, "patch_size": 8}


def _vit_images() -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """What a text config must know of a tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }


# transformers' usual 0.02 leaves a tiny model almost linear: attention must matter for a masking
# bug to show.
_WIDE_INIT = {"initializer_range": 0.2}


def _save(
    path: str | Path,
    model_class: Any,
    config: Any,
    tokenizer: Any,
    seed: int,
    *,
    images: Any = None,
) -> Path:
    import torch

    path = Path(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(path)
    for processor in (tokenizer, images):
        if processor is not None:
            processor.save_pretrained(path)
    return path
