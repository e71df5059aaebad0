"""A picture of a gallery: what some queries found before and after."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from vembed.evaluation.gallery import Answer, Gallery, GalleryRow
from vembed.images import load_image
from vembed.modes import Item

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
