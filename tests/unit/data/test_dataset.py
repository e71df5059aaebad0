import json
import multiprocessing
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import PAIRS, write_beir, write_pairs, write_rows
from vembed.config import DatasetSpec
from vembed.data import Record, load_dataset_records, split_holdout
from vembed.errors import ConfigError, DataError
from vembed.modes import Item

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
ROWS = [
    {"query": "a", "positive": "b", "negatives": ["c", "d"], "label": "x", "score": 1.5},
    {"query": "e", "positive": ["f", "g"], "negatives": [], "label": "y", "score": None},
]


def texts(dataset):
    return [(r.query.text, *(p.text for p in r.positives)) for r in dataset]


def read_all(data, **kwargs):
    return list(load_dataset_records(data, **kwargs))


def expect_error(data, *parts, error=DataError, **kwargs):
    with pytest.raises(error) as caught:
        read_all(data, **kwargs)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def refusal_of(path, **kwargs):
    """The message of the DataError that reading ends with; None when it does not."""
    try:
        read_all(path, **kwargs)
    except DataError as error:
        return str(error)
    return None


def write_numbered(path, count):
    return write_rows(path, [{"query": f"q{i}", "positive": "p"} for i in range(count)])


def test_records_hold_everything_and_know_their_line(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", ROWS)
    dataset = load_dataset_records(path)
    assert len(dataset) == 2
    assert dataset[0] == Record(
        query=Item("a"),
        positives=(Item("b"),),
        negatives=(Item("c"), Item("d")),
        label=0,
        score=1.5,
        where=f"{path}:1",
        row_index=0,
    )
    assert dataset[-1] == dataset[1] == Record(
        query=Item("e"),
        positives=(Item("f"), Item("g")),
        label=1,
        where=f"{path}:2",
        row_index=1,
    )  # fmt: skip
    with pytest.raises(IndexError):
        dataset[2]


def test_fields_are_those_of_every_row(tmp_path):
    dataset = load_dataset_records(write_rows(tmp_path / "f.jsonl", ROWS))
    assert dataset.fields == {"query", "positive", "label"}
    dataset = load_dataset_records(write_rows(tmp_path / "g.jsonl", ROWS[:1]))
    assert dataset.fields == {"query", "positive", "label", "negative", "score"}


def test_labels_are_numbered_in_order(tmp_path):
    rows = [{"text": "t", "label": label} for label in (10, 9, "-1", 10)]
    dataset = load_dataset_records(write_rows(tmp_path / "f.jsonl", rows))
    assert dataset.label_names == ("-1", "9", "10")
    assert [record.label for record in dataset] == [2, 1, 0, 2]
    rows = [{"text": "t", "label": label} for label in ("b", "10", "a")]
    dataset = load_dataset_records(write_rows(tmp_path / "g.jsonl", rows))
    assert dataset.label_names == ("10", "a", "b")


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"query": p["query"], "positive": p["positive"], "score": 0.5} for p in PAIRS]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "f.csv", index=False)
    table.to_csv(tmp_path / "f.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "f.parquet")
    table.save_to_disk(tmp_path / "arrow")
    expected = load_dataset_records(write_rows(tmp_path / "f.jsonl", rows))
    for name in ("f.csv", "f.tsv", "f.parquet", "arrow"):
        dataset = load_dataset_records(tmp_path / name)
        assert texts(dataset) == texts(expected)
        assert dataset.fields == expected.fields
        assert dataset.fingerprint == expected.fingerprint


def test_beir_folder_is_training_data(tmp_path):
    dataset = load_dataset_records(write_beir(tmp_path), split="test")
    assert texts(dataset) == [(p["query"], p["positive"]) for p in PAIRS]
    assert dataset[2].where == f"{tmp_path}/queries.jsonl:3"


def test_several_sets_each_with_its_own_prompts_and_columns(tmp_path):
    first = write_pairs(tmp_path / "first.jsonl", 3)
    second = write_rows(tmp_path / "second.jsonl", [{"q": "a", "a": "b", "kind": "x"}])
    beir = write_beir(tmp_path / "beir")
    dataset = load_dataset_records(
        [
            str(first),
            DatasetSpec(
                path=str(second),
                query_prompt="ask: ",
                document_prompt="",
                column_mapping={"query": "q", "positive": "a", "label": "kind"},
            ),
            {"path": str(beir), "split": "test", "document_prompt": "doc: "},
        ]
    )
    assert len(dataset) == 3 + 1 + len(PAIRS)
    assert [(r.query_prompt, r.document_prompt) for r in dataset][2:5] == [
        (None, None),
        ("ask: ", ""),
        (None, "doc: "),
    ]
    assert dataset[3].where == f"{second}:1"
    assert dataset[3].label == 0
    assert dataset.fields == {"query", "positive"}
    assert [r.row_index for r in dataset] == list(range(len(dataset)))
    picked = dataset.__getitems__([4, 0, 3, 4])
    assert [r.where for r in picked] == [dataset[i].where for i in (4, 0, 3, 4)]


def test_select_keeps_fields_labels_and_order(tmp_path):
    dataset = load_dataset_records(write_rows(tmp_path / "f.jsonl", ROWS)).select([1])
    assert texts(dataset) == [("e", "f", "g")]
    assert dataset.label_names == ("x", "y")
    assert dataset[0].row_index == 0
    assert len(dataset.select([])) == 0


def test_column_mapping(tmp_path):
    path = EXAMPLES / "pairs.csv"
    dataset = load_dataset_records(path, column_mapping={"query": "question", "positive": "answer"})
    assert dataset[0].query.text == "How do I reset my password?"
    expect_error(
        path,
        f"{path}: column_mapping: query is mapped to 'qestion', and there is no such column",
        "Columns: 'id', 'question', 'answer'",
        "Did you mean 'question'?",
        column_mapping={"query": "qestion", "positive": "answer"},
    )
    expect_error(
        path, "label is mapped to 'no'", column_mapping={"query": "question", "label": "no"}
    )


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "f.jsonl"
    seen = []
    for text in ("one", "two", "six"):  # of one size
        write_rows(path, [{"query": text, "positive": "p"}])
        dataset = load_dataset_records(path)
        assert dataset[0].query.text == text
        seen.append(dataset.fingerprint)
    assert len(set(seen)) == 3


def test_fingerprint_follows_content_not_place(tmp_path):
    a = load_dataset_records(write_pairs(tmp_path / "a.jsonl"))
    b = load_dataset_records(write_pairs(tmp_path / "other" / "b.jsonl"))
    assert a.fingerprint == b.fingerprint
    assert a.select([1, 0]).fingerprint != a.select([0, 1]).fingerprint
    spec = {"path": str(tmp_path / "a.jsonl"), "query_prompt": "q: "}
    assert load_dataset_records(spec).fingerprint != a.fingerprint


def test_rows_are_stored_once_whatever_is_told_the_progress(tmp_path):
    path = write_numbered(tmp_path / "f.jsonl", 2500)
    told = []
    first = load_dataset_records([str(path), str(path)], on_progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len([t for t in told if t < 0.5]) == 2
    again = load_dataset_records(path, on_progress=lambda done: None)
    stored = {
        file["filename"]
        for part in (*first._parts, *again._parts)
        for file in part.rows.cache_files
    }
    assert len(stored) == 1


def test_progress_bars_of_datasets_stay_as_they_were(tmp_path, capfd):
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    load_dataset_records(write_pairs(tmp_path / "f.jsonl"))
    assert not datasets.are_progress_bars_disabled()
    if was_disabled:
        datasets.disable_progress_bars()
    assert capfd.readouterr() == ("", "")


def _fingerprint(path, queue):
    queue.put(load_dataset_records(path).fingerprint)


def test_several_processes_may_read_at_once(tmp_path):
    path = write_numbered(tmp_path / "f.jsonl", 3000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fingerprint, args=(path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found == {load_dataset_records(path).fingerprint}


def test_the_first_problem_and_how_many_more(tmp_path):
    lines = [json.dumps({"query": f"q{i}", "positive": "p"}) for i in range(2000)]
    lines[1233] = lines[1233][:-1]
    lines[1500] = '{"query": "", "positive": "p"}'
    lines[1501] = '{"query": " ", "positive": "p"}'
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(lines))
    message = expect_error(path, f"{path}:1234: line: must be one JSON object. Received: '{{")
    for line, cell in ((1501, "''"), (1502, "' '")):
        assert f"\n  {path}:{line}: query: must not be empty. Received: {cell} (a text)" in message
    assert message.count("\n") == 2


def test_many_problems_stop_the_reading(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"question": "q"}] * 5000)
    message = expect_error(
        path, f"{path}:1: query: no column for it", "19 more problems (stopped at 20)"
    )
    assert message.count("no column for it. Received") == 1, "rows of the same columns"


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_missing_column_is_told_once(tmp_path, ending):
    path = tmp_path / f"f.{ending}"
    csv, json_lines = "title,photo\n" + "a,b\n" * 5, '{"title": "a", "photo": "b"}\n' * 5
    path.write_text(csv if ending == "csv" else json_lines)
    message = expect_error(path, "query: no column for it", "column_mapping: {query: your_column}")
    assert message.count("no column for it. Received") == 1
    assert ("more problems" in message) == (ending == "jsonl")


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("caption;image", "a;b", "header: columns must be separated by a comma. Received: one"),
        ("caption\timage", "a\tb", "with a tab in it. Save it with a comma between the cells or c"),
        ("Caption,Image", "a,b.png", "Did you mean 'caption'? The file has 'Caption': rename"),
        (" query, positive", "a,b", "Did you mean 'query'? The file has ' query': rename"),
        ("caption,image", "a,b", "Column 'image' is for images: if they are meant, set retrieval_"),
        (
            "caption,file",
            "a,b.JPG",
            "Column 'file' is for images: if they are meant, set retrieval",
        ),
    ],
)
def test_headers_that_are_nearly_right(tmp_path, header, row, expected):
    path = tmp_path / "f.csv"
    path.write_text(f"{header}\n{row}\n")
    expect_error(path, expected)


