"""Read files row by row, strictly and in bounded memory, keeping count of lines."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vembed.data.problems import RowProblem, Unreadable, describe, list_names
from vembed.errors import DataError, shorten
from vembed.registry import did_you_mean

MAX_LINE_BYTES = 32 * 2**20
"""A longer line is refused: the file is broken, or the text too long for any model."""

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PARQUET_BATCH_ROWS = 1000
_IMAGE_BATCH_ROWS = 32

_SEPARATORS = {",": "a comma", "\t": "a tab", ";": "a semicolon"}

BinaryFile = BinaryIO | gzip.GzipFile


class RawRow(NamedTuple):
    """A row as the file has it.

    Attributes:
        line: Line number from 1; for formats without lines, the row number from 1.
        values: Column to value, or what is wrong with the line.
        done: Share of the source read so far, from 0 to 1.
        file: Which of the source's files it is in, from 0.
    """

    line: int
    values: Mapping[str, Any] | RowProblem
    done: float
    file: int = 0


def read_jsonl(path: str) -> Iterator[RawRow]:
    """The objects of a JSON Lines file (`.gz` too); blank lines are passed over.

    Raises:
        DataError: if the file cannot be read.
    """
    with _open_binary(path) as (file, done):
        for line, raw in bounded_lines(file):
            if isinstance(raw, RowProblem):
                yield RawRow(line, raw, done())
                return
            values = parse_json_line(raw)
            if values is not None:
                yield RawRow(line, values, done())


def parse_json_line(raw: bytes) -> Mapping[str, Any] | RowProblem | None:
    """One line of a JSON Lines file: an object, what is wrong with it, or None when it is blank."""
    text = decode_text(raw)
    if isinstance(text, RowProblem):
        return text
    text = text.strip()
    if not text:
        return None
    rule, advice = "must be one JSON object", "Write one object per line."
    try:
        values = json.loads(text, object_pairs_hook=_each_key_once)
    except RowProblem as problem:
        return problem
    except (ValueError, RecursionError) as error:
        # No JSON; or a number of thousands of digits; or brackets nested thousands deep.
        reason = f" ({shorten(str(error))})"
        if isinstance(error, json.JSONDecodeError):
            reason = f", broken at column {error.colno} ({error.msg})"
        return RowProblem("line", rule, shorten(text, quote=True) + reason, advice=advice)
    if not isinstance(values, dict):
        return RowProblem("line", rule, describe(values), advice=advice)
    return values


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is written twice, Python would keep the last value in silence.

    Raises:
        RowProblem: if there is such a key.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RowProblem(
            "line",
            "every key must be in an object once",
            f"{shorten(repeated, quote=True)} twice",
            advice="Keep one of them; several positives or negatives are a list.",
        )
    return values


def read_csv(path: str, delimiter: str) -> Iterator[RawRow]:
    """The rows of a CSV or TSV file with a header; every value is a text.

    Quoting is that of RFC 4180 for both: a cell that starts with a quote ends with one, and quotes
    inside it are doubled.

    Raises:
        DataError: if the file cannot be read or has no usable header.
    """
    # The csv module's limit is global; its default of 128 KiB is less than a long document.
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open_binary(path) as (file, done):
        reader = csv.reader(_text_lines(file), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except RowProblem as problem:  # a line that is no text: what follows may be mid-cell
                problem.ends_reading = True
                yield RawRow(reader.line_num + 1, problem, done())
                return
            except csv.Error as error:
                yield RawRow(line, _csv_problem(error), done())
                return
            if cells is None:
                return
            if header is None:
                header = _check_header(path, line, cells, delimiter)
            elif cells:
                yield RawRow(line, _to_row(header, cells), done())


def read_parquet(path: str) -> Iterator[RawRow]:
    """The rows of a Parquet file.

    Raises:
        DataError: if it is none, or is damaged.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            total, line = file.metadata.num_rows, 0
            _check_names(f"{path}: columns", file.schema_arrow.names)
            rows = _PARQUET_BATCH_ROWS if _has_text_only(file.schema_arrow) else _IMAGE_BATCH_ROWS
            for batch in file.iter_batches(batch_size=rows):
                for values in arrow_rows(batch):
                    line += 1
                    yield RawRow(line, values, line / total)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: must be a Parquet file. Received: {shorten(str(error))}. Write it again"
        ) from None


