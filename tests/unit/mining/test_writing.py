"""A written row is the row that was read, with more negatives, as training reads it."""

from __future__ import annotations

import json

import pytest

from vembed.data.cells import CellReader
from vembed.data.records import RowParser
from vembed.errors import DataError
from vembed.images import ImageBytes, ImageFolder
from vembed.mining.writing import RowWriter
from vembed.modes import Item, RetrievalMode

TEXTS = [Item("new one"), Item("new two")]

MAPPING = {"query": "q", "positive": "a", "negative": "hard"}
CASES = {
    "none yet": ("t2t", {"query": "q", "positive": "p"}, None),
    "a list": ("t2t", {"query": "q", "positive": ["p", "r"], "negatives": ["n"]}, None),
    "one text": ("t2t", {"query": "q", "positive": "p", "negative": "n"}, None),
    "numbered": ("t2t", {"query": "q", "positive": "p", "neg_1": "n", "neg_2": "o"}, None),
    "a null": ("t2t", {"query": "q", "positive": "p", "negative": None}, None),
    "other names": ("t2t", {"anchor": "q", "pos": ["p"], "neg": ["n"]}, None),
    "text columns": ("t2t", {"query_text": "q", "positive_text": "p", "negative_text": "n"}, None),
    "mapped": ("t2t", {"q": "q", "a": "p", "hard": "n"}, MAPPING),
    "mapped, not there": ("t2t", {"q": "q", "a": "p"}, MAPPING),
    "others stay": ("t2t", {"id": 3, "query": "q", "positive": "p", "tags": [{"b": None}]}, None),
}  # fmt: skip


def parse(row, mode, mapping, *, text_cells=False, folder=None):
    parser = RowParser(
        mapping, mode=RetrievalMode.parse(mode), cells=CellReader(folder), text_cells=text_cells
    )
    return parser.parse(row)


@pytest.mark.parametrize(("mode", "row", "mapping"), CASES.values(), ids=CASES)
def test_negatives_are_added_to_those_there_are(mode, row, mapping):
    before = parse(row, mode, mapping)
    line = RowWriter(mapping, RetrievalMode.parse(mode)).line(row, TEXTS, None, "f:1")
    written = json.loads(line)
    after = parse(written, mode, mapping)
    assert line.endswith("\n")
    assert (after.query, after.positives) == (before.query, before.positives)
    assert after.negatives == (*before.negatives, *TEXTS)
    assert {k: v for k, v in written.items() if k in row and "neg" not in k and k != "hard"} == {
        k: v for k, v in row.items() if "neg" not in k and k != "hard"
    }


def test_without_negatives_a_row_stays_as_it_is():
    row = {"query": "ö", "positive": "p"}
    line = RowWriter(None, RetrievalMode.parse("t2t")).line(row, [], None, "f:1")
    assert line == '{"query": "ö", "positive": "p"}\n'


@pytest.mark.parametrize("mapping", [None, {"teacher_scores": "judged"}])
def test_scores_take_the_place_of_those_there_are(mapping):
    row = {"query": "q", "positive": "p", "negatives": ["n"], "pos_scores": [1], "neg_scores": [2]}
    if mapping:
        row = {"query": "q", "positive": "p", "negatives": ["n"], "judged": [1, 2]}
    writer = RowWriter(mapping, RetrievalMode.parse("t2t"))
    written = json.loads(writer.line(row, TEXTS, [0.1, 0.2, 0.3, 0.4], "f:1"))
    assert parse(written, "t2t", mapping).teacher_scores == (0.1, 0.2, 0.3, 0.4)
    assert written.keys() <= {"query", "positive", "negatives", "judged", "teacher_scores"}


def test_a_table_of_texts_gets_its_types():
    row = {"query": "q", "positive": "p", "negative": "", "score": "0.5", "teacher_scores": "[1]"}
    before = parse(row, "t2t", None, text_cells=True)
    writer = RowWriter(None, RetrievalMode.parse("t2t"), text_cells=True)
    after = parse(json.loads(writer.line(row, [], None, "f:1")), "t2t", None)
    assert after == before
    assert after.score == 0.5
    objects = {"query": '{"text": "q", "image": "a.png"}', "positive": "{p"}
    before = parse(objects, "m2t", None, text_cells=True, folder=ImageFolder("/x"))
    writer = RowWriter(None, RetrievalMode.parse("m2t"), text_cells=True)
    line = writer.line(objects, TEXTS, None, "f:1")
    after = parse(json.loads(line), "m2t", None, folder=ImageFolder("/x"))
    assert (after.query, after.positives, after.negatives) == (
        before.query, before.positives, tuple(TEXTS),
    )  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive": {"text": "p", "image": "a.png"}},
        {"query": "q", "positive_text": "p", "positive_image": "a.png"},
        {"query": "q", "positive": {"text": "p", "image": "a.png"},
         "negatives": [{"text": "n", "image": "b.png"}]},
        {"query": "q", "positive": {"text": "p", "image": "a.png"},
         "negative_text": "n", "negative_image": "b.png"},
        {"query": "q", "positive": {"text": "p", "image": "a.png"},
         "negative": "n", "negative_image": "b.png"},
    ],
)  # fmt: skip
def test_texts_with_images(row):
    folder = ImageFolder("/x")
    negatives = [Item("new", folder.find("sub/c.png")), Item("other", folder.find("d.png"))]
    before = parse(row, "t2m", None, folder=folder)
    written = RowWriter(None, RetrievalMode.parse("t2m")).line(row, negatives, None, "f:1")
    after = parse(json.loads(written), "t2m", None, folder=folder)
    assert after.positives == before.positives
    assert after.negatives == (*before.negatives, *negatives)


def test_images_are_their_paths():
    folder = ImageFolder("/x")
    row = {"query": "q", "positive": "a.png"}
    writer = RowWriter(None, RetrievalMode.parse("t2i"))
    written = json.loads(writer.line(row, [Item(image=folder.find("sub/c.png"))], None, "f:1"))
    assert written["negatives"] == ["sub/c.png"]
    with pytest.raises(DataError, match="f:1: a mined negative is an image that lies in a file"):
        writer.line(row, [Item(image=ImageBytes(b"x", "c.png"))], None, "f:1")


def test_what_json_cannot_hold_is_named():
    writer = RowWriter(None, RetrievalMode.parse("t2t"))
    with pytest.raises(DataError, match="f:1: raw: has no form in JSON.*Received: 2 bytes"):
        writer.line({"query": "q", "positive": "p", "raw": b"ab"}, [], None, "f:1")
