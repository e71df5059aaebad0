"""`vembed evaluate`: one JSON object, or a table; one model, or two."""

import json

import pytest

from tests.tiny import tiny_bert
from vembed.cli import main
from vembed.evaluation import load_eval_task
from vembed.inference import Predictor


def test_json_is_all_there_is_on_stdout(vembed, tiny_st_path, beir_path):
    done = vembed("evaluate", "--model", tiny_st_path, "--data", beir_path, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert 0 < metrics["ndcg@10"] <= 1
    assert all(isinstance(value, float) for value in metrics.values())


def test_a_table_shows_what_json_says(capsys, tiny_st_path, beir_path):
    arguments = ["--model", str(tiny_st_path), "--data", str(beir_path), "--device", "cpu"]
    assert main(["evaluate", *arguments]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", *arguments, "--json", "--batch_size", "5"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert f"{metrics['mrr@10']:.4f}" in table
    assert "24 queries" in table


def test_two_models_are_compared(capsys, tiny_st_path, beir_path, tmp_path):
    other = tiny_bert(tmp_path / "other", seed=1)
    arguments = ["--before", str(other), "--model", str(tiny_st_path), "--data", str(beir_path)]
    assert main(["evaluate", *arguments, "--json"]) == 0
    change = json.loads(capsys.readouterr().out)["ndcg@10"]
    assert change["difference"] == pytest.approx(change["after"] - change["before"])
    assert change["difference_low"] <= change["difference"] <= change["difference_high"]
    assert main(["evaluate", "--model", str(other), "--data", str(beir_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ndcg@10"] == pytest.approx(change["before"])
    assert main(["evaluate", *arguments]) == 0
    assert "before" in capsys.readouterr().out


def test_other_column_names(capsys, tiny_st_path, tmp_path):
    rows = [{"question": f"red {i}", "answer": f"apple {i}"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", str(tiny_st_path), "--data", str(tmp_path / "rows.jsonl"), "--json"]
    mapping = ["--column_mapping", "query=question", "positive=answer"]
    assert main(["evaluate", *arguments, *mapping]) == 0
    assert "mrr@10" in json.loads(capsys.readouterr().out)
    in_braces = "{query: question, positive: answer}"
    assert main(["evaluate", *arguments, "--column_mapping", in_braces]) == 0
    assert "mrr@10" in json.loads(capsys.readouterr().out)
    assert main(["evaluate", *arguments]) == 2
    assert "rows.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--column_mapping", "query"],
            "--column_mapping: expected FIELD=COLUMN. Received: 'query'",
        ),
        (
            ["--column_mapping", "{query: [a]}"],
            "--column_mapping: expected FIELD=COLUMN, or {FIELD: COLUMN, ...}. Received: '{query:",
        ),
        (["--batch_size", "0"], "--batch_size: must be at least 1. Received: 0"),
        (["--split", "dev"], "dev"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_mistakes(capsys, tiny_st_path, beir_path, arguments, message):
    fixed = ["--model", str(tiny_st_path), "--data", str(beir_path)]
    assert main(["evaluate", *fixed, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_smaller_vectors_are_rows_of_their_own(capsys, tiny_st_path, beir_path):
    arguments = ["--model", str(tiny_st_path), "--data", str(beir_path), "--device", "cpu"]
    smaller = ["--truncate_dim", "16", "8", "--precision", "float32", "int8", "binary"]
    assert main(["evaluate", *arguments, *smaller, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    names = [name for name in metrics if name.startswith("ndcg@10[")]
    assert names == [f"ndcg@10[{d}{p}]" for d in (16, 8) for p in ("", " int8", " binary")]
    task = load_eval_task(beir_path)
    alone = Predictor(str(tiny_st_path), device="cpu", truncate_dim=8)
    expected = task.evaluate(alone.encode_items).metrics["ndcg@10"]
    assert metrics["ndcg@10[8]"] == pytest.approx(expected)
    assert main(["evaluate", *arguments, "--precision", "int8"]) == 0
    assert "nDCG@10 [int8]" in capsys.readouterr().out
    assert main(["evaluate", *arguments, "--truncate_dim", "8", "--before", arguments[1]]) == 0
    assert "nDCG@10 [8]" in capsys.readouterr().out
    for dim in ("0", "99"):
        assert main(["evaluate", *arguments, "--truncate_dim", dim]) == 2
        assert "truncate_dim" in capsys.readouterr().err
