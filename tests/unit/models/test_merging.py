"""Copies of models with adapters. Merging itself: tests/unit/training/test_adapters.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel

from tests.unit.models.families import (
    MODALITIES,
    family_path,
    items,
    load,
    make_trainer,
    vectors,
    whole_mode,
)
from tests.unit.training.test_adapters import CONFIG, shake
from tests.unit.training.test_dropout import IDS
from vembed.models.merging import copy_to_cpu, merged, plain_copy
from vembed.training.adapters import adapt
from vembed.training.checkpoint import save_checkpoint


def hidden(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).last_hidden_state


def test_adapters_of_quantized_weights_are_merged_into_those_of_the_checkpoint(tiny_bert_path):
    expected = adapt(AutoModel.from_pretrained(tiny_bert_path), CONFIG)
    expected.get_base_model().pooler = None
    quantized = adapt(AutoModel.from_pretrained(tiny_bert_path), CONFIG)
    quantized.get_base_model().pooler = None
    for model in (expected, quantized):
        shake(model)
    # Stand-ins for quantization: the mark that transformers leaves, and weights that were rounded.
    quantized.get_base_model().hf_quantizer = object()
    for name, parameter in quantized.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.round(decimals=1)
    assert not torch.allclose(hidden(quantized), hidden(expected), atol=1e-2)

    copied = plain_copy(quantized)
    assert torch.equal(hidden(copied), hidden(expected))
    torch.testing.assert_close(hidden(merged(quantized)), hidden(expected), rtol=0, atol=1e-5)
    assert copied.get_base_model().pooler is None


@pytest.mark.parametrize("family", ["clip", "mae", "composed", "qwen3_vl"])
def test_of_quantized_models_of_every_kind_the_rest_is_kept(family, tmp_path):
    """Settings that loading changed, heads, and a temperature that the loss learned."""
    trainer = make_trainer(family_path(family), whole_mode(family), tmp_path, use_lora=True)
    encoder = trainer.model.eval()
    shake(encoder, std=0.05)
    if family == "clip":
        encoder.set_logits(logit_scale=torch.tensor(1.5))
    expected = [vectors(encoder, items(letter)) for letter in MODALITIES[family]]
    for tower in encoder.towers:
        tower.backbone.get_base_model().hf_quantizer = object()
        for name, parameter in tower.backbone.named_parameters():
            if "base_layer.weight" in name:
                parameter.data = parameter.data.round(decimals=1)
    rough = [vectors(encoder, items(letter)) for letter in MODALITIES[family]]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(rough, expected, strict=True))

    save_checkpoint(tmp_path / "saved", encoder, trainer.accelerator)
    saved = load(tmp_path / "saved")
    for letter, vector in zip(MODALITIES[family], expected, strict=True):
        np.testing.assert_allclose(vectors(saved, items(letter)), vector, atol=1e-5)
    assert family != "clip" or saved.logits["logit_scale"] == 1.5


def test_a_model_without_adapters_is_not_copied(tiny_bert_path):
    model = AutoModel.from_pretrained(tiny_bert_path)
    assert merged(model) is model


def test_a_copy_shares_nothing_but_what_is_replaced():
    model = nn.Module()
    model.own, model.other, model.tokenizer = nn.BatchNorm1d(2), nn.Linear(2, 2), object()
    model.own.weight.requires_grad_(False)
    other, tokenizer = nn.Linear(2, 2), object()
    copied = copy_to_cpu(model, {id(model.other): other, id(model.tokenizer): tokenizer})
    assert copied.other is other
    assert copied.tokenizer is tokenizer
    assert [p.requires_grad for p in copied.own.parameters()] == [False, True]
    theirs = copied.own.state_dict()
    for name, mine in model.own.state_dict().items():
        assert torch.equal(mine, theirs[name])
        assert mine.data_ptr() != theirs[name].data_ptr()
