"""Every listed model type is loaded, saved, and compared with itself in other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.tiny import byte_level_tokenizer, wordpiece_tokenizer
from vembed.inference import encode_items
from vembed.models import load_encoder
from vembed.models.model_types import (
    BIDIRECTIONAL_MODEL_TYPES,
    CAUSAL_MODEL_TYPES,
    attends_causally,
)
from vembed.modes import Item

TEXTS = [
    "the quick brown fox jumps over the dog",
    "a dog",
    "the moon is in the night sky and the sun is not",
    "moon",
]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 140,
    "initializer_range": 0.2,
}
DERIVED = object()  # computed by the config itself, which takes no value for it
OWN_SIZES = {
    "albert": {"embedding_size": 16},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "falcon": {"head_dim": DERIVED, "num_key_value_heads": DERIVED},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 140},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "ministral": {"sliding_window": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
}


def save_tiny(folder, model_type):
    causal = model_type in CAUSAL_MODEL_TYPES
    tokenizer = byte_level_tokenizer(append_eos=False) if causal else wordpiece_tokenizer()
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sizes = {**SIZES, **special, **OWN_SIZES.get(model_type, {})}
    config = AutoConfig.for_model(
        model_type, **{name: size for name, size in sizes.items() if size is not DERIVED}
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("model_type", BIDIRECTIONAL_MODEL_TYPES + CAUSAL_MODEL_TYPES)
def test_batch_padding_and_saving_change_no_vector(model_type, tmp_path):
    save_tiny(tmp_path / "model", model_type)
    encoder = load_encoder(str(tmp_path / "model"))
    items = [Item(text=text) for text in TEXTS]

    together = encode_items(encoder, items, role="document")
    alone = np.concatenate([encode_items(encoder, [item], role="document") for item in items])
    encoder.save_pretrained(tmp_path / "saved")
    again = encode_items(load_encoder(str(tmp_path / "saved")), items, role="document")

    assert together.shape == (4, 32)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together, again, atol=1e-7)
    similarity = together @ together.T - np.eye(4)
    assert similarity.max() < 0.9999, "two different texts have the same vector"


@pytest.mark.parametrize("model_type", BIDIRECTIONAL_MODEL_TYPES + CAUSAL_MODEL_TYPES)
def test_every_trainable_parameter_gets_a_gradient(model_type, tmp_path):
    save_tiny(tmp_path, model_type)
    encoder = load_encoder(str(tmp_path))
    inputs = encoder.processor([Item(text=text) for text in TEXTS], role="query")

    encoder.train()(**inputs).square().sum().backward()

    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model_type", BIDIRECTIONAL_MODEL_TYPES + CAUSAL_MODEL_TYPES)
def test_the_listed_attention_is_the_one_the_model_has(model_type, tmp_path):
    """Change the last token: the tokens before it notice, unless the model is causal."""
    save_tiny(tmp_path, model_type)
    encoder = load_encoder(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        hidden = encoder.backbone(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        ).last_hidden_state

    unchanged = torch.allclose(hidden[0, :3], hidden[1, :3], atol=1e-6)

    assert unchanged == attends_causally(encoder.backbone.config.to_dict())
    assert unchanged == (model_type in CAUSAL_MODEL_TYPES)
