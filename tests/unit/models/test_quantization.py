"""QLoRA: refused before weights are loaded where it cannot run; asked for as transformers takes it.

No test here has bitsandbytes or a GPU; what runs on quantized weights is not covered.
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from vembed import config
from vembed.errors import ConfigError
from vembed.models import load_encoder
from vembed.models.quantization import check_quantization, quantization_options
from vembed.models.towers import HEADS
from vembed.training.model_builder import build_model

CONFIG = {"use_lora": True, "lora_quantization": "4bit"}


@pytest.fixture
def backend(monkeypatch):
    """As if bitsandbytes were installed, and a GPU there or not."""
    find, version = config.find_spec, importlib.metadata.version

    def install(*, gpu: bool) -> None:
        monkeypatch.setattr(
            config, "find_spec", lambda name: object() if name == "bitsandbytes" else find(name)
        )
        monkeypatch.setattr(
            importlib.metadata, "version",
            lambda name: "0.50" if name == "bitsandbytes" else version(name),
        )  # fmt: skip
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)

    return install


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lora_quantization: 4bit needs the package bitsandbytes"):
        # There is no such model: it is not looked for.
        build_model({**CONFIG, "model_name": "/nowhere"})


def test_without_a_gpu(backend):
    backend(gpu=False)
    with pytest.raises(ConfigError, match=r"needs a GPU\. Received: a machine without one"):
        build_model({**CONFIG, "model_name": "/nowhere"})
    backend(gpu=True)
    with pytest.raises(ConfigError, match=r"quantized weights need a GPU, but device is cpu"):
        build_model({**CONFIG, "model_name": "/nowhere", "device": "cpu"})
    check_quantization("4bit")


def test_transformers_is_asked_for_it(backend, monkeypatch, tiny_bert_path):
    from vembed.models import weights

    backend(gpu=True)
    seen = {}
    load = weights.AutoModel.from_pretrained

    def spy(*args, quantization_config=None, **options):
        seen["config"] = quantization_config
        return load(*args, **options)

    monkeypatch.setattr(weights.AutoModel, "from_pretrained", spy)
    load_encoder(str(tiny_bert_path), quantization="4bit", torch_dtype="bfloat16")
    asked = seen["config"]
    assert (asked.load_in_4bit, asked.load_in_8bit) == (True, False)
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == ("nf4", True)
    assert asked.bnb_4bit_compute_dtype is torch.bfloat16
    assert set(asked.llm_int8_skip_modules) == set(HEADS), "heads train as they are"
    load_encoder(str(tiny_bert_path))
    assert seen["config"] is None


def test_types(backend):
    backend(gpu=True)
    assert quantization_options("8bit", "float32")["quantization_config"].load_in_8bit
    for name, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        options = quantization_options("4bit", name)
        assert options["quantization_config"].bnb_4bit_compute_dtype is dtype
