"""`vembed check`: shows the data as the model will see it, takes a step, leaves nothing behind."""

import pytest

from tests.tiny import PAIRS, write_rows
from vembed.cli import main


@pytest.fixture
def check(tmp_path, monkeypatch, tiny_st_path, capsys):
    """Runs the command in an empty folder; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(rows, *options: str):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        arguments = ["--model_name", str(tiny_st_path), "--data_path", str(path), "--device", "cpu"]
        status = main(["check", *arguments, *options])
        shown = capsys.readouterr()
        assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"], "something was written"
        return status, shown.out, shown.err

    return run


def test_shows_lengths_duplicates_a_sample_and_a_step(check):
    rows = [*PAIRS, PAIRS[2], {"query": "red " * 100, "positive": "apple"}]
    status, shown, _ = check(rows, "--batch_size", "4", "--gradient_accumulation_steps", "2")
    assert status == 0
    assert "query: 26 texts" in shown
    assert "1 (3.8%) are cut at 64 tokens" in shown
    assert "rows that are there twice" in shown
    assert "rows.jsonl:25" in shown
    assert "[CLS] query : " in shown  # prompts are part of what the model sees
    assert "[CLS] passage : " in shown or "[CLS] p" in shown
    assert "4 x 1 processes x 2 micro-batches" in shown
    assert "one step, " in shown
    assert "chance" in shown
    assert "gradient norm" in shown
    assert "Nothing was written" in shown


def test_what_looks_wrong_in_the_step_is_said(check):
    status, shown, _ = check(PAIRS, "--batch_size", "1")
    assert status == 0
    assert "warning" in shown
    assert "batch_size" in shown.partition("warning")[2]


def test_negatives_are_shown(check):
    rows = [{**pair, "negatives": ["an old stone"]} for pair in PAIRS]
    status, shown, _ = check(rows)
    assert status == 0
    assert "negative: 24 texts" in shown
    assert "an old stone" in shown


def test_a_stream_is_read_to_its_end(check):
    settings = ["--streaming", "--max_steps", "2", "--holdout_ratio", "0", "--batch_size", "4"]
    status, shown, _ = check(PAIRS, *settings)
    assert status == 0
    assert "one step, " in shown
    status, _, err = check([*PAIRS, {"query": "no positive"}], *settings)
    assert status == 2
    assert "rows.jsonl:25: positive" in err


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [*PAIRS, {"query": "x", "positive": 3}],
            [],
            "rows.jsonl:25: positive: a text is expected",
        ),
        (PAIRS, ["--loss_type", "cosent"], "score"),
        (PAIRS, ["--loss_kwargs", "{nonsense: 1}"], "nonsense"),
        (PAIRS, ["--optimizer", "adamv"], "did you mean 'adam' or 'adamw'"),
        (PAIRS, ["--lr", "x"], "--lr: expected a number"),
        (PAIRS, ["--column_mapping", "{query: question}"], "question"),
    ],
)
def test_mistakes(check, rows, options, message):
    status, _, err = check(rows, *options)
    assert status == 2
    assert message in err


def test_an_earlier_run_is_no_reason_not_to_look(check, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("")
    status, shown, _ = check(PAIRS, "--output_dir", str(folder))
    assert status == 0
    assert f"output_dir: {folder} holds an earlier run" in " ".join(shown.split())
    assert "`vembed train` can start." not in shown
    status, shown, _ = check(PAIRS, "--output_dir", str(folder), "--overwrite_output_dir", "true")
    assert "`vembed train` can start." in shown
