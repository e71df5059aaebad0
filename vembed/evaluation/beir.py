"""The BEIR folder layout: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed.data import ImageRules
from vembed.data.cells import CellReader, check_characters, read_text
from vembed.data.checking import require_images
from vembed.data.problems import RowProblem, describe, list_names
from vembed.data.reading import beir_entry, beir_text, bounded_lines, decode_text, read_jsonl
from vembed.errors import DataError, shorten
from vembed.images import ImageFile
from vembed.modes import IMAGE, TEXT, Item, RetrievalMode

CORPUS_FILE = "corpus.jsonl"
QUERIES_FILE = "queries.jsonl"
_HEADER = "query-id\tcorpus-id\tscore"

Qrels = dict[str, dict[str, float]]
"""Query id to document id to relevance grade."""


@dataclass(frozen=True)
class BeirData:
    """Items by id, and the judgements of one split."""

    queries: dict[str, Item]
    corpus: dict[str, Item]
    qrels: Qrels


def is_beir_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with a corpus in it."""
    return (Path(path) / CORPUS_FILE).is_file()


def read_beir(
    folder: str | Path,
    *,
    split: str = "test",
    retrieval_mode: str | RetrievalMode = "t2t",
    images: ImageRules = ImageRules(),  # noqa: B008 - frozen
) -> BeirData:
    """Read a BEIR folder.

    A document's text is its title, a space and its text, as in BEIR. Images are paths in `image`,
    relative to the folder unless the rules name another; all are looked at before this returns.

    Args:
        folder: Holds `corpus.jsonl`, `queries.jsonl` and `qrels/`.
        split: Which `qrels/SPLIT.tsv`.
        retrieval_mode: Modality of queries and documents.
        images: Where images are, and what they are held to.

    Returns:
        All documents, the queries that `split` judges, and its judgements.

    Raises:
        DataError: at `file:line`, for a missing file, text that is not UTF-8, a broken or repeated
            entry, a judgement of an unknown query or document, an empty query, or an image that
            cannot be used.
    """
    folder = Path(folder)
    mode = RetrievalMode.parse(retrieval_mode)
    cells = CellReader(images.folder(str(folder)) if mode.has_images else None, images.limits)
    corpus = _read_items(folder / CORPUS_FILE, mode.document, cells, with_title=True)
    queries = _read_items(folder / QUERIES_FILE, mode.query, cells, with_title=False)
    qrels = _read_qrels(folder, split, queries, corpus)
    judged = {query_id: queries[query_id] for query_id in queries if query_id in qrels}
    require_images([*judged.values(), *corpus.values()], decode=images.check == "decode")
    return BeirData(judged, corpus, qrels)


def write_beir(
    folder: str | Path,
    queries: Mapping[str, str | Item],
    corpus: Mapping[str, str | Item],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    split: str = "test",
) -> Path:
    """Write a BEIR folder that `read_beir` gives back as it was.

    Args:
        folder: Made when missing; files of the same name are replaced.
        queries: Query id to text or item. Of an image, the path is written; the file stays where it
            is.
        corpus: Document id to text or item; the title is left empty.
        qrels: Query id to document id to relevance grade.
        split: Name of the file under `qrels/`.
    """
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    documents = ({"_id": key, "title": "", **_columns(item)} for key, item in corpus.items())
    _write_lines(folder / CORPUS_FILE, (json.dumps(row, ensure_ascii=False) for row in documents))
    asked = ({"_id": key, **_columns(item)} for key, item in queries.items())
    _write_lines(folder / QUERIES_FILE, (json.dumps(row, ensure_ascii=False) for row in asked))
    judged = (
        f"{query_id}\t{document_id}\t{grade}"
        for query_id, grades in qrels.items()
        for document_id, grade in grades.items()
    )
    _write_lines(
        _qrels_path(folder, split), (line for part in ([_HEADER], judged) for line in part)
    )
    return folder


