import pytest

from vembed.data.columns import normalise_mapping
from vembed.data.problems import PROBLEM_LIMIT, ProblemLog, RowProblem, describe
from vembed.data.records import ParsedRow, RowParser
from vembed.errors import ConfigError, DataError
from vembed.modes import Item, RetrievalMode

T2T = RetrievalMode.parse("t2t")


def texts(query, positives=(), negatives=(), *facts):
    """A parsed row of texts."""
    items = (tuple(Item(text) for text in several) for several in (positives, negatives))
    return ParsedRow(Item(query), *items, *facts)


def parse(row, mapping=None, **kwargs):
    return RowParser(mapping, **kwargs).parse(row)


def problem_of(row, mapping=None, **kwargs):
    with pytest.raises(RowProblem) as caught:
        parse(row, mapping, **kwargs)
    return caught.value.describe_at("f.jsonl:7")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "positive": "p"}, texts("q", ("p",), (), None, None, None)),
        (
            {"query": "q", "positive": "p", "negatives": ["a", "b"]},
            texts("q", ("p",), ("a", "b"), None, None, None),
        ),
        ({"query": "q", "positive": ["p", "r"]}, texts("q", ("p", "r"), (), None, None, None)),
        ({"query": "q", "positives": ["p", "r"]}, texts("q", ("p", "r"), (), None, None, None)),
        (
            {"anchor": "q", "positive": "p", "negative_1": "a", "negative_2": "b"},
            texts("q", ("p",), ("a", "b"), None, None, None),
        ),
        (
            {"query": "q", "positive": "p", "negative": "a", "negative_2": None},
            texts("q", ("p",), ("a",), None, None, None),
        ),
        ({"text": "t", "label": "x"}, texts("t", (), (), "x", None, None)),
        ({"text": "t", "label": 3}, texts("t", (), (), "3", None, None)),
        (
            {"text1": "a", "text2": "b", "score": 0.5},
            texts("a", ("b",), (), None, 0.5, None),
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": 4},
            texts("a", ("b",), (), None, 4.0, None),
        ),
        (
            {"query": "q", "positive": "p", "negatives": ["n"], "teacher_scores": [2, 1.5]},
            texts("q", ("p",), ("n",), None, None, (2.0, 1.5)),
        ),
        (
            {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [9.5], "neg_scores": [1]},
            texts("q", ("p",), ("n",), None, None, (9.5, 1.0)),
        ),
        (
            {"query": "q", "positive": "p", "negatives": None, "id": 7, "text": "not used"},
            texts("q", ("p",), (), None, None, None),
        ),
        ({"query": "q", "positive": "p", "negatives": []}, texts("q", ("p",), (), *[None] * 3)),
    ],
)
def test_row_forms(row, expected):
    assert parse(row) == expected


def test_mapping_names_columns_of_any_field():
    row = {"question": "q", "answer": "p", "bad1": "a", "bad2": "b", "sim": 1, "score": "ignored"}
    mapping = {
        "query": "question",
        "positive": "answer",
        "negative_1": "bad1",
        "negative_2": "bad2",
        "score": "sim",
    }
    assert parse(row, mapping) == texts("q", ("p",), ("a", "b"), None, 1.0, None)


def test_mapping_accepts_the_names_of_every_row_form():
    assert normalise_mapping({"text1": "a", "sentence2": "b", "negatives": "c"}, T2T) == {
        "query": ["a"],
        "positive": ["b"],
        "negative": ["c"],
    }


def test_a_column_that_is_mapped_to_one_field_is_no_other_field():
    row = {"sentence1": "a", "sentence2": "b", "label": 3.5}
    assert parse(row, {"score": "label"}) == texts("a", ("b",), (), None, 3.5, None)
    assert "similarity is a score" in problem_of(row)


def test_swapped_columns():
    row = {"query": "p", "positive": "q"}
    assert parse(row, {"query": "positive", "positive": "query"}).query == Item("q")


