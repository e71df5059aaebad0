"""*API documentation search*: a retrieval task made on the spot from docstrings that are already on the machine.

A query is the sentence that says what something does ("Clip the values in an array."); its document is the thing's name,
signature and the rest of its documentation, without that sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed.quickstart.docstrings import (
    STANDARD_LIBRARY,
    DocumentedObject,
    read_package,
    stable_hash,
)

PACKAGES = (
    STANDARD_LIBRARY,
    *("numpy", "scipy", "pandas", "matplotlib", "sklearn", "networkx", "sympy"),
    *("torch", "transformers", "datasets", "accelerate", "sentence_transformers", "peft"),
    *("huggingface_hub", "PIL", "rich", "pydantic", "jinja2", "fsspec", "fontTools"),
)
"""What is searched: literal, so that other packages of an environment change nothing. `vembed[quickstart]` brings all."""

MAX_OBJECTS_PER_PACKAGE = 2000
MAX_DOCUMENT_WORDS = 120
MAX_SIGNATURE_LETTERS = 160
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 40
MIN_DETAIL_WORDS = 0

# Shares of all rows, in 1/1000. The rest is for training.
TEST_SHARE, DEV_SHARE = 170, 40

_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"\[`+~?([^`\]]+)`+\](?:\([^)]*\))?")
_MARKUP_LINE = re.compile(r"^\s*(?:[-=~^*`\"']{3,}.*|\.\. .*|>>>.*|\.\.\. .*)$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)[.!?](?=\s|$)")
_SAYS_NOTHING = re.compile(
    r"(?:see|inherit|alias|same as|deprecated|refer to|internal|todo|fixme|not implemented|overrid|return self|"
    r"do not|don't|copied|this is|this class|this function|this method|this module|base class|abstract)\b|\S+:\s|"
    r".*(?:docstring|[{}%<>=|\\]|->|\):|\bXXX\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ApiRow:
    """One query and the document that answers it.

    Attributes:
        name: Qualified name of the documented object: the document's id.
        query: What the object does, in a sentence.
        document: Name, signature and the rest of the docstring.
    """

    name: str
    query: str
    document: str


@dataclass(frozen=True)
class ApiDocs:
    """Where the task was written, and how large it is.

    Attributes:
        train: JSONL of query and positive.
        dev: The same form, for choosing settings.
        test: Folder in BEIR layout.
        sizes: Rows of `train`, `dev` and `test`.
    """

    train: Path
    dev: Path
    test: Path
    sizes: dict[str, int]


def build_api_docs(
    folder: Path,
    *,
    packages: Iterable[str] = PACKAGES,
    on_package: Callable[[str], None] = lambda name: None,
) -> ApiDocs:
    """Write the task into `folder`: the same files, byte for byte, wherever the same packages are installed.

    Args:
        folder: Is created; files of an earlier build are replaced.
        packages: Import names; `STANDARD_LIBRARY` stands for Python's own.
        on_package: Told the name of each package before it is read.

    Raises:
        ConfigError: if a package is not installed.
    """
    objects: list[DocumentedObject] = []
    for package in packages:
        on_package(package)
        objects += read_package(package, max_objects=MAX_OBJECTS_PER_PACKAGE)
    splits: dict[str, list[ApiRow]] = {"train": [], "dev": [], "test": []}
    for row in make_rows(objects):
        splits[split_of(row.name)].append(row)
    for name in ("train", "dev"):
        _write_jsonl(
            folder / f"{name}.jsonl",
            ({"query": row.query, "positive": row.document} for row in splits[name]),
        )
    _write_beir(folder / "test", splits["test"])
    return ApiDocs(
        train=folder / "train.jsonl",
        dev=folder / "dev.jsonl",
        test=folder / "test",
        sizes={name: len(rows) for name, rows in splits.items()},
    )


def make_rows(objects: Iterable[DocumentedObject]) -> list[ApiRow]:
    """Turn documented objects into rows, no two with the same query, document text or name, in order of name.

    Which of two equal rows stays is decided by a hash of the name, so that no package is favoured.
    """
    rows: list[ApiRow] = []
    seen: set[str] = set()
    for item in sorted(objects, key=lambda o: (stable_hash(o.name), o.name, o.docstring)):
        row = make_row(item)
        if row is None:
            continue
        details = row.document.partition("\n")[2] or row.name
        keys = {f"name {row.name}", f"query {_key(row.query)}", f"document {_key(details)}"}
        if keys.isdisjoint(seen):
            rows.append(row)
            seen |= keys
    return sorted(rows, key=lambda row: row.name)


def make_row(item: DocumentedObject) -> ApiRow | None:
    """The row of one object, or None when its docstring makes no search of sense.

    That is: no proper sentence, no more than a sentence, a sentence that names the object (a look-up, not a search), or one
    that the document repeats.
    """
    summary, details = _split_docstring(item.docstring)
    if not _is_sentence(summary) or len(details.split()) < MIN_DETAIL_WORDS:
        return None
    own_name = item.name.rpartition(".")[2]
    is_word = own_name.islower() and own_name.isalpha()
    if not is_word and own_name.lower() in summary.lower():
        return None
    signature = item.signature
    if len(signature) > MAX_SIGNATURE_LETTERS:
        signature = signature[:MAX_SIGNATURE_LETTERS] + " ...)"
    kept = " ".join(details.split()[:MAX_DOCUMENT_WORDS])
    document = f"{item.name}{signature}\n{kept}"
    if _key(summary) in _key(document):
        return None
    return ApiRow(item.name, summary, document)


def split_of(name: str) -> str:
    """The split of an object, by a stable hash of the last part of its name.

    Methods of one name are often documented in nearly the same words (`DataFrame.to_csv`, `Series.to_csv`): by hashing what
    they share, they all go to one split, and none is tested that was trained on under another class.
    """
    bucket = stable_hash(name.rpartition(".")[2].lower()) % 1000
    if bucket < TEST_SHARE:
        return "test"
    return "dev" if bucket < TEST_SHARE + DEV_SHARE else "train"


def _split_docstring(docstring: str) -> tuple[str, str]:
    """The first sentence and everything after it, both without markup, on one line."""
    paragraph, _, others = docstring.strip().partition("\n\n")
    first = _plain(paragraph)
    end = _SENTENCE_END.search(first)
    summary, rest = (first[: end.end()], first[end.end() :]) if end else (first, "")
    return summary.strip(), f"{rest} {_plain(others)}".strip()


def _plain(text: str) -> str:
    text = _MARKUP_LINE.sub(" ", text)
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text))
    return " ".join(text.replace("`", "").split())


def _is_sentence(text: str) -> bool:
    words = text.split()
    if not MIN_QUERY_WORDS <= len(words) <= MAX_QUERY_WORDS:
        return False
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return text[0].isalpha() and letters >= 0.9 * len(text) and not _SAYS_NOTHING.match(text)


def _key(text: str) -> str:
    """What makes two texts nearly identical: the same letters and digits, whatever their case, spaces and punctuation."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _write_beir(folder: Path, rows: list[ApiRow]) -> None:
    """Every row is a document and the one query that it answers; ids are the objects' names."""
    corpus = ({"_id": row.name, "title": "", "text": row.document} for row in rows)
    queries = ({"_id": f"q:{row.name}", "text": row.query} for row in rows)
    _write_jsonl(folder / "corpus.jsonl", corpus)
    _write_jsonl(folder / "queries.jsonl", queries)
    judgements = [f"q:{row.name}\t{row.name}\t1" for row in rows]
    _write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *judgements])


def _write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_lines(file, (json.dumps(row, ensure_ascii=False) for row in rows))


def _write_lines(file: Path, lines: Iterable[str] | Iterator[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