def test_an_image_column_beside_texts_of_other_names_leaves_both_ways_open(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("question,answer,image\na,b,c.png\n")
    expect_error(path, "set retrieval_mode: t2i (t", "column_mapping: {query: your_column}")
    path.write_text("caption,file\na,c.png\n")
    message = expect_error(path, "retrieval_mode: t2i and column_mapping: {positive: 'file'} (t")
    assert "your_column" not in message


def test_a_header_of_one_column_is_fine_without_a_foreign_separator(tmp_path):
    path = tmp_path / "f.tsv"
    path.write_text("a;b\tpositive\nx\ty\n")
    load_dataset_records(path, column_mapping={"query": "a;b"})


def test_a_folder_of_images_says_what_to_do(tmp_path):
    (tmp_path / "a.JPG").write_bytes(b"x")
    expect_error(tmp_path, "first line is `caption,image`", "retrieval_mode: t2i", "--modality i")


@pytest.mark.parametrize("streaming", [False, True])
def test_problems_of_whole_files(tmp_path, streaming):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    expect_error(tmp_path / "blank.jsonl", "must have rows. Received: none", streaming=streaming)
    (tmp_path / "header.csv").write_text("query,positive\n")
    expect_error(tmp_path / "header.csv", "must have rows. Received: none", streaming=streaming)
    (tmp_path / "latin.csv").write_bytes(b"query,positive\ncaf\xe9,p\n")
    expect_error(tmp_path / "latin.csv", "latin.csv:2: line: must be UTF-8", streaming=streaming)


def test_arguments_that_cannot_be_meant(tmp_path):
    path = str(write_pairs(tmp_path / "f.jsonl", 2))
    expect_error([], "at least one path", error=ConfigError)
    expect_error({"path": path, "prompt": "x"}, "prompt", "query_prompt", error=ConfigError)
    expect_error({"query_prompt": "x"}, "path", error=ConfigError)
    expect_error(path, "retrieval_mode", "t2x", error=ConfigError, retrieval_mode="t2x")
    expect_error(path, "'qery'", error=ConfigError, column_mapping={"qery": "a"})
    expect_error({"path": path, "split": "dev"}, "no splits", error=ConfigError)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "f.jsonl", 2)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_generator", fail)
    expect_error(path, "cannot be stored", "No space left on device", "HF_DATASETS_CACHE")


