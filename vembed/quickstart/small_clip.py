"""A CLIP small enough to train from scratch on a CPU, as an ordinary folder of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_TOKENS = 32
_VOCABULARY = 1500


def write_small_clip(
    folder: Path,
    *,
    texts: Sequence[str],
    image_size: int,
    patch_size: int = 8,
    size: int = 128,
    text_layers: int = 1,
    image_layers: int = 3,
    seed: int = 0,
) -> Path:
    """Write an untrained CLIP, its tokenizer trained on `texts`, and its image processor.

    Args:
        folder: Where to; is created.
        texts: What the tokenizer learns its pieces from.
        image_size: Width and height of images, in pixels; others are scaled to it.
        patch_size: Width and height of what the image tower reads as one token.
        size: Of hidden states and embeddings.
        text_layers: Of the text tower.
        image_layers: Of the image tower.
        seed: Of the weights.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = train_tokenizer(texts)
    tower = {
        "hidden_size": size,
        "intermediate_size": 4 * size,
        "num_attention_heads": max(1, size // 32),
        "projection_dim": size,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "num_hidden_layers": text_layers,
            "max_position_embeddings": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **tower,
            "num_hidden_layers": image_layers,
            "image_size": image_size,
            "patch_size": patch_size,
        },
        projection_dim=size,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
    edge = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(size=edge, crop_size=edge)
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    return folder


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A lower-casing byte-pair tokenizer of transformers that closes each text with its end token.

    CLIP's text tower reads what stands at the first end token.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=list(special.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_TOKENS, **special)
