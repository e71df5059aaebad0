"""Every script in `examples/` runs, as its docstring says, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vembed import Predictor
from vembed.cli import main as vembed
from vembed.errors import ConfigError
from vembed.models import load_encoder

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_text(tiny_bert_path, tmp_path):
    out = run_example("train_text.py", str(tiny_bert_path), str(tmp_path / "out"))
    assert "'ndcg@10'" in out
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_with_components.py", "steps, 1 of them warm-up"),
        ("custom_step.py", "tokens in 4 steps"),
    ],
)
def test_scripts_that_read_a_config(name, words, tiny_bert_path, tmp_path):
    out = run_example(
        name,
        *("--config", "configs/train.yaml", "--model_name", str(tiny_bert_path)),
        *("--epochs", "1", "--batch_size", "64", "--max_seq_length", "32"),
        *("--warmup_ratio", "0.25", "--output_dir", str(tmp_path / "out")),
    )
    assert words in out


def test_a_loss_of_your_own(tiny_bert_path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    arguments = [
        *("train", "--data_path", "examples/data/pairs.jsonl", "--max_steps", "2"),
        *("--model_name", str(tiny_bert_path), "--loss_type", "custom_loss:MarginLoss"),
        *("--loss_kwargs", "{margin: 0.3}", "--output_dir", str(tmp_path / "out")),
    ]
    assert vembed(arguments) == 0
    assert (tmp_path / "out" / "final").exists()


@pytest.fixture(scope="module")
def text_cnn(tmp_path_factory):
    """What the two commands of the example leave behind: the untrained folder and the run's."""
    folder = tmp_path_factory.mktemp("text_cnn")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(EXAMPLES))
        run_example("text_cnn.py", str(folder / "new"), "examples/data/pairs.jsonl")
        arguments = [
            *("train", "--config", "examples/text_cnn.yaml", "--device", "cpu"),
            *("--model_name", str(folder / "new"), "--output_dir", str(folder / "run")),
            *("--epochs", "6", "--progress", "false"),
        ]
        assert vembed(arguments) == 0
        yield folder


def test_an_encoder_of_your_own_learns_and_is_measured(text_cnn):
    lines = (text_cnn / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.5
    assert (text_cnn / "run" / "report" / "report.html").exists()


def test_an_encoder_of_your_own_loads_again(text_cnn, tmp_path, capfd):
    texts = ["How do I boil an egg?", "egg", "Yeast makes gas in the dough. " * 30]
    final = text_cnn / "run" / "final"
    model = Predictor(final, device="cpu", encoder_mode="text_cnn:TextCNN")
    vectors = model.encode_text(texts)

    model.encoder.save_pretrained(tmp_path)
    again = Predictor(tmp_path, device="cpu", encoder_mode="text_cnn:TextCNN")
    alone = [again.encode_text(text)[0] for text in texts]
    np.testing.assert_allclose(vectors, alone, atol=1e-6, err_msg="depends on its batch")
    untrained = Predictor(text_cnn / "new", device="cpu", encoder_mode="text_cnn:TextCNN")
    assert np.abs(untrained.encode_text(texts) - vectors).max() > 0.01
    data = ("--data", "examples/data/pairs.jsonl", "--encoder_mode", "text_cnn:TextCNN")
    assert vembed(["evaluate", "--model", str(final), *data, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["ndcg@10"] > 0.2
    output = tmp_path / "vectors.npy"
    rows = (*data, "--column", "query", "--output", str(output))
    assert vembed(["encode", "--model", str(final), *rows]) == 0
    assert np.load(output).shape[1] == model.embedding_dim
    with pytest.raises(ConfigError, match="write an encoder and set encoder_mode"):
        Predictor(final)


def test_settings_of_the_text_cnn_reach_its_layers(text_cnn, tmp_path):
    folder = shutil.copytree(text_cnn / "new", tmp_path / "new")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"embed_size": 16, "filter_sizes": [2, 7], "num_filters": 5, "dropout": 0.25}
    (folder / "config.json").write_text(json.dumps(settings))

    layers = load_encoder(str(folder), encoder_mode="text_cnn:TextCNN").backbone

    assert layers["words"].embedding_dim == 16
    assert [(f.kernel_size, f.out_channels) for f in layers["filters"]] == [((2,), 5), ((7,), 5)]
    assert layers["head"][0].p == 0.25


def test_every_example_is_run_here():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {
        "custom_loss.py",
        "custom_step.py",
        "text_cnn.py",
        "train_text.py",
        "train_with_components.py",
    }