def test_mixed_types_never_reach_arrow(tmp_path):
    rows = [
        {"query": "q", "positive": "p", "meta": 1},
        {"query": "q", "positive": ["p"], "meta": {}},
    ]
    dataset = load_dataset_records(write_rows(tmp_path / "f.jsonl", rows * 600))
    assert len(dataset) == 1200


# --- holding out


def test_holdout_is_a_stable_share_of_the_queries(tmp_path):
    rows = [{"query": f"q{i % 500}", "positive": f"p{i}"} for i in range(1000)]
    path = write_rows(tmp_path / "f.jsonl", rows)
    train, holdout = split_holdout(load_dataset_records(path), 0.2)
    asked = {r.query.text for r in holdout}
    assert len(train) + len(holdout) == 1000
    assert not asked & {r.query.text for r in train}
    assert 70 <= len(asked) <= 130
    # The choice hangs on each query's content alone: order and further rows change nothing.
    write_rows(path, [*reversed(rows), {"query": "new", "positive": "p"}])
    again = {r.query.text for r in split_holdout(load_dataset_records(path), 0.2).holdout}
    assert again - {"new"} == asked
    # Known values: what another machine and another day must find.
    assert sorted(asked)[:3] == ["q101", "q106", "q121"]


@pytest.mark.parametrize("ratio", [1e-9, 0.5, 1 - 1e-9])
def test_holdout_never_leaves_a_side_empty(tmp_path, ratio):
    rows = [{"query": q, "positive": "p"} for q in ("a", "b", "b")]
    train, holdout = split_holdout(
        load_dataset_records(write_rows(tmp_path / "f.jsonl", rows)), ratio
    )
    assert len(train) + len(holdout) == 3
    assert min(len(train), len(holdout)) >= 1


