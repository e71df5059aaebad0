"""The BEIR folder layout: `corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed.data.problems import RowProblem, describe, list_names
from vembed.data.reading import read_jsonl
from vembed.errors import DataError

CORPUS_FILE = "corpus.jsonl"
QUERIES_FILE = "queries.jsonl"
_HEADER = "query-id\tcorpus-id\tscore"

Qrels = dict[str, dict[str, float]]
"""Query id to document id to relevance grade."""


@dataclass(frozen=True)
class BeirData:
    """Texts by id, and the judgements of one split."""

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: Qrels


def is_beir_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with a corpus in it."""
    return (Path(path) / CORPUS_FILE).is_file()


def read_beir(folder: str | Path, *, split: str = "test") -> BeirData:
    """Read a BEIR folder. A document is its title, a space and its text, as in BEIR.

    Returns:
        All documents, the queries that `split` judges, and its judgements.

    Raises:
        DataError: at `file:line`, for a missing file, text that is not UTF-8, a broken or repeated
            entry, a judgement of an unknown query or document, or an empty query.
    """
    folder = Path(folder)
    corpus = _read_texts(folder / CORPUS_FILE, with_title=True)
    queries = _read_texts(folder / QUERIES_FILE, with_title=False)
    qrels = _read_qrels(folder, split, queries, corpus)
    judged = {query_id: queries[query_id] for query_id in queries if query_id in qrels}
    return BeirData(judged, corpus, qrels)


def write_beir(
    folder: str | Path,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    split: str = "test",
) -> Path:
    """Write a BEIR folder that `read_beir` gives back as it was.

    Args:
        folder: Made when missing; files of the same name are replaced.
        queries: Query id to text.
        corpus: Document id to text; the title is left empty.
        qrels: Query id to document id to relevance grade.
        split: Name of the file under `qrels/`.
    """
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    documents = ({"_id": key, "title": "", "text": text} for key, text in corpus.items())
    _write_lines(folder / CORPUS_FILE, (json.dumps(row, ensure_ascii=False) for row in documents))
    asked = ({"_id": key, "text": text} for key, text in queries.items())
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


def _read_texts(path: Path, *, with_title: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    for row in read_jsonl(str(path)):
        where = f"{path}:{row.line}"
        if isinstance(row.values, RowProblem):
            raise DataError(row.values.describe_at(where))
        key, text = _string(where, row.values, "_id"), _string(where, row.values, "text")
        if with_title:
            title = _string(where, row.values, "title") if row.values.get("title") else ""
            text = f"{title} {text}".strip()
        elif not text.strip():
            raise DataError(
                f"{where}: text: must not be empty. Received: {text!r}. Remove the line"
            )
        if key in texts:
            raise DataError(f"{where}: _id: must be unique. Received: {key!r} a second time")
        texts[key] = text
    if not texts:
        raise DataError(f"{path}: must hold one JSON object per line. Received: no lines")
    return texts


def _string(where: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    columns = "" if key in row else f"; the line has {list_names(row)}"
    raise DataError(f"{where}: {key}: a text is expected. Received: {describe(value)}{columns}")


def _read_qrels(
    folder: Path, split: str, queries: Mapping[str, str], corpus: Mapping[str, str]
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
                    f"{where}: {key!r} is not in {file}. Add it there, or remove the line"
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
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{line}: must be UTF-8. Received: {raw[:80]!r} ({error})"
                ) from None
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
