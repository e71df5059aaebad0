import json

import pytest

from tests.unit.evaluation.fakes import hashing_encode
from vembed.data import Record
from vembed.errors import DataError
from vembed.evaluation import (
    GradedPairsTask,
    LabelledTask,
    RetrievalTask,
    load_eval_task,
    task_from_records,
    write_beir,
)
from vembed.modes import Item


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_beir_folder_is_retrieval(tmp_path):
    write_beir(tmp_path / "b", {"q": "a"}, {"d": "a b", "e": "c"}, {"q": {"d": 1}}, split="dev")
    task = load_eval_task(tmp_path / "b", split="dev")
    assert isinstance(task, RetrievalTask)
    assert task.evaluate(hashing_encode).metrics["recall@1"] == 1
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: image: an image is expected"):
        load_eval_task(tmp_path / "b", retrieval_mode="t2i")


def test_pairs_are_retrieval(tmp_path):
    rows = [{"ask": f"w{i} x", "positive": f"w{i} y", "negatives": ["z"]} for i in range(4)]
    task = load_eval_task(write(tmp_path / "rows.jsonl", rows), column_mapping={"query": "ask"})
    assert isinstance(task, RetrievalTask)
    assert task.name == "rows"
    assert task.describe() == {"queries": 4, "documents": 5, "relevant pairs": 4}


def test_scored_pairs_are_graded(tmp_path):
    rows = [{"text1": f"a{i}", "text2": "b", "score": i} for i in range(4)]
    task = load_eval_task(write(tmp_path / "rows.jsonl", rows))
    assert isinstance(task, GradedPairsTask)
    assert task.scores.tolist() == [0, 1, 2, 3]


def test_labelled_texts_are_labelled(tmp_path):
    rows = [{"text": f"a{i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(4)]
    task = load_eval_task(write(tmp_path / "rows.jsonl", rows))
    assert isinstance(task, LabelledTask)
    assert task.describe() == {"texts": 4, "labels": 2}


def test_some_scores_do_not_make_graded_pairs():
    records = [Record(Item("q"), (Item("a"),), score=1.0), Record(Item("r"), (Item("b"),))]
    assert isinstance(task_from_records(records, "x"), RetrievalTask)


def test_records_that_fit_no_task_are_refused():
    with pytest.raises(DataError, match="x: expected rows"):
        task_from_records([], "x")
    mixed = [Record(Item("q"), (Item("a"),)), Record(Item("r"), label=1, where="f.jsonl:2")]
    with pytest.raises(DataError, match=r"f\.jsonl:2: .*Split them into two files"):
        task_from_records(mixed, "x")