def test_text_cells_hold_numbers_as_text_and_empty_means_absent():
    row = {"query": "q", "positive": "p", "negative_1": "n", "negative_2": "", "score": "0.5"}
    parsed = parse({**row, "teacher_scores": "[1, 2.5]"}, text_cells=True)
    assert parsed == texts("q", ("p",), ("n",), None, 0.5, (1.0, 2.5))
    assert parse({"text": "t", "label": "4"}, text_cells=True).label == "4"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "", "positive": "p"}, "query: must not be empty. Received: '' (a text)"),
        ({"query": " \n", "positive": "p"}, "query: must not be empty"),
        ({"query": None, "positive": "p"}, "query: must not be empty. Received: null"),
        ({"query": "q", "positive": "\t"}, "positive: must not be empty"),
        ({"query": "q", "positive": []}, "positive: must not be empty. Received: [] (a list of 0)"),
        ({"query": "q", "positive": ["p", ""]}, "positive[1]: must not be empty"),
        ({"query": 3, "positive": "p"}, "query: a text is expected. Received: 3 (a number)"),
        ({"query": True, "positive": "p"}, "query: a text is expected. Received: true (a boolean)"),
        ({"query": ["q"], "positive": "p"}, "query: a text is expected. Received: ['q']"),
        ({"query": {"a": 1}, "positive": "p"}, "query: a text is expected. Received: {'a': 1}"),
        ({"query": "q", "positive": 1}, "positive: a text is expected. Received: 1 (a number)"),
        ({"query": "q", "positive": "p", "negatives": [1]}, "negatives[0]: a text is expected"),
        ({"query": "q", "positive": "p", "negatives": {}}, "negatives: a text is expected"),
        ({"query": "q", "positive": "p", "negatives": [["a"]]}, "negatives[0]: a text is expected"),
        ({"query": "q\0", "positive": "p"}, "query: must not contain NUL"),
        ({"query": "q", "positive": "\ud800"}, "positive: must be valid Unicode"),
        ({"query": "q", "positive": "p", "score": "high"}, "score: a finite number is expected"),
        ({"query": "q", "positive": "p", "score": float("nan")}, "Received: nan (a number)"),
        ({"query": "q", "positive": "p", "score": float("inf")}, "Received: inf (a number)"),
        ({"query": "q", "positive": "p", "score": 10**400}, "score: a finite number is expected"),
        ({"query": "q", "positive": "p", "score": False}, "Received: false (a boolean)"),
        ({"text": "t", "label": 1.5}, "label: a text or a whole number is expected"),
        ({"text": "t", "label": True}, "label: a text or a whole number is expected"),
        ({"text": "t", "label": " "}, "label: must not be empty"),
        ({"text": 4, "label": "x"}, "text: a text is expected"),
        (
            {"query": "q", "positive": "p", "negatives": ["n"], "teacher_scores": [1.0]},
            "Received: 1 scores for 2 positives and negatives together",
        ),
        (
            {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0]},
            "negative_scores: one score for each",
        ),
        (
            {"query": "q", "positive": "p", "teacher_scores": ["1"]},
            "teacher_scores[0]: a finite number is expected",
        ),
        ({"question": "q", "answer": "a"}, "no column for it. Received: columns 'question', 'ans"),
        ({"query": "q", "answer": "a"}, "positive: no column for it, and none for label"),
        ({"text": "t", "label": None}, "label: must not be empty. Received: null"),
        ({}, "query: no column for it. Received: columns none"),
    ],
)
def test_problems_name_the_place_and_what_was_received(row, expected):
    message = problem_of(row)
    assert message.startswith("f.jsonl:7: ")
    assert expected in message


def test_a_text_column_of_the_user_is_named_beside_the_field():
    message = problem_of({"q": "", "positive": "p"}, {"query": "q"})
    assert "query (column 'q'): must not be empty" in message


def test_mapped_column_that_a_row_lacks():
    message = problem_of({"question": "q", "answer": "a"}, {"query": "qestion"})
    assert "'qestion'" in message
    assert "'question', 'answer'" in message
    assert "Did you mean 'question'?" in message


def test_mapped_column_that_no_row_has():
    parser = RowParser({"negative": "hard"})
    parser.parse({"query": "q", "positive": "p"})
    with pytest.raises(DataError, match=r"f: column_mapping: negative is mapped to 'hard'"):
        parser.check_seen("f")
    parser.parse({"query": "q", "positive": "p", "hard": "n"})
    parser.check_seen("f")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"qery": "a"}, "'qery' is no field of vembed .did you mean 'query'"),
        ({"query": 3}, "expected the name of a column"),
        ({"query": ""}, "expected the name of a column"),
        ({"query": "a", "text": "b"}, "query can come from one column only"),
    ],
)
def test_mapping_that_cannot_be_meant(mapping, message):
    with pytest.raises(ConfigError, match=message):
        RowParser(mapping)


def test_received_values_are_short():
    message = problem_of({"query": "q", "positive": "p", "negatives": {"x" * 500: "y" * 500}})
    assert len(message) < 250
    assert len(describe("x" * 10_000)) < 110
    assert len(describe(list(range(10_000)))) < 120


def test_content_hash_tells_every_part_of_a_row():
    rows = [
        {"query": "q", "positive": "p"},
        {"query": "q", "positive": ["p", "r"]},
        {"query": "q", "positive": "p", "negatives": ["r"]},
        {"query": "q", "positive": "p", "score": 1},
        {"query": "q", "positive": "p", "label": 1},
        {"query": "q", "positive": "p", "teacher_scores": [1]},
        {"query": "p", "positive": "q"},
    ]
    hashes = [parse(row).content_hash() for row in rows]
    assert len(set(hashes)) == len(rows)
    assert all(0 <= h < 2**63 for h in hashes)
    assert hashes[0] == parse({"text1": "q", "text2": "p"}).content_hash()


def test_problem_log_lists_the_first_and_counts_the_rest():
    log = ProblemLog()
    log.raise_if_any()
    log.add(RowProblem("query", "must not be empty", "''"), "f:3")
    log.add(RowProblem("line", "must be one JSON object"), "f:4")
    log.add(RowProblem("query", "must not be empty"), "f:9")
    log.add(RowProblem("query", "must not be empty"), "f:12")
    assert not log.is_full
    with pytest.raises(DataError) as caught:
        log.raise_if_any()
    assert str(caught.value) == (
        "f:3: query: must not be empty. Received: ''.\n"
        "  f:4: line: must be one JSON object.\n"
        "  f:9: query: must not be empty.\n"
        "  f:12: query: must not be empty."
    )
    for line in range(PROBLEM_LIMIT):
        log.add(RowProblem("query", "must not be empty"), f"f:{line}")
    assert log.is_full
