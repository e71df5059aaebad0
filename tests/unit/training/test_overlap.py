"""What of a test set is also trained on."""

import pytest

from tests.pictures import write_pictures
from tests.tiny import write_rows
from vembed.config import TrainConfig
from vembed.data import load_dataset_records
from vembed.evaluation import load_eval_task
from vembed.training.overlap import Overlap, Shared, find_overlap
from vembed.training.run_data import load_run_data

TRAIN = [{"query": f"q{i}", "positive": [f"p{i}", f"r{i}"]} for i in range(6)]


def overlap(tmp_path, train, test, mode="t2t"):
    rows = load_dataset_records(write_rows(tmp_path / "train.jsonl", train), retrieval_mode=mode)
    task = load_eval_task(write_rows(tmp_path / "test.jsonl", test), retrieval_mode=mode)
    return find_overlap(rows, task)


def test_pairs_queries_and_documents_are_counted_by_content(tmp_path):
    test = [
        {"query": "q0", "positive": "r0"},  # a pair of training, its second positive
        {"query": "q1", "positive": "p2"},  # a query and a document, but of two rows
        {"query": "new", "positive": ["p3", "other"]},
        {"query": "p4", "positive": "q4"},  # the pair the other way round
    ]
    assert overlap(tmp_path, TRAIN, test) == Overlap(Shared(1, 5), Shared(2, 4), Shared(3, 5))


def test_only_rows_that_are_trained_on_count(tmp_path):
    rows = load_dataset_records(write_rows(tmp_path / "train.jsonl", TRAIN))
    task = load_eval_task(write_rows(tmp_path / "test.jsonl", TRAIN))
    assert find_overlap(rows, task).pairs == Shared(12, 12)
    assert find_overlap(rows.select([5, 1]), task).pairs == Shared(4, 12)


def test_graded_pairs_and_labels(tmp_path):
    graded = [{"text1": f"q{i}", "text2": f"p{i + i % 2}", "score": i} for i in range(4)]
    assert overlap(tmp_path, TRAIN, graded).pairs == Shared(2, 4)
    labelled = [{"text": f"q{i}", "label": i % 2} for i in range(8)]
    found = overlap(tmp_path, labelled[:5], labelled)
    assert (found.queries, found.pairs) == (Shared(5, 8), Shared(0, 0))


def test_pictures_are_the_same_where_they_are_the_same_file(tmp_path):
    """Not where two folders have files of one name: `1.png` is a picture in each of them."""
    for name in ("one", "two"):
        write_pictures(tmp_path / name)
    rows = [{"query": f"the {n}", "positive": f"{n}.png"} for n in ("red", "blue")]
    own = write_rows(tmp_path / "one" / "train.jsonl", rows)
    train = load_dataset_records(own, retrieval_mode="t2i")
    others = [{**row, "query": "some other words"} for row in rows]
    for path, test, same in (
        (tmp_path / "one" / "test.jsonl", others, 2),
        (tmp_path / "two" / "test.jsonl", others, 0),
        (tmp_path / "test.jsonl", [{**r, "positive": f"one/{r['positive']}"} for r in others], 2),
    ):
        task = load_eval_task(write_rows(path, test), retrieval_mode="t2i")
        found = find_overlap(train, task)
        assert found.documents == Shared(same, 2)
        assert (found.describe("x") is None) == (same == 0)


def test_text_documents_alone_may_be_shared():
    nothing, some = Shared(0, 3), Shared(2, 3)
    assert Overlap(nothing, nothing, some).describe("x") is None
    assert Overlap(nothing, nothing, some, images=True).describe("x") is not None
    assert Overlap(nothing, some, nothing).describe("x") is not None
    # As names of symbols, asked for in a font that is never trained on.
    assert Overlap(nothing, some, nothing, images=True).describe("x") is None


@pytest.mark.parametrize("key", ["test_data_path", "val_data_path"])
def test_a_run_is_warned(tmp_path, key):
    path = str(write_rows(tmp_path / "train.jsonl", TRAIN))
    config = TrainConfig(model_name="m", data_path=path, holdout_ratio=0)
    assert load_run_data(config).warnings == ()
    config[key] = path
    (warning,) = load_run_data(config).warnings
    assert warning.startswith(f"{key}: {path}: rows of it are also trained on: 12 of 12 pairs")


def test_held_out_rows_are_no_reason_to_warn(tmp_path):
    path = str(write_rows(tmp_path / "train.jsonl", TRAIN))
    assert load_run_data(TrainConfig(model_name="m", data_path=path)).warnings == ()


def test_it_is_said_in_the_first_lines_of_a_run(tmp_path, tiny_st_path, caplog):
    from vembed.cli import main

    path = str(write_rows(tmp_path / "train.jsonl", TRAIN))
    run = ["--model_name", str(tiny_st_path), "--data_path", path, "--test_data_path", path]
    last = ["--max_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *run, *last]) == 0
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "rows of it are also trained on: 12 of 12 pairs" in warnings[0].getMessage()
