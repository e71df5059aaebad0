import gzip
import json
import tracemalloc

import pytest

from tests.tiny import write_beir, write_rows
from vembed.data import reading
from vembed.data.problems import RowProblem
from vembed.data.reading import RawRow, read_beir, read_csv, read_jsonl, read_parquet
from vembed.errors import DataError


def messages(rows, path="f"):
    return [
        row.values.describe_at(f"{path}:{row.line}")
        for row in rows
        if isinstance(row.values, RowProblem)
    ]


@pytest.fixture
def write(tmp_path):
    def write_bytes(content, name="f.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return write_bytes


def test_jsonl_lines_are_counted_and_blank_ones_passed_over(write):
    path = write(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xc3\xa9"}')
    rows = list(read_jsonl(path))
    assert [(row.line, row.values) for row in rows] == [(1, {"a": 1}), (4, {"a": "é"})]
    assert [row.done for row in rows] == sorted(row.done for row in rows)
    assert rows[-1].done == 1.0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1', "f:2: line: must be one JSON object. Received: '{\"a\": 1', broken at column"),
        (b"[1, 2]", "Received: [1, 2] (a list of 2)"),
        (b'"text"', "Received: 'text' (a text)"),
        (b"null", "Received: null"),
        (b"{}{}", "broken at column 3 (Extra data)"),
        (b'{"a": "\x00"}', "Invalid control character"),
        (b"\x00\x01", "must be one JSON object"),
        (b"9" * 5000, "must be one JSON object"),
        (b"[" * 200_000, "must be one JSON object"),
        (b'{"a": "caf\xe9"}', "must be UTF-8. Received: byte 0xe9 at byte 10 of the line"),
        (b"\xff\xfe{\x00", "a UTF-16 byte-order mark"),
    ],
)
def test_jsonl_problem_of_one_line_leaves_the_next_readable(write, line, expected):
    rows = list(read_jsonl(write(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')))
    (message,) = messages(rows)
    assert message.startswith("f:2: line: ")
    assert expected in message
    assert len(message) < 300
    assert rows[-1] == RawRow(3, {"a": 3}, 1.0)


def test_a_line_that_is_too_long_is_refused_in_bounded_memory(write):
    path = write(b'{"a": 1}\n{"a": "' + b"x" * (3 * reading.MAX_LINE_BYTES) + b'"}\n')
    tracemalloc.start()
    (message,) = messages(read_jsonl(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "f:2: line: must not be longer than 32 MB" in message
    assert peak < 2.5 * reading.MAX_LINE_BYTES


def test_jsonl_gz(tmp_path):
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert [row.values for row in read_jsonl(str(path))] == [{"a": 1}, {"a": 2}]
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="complete gzip file"):
        list(read_jsonl(str(path)))
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="complete gzip file"):
        list(read_jsonl(str(path)))


def test_csv_rows_start_where_their_first_line_is(write):
    path = write(b'a,b\n1,"two\nlines"\n\n"say ""hi""",\xc3\xa9\n', "f.csv")
    rows = [(row.line, row.values) for row in read_csv(path, ",")]
    assert rows == [
        (2, {"a": "1", "b": "two\nlines"}),
        (5, {"a": 'say "hi"', "b": "é"}),
    ]


def test_csv_takes_a_byte_order_mark_an_index_column_and_long_cells(write):
    path = write(b"\xef\xbb\xbf,a\n0," + b"x" * 200_000 + b"\n", "f.csv")
    assert [row.values for row in read_csv(path, ",")] == [{"a": "x" * 200_000}]


def test_tsv(write):
    path = write(b"a\tb\n1,5\t2\n", "f.tsv")
    assert [row.values for row in read_csv(path, "\t")] == [{"a": "1,5", "b": "2"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n1,2,3\n", "f:3: line: must have as many cells as the header. Received: 3"),
        (b"a,b\n1\n", "f:2: line: must have as many cells as the header. Received: 1 cells"),
        (b'a,b\n1,"2\n3,4\n', "f:2: line: must be a row of cells"),
        (b'a,b\n1,"2"x\n', "f:2: line: must be a row of cells"),
        (b"a,b\n1,2\n1,\xff\n", "f:3: line: must be UTF-8. Received: byte 0xff at byte 2"),
    ],
)
def test_csv_problems(write, content, expected):
    (message,) = messages(read_csv(write(content, "f.csv"), ","))
    assert message.startswith(expected)


def test_csv_headers(write):
    with pytest.raises(DataError, match=r"f\.csv:1: header: .* Received twice: 'a'"):
        list(read_csv(write(b"a,b,a\n1,2,3\n", "f.csv"), ","))
    with pytest.raises(DataError, match="must name the columns"):
        list(read_csv(write(b",\n1,2\n", "f.csv"), ","))


def test_parquet_counts_rows_and_refuses_what_is_none(write, tmp_path):
    import datasets

    path = tmp_path / "f.parquet"
    datasets.Dataset.from_dict({"a": ["x", "y"], "n": [["p"], None]}).to_parquet(path)
    assert list(read_parquet(str(path))) == [
        RawRow(1, {"a": "x", "n": ["p"]}, 0.5),
        RawRow(2, {"a": "y", "n": None}, 1.0),
    ]
    content = path.read_bytes()
    for broken in (b"text", content[:-30], content[:4] + b"\xff" * 60 + content[64:]):
        with pytest.raises(DataError, match="must be a Parquet file"):
            list(read_parquet(write(broken, "g.parquet")))


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_jsonl(str(tmp_path / "f.jsonl")))


def beir_columns(query, positives):
    return {
        "query_text": query,
        "query_image": None,
        "positive_text": positives,
        "positive_image": [None] * len(positives),
    }


def test_beir_gives_each_query_with_its_documents(tmp_path):
    write_rows(
        tmp_path / "corpus.jsonl",
        [
            {"_id": "d1", "title": "T", "text": "one"},
            {"_id": "d2", "text": "two"},
            {"_id": "d3", "title": "", "text": "three"},
        ],
    )
    write_rows(
        tmp_path / "queries.jsonl",
        [{"_id": "q0", "text": "none"}, {"_id": "q1", "text": "a"}, {"_id": "q2", "text": "b"}],
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq2\td3\t1\nq1\td2\t1\nq1\td1\t2\nq1\td3\t0\nq1\td2\t1\n"
    )
    rows = [(row.line, row.values) for row in read_beir(str(tmp_path), "train")]
    assert rows == [
        (2, beir_columns("a", ["two", "T one"])),
        (3, beir_columns("b", ["three"])),
    ]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("qrels/test.tsv", "q0\tnowhere\t1\n", "every document must be in .* 'nowhere'"),
        ("qrels/test.tsv", "nobody\td0\t1\n", "every query must be in .* 'nobody'"),
        ("qrels/test.tsv", "q0\td0\n", r"test\.tsv:1: line: must be query-id, corpus-id and"),
        ("qrels/test.tsv", "q0\td0\thigh\n", r"test\.tsv:1: line: must be query-id"),
        ("corpus.jsonl", '{"_id": "d0"\n', r"corpus\.jsonl:1: line: must be one JSON object"),
        ("corpus.jsonl", '{"_id": 5, "text": "a"}\n', r"corpus\.jsonl:1: _id: a text"),
        ("corpus.jsonl", '{"_id": "d0", "text": 5}\n', r"corpus\.jsonl:1: text: a text"),
        ("queries.jsonl", '{"text": "a"}\n', r"queries\.jsonl:1: _id: a text"),
    ],
)
def test_beir_problems(tmp_path, file, content, expected):
    write_beir(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=expected):
        list(read_beir(str(tmp_path), "test"))


def test_beir_split_that_is_not_there(tmp_path):
    write_beir(tmp_path)
    with pytest.raises(DataError, match="Splits of this BEIR folder: 'test'.*did you mean 'test'"):
        list(read_beir(str(tmp_path), "tests"))


def test_jsonl_reads_what_json_writes(write):
    row = {"q": "a\nb\u2028c\U0001f600\\", "n": [1.5, None, True, "\x7f"]}
    for ascii_only in (True, False):
        path = write((json.dumps(row, ensure_ascii=ascii_only) + "\n").encode() * 2)
        assert [r.values for r in read_jsonl(path)] == [row, row]
