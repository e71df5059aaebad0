import pytest

from vembed.data.cells import CellReader
from vembed.data.columns import field_columns, normalise_mapping
from vembed.data.problems import RowProblem
from vembed.data.records import RowParser
from vembed.errors import ConfigError
from vembed.images import ImageFolder
from vembed.modes import RetrievalMode

ROOT = ImageFolder("/images")


def parse(row, mode, mapping=None, **kwargs):
    """A row's items, each as its text, its path, or both."""
    parser = RowParser(mapping, mode=RetrievalMode.parse(mode), cells=CellReader(ROOT), **kwargs)
    row = parser.parse(row)

    def parts(item):
        path = None if item.image is None else item.image.path
        return item.text or path if None in (item.text, path) else (item.text, path)

    return parts(row.query), [parts(i) for i in row.positives], [parts(i) for i in row.negatives]


@pytest.mark.parametrize(
    ("mode", "row", "expected"),
    [
        # What pairs of captions and images are called wherever they are found.
        ("t2i", {"text": "a", "image": "x"}, ("a", ["x"], [])),
        ("i2t", {"text": "a", "image": "x"}, ("x", ["a"], [])),
        ("t2i", {"caption": "a", "image": "x"}, ("a", ["x"], [])),
        ("i2t", {"caption": "a", "image": "x", "id": 3}, ("x", ["a"], [])),
        ("m2t", {"text": "a", "image": "x", "positive": "b"}, (("a", "x"), ["b"], [])),
        ("i2m", {"query": "x", "text": "a", "positive_image": "y"}, ("x", [("a", "y")], [])),
        ("t2m", {"text": "a", "image": "y", "positive_text": "b"}, ("a", [("b", "y")], [])),
        ("i2i", {"image1": "x", "image2": "y", "score": 1}, ("x", ["y"], [])),
        ("i2i", {"image": "x", "label": 1}, ("x", [], [])),
        ("m2m", {"text": "a", "image": "x", "label": 1}, (("a", "x"), [], [])),
        # A part's own name says more than the item's.
        ("i2t", {"query": "a", "query_image": "x", "positive": "b"}, ("x", ["b"], [])),
        ("t2t", {"query": "a", "query_image": "x", "positive": "b"}, ("a", ["b"], [])),
        ("m2t", {"query": "a", "query_image": "x", "positive": "b"}, (("a", "x"), ["b"], [])),
        ("m2t", {"query_text": "a", "query_image": "x", "positive": "b"}, (("a", "x"), ["b"], [])),
        # Several.
        (
            "t2i",
            {"query": "a", "positives": ["x", "y"], "negative_1": "u", "negative_2": "v"},
            ("a", ["x", "y"], ["u", "v"]),
        ),
        (
            "t2i",
            {"query": "a", "positive": "x", "negative_image_1": "u", "negative_image_2": "v"},
            ("a", ["x"], ["u", "v"]),
        ),
        (
            "t2m",
            {"query": "a", "positive_texts": ["b", "c"], "positive_images": ["x", "y"]},
            ("a", [("b", "x"), ("c", "y")], []),
        ),
        (
            "t2m",
            {
                "query": "a",
                "positive": {"text": "b", "image": "x"},
                "negative_text_1": "c", "negative_image_1": "y",
                "negative_text_2": "d", "negative_image_2": "z",
            },
            ("a", [("b", "x")], [("c", "y"), ("d", "z")]),
        ),
        (
            "i2m",
            {"query": "q", "pos": [{"text": "b", "image": "x", "id": 1}], "neg": []},
            ("q", [("b", "x")], []),
        ),
    ],
)  # fmt: skip
def test_rows_of_many_forms(mode, row, expected):
    assert parse(row, mode) == expected


@pytest.mark.parametrize(
    ("mode", "mapping", "expected"),
    [
        ("t2i", {"query": "title", "positive": "photo"}, ("a", ["x"], [])),
        ("i2t", {"query_image": "photo", "positive_text": "title"}, ("x", ["a"], [])),
        ("i2t", {"image": "photo", "caption": "title"}, ("x", ["a"], [])),
        (
            "m2t",
            {"query_text": "title", "query_image": "photo", "positive": "title"},
            (("a", "x"), ["a"], []),
        ),
        ("m2t", {"query": "product", "positive": "title"}, (("b", "y"), ["a"], [])),
        ("m2t", {"text": "title", "image": "photo", "positive": "title"}, (("a", "x"), ["a"], [])),
    ],
)
def test_column_mapping(mode, mapping, expected):
    row = {"title": "a", "photo": "x", "product": {"text": "b", "image": "y"}, "text": "unused"}
    assert parse(row, mode, mapping) == expected


def test_a_field_without_an_image_has_no_such_column():
    t2t = RetrievalMode.parse("t2t")
    assert "query_image" not in str(field_columns(t2t))
    with pytest.raises(ConfigError, match="'query_image' is no field of vembed.*fields in t2t: "):
        normalise_mapping({"query_image": "a"}, t2t)
    assert normalise_mapping({"negatives": "a", "negative_2": "b"}, t2t) == {"negative": ["a", "b"]}


def test_objects_in_cells_of_text_are_json():
    row = {
        "query": "a",
        "positive": '{"text": "b, c", "image": "x"}',
        "negative_1": ' {"image": "y", "text": "d"}',
        "negative_2": "",
    }
    assert parse(row, "t2m", text_cells=True) == ("a", [("b, c", "x")], [("d", "y")])
    with pytest.raises(RowProblem, match="an object with text and image is expected"):
        parse({"query": "a", "positive": '{"text": "b'}, "t2m", text_cells=True)


@pytest.mark.parametrize(
    ("mode", "row", "expected"),
    [
        (
            "m2t",
            {"query_text": "a", "positive": "b"},
            "query: as many texts as images are expected. Re",
        ),
        ("m2t", {"query_image": "x", "positive": "b"}, "query: as many texts as images are expec"),
        (
            "t2m",
            {"query": "a", "positive_text": ["b", "c"], "positive_image": ["x"]},
            "positive: as many texts as images are expected. Received: 2 texts and 1 images",
        ),
        (
            "t2m",
            {"query": "a", "positive_text": ["b", "c"], "positive_image": ["x", None]},
            "positive_image[1]: an image is expected: a path, or bytes. Received: null",
        ),
        ("m2t", {"query": "a", "positive": "b"}, "or two columns: query_text and query_image"),
        ("m2t", {"ask": "a", "positive": "b"}, "query_text: your_column, query_image: your_column"),
        ("t2m", {"query": "a", "text2": "b"}, "Received: 1 texts and 0 images"),
        ("t2i", {"query": "a", "picture": "x"}, "positive: no column for it, and none for label"),
        ("i2t", {"query_image": 3, "positive": "b"}, "query_image: an image is expected"),
    ],
)
def test_rows_that_lack_a_part(mode, row, expected):
    with pytest.raises(RowProblem) as caught:
        parse(row, mode)
    assert expected in caught.value.describe_at("f:1")
