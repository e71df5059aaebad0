"""`dropout` reaches every dropout of every family, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from tests.unit.models.families import MODALITIES, family_path, items, load
from tests.unit.models.test_model_types import DERIVED, OWN_SIZES, SIZES
from vembed.errors import ConfigError
from vembed.models.model_types import BIDIRECTIONAL_MODEL_TYPES, CAUSAL_MODEL_TYPES
from vembed.training.dropout import set_dropout
from vembed.training.model_builder import build_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
# What the configs of transformers call it: hidden_dropout_prob, attention_dropout, attn_pdrop ...
OWN_NAMES = re.compile(r"^(?!classifier|seq_classif|summary|cls).*(dropout|pdrop)")


def tiny(model_type: str, **settings: object) -> nn.Module:
    sizes = {**SIZES, "vocab_size": 40, "pad_token_id": 0, **OWN_SIZES.get(model_type, {})}
    sizes = {name: size for name, size in sizes.items() if size is not DERIVED}
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 1)
    config = AutoConfig.for_model(model_type, **{**special, **sizes, **settings})
    torch.manual_seed(0)
    return AutoModel.from_config(config).train()


def hidden(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state


@pytest.mark.parametrize("model_type", BIDIRECTIONAL_MODEL_TYPES + CAUSAL_MODEL_TYPES)
def test_it_is_the_model_that_its_config_would_have_built(model_type):
    names = [n for n in AutoConfig.for_model(model_type).to_dict() if OWN_NAMES.match(n)]
    expected = tiny(model_type, **dict.fromkeys(names, 0.5))
    model = tiny(model_type, **dict.fromkeys(names, 0.0))
    assert names
    assert torch.equal(hidden(model, 1), hidden(model, 2))

    set_dropout(model, 0.5)
    assert torch.equal(hidden(model, 1), hidden(expected, 1))
    assert not torch.equal(hidden(model, 1), hidden(model, 2))
    set_dropout(model, 0.0)
    assert torch.equal(hidden(model, 1), hidden(model, 2))


def test_of_the_checkpoint_unless_it_is_set(tiny_bert_path):
    own = build_model({"model_name": str(tiny_bert_path)}).backbone
    other = build_model({"model_name": str(tiny_bert_path), "dropout": 0.25}).backbone

    def probabilities(model: nn.Module) -> set[float]:
        return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    assert (probabilities(own), probabilities(other)) == ({0.1}, {0.25})
    # The saved model says what it was trained with, as it would if the config had been changed.
    assert other.config.hidden_dropout_prob == 0.25
    assert other.config.classifier_dropout is None


def test_both_halves_of_a_model_with_two_configs():
    from transformers import CLIPConfig, CLIPModel

    sizes = {**SIZES, "num_hidden_layers": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 40}, vision_config=vision)
    model = CLIPModel(config)
    set_dropout(model, 0.5)
    layers = [model.text_model.encoder.layers[0], model.vision_model.encoder.layers[0]]
    assert [layer.self_attn.dropout for layer in layers] == [0.5, 0.5]
    assert model.config.text_config.attention_dropout == 0.5
    assert model.config.vision_config.attention_dropout == 0.5


def test_a_model_without_dropout_is_told_apart():
    with pytest.raises(ConfigError, match="Linear has no dropout"):
        set_dropout(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize("family", MODALITIES)
def test_of_every_family(family):
    encoder = load(family_path(family))

    def embed(letter: str, seed: int) -> torch.Tensor:
        inputs = encoder.processor(items(letter), role=None)
        torch.manual_seed(seed)
        with torch.no_grad():
            return encoder.train()(**inputs)

    for probability in (0.5, 0.0):
        for tower in encoder.towers:
            set_dropout(tower.backbone, probability)
        for letter in MODALITIES[family]:
            assert torch.equal(embed(letter, 1), embed(letter, 1))
            assert torch.equal(embed(letter, 1), embed(letter, 2)) == (probability == 0), letter