def test_holdout_that_cannot_be(tmp_path):
    path = write_rows(tmp_path / "f.jsonl", [{"query": "a", "positive": "p"}] * 2)
    dataset = load_dataset_records(path)
    with pytest.raises(
        DataError, match="two different queries are needed.* 2 rows with the query 'a'"
    ):
        split_holdout(dataset, 0.5)
    for ratio in (0, 1, -1, float("nan")):
        with pytest.raises(ConfigError, match="holdout_ratio"):
            split_holdout(dataset, ratio)
    with pytest.raises(ConfigError, match="stream"):
        split_holdout(load_dataset_records(path, streaming=True), 0.5)


# --- streaming


def test_a_stream_gives_the_same_rows(tmp_path):
    paths = [str(write_pairs(tmp_path / "a.jsonl")), str(write_beir(tmp_path / "beir"))]
    stored = load_dataset_records(paths, split="test")
    stream = load_dataset_records(paths, split="test", streaming=True)
    assert list(stream) == list(stored)
    assert list(stream) == list(stored)
    assert stream.fields == stored.fields
    with pytest.raises(TypeError):
        len(stream)


def test_labels_of_a_stream_are_equal_where_the_label_is(tmp_path):
    rows = [{"text": "t", "label": label} for label in ("a", "b", "a")]
    stream = load_dataset_records(write_rows(tmp_path / "f.jsonl", rows), streaming=True)
    first, second, third = (record.label for record in stream)
    assert first == third != second
    assert 0 <= first < 2**63


