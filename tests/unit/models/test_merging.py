"""Copies of models with adapters. Merging itself: tests/unit/training/test_adapters.py."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel

from tests.unit.training.test_adapters import CONFIG, shake
from tests.unit.training.test_dropout import IDS
from vembed.models.merging import copy_to_cpu, merged, plain_copy
from vembed.training.adapters import adapt


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
