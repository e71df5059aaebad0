"""*API documentation search*: a retrieval task made on the spot from docstrings on this machine.

A query is the sentence that says what something does ("Clip the values in an array."); its document
is the thing's name, signature and the rest of its documentation, without that sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
"""What is searched: literal, so that other packages of an environment change nothing.

Each is pinned in constraints.txt and comes with `vembed[quickstart]`.
"""

MAX_OBJECTS_PER_PACKAGE = 2000
MAX_DOCUMENT_WORDS = 120
MAX_SIGNATURE_LETTERS = 160
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 3, 40

# Thousandths of all rows. The rest is for training.
TEST_SHARE, DEV_SHARE = 130, 40

_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"\[`+~?([^`\]]+)`+\](?:\([^)]*\))?")
# Underlines and fences, directives and comments, and the code of doctests.
_MARKUP_LINE = re.compile(r"^\s*(?:[-=~^*`\"']{3,}.*|\.\. .*|>>>.*|\.\.\. .*)$", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)[.!?](?=\s|$)")
_SAYS_NOTHING = re.compile(
    r"(?:see|inherit|alias|same as|deprecated|refer to|internal|todo|fixme|not implemented|overrid|"
    r"return self|do not|don't|copied|this is|this class|this function|this method|this module|"
    r"base class|abstract)\b|\S+:\s|.*(?:docstring|[{}%<>=|\\]|->|\):)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ApiRow:
    """One query and the document that answers it.

    Attributes:
        name: Qualified name of the documented object: the document's id.
        query: What the object does, in a sentence.
        document: Name and signature, and on a second line the rest of the docstring, if any.
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
        sizes: Rows by the name of the split.
    """

    train: Path
    dev: Path
    test: Path
    sizes: Mapping[str, int]


def build_api_docs(
    folder: Path,
    *,
    packages: Iterable[str],
    on_package: Callable[[str], None] = lambda package: None,
) -> ApiDocs:
    """Write the task: the same files, byte for byte, wherever the same packages are installed.

    Args:
        folder: Is created; files of an earlier build are replaced.
        packages: Import names; `STANDARD_LIBRARY` stands for Python's own modules.
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
    docs = ApiDocs(
        train=folder / "train.jsonl",
        dev=folder / "dev.jsonl",
        test=folder / "test",
        sizes={name: len(rows) for name, rows in splits.items()},
    )
    _write_pairs(docs.train, splits["train"])
    _write_pairs(docs.dev, splits["dev"])
    _write_beir(docs.test, splits["test"])
    return docs


def make_rows(objects: Iterable[DocumentedObject]) -> list[ApiRow]:
    """Turn documented objects into rows, no two with the same name, query or document text.

    The order is that of a hash of the names: no package is favoured where two rows are equal, and
    the first rows are a fair sample of all.
    """
    rows: list[ApiRow] = []
    seen: set[str] = set()
    for item in sorted(objects, key=lambda o: (stable_hash(o.name), o.name, o.docstring)):
        row = make_row(item)
        if row is None:
            continue
        text = row.document.partition("\n")[2] or row.name
        keys = {f"name {row.name}", f"query {_letters(row.query)}", f"text {_letters(text)}"}
        if keys.isdisjoint(seen):
            rows.append(row)
            seen |= keys
    return rows


def make_row(item: DocumentedObject) -> ApiRow | None:
    """The row of one object, or None when its docstring makes no sensible search.

    That is: its first sentence is none, or names the object (a look-up, not a search), or stands
    in the document again.
    """
    query, details = _split_docstring(item.docstring)
    own_name = item.name.rpartition(".")[2]
    # Names such as `open` or `join` are words that a sentence about something else may contain.
    is_plain_word = own_name.isalpha() and own_name.islower()
    if not _is_sentence(query) or (not is_plain_word and own_name.lower() in query.lower()):
        return None
    signature = item.signature
    if len(signature) > MAX_SIGNATURE_LETTERS:
        signature = f"{signature[:MAX_SIGNATURE_LETTERS]} ...)"
    kept = " ".join(details.split()[:MAX_DOCUMENT_WORDS])
    document = f"{item.name}{signature}\n{kept}".rstrip()
    if _letters(query) in _letters(document):
        return None
    return ApiRow(item.name, query, document)


def split_of(name: str) -> str:
    """The split of an object, by a stable hash of the last part of its name.

    Methods of one name are often documented in nearly the same words (`DataFrame.to_csv`,
    `Series.to_csv`). They all go to one split: none is tested whose twin was trained on.
    """
    bucket = stable_hash(name.rpartition(".")[2].lower()) % 1000
    if bucket < TEST_SHARE:
        return "test"
    return "dev" if bucket < TEST_SHARE + DEV_SHARE else "train"


def _split_docstring(docstring: str) -> tuple[str, str]:
    """The first sentence and everything after it, both without markup and on one line."""
    paragraph, _, others = docstring.strip().partition("\n\n")
    first = _plain(paragraph)
    end = _SENTENCE_END.search(first)
    position = end.end() if end else len(first)
    return first[:position], f"{first[position:]} {_plain(others)}".strip()


def _plain(text: str) -> str:
    text = _MARKUP_LINE.sub(" ", text)
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text))
    return " ".join(_CONTROL.sub(" ", text).replace("`", "").split())


def _is_sentence(text: str) -> bool:
    if not MIN_QUERY_WORDS <= len(text.split()) <= MAX_QUERY_WORDS:
        return False
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return text[0].isalpha() and letters >= 0.85 * len(text) and not _SAYS_NOTHING.match(text)


def _letters(text: str) -> str:
    """Equal for texts that differ only in case, spaces and punctuation."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _write_pairs(file: Path, rows: Iterable[ApiRow]) -> None:
    _write_jsonl(file, ({"query": row.query, "positive": row.document} for row in rows))


def _write_beir(folder: Path, rows: list[ApiRow]) -> None:
    """Every row is a document, and a query that it alone answers."""
    corpus = ({"_id": row.name, "title": "", "text": row.document} for row in rows)
    queries = ({"_id": f"q:{row.name}", "text": row.query} for row in rows)
    _write_jsonl(folder / "corpus.jsonl", corpus)
    _write_jsonl(folder / "queries.jsonl", queries)
    judgements = [f"q:{row.name}\t{row.name}\t1" for row in rows]
    _write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *judgements])


def _write_jsonl(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    _write_lines(file, (json.dumps(row, ensure_ascii=False) for row in rows))


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