def test_a_stream_reads_only_what_is_asked_for(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n' * 3 + "broken\n")
    stream = iter(load_dataset_records(path, streaming=True))
    assert [next(stream).row_index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"f\.jsonl:4: line: must be one JSON object"):
        next(stream)


def test_rows_of_a_stream_have_what_the_first_has(tmp_path):
    rows = [{"query": "q", "positive": "p", "score": 1}, {"query": "q", "positive": "p"}]
    expect_error(
        write_rows(tmp_path / "f.jsonl", rows),
        "f.jsonl:2: score: rows of a stream must have what its first row has",
        streaming=True,
    )


def test_rows_of_a_stream_may_have_any_number_of_negatives():
    stream = load_dataset_records(EXAMPLES / "pairs.jsonl", streaming=True)
    assert stream.fields == {"query", "positive", "negative"}
    assert {len(record.negatives) for record in stream} == {0, 1}


@pytest.mark.parametrize("buffer_size", [1, 7, 24, 1000])
def test_shuffling_a_stream(tmp_path, buffer_size):
    stream = load_dataset_records(write_pairs(tmp_path / "f.jsonl"), streaming=True)

    def order(**kwargs):
        arguments = {"seed": 1, "epoch": 0, "buffer_size": buffer_size, **kwargs}
        return [record.row_index for record in stream.shuffled(**arguments)]

    assert sorted(order()) == list(range(len(PAIRS)))
    assert order() == order()
    if buffer_size == 1:
        assert order() == sorted(order())
    else:
        assert len({tuple(order(seed=s, epoch=e)) for s in (1, 2) for e in (0, 1)}) == 4
        # A row comes no earlier than the buffer allows.
        assert all(row < place + buffer_size for place, row in enumerate(order()))


# --- any file at all


def _mutations(count):
    chooser = random.Random(0)
    good = [
        {"query": "a\u00e9", "positive": "b", "negatives": ["c"], "teacher_scores": [1.0, 0.5]},
        {"text1": "a", "text2": "b", "score": 0.25, "label": 3},
        {"text": "\U0001f600", "label": "x", "positive": None},
    ]
    pieces = [
        b"\x00", b"\xff", b"\xc3", b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN",
        b"-Infinity", b"1e999", b"true", b"\\ud83d", b"\\u0000", b"  ", b"\n", b"\r", b"-", b"''",
        b'"query"', b'{"query": 1}', b"[[[[", b"9" * 50, b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\\",
    ]  # fmt: skip
    for _ in range(count):
        line = bytearray(
            json.dumps(chooser.choice(good), ensure_ascii=chooser.random() < 0.5).encode()
        )
        for _ in range(chooser.randint(1, 2)):
            at = chooser.randrange(len(line) + 1)
            kind = chooser.randrange(5)
            if kind == 0:
                line[at : at + chooser.randint(1, 6)] = b""
            elif kind == 1:
                line[at:at] = chooser.choice(pieces)
            elif kind == 2:
                line[at : at + 1] = bytes([chooser.randrange(256)])
            elif kind == 3:
                line[at : at + 1] = chooser.choice([b"a", b"1", b" ", b"Q"])
            else:
                line[at : at + len(line) // 2] = chooser.choice(pieces)
        yield bytes(line)


def test_mutated_rows_are_read_or_refused_with_their_line(tmp_path):
    path = tmp_path / "f.jsonl"
    fine = []
    for line in _mutations(600):
        path.write_bytes(line + b"\n")
        message = refusal_of(path, streaming=True)
        if message is None:
            fine.append(line)
        else:
            assert message.startswith(f"{path}:")
            assert len(message) < 600
    assert 30 < len(fine) < 300
    path.write_bytes(b"\n".join(fine))
    assert len(load_dataset_records(path)) >= len(fine) - 5  # an emptied line is no row


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2)
    ),
    max_leaves=4,
)
columns = st.sampled_from(
    ["query", "positive", "positives", "negatives", "negative_1", "label", "score", "text", "text1",
     "text2", "pos", "neg", "pos_scores", "neg_scores", "teacher_scores", "other"]
)  # fmt: skip


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.dictionaries(columns, json_values, max_size=5), min_size=1, max_size=8))
def test_any_json_is_read_or_refused(tmp_path, rows):
    path = tmp_path / "f.jsonl"
    usable = [{"query": "q", "positive": "p", **row} for row in rows]
    for some in (rows, usable):
        write_rows(path, some)
        message = refusal_of(path)
        assert message is None or message.startswith(f"{path}:")
        if message is None:
            dataset = load_dataset_records(path)
            assert len(dataset) == len(some)
            assert all(record.fields >= dataset.fields for record in dataset)


# --- the examples


def test_examples_can_be_used():
    pairs = load_dataset_records(EXAMPLES / "pairs.jsonl")
    assert len(pairs) == 240
    assert pairs.fields == {"query", "positive"}
    assert len(np.unique(pairs.query_ids)) == 240
    assert sum(bool(record.negatives) for record in pairs) > 50
    graded = load_dataset_records(EXAMPLES / "graded.jsonl")
    assert graded.fields == {"query", "positive", "score"}
    labelled = load_dataset_records(EXAMPLES / "labelled.jsonl")
    assert labelled.fields == {"query", "label"}
    assert len(labelled.label_names) == 5
