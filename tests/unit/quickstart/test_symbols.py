"""Symbol search: what is drawn, what counts as one symbol, what the files say."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from vembed.data import ImageRules, load_dataset_records
from vembed.evaluation import RetrievalTask
from vembed.quickstart.glyphs import IMAGE_SIZE, draw
from vembed.quickstart.symbols import (
    DEV_FONT,
    TEST_FONT,
    TRAIN_FONTS,
    Symbol,
    build_symbol_search,
    find_symbols,
    name_of,
)

SANS, ITALIC = TRAIN_FONTS[0], TRAIN_FONTS[-2]


def block(character: str) -> bool:
    return character in "+-=<>*?!#%&@0123456789←↑→↓★☆♠♥√∞≠≤≥′’ʹ|❘∣"


def dot(shade: int) -> Image.Image:
    return Image.new("L", (2, 2), shade)


def draw_if_known(character: str, font):
    return draw(character, font) if character in font.characters() else None


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return build_symbol_search(tmp_path_factory.mktemp("symbols"), keep=block)


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("font", [SANS, DEV_FONT, TEST_FONT], ids=lambda font: font.name)
def test_a_character_is_drawn_black_in_the_middle(font):
    image = draw("+", font)

    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    left, top, right, bottom = image.point(lambda value: 255 - value).getbbox()
    assert abs(left - (IMAGE_SIZE - right)) <= 1
    assert abs(top - (IMAGE_SIZE - bottom)) <= 1
    assert image.getextrema()[0] < 50


def test_capitals_are_equally_high_in_all_fonts():
    heights = set()
    for font in (SANS, DEV_FONT, TEST_FONT):
        _, top, _, bottom = draw("H", font).point(lambda value: 255 - value).getbbox()
        heights.add(bottom - top)
    assert max(heights) - min(heights) <= 1


def test_what_has_no_ink_or_no_room_is_not_drawn():
    assert draw("\u00a0", SANS) is None
    assert draw("\u2003", TEST_FONT) is None


def test_characters_of_a_font_are_named_symbols_that_it_has():
    characters = TEST_FONT.characters()

    assert {"+", "★", "½"} <= set(characters)
    assert "☃" not in characters  # STIX has no snowman, and would draw an empty box
    assert "☃" in SANS.characters()
    assert not [c for c in characters if unicodedata.category(c)[0] not in "NPS"]
    assert "𝟎" not in characters  # a digit in a style


def test_names_that_are_drawn_alike_are_one_symbol():
    pictures = {
        "a": {SANS: dot(0), ITALIC: dot(70)},
        "b": {SANS: dot(140)},
        "c": {ITALIC: dot(70), TEST_FONT: dot(210)},
        "d": {SANS: dot(210)},
    }

    assert find_symbols(pictures) == [Symbol(("a", "c", "d")), Symbol(("b",))]


@pytest.mark.parametrize(("shade", "alike"), [(64, True), (65, False)])
def test_pictures_of_one_font_are_alike_up_to_a_quarter_of_black(shade, alike):
    pictures = {"a": {SANS: dot(0)}, "b": {SANS: dot(shade)}}

    assert (len(find_symbols(pictures)) == 1) == alike
    assert len(find_symbols({**pictures, "b": {ITALIC: dot(shade)}})) == 2, "of two fonts"


def test_marks_tell_symbols_apart_and_style_does_not():
    characters = "\u2468\u2788\u2312\u25e0\u2683\u2684\u2232\u2233\u2308["
    fonts = (*TRAIN_FONTS, DEV_FONT, TEST_FONT)
    drawn = {c: {font: p for font in fonts if (p := draw_if_known(c, font))} for c in characters}

    groups = {symbol.characters for symbol in find_symbols(drawn)}

    assert groups == {
        ("\u2468", "\u2788"), ("\u2312", "\u25e0"), ("\u2683",), ("\u2684",), ("\u2232",),
        ("\u2233",), ("\u2308",), ("[",),
    }  # fmt: skip


def test_names_whose_pictures_are_exchanged_in_the_test_font_are_left_out(tmp_path):
    """STIX draws DOUBLE UNION as an intersection."""
    task = build_symbol_search(tmp_path, keep=lambda c: c in "\u22d0\u22d1\u22d2\u22d3")

    assert sorted(task.names) == ["double subset", "double superset"]


def test_no_picture_stands_for_two_symbols(task):
    """The positives of two rows are the same files, or share none."""
    rows = read_jsonl(task.train)
    owner: dict[str, tuple] = {}
    contents: dict[bytes, tuple] = {}
    for row in rows:
        for path in row["positive"]:
            files = tuple(row["positive"])
            assert owner.setdefault(path, files) == files
            assert contents.setdefault((task.images / path).read_bytes(), files) == files
    pictures = {row["query"]: row["positive"] for row in rows}
    assert pictures["divides"] == pictures["vertical line"] != pictures["plus sign"]
    assert len(rows) > 30


def test_train_and_test_have_no_font_in_common(task):
    drawn = {path.split("/")[1] for row in read_jsonl(task.train) for path in row["positive"]}
    tested = {row["image"].split("/")[1] for row in read_jsonl(task.test / "corpus.jsonl")}

    assert drawn <= {font.name for font in TRAIN_FONTS}
    assert tested == {TEST_FONT.name}
    assert TEST_FONT not in TRAIN_FONTS
    assert {font.family for font in TRAIN_FONTS}.isdisjoint({TEST_FONT.family, DEV_FONT.family})


def test_every_tested_name_was_trained_and_has_one_picture(task):
    queries = {row["_id"]: row["text"] for row in read_jsonl(task.test / "queries.jsonl")}
    lines = (task.test / "qrels" / "test.tsv").read_text().splitlines()[1:]
    judged = [line.split("\t")[0] for line in lines]

    assert set(queries.values()) <= set(task.names)
    assert sorted(judged) == sorted(queries)
    assert len(queries) == task.sizes["test"] > 30
    assert "leftwards arrow" in queries.values()
    assert name_of("←") == "leftwards arrow"


def test_the_product_reads_what_was_written(task):
    records = load_dataset_records(str(task.train), retrieval_mode="t2i")
    assert len(records) == task.sizes["train"]
    assert max(len(record.positives) for record in records) > 3

    images = ImageRules(str(task.images))
    found = RetrievalTask.from_beir(task.test, retrieval_mode="t2i", images=images)
    assert found.describe()["queries"] == task.sizes["test"]


def test_another_build_writes_the_same_files(task, tmp_path):
    again = build_symbol_search(tmp_path, keep=block)

    files = sorted(file.relative_to(task.images) for file in task.images.rglob("*.*"))
    assert files == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    assert all((tmp_path / f).read_bytes() == (task.images / f).read_bytes() for f in files)
    assert again.sizes == task.sizes
