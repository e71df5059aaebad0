"""`vembed mine` as a user types it: help at once, killed and gone on with, trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import PAIRS, write_rows
from vembed.cli import main
from vembed.data import load_dataset_records

BIN = Path(sys.executable).parent


@pytest.fixture
def arguments(tmp_path, tiny_st_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    return [
        "mine", "--model", str(tiny_st_path), "--data", "rows.jsonl", "--output", "mined.jsonl",
        "--device", "cpu",
    ]  # fmt: skip


def test_what_it_says(arguments, capsys):
    assert main([*arguments, "--absolute_margin", "0.02", "--max_score", "0.9", "--show", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in Path("mined.jsonl").read_text().splitlines()]
    count = sum(len(row.get("negatives", [])) for row in rows)
    short = sum(len(row.get("negatives", [])) < 3 for row in rows)
    assert shown[0] == (
        f"mined.jsonl: 24 rows, {count} negatives, {count / 24:.2f} a row; {short} rows with fewer "
        "than 3"
    )
    assert shown[1].startswith("24 queries x 24 candidates: of 576 pairs left out 24 by what is ")
    assert " by margin" in shown[1]
    assert " by max_score" in shown[1]
    assert shown[2].startswith("mean score: positives 0.")
    assert shown[3].startswith("48 vectors computed in ")
    assert shown[5] == PAIRS[0]["query"]
    assert shown[6].startswith("  + 0.")
    assert shown[6].endswith(PAIRS[0]["positive"])
    assert [line[12:] for line in shown[7 : 7 + len(rows[0]["negatives"])]] == rows[0]["negatives"]
    assert PAIRS[-1]["query"] in shown


def test_texts_of_several_lines_are_shown_on_one(arguments, tmp_path, capsys):
    rows = [{"query": f"who\nis {n}?", "positive": f"It is\n\nnumber {n}."} for n in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert main([*arguments, "--show", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()[5:]
    assert shown[0] == "who is 0?"
    assert shown[1].endswith("  It is number 0.")
    assert [line[:4] for line in shown[1:]] == ["  + ", *["  - "] * 3]


def test_what_it_writes_is_trained_on(arguments, tiny_st_path):
    assert main([*arguments, "--scores", "--short_rows", "drop", "--num_negatives", "2"]) == 0
    model = ["--model_name", str(tiny_st_path), "--data_path", "mined.jsonl", "--device", "cpu"]
    short = ["--epochs", "1", "--batch_size", "4", "--holdout_ratio", "0", "--max_steps", "2"]
    for name, loss in (("infonce", []), ("margin", ["--loss_type", "margin_mse"])):
        assert main(["train", *model, *short, *loss, "--output_dir", name]) == 0
        assert (Path(name) / "final").is_dir()
    (record, *_) = load_dataset_records("mined.jsonl")
    assert len(record.negatives) == 2
    assert len(record.teacher_scores) == 3


def test_rows_of_which_some_have_none_are_trained_on(arguments, tiny_st_path):
    """Uneven numbers of negatives, none among them, are what `keep` leaves."""
    assert main([*arguments, "--relative_margin", "0.05", "--num_negatives", "4"]) == 0
    counts = {len(record.negatives) for record in load_dataset_records("mined.jsonl")}
    assert 0 in counts
    assert len(counts) > 2
    model = ["--model_name", str(tiny_st_path), "--data_path", "mined.jsonl", "--device", "cpu"]
    short = ["--batch_size", "8", "--holdout_ratio", "0", "--max_steps", "2"]
    assert main(["train", *model, *short, "--output_dir", "run"]) == 0


def parts(folder: Path) -> int:
    return len(list(folder.rglob("*.keys.npy")))


def test_a_killed_one_is_gone_on_with(arguments, tmp_path, capsys):
    rows = [{"query": f"query {n}", "positive": f"the answer to {n}"} for n in range(600)]
    write_rows(tmp_path / "rows.jsonl", rows)
    code = (
        "import sys\nfrom vembed.mining import vectors\nfrom vembed.cli import main\n"
        "vectors._CHUNK_ITEMS = 10\nsys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=os.environ,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    cache = tmp_path / "mined.jsonl.cache"
    deadline = time.monotonic() + 120
    while parts(cache) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = parts(cache)
    assert 3 <= stored < 120  # in the middle of it
    assert not Path("mined.jsonl").exists()
    assert main(arguments) == 0
    assert f"\n{1200 - 10 * stored:,} vectors computed" in capsys.readouterr().out
    assert not cache.exists()
    assert main([*arguments, "--output", "whole.jsonl"]) == 0
    assert "\n1,200 vectors computed" in capsys.readouterr().out
    assert Path("mined.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range_max", "2"], "vembed: range_max: expected a whole number of at least range_min"),
        (["--output", "mined.csv"], "vembed: output: expected a name that ends in .jsonl"),
        (["--output", "rows.jsonl", "--overwrite"], "vembed: output: rows.jsonl is the file of"),
        (["--column_mapping", "query"], "vembed: --column_mapping: expected FIELD=COLUMN. Rec"),
        (["--batch_size", "0"], "vembed: --batch_size: must be at least 1. Received: 0"),
        (["--relativ_margn", "0.05"], "vembed: vembed mine: unrecognized arguments: "
         "--relativ_margn 0.05 (did you mean '--relative_margin'"),
        (["--range_max", "many"], "vembed: vembed mine: argument --range_max: invalid int value"),
        (["--show", "-1"], "vembed: --show: must be at least 0. Received: -1"),
        (["--retrieval_mode", "x2t"], "vembed: retrieval_mode: expected two of t (text)"),
        (["--data", "no.jsonl"], "vembed: no.jsonl: there is no such file"),
        (["--corpus", "rows.jsonl"], "vembed: rows.jsonl:1: no column 'text'. Columns: 'query', "
         "'positive'. Name one with corpus_column"),
    ],
)  # fmt: skip
def test_mistakes(arguments, capsys, options, message):
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("mined.jsonl").exists()


def test_without_faiss_it_says_what_to_install_at_once(arguments, tmp_path):
    code = (
        "import sys\nsys.modules['faiss'] = None\nfrom vembed.cli import main\n"
        "status = main(sys.argv[1:])\nprint('torch' in sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == (
        "vembed: mining: searches with faiss, which is not installed. Install it with: "
        "pip install 'vembed[mining]'\n"
    )


def test_an_output_that_is_there_stays(arguments, capsys):
    Path("mined.jsonl").write_text("precious")
    assert main(arguments) == 2
    assert (
        "mined.jsonl is there already. Name another, or give overwrite (--overw"
        in capsys.readouterr().err
    )
    assert Path("mined.jsonl").read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
