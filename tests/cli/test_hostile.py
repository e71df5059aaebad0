"""Hostile files through the real command: status 2, the line, no traceback."""

import json

import pytest

from tests.hostile import bad_lines, bad_settings
from tests.tiny import PAIRS

SETTINGS = bad_settings(["lr", "epochs"], ["use_lora"], ["lr", "tags", "loss_kwargs"], 40, seed=2)
ROWS = [line for line in bad_lines(60, seed=2) if line.kind in ("nested", "a key twice", "cut off")]


@pytest.mark.parametrize("file", SETTINGS[:4], ids=lambda file: file.kind)
def test_settings(vembed, tmp_path, file):
    (tmp_path / "train.yaml").write_bytes(file.text)
    done = vembed("train", "--config", "train.yaml")
    assert done.returncode == 2
    assert "  train.yaml:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ROWS[:4], ids=lambda line: line.kind)
def test_rows(vembed, tmp_path, line):
    good = json.dumps(PAIRS[0]).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, line.raw, good]))
    done = vembed("encode", "--model", "none", "--data", "rows.jsonl", "--output", "v.npy",
                  "--column", "query")  # fmt: skip
    assert done.returncode == 2
    assert "rows.jsonl:2: " in done.stderr or line.kind == "nested"
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
