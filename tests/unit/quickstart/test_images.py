"""`vembed quickstart images`, on a few symbols; and which example a command line means."""

from __future__ import annotations

import functools
import json

import pytest

from vembed import Predictor
from vembed.cli import main as vembed
from vembed.errors import ConfigError
from vembed.quickstart import EXAMPLES, images, main, text
from vembed.quickstart.symbols import build_symbol_search


def few(character: str) -> bool:
    return character in "+-=<>*?!#%&@0123456789←↑→↓★☆♠♥√∞≠≤≥|∣"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder that `vembed quickstart images` leaves behind."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    flags = ("--max_steps", "30", "--batch_size", "16", "--device", "cpu", "--progress", "false")
    with pytest.MonkeyPatch.context() as patch:
        build = functools.partial(build_symbol_search, keep=few)
        patch.setattr(images, "build_symbol_search", build)
        assert vembed(["quickstart", "images", "--output_dir", str(folder), *flags]) == 0
    return folder


def test_it_learns_and_leaves_a_picture(run):
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert losses[-1] < losses[0]
    assert (run / "report" / "gallery.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in (run / "report" / "report.html").read_text()


def test_the_model_is_an_ordinary_folder(run):
    model = Predictor(run / "final", device="cpu")
    (star,) = (run / "data" / "images" / "STIXGeneral").glob("2605.png")

    names = model.encode_text(["black star", "plus sign"])
    picture = model.encode_image(star)

    assert names.shape == (2, model.embedding_dim)
    assert model.encoder.model_type == "clip"
    assert model.similarity(names, picture).shape == (2, 1)


def test_its_settings_are_a_file_to_copy(run, tmp_path):
    config = ("--config", str(run / "data" / "train.yaml"))
    flags = ("--max_steps", "1", "--output_dir", str(tmp_path / "again"), "--device", "cpu")

    assert vembed(["train", *config, *flags]) == 0
    assert (tmp_path / "again" / "report" / "gallery.png").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ("text", [])),
        (["--lr", "1"], ("text", ["--lr", "1"])),
        (["text", "--lr", "1"], ("text", ["--lr", "1"])),
        (["images", "--lr", "1"], ("images", ["--lr", "1"])),
    ],
)
def test_the_first_word_chooses_the_example(argv, expected, monkeypatch):
    called = []
    for name in EXAMPLES:
        module = __import__(EXAMPLES[name], fromlist=["main"])
        monkeypatch.setattr(module, "main", lambda rest, name=name: called.append((name, rest)))

    main(argv)

    assert called == [expected]


@pytest.mark.parametrize(
    ("module", "key"), [(images, "model_name"), (images, "image_root"), (text, "data_path")]
)
def test_what_an_example_makes_itself_is_refused(module, key):
    with pytest.raises(ConfigError, match=rf"{key}: vembed quickstart.*its own.*'x' from --{key}"):
        module.main([f"--{key}", "x"])


def test_an_unknown_example_is_an_error():
    with pytest.raises(ConfigError, match="image"):
        main(["image"])
