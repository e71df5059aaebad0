from __future__ import annotations

import json

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn

from vembed.errors import CheckpointError
from vembed.models.projection import Projection

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Identity(), nn.GELU()])
@pytest.mark.parametrize("bias", [True, False])
def test_reads_and_writes_what_sentence_transformers_does(activation, bias, tmp_path):
    theirs = Dense(8, 4, bias=bias, activation_function=activation)
    (tmp_path / "theirs").mkdir()
    theirs.save(str(tmp_path / "theirs"))
    ours = Projection.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    again = Dense.load(str(tmp_path / "ours"))

    expected = theirs({"sentence_embedding": X})["sentence_embedding"]
    torch.testing.assert_close(ours(X), expected)
    torch.testing.assert_close(again({"sentence_embedding": X})["sentence_embedding"], expected)
    assert ours.out_features == 4


def test_weights_from_before_safetensors(tmp_path):
    theirs = Dense(8, 4)
    theirs.save(str(tmp_path), safe_serialization=False)
    expected = theirs({"sentence_embedding": X})["sentence_embedding"]
    torch.testing.assert_close(Projection.load(tmp_path)(X), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation_function": "os.system"}, "not a module of torch.nn"),
        ({"activation_function": "torch.nn.functional.relu"}, "not a module of torch.nn"),
        ({"use_residual": True}, "use_residual"),
        ({"module_input_name": "sentence_features"}, "sentence_features"),
        ({"out_features": 5}, "size mismatch"),
    ],
)
def test_what_cannot_be_followed_is_an_error(change, says, tmp_path):
    Projection(8, 4).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=says):
        Projection.load(tmp_path)


def test_missing_files_are_named(tmp_path):
    Projection(8, 4).save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Projection.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Projection.load(tmp_path)
