import json

import pytest

from vembed.errors import DataError
from vembed.evaluation.beir import is_beir_folder, read_beir, write_beir
from vembed.modes import Item

QUERIES = {"q1": "how tall is it", "q2": "wie groß\tist 'es'\n"}
CORPUS = {"d1": "ten metres", "d2": 'said "ten"', "d3": ""}
QRELS = {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}


@pytest.fixture
def folder(tmp_path):
    return write_beir(tmp_path / "beir", QUERIES, CORPUS, QRELS)


def replace_line(path, number, line):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))


def texts(by_id):
    return {key: Item(text) for key, text in by_id.items()}


def test_what_is_written_is_read_back(folder):
    data = read_beir(folder)
    assert (data.queries, data.corpus, data.qrels) == (texts(QUERIES), texts(CORPUS), QRELS)
    assert is_beir_folder(folder)
    assert not is_beir_folder(folder / "qrels")


def test_the_files_are_the_ones_that_beir_knows(folder):
    assert (folder / "qrels" / "test.tsv").read_text().splitlines()[:2] == [
        "query-id\tcorpus-id\tscore",
        "q1\td1\t2",
    ]
    first = json.loads((folder / "corpus.jsonl").read_text().splitlines()[0])
    assert first == {"_id": "d1", "title": "", "text": "ten metres"}


def test_a_document_is_title_space_text(folder):
    replace_line(
        folder / "corpus.jsonl", 1, '{"_id": "d1", "title": "Towers", "text": "ten metres"}'
    )
    replace_line(
        folder / "corpus.jsonl", 2, '{"_id": "d2", "title": null, "text": "x", "metadata": {}}'
    )
    replace_line(folder / "corpus.jsonl", 3, '{"_id": "d3", "text": "no title"}')
    assert read_beir(folder).corpus == texts(
        {"d1": "Towers ten metres", "d2": "x", "d3": "no title"}
    )


def test_only_the_queries_of_the_split_are_kept(folder):
    (folder / "qrels" / "dev.tsv").write_text("q2\td1\t1\n")  # without a header
    assert list(read_beir(folder, split="dev").queries) == ["q2"]


def test_a_judgement_given_twice_alike_counts_once(folder):
    replace_line(folder / "qrels" / "test.tsv", 5, "q1\td1\t2\n")
    assert read_beir(folder).qrels == QRELS


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("corpus.jsonl", 2, "{broken", r"corpus\.jsonl:2: line: must be one JSON object"),
        ("corpus.jsonl", 2, '["d2"]', r"corpus\.jsonl:2: .*must be one JSON object"),
        ("corpus.jsonl", 2, b'{"_id": "d2", "text": "\xff"}', r"corpus\.jsonl:2: .*UTF-8"),
        ("corpus.jsonl", 2, '{"_id": 2, "text": "x"}', r"corpus\.jsonl:2: _id: a text that is"),
        ("corpus.jsonl", 2, '{"_id": "d2", "txt": "x"}', r"corpus\.jsonl:2: text: .*'txt'"),
        ("corpus.jsonl", 2, '{"_id": "d1", "text": "x"}', r"corpus\.jsonl:2: _id: must be unique"),
        ("corpus.jsonl", 2, '{"_id": "d2", "text": "x", "title": 3}', r"corpus\.jsonl:2: title"),
        ("queries.jsonl", 1, '{"_id": "q1", "text": " "}', r"queries\.jsonl:1: text: must not be"),
        ("qrels/test.tsv", 2, "q1 d1 1", r"test\.tsv:2: query-id, corpus-id and a number"),
        ("qrels/test.tsv", 2, "q1\t0\td1\t1", r"test\.tsv:2: query-id, corpus-id and a number"),
        ("qrels/test.tsv", 2, "q1\td1\tyes", r"test\.tsv:2: query-id, corpus-id and a number"),
        ("qrels/test.tsv", 2, "q1\td1\tnan", r"test\.tsv:2: query-id, corpus-id and a number"),
        ("qrels/test.tsv", 2, b"q1\td1\xff\t1", r"test\.tsv:2: line: must be UTF-8"),
        ("qrels/test.tsv", 2, "q9\td1\t1", r"test\.tsv:2: 'q9' is not in queries\.jsonl"),
        ("qrels/test.tsv", 2, "q1\td9\t1", r"test\.tsv:2: 'd9' is not in corpus\.jsonl"),
        ("qrels/test.tsv", 3, "q1\td1\t1", r"test\.tsv:3: one judgement per pair.*1 after 2"),
    ],
)
def test_what_is_broken_is_named_by_file_and_line(folder, file, number, line, message):
    replace_line(folder / file, number, line)
    with pytest.raises(DataError, match=message):
        read_beir(folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_an_empty_or_missing_file_is_named(folder, file):
    (folder / file).write_text("")
    with pytest.raises(DataError, match=file):
        read_beir(folder)
    (folder / file).unlink()
    with pytest.raises(DataError, match=file):
        read_beir(folder)


def test_an_unknown_split_names_the_ones_there_are(folder):
    with pytest.raises(DataError, match="Splits of this BEIR folder: 'test'"):
        read_beir(folder, split="dev")


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_a_document_that_no_tokenizer_takes(folder, text):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "new", "text": text}) + "\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl:\d+: text: must"):
        read_beir(folder)
