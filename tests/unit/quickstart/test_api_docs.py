from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vembed.quickstart.api_docs import (
    PACKAGES,
    _letters,
    build_api_docs,
    make_row,
    make_rows,
    split_of,
)
from vembed.quickstart.docstrings import STANDARD_LIBRARY, DocumentedObject

REPOSITORY = Path(__file__).parents[3]


def documented(docstring: str, name: str = "pkg.find_it", signature: str = "(x)"):
    return DocumentedObject(name, signature, docstring)


def test_first_sentence_asks_and_the_rest_answers():
    row = make_row(
        documented(
            "Find the :class:`~pkg.Thing` in ``x``. Slow for\nlong lists.\n\n"
            "Parameters\n----------\nx : list\n    Where to look.\n\n>>> find_it([1])\n1\n"
        )
    )

    assert row is not None
    assert row.query == "Find the pkg.Thing in x."
    assert (
        row.document == "pkg.find_it(x)\nSlow for long lists. Parameters x : list Where to look. 1"
    )


def test_name_and_signature_are_a_document_of_their_own():
    row = make_row(documented("Search a list from the left"))

    assert row is not None
    assert row.document == "pkg.find_it(x)"


def test_control_characters_of_a_docstring_become_spaces():
    row = make_row(documented("Split text at a\0NUL character. It is \x1b[1mrare."))

    assert row is not None
    assert row.query == "Split text at a NUL character."
    assert row.document.endswith("It is [1mrare.")


def test_abbreviations_do_not_end_a_sentence():
    row = make_row(documented("Sort sequences, e.g. lists or tuples. In place."))

    assert row is not None
    assert row.query == "Sort sequences, e.g. lists or tuples."


@pytest.mark.parametrize(
    "docstring",
    [
        "Two words.",
        "See base class for details.",
        "Return %(what)s of the figure.",
        "f(x) -> the value of x",
        "Call find_it on the list.",
        "x (int): the number to use.",
        "Args: the list to look through",
        "Search a list from the left.\n\nUse it to search  a list from THE left.",
        "word " * 41,
    ],
)
def test_docstrings_that_make_no_search(docstring):
    assert make_row(documented(docstring)) is None


def test_long_signatures_and_texts_are_cut():
    row = make_row(
        documented("Do many things at once.\n\n" + "more " * 500, signature="(" + "a" * 500)
    )

    assert row is not None
    name, text = row.document.split("\n")
    assert len(name) < 200
    assert len(text.split()) == 120


@pytest.mark.parametrize(
    "other",
    [
        "read one  LINE of a file\n\nNever blocks.",
        "Wait until a line is there.\n\nBlocks, until there is one!",
    ],
    ids=["same query", "same text"],
)
def test_nearly_equal_rows_are_kept_once(other):
    first = "Read one line of a file.\n\nBlocks until there is one."
    third = "Write one line to a file.\n\nAppends a newline."

    rows = make_rows([documented(first, "a.x"), documented(other, "b.x"), documented(third, "c.x")])

    assert len(rows) == 2
    assert "c.x" in {row.name for row in rows}


def test_rows_do_not_depend_on_the_order_of_the_objects():
    objects = [
        documented(f"Do the thing number {i}.\n\nDetail {i % 7}.", f"p.f{i}x") for i in range(50)
    ]

    assert make_rows(objects) == make_rows(reversed(objects))


def test_methods_of_one_name_share_a_split():
    assert split_of("pandas.DataFrame.to_csv") == split_of("pandas.Series.to_csv")
    assert {split_of(f"m.f{i}") for i in range(200)} == {"train", "dev", "test"}


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return build_api_docs(tmp_path_factory.mktemp("docs"), packages=("jinja2", "rich", "pydantic"))


def read_jsonl(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_no_query_or_document_is_in_two_splits(docs):
    pairs = [*read_jsonl(docs.train), *read_jsonl(docs.dev)]
    queries = [row["query"] for row in pairs] + [
        r["text"] for r in read_jsonl(docs.test / "queries.jsonl")
    ]
    documents = [row["positive"] for row in pairs] + [
        r["text"] for r in read_jsonl(docs.test / "corpus.jsonl")
    ]

    assert len({_letters(q) for q in queries}) == len(queries) > 300
    assert len({_letters(d) for d in documents}) == len(documents)


def test_no_document_repeats_its_query(docs):
    corpus = {row["_id"]: row["text"] for row in read_jsonl(docs.test / "corpus.jsonl")}
    pairs = [
        (r["text"], corpus[r["_id"].removeprefix("q:")])
        for r in read_jsonl(docs.test / "queries.jsonl")
    ]
    pairs += [(r["query"], r["positive"]) for r in read_jsonl(docs.train)]

    assert not [query for query, document in pairs if _letters(query) in _letters(document)]


def test_test_set_is_in_beir_layout(docs):
    corpus = {row["_id"] for row in read_jsonl(docs.test / "corpus.jsonl")}
    queries = {row["_id"] for row in read_jsonl(docs.test / "queries.jsonl")}
    header, *lines = (docs.test / "qrels" / "test.tsv").read_text().splitlines()
    judgements = [line.split("\t") for line in lines]

    assert header == "query-id\tcorpus-id\tscore"
    assert {query for query, _, _ in judgements} == queries
    assert {document for _, document, _ in judgements} == corpus
    assert len(judgements) == docs.sizes["test"] > 30


def test_another_process_writes_the_same_bytes(docs, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from vembed.quickstart.api_docs import build_api_docs\n"
        "build_api_docs(Path(sys.argv[1]), packages=('jinja2', 'rich', 'pydantic'))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)

    files = [file.relative_to(docs.test.parent) for file in docs.test.parent.rglob("*.*")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / file).read_bytes() == (docs.test.parent / file).read_bytes(), file


def test_packages_are_pinned():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    distributions = {"sklearn": "scikit-learn", "PIL": "pillow"}

    for package in PACKAGES:
        name = distributions.get(package, package).lower().replace("_", "-")
        assert package == STANDARD_LIBRARY or name in pins, package
