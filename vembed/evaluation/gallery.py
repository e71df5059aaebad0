"""A picture of what some queries found before and after, for tasks with images."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vembed.errors import ConfigError
from vembed.evaluation.results import EvalResult, Rankings
from vembed.images import load_image
from vembed.modes import Item

ROWS, DEPTH = 12, 5

_CELL, _GAP, _MARGIN = 84, 10, 28  # pixels
_QUERY_WIDTH, _HEADER, _LINE = 300, 58, 20
_BETWEEN = 40  # from what was found before to what is found after
_FRAME = 4
_FONT_SIZE, _SMALL_SIZE = 16, 11
_CHARACTERS, _SMALL_CHARACTERS = 29, 12  # that fit beside, or into a cell
_TITLES = ("query", "before, nearest first", "after, nearest first")
_PAPER, _INK, _MUTED, _RULE = "#ffffff", "#1b1f24", "#5d6672", "#d9dcd7"
_RIGHT, _RIGHT_WASH = "#0b6e4f", "#e2f2ec"


@dataclass(frozen=True)
class Answer:
    """A document that a query found, and whether it is relevant."""

    document: Item
    is_right: bool


@dataclass(frozen=True)
class GalleryRow:
    """A query and its nearest documents, the nearest first."""

    query: Item
    before: list[Answer]
    after: list[Answer]


@dataclass(frozen=True)
class Gallery:
    """Rows to draw, and how many queries they stand for."""

    rows: list[GalleryRow]
    query_count: int

    def describe(self) -> str:
        """What the picture shows, in words."""
        before = sum(any(answer.is_right for answer in row.before) for row in self.rows)
        after = sum(any(answer.is_right for answer in row.after) for row in self.rows)
        return (
            f"{len(self.rows)} of {self.query_count:,} queries, taken at equal distances. The "
            f"{DEPTH} nearest documents hold a right answer for {before} of them before and for "
            f"{after} after; right answers are framed."
        )


def choose_gallery(
    before: EvalResult, after: EvalResult, *, rows: int = ROWS, depth: int = DEPTH
) -> Gallery | None:
    """Queries at equal distances through the task, so that nobody picked them.

    Returns:
        None where there are no rankings, or no images.

    Raises:
        ConfigError: if the two results are not of the same queries.
    """
    old, new = before.rankings, after.rankings
    if old is None or new is None:
        return None
    if list(old.queries) != list(new.queries):
        raise ConfigError("gallery: expected two results of the same task. Received: two tasks")
    if all(item.image is None for item in (new.queries[0], new.documents[0])):
        return None
    count = len(new.queries)
    chosen = np.unique(((np.arange(rows) + 0.5) * count / rows).astype(int))
    return Gallery(
        [
            GalleryRow(new.queries[q], _answers(old, q, depth), _answers(new, q, depth))
            for q in chosen.tolist()
        ],
        count,
    )


def gallery_png(gallery: Gallery) -> bytes:
    """The picture as a PNG file.

    Raises:
        ImageError: if an image cannot be read any more.
    """
    depth = max(len(side) for row in gallery.rows for side in (row.before, row.after))
    side_width = depth * (_CELL + _GAP) - _GAP
    lefts = [_MARGIN + _QUERY_WIDTH]
    lefts.append(lefts[0] + side_width + _BETWEEN)
    height = _HEADER + len(gallery.rows) * (_CELL + _GAP) + _MARGIN
    sheet = Image.new("RGB", (lefts[1] + side_width + _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, title in zip((_MARGIN, *lefts), _TITLES, strict=True):
        draw.text((left, _MARGIN - 8), title, fill=_MUTED, font=_font(_FONT_SIZE))
    for number, row in enumerate(gallery.rows):
        top = _HEADER + number * (_CELL + _GAP)
        _draw_query(sheet, row.query, top)
        for left, answers in zip(lefts, (row.before, row.after), strict=True):
            for place, answer in enumerate(answers):
                _draw_answer(sheet, answer, left + place * (_CELL + _GAP), top)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _answers(rankings: Rankings, query: int, depth: int) -> list[Answer]:
    found = rankings.neighbours.documents_QK[query, :depth]
    right = set(rankings.relevant[query].tolist())
    return [Answer(rankings.documents[d], d in right) for d in found.tolist() if d >= 0]


def _draw_query(sheet: Image.Image, query: Item, top: int) -> None:
    left = _MARGIN
    if query.image is not None:
        _draw_item(sheet, Item(image=query.image), (left, top, left + _CELL, top + _CELL))
        left += _CELL + _GAP
    if query.text is None:
        return
    room = _CHARACTERS - (left - _MARGIN) // 9
    lines = textwrap.wrap(query.text, room, max_lines=4, placeholder=" …")
    _draw_lines(sheet, lines, left, top + (_CELL - _LINE * len(lines)) // 2)


def _draw_lines(sheet: Image.Image, lines: Sequence[str], left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((left, top + number * _LINE), line, fill=_INK, font=_font(_FONT_SIZE))


def _draw_answer(sheet: Image.Image, answer: Answer, left: int, top: int) -> None:
    """In its cell: a thin rule around a wrong one, a thick frame around a right one."""
    box = (left, top, left + _CELL, top + _CELL)
    ImageDraw.Draw(sheet).rectangle(
        box,
        fill=_RIGHT_WASH if answer.is_right else _PAPER,
        outline=_RIGHT if answer.is_right else _RULE,
        width=_FRAME if answer.is_right else 1,
    )
    near, far = _FRAME + 2, _CELL - _FRAME - 2
    _draw_item(sheet, answer.document, (left + near, top + near, left + far, top + far))


def _draw_item(sheet: Image.Image, item: Item, box: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    if item.image is not None:
        image = load_image(item.image)
        scale = min((right - left) / image.width, (bottom - top) / image.height)
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        place = ((left + right - size[0]) // 2, (top + bottom - size[1]) // 2)
        sheet.paste(image.resize(size, Image.Resampling.LANCZOS), place)
        return
    lines = textwrap.wrap(item.text or "", _SMALL_CHARACTERS, max_lines=5, placeholder=" …")
    ImageDraw.Draw(sheet).multiline_text(
        (left, top), "\n".join(lines), fill=_INK, font=_font(_SMALL_SIZE), spacing=2
    )


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Of the fonts that are always there, the one that knows most scripts.
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)
