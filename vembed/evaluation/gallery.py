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
_FONT_SIZE, _RANK_SIZE, _SMALL_SIZE = 16, 14, 11
_SMALL_CHARACTERS = 12  # that fit into a cell
_ANSWER_WIDTH, _ANSWER_GAP = 118, 30  # the right answer and its ranks, before what was found
_TITLES = ("query", "right answer", "before, nearest first", "after, nearest first")
_PAPER, _INK, _MUTED, _RULE = "#ffffff", "#1b1f24", "#5d6672", "#d9dcd7"
_RIGHT, _RIGHT_WASH = "#0b6e4f", "#e2f2ec"


@dataclass(frozen=True)
class Answer:
    """A document that a query found, and whether it is relevant."""

    document: Item
    is_right: bool


@dataclass(frozen=True)
class GalleryRow:
    """A query and its nearest documents, the nearest first.

    Attributes:
        query: What was asked.
        right: The relevant document that stands highest after; None without one.
        rank_before: Rank of the highest relevant document before, from 1; 0 without one.
        rank_after: The same after.
        before: What was found before.
        after: What was found after.
    """

    query: Item
    right: Item | None
    rank_before: int
    rank_after: int
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
        queries = "query" if self.query_count == 1 else "queries"
        return (
            f"{len(self.rows)} of {self.query_count:,} {queries}, taken at equal distances. The "
            f"{DEPTH} nearest documents hold a right answer for {before} of them before and for "
            f"{after} after; right answers are framed. Beside each query: its right answer, and "
            "the rank of that before and after."
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
        [_row(old, new, query, depth) for query in chosen.tolist()],
        count,
    )


def gallery_png(gallery: Gallery) -> bytes:
    """The picture as a PNG file.

    Raises:
        ImageError: if an image cannot be read any more.
    """
    depth = max(len(side) for row in gallery.rows for side in (row.before, row.after))
    side_width = depth * (_CELL + _GAP) - _GAP
    answer_left = _MARGIN + _QUERY_WIDTH
    lefts = [answer_left + _ANSWER_WIDTH + _ANSWER_GAP]
    lefts.append(lefts[0] + side_width + _BETWEEN)
    height = _HEADER + len(gallery.rows) * (_CELL + _GAP) + _MARGIN
    sheet = Image.new("RGB", (lefts[1] + side_width + _MARGIN, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, title in zip((_MARGIN, answer_left, *lefts), _TITLES, strict=True):
        draw.text((left, _MARGIN - 8), title, fill=_MUTED, font=_font(_FONT_SIZE))
    for number, row in enumerate(gallery.rows):
        top = _HEADER + number * (_CELL + _GAP)
        _draw_query(sheet, row.query, top)
        _draw_right(sheet, row, answer_left, top)
        for left, answers in zip(lefts, (row.before, row.after), strict=True):
            for place, answer in enumerate(answers):
                _draw_answer(sheet, answer, left + place * (_CELL + _GAP), top)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _row(old: Rankings, new: Rankings, query: int, depth: int) -> GalleryRow:
    right = int(new.neighbours.right_document_Q[query])
    return GalleryRow(
        query=new.queries[query],
        right=new.documents[right] if right >= 0 else None,
        rank_before=int(old.neighbours.right_rank_Q[query]),
        rank_after=int(new.neighbours.right_rank_Q[query]),
        before=_answers(old, query, depth),
        after=_answers(new, query, depth),
    )


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
    room = _QUERY_WIDTH - (left - _MARGIN) - _GAP
    lines = _wrap(query.text, room, lines=4)
    _draw_lines(sheet, lines, left, top + (_CELL - _LINE * len(lines)) // 2)


def _draw_lines(sheet: Image.Image, lines: Sequence[str], left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((left, top + number * _LINE), line, fill=_INK, font=_font(_FONT_SIZE))


def _wrap(text: str, width: int, *, lines: int) -> list[str]:
    """Lines that are no wider than `width` pixels: letters differ in width by far."""
    font = _font(_FONT_SIZE)
    for characters in range(width // 4, 2, -1):
        wrapped = textwrap.wrap(text, characters, max_lines=lines, placeholder=" …")
        if all(font.getlength(line) <= width for line in wrapped):
            return wrapped
    return []


def _draw_right(sheet: Image.Image, row: GalleryRow, left: int, top: int) -> None:
    """The right answer, with its rank before and after below it."""
    if row.right is None:
        return
    size = _CELL - _LINE
    near = left + (_ANSWER_WIDTH - size) // 2
    _draw_item(sheet, row.right, (near, top, near + size, top + size))
    ImageDraw.Draw(sheet).text(
        (left + _ANSWER_WIDTH // 2, top + _CELL - 2),
        f"{row.rank_before:,} → {row.rank_after:,}",
        fill=_RIGHT if row.rank_after <= len(row.after) else _MUTED,
        font=_font(_RANK_SIZE),
        anchor="mb",
    )


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