def arrow_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table or batch; what has no form in Python is `Unreadable`.

    That can be a text that is not UTF-8, a date in the year 100,000, an unknown time zone.
    """
    import pyarrow

    unreadable = (pyarrow.ArrowException, OverflowError, ValueError)
    try:
        rows = table.to_pylist()
    except unreadable:
        rows = None
    if rows is not None:
        yield from rows
        return

    def cell(column: Any, row: int) -> Any:
        try:
            return column[row].as_py()
        except unreadable as error:
            return Unreadable(str(error))

    for row in range(table.num_rows):
        columns = zip(table.schema.names, table.columns, strict=True)
        yield {name: cell(column, row) for name, column in columns}


def _has_text_only(schema: Any) -> bool:
    return "binary" not in str(schema)


def read_beir(folder: str, split: str) -> Iterator[RawRow]:
    """Each query of a BEIR split with its relevant documents, in the order of queries.jsonl.

    The columns are `query_text` and `positive_text`, and `query_image` and `positive_image` where a
    line has an `image`. A document's text is its title, a space and its text. Only the relevant
    documents are held in memory. `line` is the line of queries.jsonl.

    Raises:
        DataError: if a file is missing or broken, or qrels name what is not there.
    """
    relevant = _read_qrels(folder, split)
    wanted = {document for documents in relevant.values() for document in documents}
    found: dict[str, tuple[Any, Any]] = {}
    corpus = str(Path(folder, "corpus.jsonl"))
    for row in read_jsonl(corpus):
        where = f"{corpus}:{row.line}"
        identifier, values = beir_entry(where, row.values)
        if identifier in wanted:
            found[identifier] = (beir_text(where, values), values.get("image"))
    _check_known(folder, split, "document", wanted, found)
    queries = str(Path(folder, "queries.jsonl"))
    seen: set[str] = set()
    for row in read_jsonl(queries):
        identifier, values = beir_entry(f"{queries}:{row.line}", row.values)
        if identifier in relevant:
            seen.add(identifier)
            positives = [found[document] for document in dict.fromkeys(relevant[identifier])]
            columns = {
                "query_text": values.get("text"),
                "query_image": values.get("image"),
                "positive_text": [text for text, _ in positives],
                "positive_image": [image for _, image in positives],
            }
            yield RawRow(row.line, columns, row.done)
    _check_known(folder, split, "query", set(relevant), seen)


def read_beir_corpus(path: str) -> Iterator[RawRow]:
    """The documents of a BEIR folder: `text` is a title, a space and a text.

    Raises:
        DataError: if a line is broken, or has no id.
    """
    for row in read_jsonl(path):
        where = f"{path}:{row.line}"
        _, values = beir_entry(where, row.values)
        image = {"image": values["image"]} if "image" in values else {}
        yield row._replace(values={"text": beir_text(where, values), **image})


def beir_entry(where: str, values: Mapping[str, Any] | RowProblem) -> tuple[str, Mapping[str, Any]]:
    """The id of a line of a BEIR folder, and the line.

    Raises:
        DataError: if the line is broken, or has no id.
    """
    if isinstance(values, RowProblem):
        raise DataError(values.describe_at(where))
    identifier = values.get("_id")
    if not isinstance(identifier, str) or not identifier:
        columns = "" if "_id" in values else f"; the line has {list_names(values)}"
        raise DataError(
            f"{where}: _id: a text that is not empty is expected. "
            f"Received: {describe(identifier)}{columns}"
        )
    return identifier, values


def beir_text(where: str, values: Mapping[str, Any]) -> str | None:
    """The text of a line of a BEIR folder, its title, a space and its text; None without both.

    Raises:
        DataError: if one of them is no text.
    """
    parts = {name: values.get(name) for name in ("title", "text")}
    for name, part in parts.items():
        if part is not None and not isinstance(part, str):
            raise DataError(f"{where}: {name}: a text is expected. Received: {describe(part)}")
    given = [part for part in parts.values() if part is not None]
    return " ".join(given).strip() if given else None


@contextmanager
def _open_binary(path: str) -> Iterator[tuple[BinaryFile, Callable[[], float]]]:
    """A file, unpacked when it ends in `.gz`, and what tells which share of it is read."""
    try:
        size = max(1, Path(path).stat().st_size)
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                with gzip.open(raw) as file:
                    yield file, lambda: min(1.0, raw.tell() / size)
            else:
                yield raw, lambda: min(1.0, raw.tell() / size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: must be a complete gzip file. Received: {error}. Write it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def bounded_lines(file: BinaryFile) -> Iterator[tuple[int, bytes | RowProblem]]:
    """Lines with their numbers from 1; one that is too long ends the reading."""
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            yield (
                line,
                RowProblem(
                    "line",
                    f"must not be longer than {MAX_LINE_BYTES // 2**20} MB",
                    shorten(repr(raw[:80])),
                    advice="Write one object per line, and shorten its texts.",
                    ends_reading=True,
                ),
            )
            return
        yield line, raw.removeprefix(_UTF8_MARK) if line == 1 else raw


def _text_lines(file: BinaryFile) -> Iterator[str]:
    for _, raw in bounded_lines(file):
        text = raw if isinstance(raw, RowProblem) else decode_text(raw)
        if isinstance(text, RowProblem):
            raise text
        yield text


def decode_text(raw: bytes) -> str | RowProblem:
    """Bytes that must be UTF-8 as a text, or what is wrong with them."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = raw.startswith(_UTF16_MARKS)
        return RowProblem(
            "line",
            "must be UTF-8",
            "a UTF-16 byte-order mark" if utf16 else
            f"byte 0x{raw[error.start]:02x} at byte {error.start} of the line (counted from 0)",
            advice="Save the file as UTF-8.",
        )  # fmt: skip


