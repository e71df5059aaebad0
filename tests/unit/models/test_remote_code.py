"""Nothing in a checkpoint runs: not its pickles, nor code that it names, nor code beside it."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

import vembed
from tests.tiny import tiny_bert, tiny_cross_encoder, tiny_sentence_transformer
from vembed.errors import ConfigError, VembedError
from vembed.models import load_encoder
from vembed.models.cross_encoder import CrossEncoder
from vembed.models.remote_code import check_remote_code

PACKAGE = Path(vembed.__file__).parent


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def evil_pickles(mark: Path) -> dict[str, bytes]:
    """A pickle as torch wrote them once, and as it writes them now."""
    plain = pickle.dumps(Evil(mark), protocol=2)
    file = mark.with_name("evil.zip")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3\n")
    return {"plain": plain, "zip": file.read_bytes()}


def add_code(folder: Path, mark: Path, *, where: str = "own_model.Own") -> None:
    """Code beside the weights, as hub models bring it."""
    (folder / "own_model.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertForSequenceClassification, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class Own(BertModel):\n    config_class = OwnConfig\n"
        "class OwnScores(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": where.replace("Own", "OwnConfig"),
        "AutoModel": where,
        "AutoModelForSequenceClassification": f"{where}Scores",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))


@pytest.mark.parametrize("kind", ["plain", "zip"])
@pytest.mark.parametrize("slot", ["backbone", "dense", "cross-encoder"])
def test_a_pickle_never_runs(tmp_path, slot, kind):
    mark, folder = tmp_path / "mark", tmp_path / "model"
    data = evil_pickles(mark)[kind]
    if slot == "dense":
        tiny_sentence_transformer(folder, dense_features=8)
        weights = next(folder.glob("*_Dense"))
    elif slot == "backbone":
        weights = tiny_bert(folder)
    else:
        weights = tiny_cross_encoder(folder)
    (weights / "model.safetensors").unlink()
    (weights / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(VembedError, match="model"):
        CrossEncoder(str(folder)) if slot == "cross-encoder" else load_encoder(str(folder))
    assert not mark.exists()
    torch.load(
        weights / "pytorch_model.bin", weights_only=False
    ) if kind == "zip" else pickle.loads(data)
    assert mark.exists(), "the pickle would not have run anyway"


def test_code_beside_the_weights_runs_only_where_the_user_says_so(tmp_path):
    mark, folder = tmp_path / "mark", tiny_bert(tmp_path / "model")
    add_code(folder, mark)
    options = {"encoder_mode": "text", "pooling_method": "mean"}
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_encoder(str(folder), **options)
    assert not mark.exists()
    load_encoder(str(folder), trust_remote_code=True, **options)
    assert mark.exists()


def test_a_cross_encoder_asks_nobody(tmp_path):
    mark, folder = tmp_path / "mark", tiny_cross_encoder(tmp_path / "model")
    add_code(folder, mark)
    with pytest.raises(VembedError, match="trust_remote_code"):
        CrossEncoder(str(folder))
    assert not mark.exists()


def test_code_of_another_repository_never_runs(tmp_path):
    mark, folder = tmp_path / "mark", tiny_bert(tmp_path / "model")
    add_code(folder, mark, where="somebody/else--own_model.Own")
    with pytest.raises(ConfigError, match="names code in another repository"):
        load_encoder(str(folder), encoder_mode="text", trust_remote_code=True)
    assert not mark.exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123", "g" * 40, "a" * 41])
def test_code_of_the_hub_needs_a_commit(tmp_path, revision):
    with pytest.raises(ConfigError, match="needs a revision that fixes which code"):
        check_remote_code("owner/name", tmp_path, revision)


def test_code_that_can_be_read_may_run(tmp_path):
    check_remote_code("owner/name", tmp_path, "0a" * 20)
    check_remote_code(str(tmp_path), tmp_path, None)
    check_remote_code("package:name", tmp_path, None)


@pytest.mark.parametrize("file", ["modules.json", "vembed_config.json"])
def test_code_that_a_folder_names_is_not_imported(tmp_path, monkeypatch, file):
    folder = tiny_sentence_transformer(tmp_path / "model")
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    content: object = {"encoder_mode": "evil_module:Name", "loss_type": "evil_module:Name"}
    if file == "modules.json":
        content = json.loads((folder / file).read_text())
        content[0]["type"] = "evil_module.Transformer"
    (folder / file).write_text(json.dumps(content))
    if file == "modules.json":
        with pytest.raises(VembedError, match="evil_module"):
            load_encoder(str(folder))
    else:
        load_encoder(str(folder))
    assert not (tmp_path / "mark").exists()


def test_the_source_reads_no_pickles():
    """Each of these would run code that a file brings, if it is called carelessly."""
    careless = re.compile(
        r"pickle\.loads?\(|joblib|dill\.|cloudpickle|allow_pickle=True|weights_only=False|"
        r"yaml\.(unsafe_|full_)?load\(|(?<![.\w])(?:eval|exec)\(|shell=True|os\.system|"
        r"trust_remote_code=True"
    )
    found = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found += [f"{path}: {match.group()}" for match in careless.finditer(text)]
        for call in re.finditer(r"(torch|np|numpy)\.load\((?:[^()]|\([^()]*\))*\)", text):
            wanted = "weights_only=True" if call[1] == "torch" else "allow_pickle=False"
            found += [] if wanted in call.group() else [f"{path}: {call.group()}"]
        for call in re.finditer(r"Auto\w+\.from_pretrained\((?:[^()]|\([^()]*\))*\)", text):
            told = "trust_remote_code" in call.group() or "**options" in call.group()
            found += [] if told else [f"{path}: {call.group()}"]
    assert not found
