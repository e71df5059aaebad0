"""Each content has one number, in the order in which contents come, and what is known is known."""

from __future__ import annotations

import json

import pytest

from tests.pictures import COLORS, mode_rows, write_pictures
from tests.tiny import write_rows
from vembed.data import ImageRules
from vembed.errors import DataError
from vembed.mining.rows import load_corpus, load_rows, number_items
from vembed.modes import RetrievalMode

ROWS = [
    {"query": "q0", "positive": ["p0", "p1"]},
    {"query": "q1", "positive": "p2", "negatives": ["p0", "n0"]},
    {"query": "q0", "positive": "p3"},
    {"query": "p2", "positive": "p1"},
]


def load(path, mode="t2t", **options):
    settings = {"column_mapping": None, "images": ImageRules(), "split": "train"}
    return load_rows(str(path), mode=RetrievalMode.parse(mode), **(settings | options))


def corpus_of(path, modality="t", column="text"):
    return load_corpus(
        str(path), modality=modality, column=column, image_column="image", images=ImageRules(),
        split="train",
    )  # fmt: skip


def texts(items):
    return [str(item) for item in items.read(range(len(items)))]


def named(pool, pairs):
    queries, documents = texts(pool.queries), texts(pool.documents)
    numbers = zip(pairs.queries.tolist(), pairs.documents.tolist(), strict=True)
    return {(queries[q], documents[d]) for q, d in numbers}


def test_positives_of_all_rows_are_the_candidates(tmp_path):
    pool = number_items(load(write_rows(tmp_path / "r.jsonl", ROWS)), None, with_negatives=False)
    assert texts(pool.queries) == ["q0", "q1", "p2"]
    assert texts(pool.documents) == ["p0", "p1", "p2", "p3"]
    assert pool.candidates == 4
    assert pool.query_R.tolist() == [0, 1, 0, 2]
    positives = {("q0", "p0"), ("q0", "p1"), ("q0", "p3"), ("q1", "p2"), ("p2", "p1")}
    assert named(pool, pool.positives) == positives
    # Beside them: what a row has as a negative, and a query that is a candidate itself.
    assert named(pool, pool.known) == positives | {("q1", "p0"), ("p2", "p2")}
    assert [pool.positives_R[row].tolist() for row in range(4)] == [[0, 1], [2], [3], [1]]
    assert pool.source_N.tolist() == [0, 0, 1, 2]


def test_of_a_corpus_equal_texts_are_one_candidate(tmp_path):
    corpus = write_rows(tmp_path / "c.jsonl", [{"text": t} for t in ("c0", "p1", "c0", "n0", "c1")])
    rows = load(write_rows(tmp_path / "r.jsonl", ROWS))
    pool = number_items(rows, corpus_of(corpus), with_negatives=True)
    documents = texts(pool.documents)
    assert documents[: pool.candidates] == ["c0", "p1", "n0", "c1"]
    assert documents[pool.candidates :] == ["p0", "p2", "p3"]
    assert pool.source_N.tolist() == [0, 1, 3, 4, -1, -1, -1]
    assert named(pool, pool.known) == {("q0", "p1"), ("p2", "p1"), ("q1", "n0")}
    assert [documents[n] for n in pool.positives_R[0]] == ["p0", "p1"]
    assert [documents[n] for n in pool.negatives_R[1]] == ["p0", "n0"]
    assert pool.negatives_R[2].tolist() == []


def test_the_documents_of_a_beir_folder_are_title_and_text(tmp_path, beir_path):
    first = json.loads((beir_path / "corpus.jsonl").read_text().splitlines()[0])
    corpus = corpus_of(beir_path)
    assert corpus[0].query.text == f"{first['title']} {first['text']}".strip()


def test_a_corpus_of_images(tmp_path):
    write_pictures(tmp_path)
    pictures = [{"image": f"{name}.png"} for name in COLORS]
    corpus = corpus_of(write_rows(tmp_path / "c.jsonl", pictures), "i")
    rows = load(write_rows(tmp_path / "r.jsonl", mode_rows("t2i")), "t2i")
    pool = number_items(rows, corpus, with_negatives=False)
    assert pool.candidates == len(COLORS)
    assert (pool.source_N >= 0).all()  # the positives are among them, known by their paths


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"text": "x", "label": "a"}], "r.jsonl: mining needs a positive in every row. "
         "Without one: 1 of 5 rows, the first at .*r.jsonl:5"),
        ([{"text": "x", "label": "a"}], "Without one: all 1 rows"),
    ],
)  # fmt: skip
def test_rows_without_a_positive(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(write_rows(tmp_path / "r.jsonl", rows))


def test_a_corpus_without_the_column(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match="c.jsonl:1: no column 'text'. Columns: 'body'. Name"):
        corpus_of(path)
    assert corpus_of(path, column="body")[0].query.text == "x"
