"""From a source to checked rows: parsed, their images looked at, what is wrong said once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from vembed.data.cells import CellReader, image_problem
from vembed.data.problems import SHOWN_PROBLEMS, ProblemLog, RowProblem
from vembed.data.records import ParsedRow, RowParser
from vembed.data.rules import ImageCheck
from vembed.data.sources import Source
from vembed.errors import DataError
from vembed.images import ImageError, ImageFile, ImageFolder, ImageLimits, ImageSource, probe_image
from vembed.modes import Item, RetrievalMode

OnProgress = Callable[[float], None]
"""Called now and then with the share of the work that is done, from 0 to 1."""

_PROGRESS_ROWS = 1000
_WINDOW_ROWS = 64
_THREADS = 8
_KNOWN_IMAGES = 1_000_000


@dataclass(frozen=True)
class RowRules:
    """How the rows of one source are read.

    Attributes:
        mode: Modality of queries and documents.
        column_mapping: Our field and the file's column, as pairs.
        folder: What image paths are relative to; None refuses paths.
        limits: What images are held to.
        image_check: How images are looked at now; None leaves it to when they are needed.
        tolerant: Whether a row that cannot be used is passed on as its problem, rather than ending
            the reading.
        items_only: Whether rows are documents, whose field is `query`, and have no other.
    """

    mode: RetrievalMode
    column_mapping: tuple[tuple[str, str], ...] = ()
    folder: ImageFolder | None = None
    limits: ImageLimits = ImageLimits()
    image_check: ImageCheck | None = None
    tolerant: bool = False
    items_only: bool = False

    def parser(self, source: Source) -> RowParser:
        """A parser of the source's rows."""
        return RowParser(
            dict(self.column_mapping),
            mode=self.mode,
            cells=CellReader(self.folder, self.limits),
            text_cells=source.text_cells,
            items_only=self.items_only,
        )


class CheckedRow(NamedTuple):
    """A row, or what is wrong with it, and the line and the number of the file it is in."""

    line: int
    file: int
    row: ParsedRow | RowProblem


def checked_rows(
    source: Source,
    rules: RowRules,
    *,
    stop_at_first: bool = False,
    progress: OnProgress | None = None,
) -> Iterator[CheckedRow]:
    """The rows of a source, in order.

    Raises:
        DataError: if there was no row. Unless the rules are tolerant, also after the last row, or
            after enough problems, if there was a problem; if they are, about a problem behind which
            nothing can be read.
    """
    parser = rules.parser(source)
    rows = _parsed_rows(source, parser, progress)
    if rules.image_check is not None:
        rows = _with_images_checked(rows, decode=rules.image_check == "decode")
    problems = ProblemLog()
    count = 0
    for checked in rows:
        count += 1
        if not isinstance(checked.row, RowProblem):
            yield checked
            continue
        where = f"{source.files[checked.file]}:{checked.line}"
        if rules.tolerant and not checked.row.ends_reading:
            yield checked
            continue
        problems.add(checked.row, where)
        if problems.is_full or stop_at_first or checked.row.ends_reading:
            break
    problems.raise_if_any()
    if not count:
        raise DataError(f"{source.path}: must have rows. Received: none")
    parser.check_seen(source.path)


def _parsed_rows(
    source: Source, parser: RowParser, progress: OnProgress | None
) -> Iterator[CheckedRow]:
    for number, (line, values, done, file) in enumerate(source.read(), 1):
        row: ParsedRow | RowProblem
        try:
            if isinstance(values, RowProblem):
                raise values
            if number == 1 and source.has_header:
                parser.check_columns(source.path, list(values))
            row = parser.parse(values)
        except RowProblem as problem:
            row = problem
            # All rows have the same columns: the others would only say it again.
            row.ends_reading |= problem.about_columns and source.has_header
        yield CheckedRow(line, file, row)
        if progress is not None and number % _PROGRESS_ROWS == 0:
            progress(done)


def _with_images_checked(rows: Iterable[CheckedRow], *, decode: bool) -> Iterator[CheckedRow]:
    """The same rows; one with an image that cannot be used becomes its problem."""
    left = iter(rows)
    # Not the images, which may hold all their bytes.
    known: set[tuple[type, str]] = set()
    with ThreadPoolExecutor(_THREADS) as pool:
        while window := list(islice(left, _WINDOW_ROWS)):
            named = {(type(image), image.identity): image for image in _images_of(window)}
            unseen = [image for key, image in named.items() if key not in known]
            found = broken_images(unseen, pool, decode=decode)
            if len(known) > _KNOWN_IMAGES:
                known.clear()
            known |= {key for key, image in named.items() if image not in found}
            for checked in window:
                problem = _first_problem(checked.row, found)
                yield checked if problem is None else checked._replace(row=problem)


def broken_images(
    images: Iterable[ImageSource], pool: Executor, *, decode: bool
) -> dict[ImageSource, ImageError]:
    """Those of some images that cannot be used, each with the reason."""

    def look(image: ImageSource) -> ImageError | None:
        try:
            probe_image(image, decode=decode)
        except ImageError as error:
            return error
        return None

    listed = list(images)
    errors = zip(listed, pool.map(look, listed), strict=True)
    return {image: error for image, error in errors if error is not None}


def require_images(items: Iterable[Item], *, decode: bool) -> None:
    """Raise DataError about the first items whose image cannot be used, and say how many more."""
    images = list(dict.fromkeys(item.image for item in items if item.image is not None))
    with ThreadPoolExecutor(_THREADS) as pool:
        errors = list(broken_images(images, pool, decode=decode).values())
    if errors:
        lines = [str(error) for error in errors[:SHOWN_PROBLEMS]]
        if (more := len(errors) - len(lines)) > 0:
            lines.append(f"and {more} more image{'s' if more > 1 else ''}")
        raise DataError("\n  ".join(lines))


def _images_of(window: Iterable[CheckedRow]) -> set[ImageSource]:
    return {
        item.image
        for checked in window
        if isinstance(checked.row, ParsedRow)
        for _, _, item in checked.row.items()
        if item.image is not None
    }


def _first_problem(
    row: ParsedRow | RowProblem, broken: Mapping[ImageSource, ImageError]
) -> RowProblem | None:
    if isinstance(row, RowProblem) or not broken:
        return None
    for field, place, item in row.items():
        if item.image is not None and item.image in broken:
            problem = image_problem(broken[item.image], field=field, place=place)
            if isinstance(item.image, ImageFile):
                problem.file = os.path.join(item.image.root, item.image.path)
            return problem
    return None