def _qrels_path(folder: Path, split: str) -> Path:
    return folder / "qrels" / f"{split}.tsv"


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _columns(item: str | Item) -> dict[str, str]:
    if isinstance(item, str):
        return {"text": item}
    columns = {"text": item.text or ""}
    if isinstance(item.image, ImageFile):
        columns["image"] = item.image.path
    elif item.image is not None:
        raise DataError(f"a BEIR folder holds images as files. Received: {item.image}")
    return columns


def _read_items(
    path: Path, modality: str, cells: CellReader, *, with_title: bool
) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for row in read_jsonl(str(path)):
        where = f"{path}:{row.line}"
        key, values = beir_entry(where, row.values)
        text = beir_text(where, values) if with_title else values.get("text")
        try:
            item = _item(text, values, modality, cells)
            if modality == TEXT and not with_title:
                read_text(item.text, field="text", place="text")
        except RowProblem as problem:
            raise DataError(problem.describe_at(where)) from None
        if key in items:
            name = shorten(key, quote=True)
            raise DataError(f"{where}: _id: must be unique. Received: {name} a second time")
        items[key] = item.located(f"{where}: image")
    if not items:
        raise DataError(f"{path}: must hold one JSON object per line. Received: no lines")
    return items


def _item(text: Any, values: Mapping[str, Any], modality: str, cells: CellReader) -> Item:
    if modality == IMAGE:
        return cells.item(IMAGE, values.get("image"), field="image", place="image")
    if modality != TEXT:
        return cells.pair(text, values.get("image"), field="item", places=("text", "image"))
    if values.get("text") is None:
        received = describe(None) if "text" in values else f"a line with {list_names(values)}"
        raise RowProblem("text", "a text is expected", received)
    # Documents of no text at all are there in BEIR's own sets.
    check_characters(text, field="text", place="text")
    return Item(text)


def _read_qrels(
    folder: Path, split: str, queries: Collection[str], corpus: Collection[str]
) -> Qrels:
    path = _qrels_path(folder, split)
    if not path.is_file():
        splits = list_names(sorted(file.stem for file in path.parent.glob("*.tsv")))
        raise DataError(f"{path}: there is no such file. Splits of this BEIR folder: {splits}")
    qrels: Qrels = {}
    for line, (query_id, document_id, grade) in _judgements(path):
        where = f"{path}:{line}"
        for key, known, file in (
            (query_id, queries, QUERIES_FILE),
            (document_id, corpus, CORPUS_FILE),
        ):
            if key not in known:
                raise DataError(
                    f"{where}: {shorten(key, quote=True)} is not in {file}. Add it there, or "
                    "remove the line"
                )
        first = qrels.setdefault(query_id, {}).setdefault(document_id, grade)
        if first != grade:
            raise DataError(
                f"{where}: one judgement per pair is expected. Received: {grade:g} after {first:g} "
                f"for {query_id!r} and {document_id!r}. Keep one"
            )
    if not qrels:
        raise DataError(f"{path}: must hold judgements. Received: none")
    return qrels


def _judgements(path: Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
    """Line number, query id, document id and grade; blank lines and the header are passed over."""
    with path.open("rb") as file:
        for line, raw in bounded_lines(file):
            text = raw if isinstance(raw, RowProblem) else decode_text(raw)
            if isinstance(text, RowProblem):
                raise DataError(text.describe_at(f"{path}:{line}"))
            text = text.rstrip("\r\n")
            cells = text.split("\t")
            grade = _grade(cells[2]) if len(cells) == 3 else None
            is_header = line == 1 and len(cells) == 3 and grade is None
            if is_header or not text.strip():
                continue
            if grade is None:
                raise DataError(
                    f"{path}:{line}: query-id, corpus-id and a number, separated by tabs, are "
                    f"expected. Received: {describe(text)}"
                )
            yield line, (cells[0], cells[1], grade)


def _grade(cell: str) -> float | None:
    try:
        grade = float(cell)
    except ValueError:
        return None
    return grade if math.isfinite(grade) else None