def _csv_problem(error: csv.Error) -> RowProblem:
    return RowProblem(
        "line",
        "must be a row of cells, each either without quotes or quoted whole",
        str(error),
        advice="Quote the cell, double the quotes in it, and close it.",
        ends_reading=True,
    )


def _check_header(path: str, line: int, cells: list[str], delimiter: str) -> list[str]:
    names = [name for name in cells if name]
    other = next((mark for mark in _SEPARATORS if mark != delimiter and mark in cells[0]), None)
    if len(cells) == 1 and other is not None:
        remedy = " or call it .tsv" if other == "\t" else ""
        raise DataError(
            f"{path}:{line}: header: columns must be separated by {_SEPARATORS[delimiter]}. "
            f"Received: one column {shorten(cells[0], quote=True)}, with {_SEPARATORS[other]} in "
            f"it. Save it with {_SEPARATORS[delimiter]} between the cells{remedy}"
        )
    _check_names(f"{path}:{line}: header", names)
    if not names:
        raise DataError(f"{path}:{line}: header: the first line must name the columns")
    return cells


def _check_names(where: str, names: Sequence[str]) -> None:
    """Raise DataError if two columns have one name."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"{where}: column names must differ. Received twice: "
            f"{list_names(repeated)}. Rename them"
        )


def _to_row(header: list[str], cells: list[str]) -> Mapping[str, Any] | RowProblem:
    if len(cells) != len(header):
        return RowProblem(
            "line",
            "must have as many cells as the header",
            f"{len(cells)} cells for {len(header)} columns",
            advice="Quote cells that hold the separator or a line break.",
        )
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _read_qrels(folder: str, split: str) -> dict[str, list[str]]:
    """Relevant documents (score above 0) of each query, in the order of the file."""
    path = Path(folder, "qrels", f"{split}.tsv")
    if not path.is_file():
        splits = sorted(file.stem for file in path.parent.glob("*.tsv"))
        raise DataError(
            f"{path}: there is no such file. Splits of this BEIR folder: {list_names(splits)}. "
            f"Choose one with split{did_you_mean(split, splits)}"
        )
    relevant: dict[str, list[str]] = {}
    with _open_binary(str(path)) as (file, _):
        for line, raw in bounded_lines(file):
            text = raw if isinstance(raw, RowProblem) else decode_text(raw)
            judgement = text if isinstance(text, RowProblem) else _judgement(line, text)
            if isinstance(judgement, RowProblem):
                raise DataError(judgement.describe_at(f"{path}:{line}"))
            if judgement is not None:
                relevant.setdefault(judgement[0], []).append(judgement[1])
    return relevant


def _judgement(line: int, text: str) -> tuple[str, str] | RowProblem | None:
    """Query and document of a line of qrels; None for a header, a blank line or no relevance."""
    cells = text.strip().split("\t")
    if cells == [""] or (line == 1 and cells[0] == "query-id"):
        return None
    try:
        query, document, score = cells
        relevance = int(score)
    except ValueError:
        return RowProblem(
            "line",
            "must be query-id, corpus-id and a whole number, separated by tabs",
            describe(text),
        )
    return (query, document) if relevance > 0 else None


def _check_known(
    folder: str, split: str, kind: str, named: set[str], known: Collection[str]
) -> None:
    unknown = sorted(named.difference(known))
    if unknown:
        raise DataError(
            f"{Path(folder, 'qrels', split + '.tsv')}: every {kind} must be in the folder's jsonl "
            f"files. Received: {list_names(unknown)}, which {'is' if len(unknown) == 1 else 'are'} "
            "not there"
        )
