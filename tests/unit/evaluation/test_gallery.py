"""The picture of what queries found."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.pictures import COLORS, plain
from tests.unit.evaluation.test_report import write
from vembed.errors import ConfigError
from vembed.evaluation import RetrievalTask, choose_gallery
from vembed.evaluation.gallery_picture import gallery_png
from vembed.images import as_image_source
from vembed.modes import Item

NAMES = list(COLORS)
FRAME = (11, 110, 79)


def picture_of(name: str) -> Item:
    return Item(image=as_image_source(plain(name)))


def task(query_of=lambda name: Item(text=f"the {name} one"), document_of=picture_of, names=NAMES):
    return RetrievalTask(
        {f"q{name}": query_of(name) for name in names},
        {name: document_of(name) for name in names},
        {f"q{name}": {name: 1} for name in names},
    )


def result(of, *, right: bool):
    """Every query finds its own document first, or that of its neighbour."""
    rows = np.eye(len(of.documents), dtype=np.float32)

    def encode(items, role):
        return np.roll(rows, 0 if right or role == "query" else 1, axis=0)[: len(items)]

    return of.evaluate(encode)


def test_answers_are_marked_by_what_is_relevant():
    of = task()
    gallery = choose_gallery(result(of, right=False), result(of, right=True), rows=3, depth=2)

    assert gallery is not None
    assert [row.query.text for row in gallery.rows] == [f"the {NAMES[i]} one" for i in (1, 4, 6)]
    for row in gallery.rows:
        assert [answer.is_right for answer in row.after] == [True, False]
        assert not row.before[0].is_right
        color = row.query.text.split()[1]
        assert row.after[0].document == picture_of(color)
    assert "3 of 8 queries" in gallery.describe()


def test_a_row_tells_the_right_answer_and_its_ranks():
    of = task()

    row = choose_gallery(result(of, right=False), result(of, right=True), rows=1).rows[0]

    assert row.right == picture_of(row.query.text.split()[1])
    assert row.rank_before > row.rank_after == 1


def test_the_right_answer_is_shown_though_neither_model_found_it():
    of = task()
    wrong = choose_gallery(*[result(of, right=False)] * 2, rows=1, depth=1)
    color = COLORS[wrong.rows[0].query.text.split()[1]]

    pixels = np.asarray(Image.open(io.BytesIO(gallery_png(wrong))))

    assert not wrong.rows[0].after[0].is_right
    assert np.all(pixels == color, axis=-1).any()


def test_a_long_query_of_wide_letters_stays_in_its_column():
    """Nothing is drawn between the query and the right answer."""
    of = task(query_of=lambda name: Item(text=f"{name} WWWWWWWWWW MMMMMMMMMM " * 4))
    gallery = choose_gallery(*[result(of, right=True)] * 2)

    pixels = np.asarray(Image.open(io.BytesIO(gallery_png(gallery))))

    assert (pixels[58:-28, 28 + 300 - 8 : 28 + 300] == 255).all()
    assert (pixels[58:-28, 28 : 28 + 200] < 255).any()


@pytest.mark.parametrize("depth", [1, 3])
def test_right_answers_are_framed(depth):
    of = task()
    right, wrong = result(of, right=True), result(of, right=False)

    counts = [
        np.all(
            np.asarray(Image.open(io.BytesIO(gallery_png(choose_gallery(*pair, depth=depth)))))
            == FRAME,
            axis=-1,
        ).sum()
        for pair in ((wrong, wrong), (wrong, right), (right, right))
    ]

    frame = 84**2 - 76**2
    assert counts[1] - counts[0] >= len(NAMES) * frame * (depth == 1)
    assert counts[2] > counts[1] > (counts[0] if depth == 1 else 0)


def test_pictures_on_either_side_are_drawn():
    """Also a query of both, and documents of text: nothing overflows, nothing is left out."""
    both = lambda name: Item(text=f"{name} " * 60, image=as_image_source(plain(name)))  # noqa: E731
    words = lambda name: Item(text=f"about {name} things " * 40)  # noqa: E731
    of = task(query_of=both, document_of=words)

    image = Image.open(io.BytesIO(gallery_png(choose_gallery(*[result(of, right=True)] * 2))))

    pixels = {color for _, color in image.getcolors(2**20)}
    assert {COLORS[name] for name in NAMES} <= pixels
    assert image.width < 1550


def test_texts_alone_have_no_gallery():
    of = task(document_of=lambda name: Item(text=name))

    assert choose_gallery(result(of, right=True), result(of, right=True)) is None


def test_two_tasks_are_refused():
    one, other = task(), task(names=NAMES[:4])

    with pytest.raises(ConfigError, match="the same task"):
        choose_gallery(result(one, right=True), result(other, right=True))


def test_the_report_holds_the_picture(tmp_path):
    of = task()
    gallery = choose_gallery(result(of, right=False), result(of, right=True))

    page = write(tmp_path, gallery=gallery).read_text()

    (encoded,) = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(encoded) == (tmp_path / "report" / "gallery.png").read_bytes()
    write(tmp_path)
    assert not (tmp_path / "report" / "gallery.png").exists(), "of an earlier run"
