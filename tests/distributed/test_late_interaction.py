"""Late interaction on two processes: what is encoded, and what training leaves, is that of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.launch import run_on_processes
from tests.tiny import PAIRS
from vembed import Predictor
from vembed.inference import encode_items
from vembed.models import load_encoder
from vembed.modes import Item
from vembed.token_vectors import TokenVectors
from vembed.training.evaluator import sharded_encode
from vembed.training.run import run_training

TEXTS = [pair["positive"] for pair in PAIRS[:7]]


@pytest.mark.parametrize("count", [7, 1])
def test_every_process_gets_the_tokens_of_all_items(tiny_bert_path, count):
    """With one item, the second process has none to encode."""
    texts = TEXTS[:count]
    encoder = load_encoder(str(tiny_bert_path), pooling_method="none")
    alone = list(encode_items(encoder, [Item(text) for text in texts], role="document"))
    for found in run_on_processes(_encode, 2, str(tiny_bert_path), texts):
        assert [array.shape for array in found] == [array.shape for array in alone]
        for array, expected in zip(found, alone, strict=True):
            np.testing.assert_allclose(array, expected, atol=2e-6)


def _encode(path: str, texts: list[str]) -> list[Any]:
    encoder = load_encoder(path, pooling_method="none")
    encode = sharded_encode(encoder, Accelerator(cpu=True))
    vectors = encode([Item(text) for text in texts], "document")
    assert isinstance(vectors, TokenVectors)
    return list(vectors)


def test_a_run_on_two_processes_is_that_on_one(tiny_bert_path, pairs_path, tmp_path):
    settings = {
        "model_name": str(tiny_bert_path),
        "data_path": str(pairs_path),
        "val_data_path": str(pairs_path),
        "pooling_method": "none",
        "projection_dim": 8,
        "loss_type": "maxsim",
        "use_gradient_cache": True,
        "gradient_cache_chunk_size": 3,
        "optimizer": "sgd",
        "lr": 0.1,
        "max_steps": 2,
        "holdout_ratio": 0,
        "device": "cpu",
        "progress": False,
    }
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    # Without dropout, which would draw other masks on each process.
    for_one = run_on_processes(_train, 1, {**settings, "batch_size": 8, "output_dir": one})
    for_two = run_on_processes(_train, 2, {**settings, "batch_size": 4, "output_dir": two})
    assert for_two == [pytest.approx(for_one[0], rel=1e-5)] * 2
    before, *after = (
        Predictor(path, device="cpu", pooling_method="none").encoder.state_dict()
        for path in (tiny_bert_path, f"{one}/final", f"{two}/final")
    )
    differences = [(after[0][n] - after[1][n]).abs().max() for n in after[0]]
    assert max(differences) < 2e-5
    assert max((after[0][n] - before[n]).abs().max() for n in before) > 1e-3


def _train(settings: dict[str, Any]) -> list[float]:
    from vembed.training import run

    build = run.build_model

    def without_dropout(config):
        encoder = build(config)
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return encoder

    run.build_model = without_dropout
    result = run_training(settings)
    return [result.state.best_value or 0.0]
