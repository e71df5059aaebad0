"""Tar shards in the layout of webdataset: members with one name up to the first dot are one row."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from vembed.data.problems import RowProblem, describe
from vembed.data.reading import MAX_LINE_BYTES, RawRow, decode_text, parse_json_line
from vembed.errors import DataError, shorten
from vembed.images import ImageInTar

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
"""Members with these endings are images."""

_COLUMNS = dict.fromkeys(IMAGE_ENDINGS, "image") | {"txt": "text", "cls": "label", "json": ""}
"""Ending of a member to the column that it is."""


def read_shards(paths: Sequence[str]) -> Iterator[RawRow]:
    """The samples of several shards, in their order; `line` counts the samples of a shard.

    `17.jpg` is the column `image` of sample 17, `17.txt` its `text`, `17.cls` its `label`, and the
    object in `17.json` holds further columns. `17.positive.jpg` and `17.query.txt` are the columns
    `positive` and `query`. Other members are passed over.

    Images are not read: a row has where they lie in the shard.

    Raises:
        DataError: if a shard cannot be read, or is compressed.
    """
    for number, path in enumerate(paths):
        try:
            size = max(1, Path(path).stat().st_size)
            with tarfile.open(path, "r:") as shard:
                for line, (key, members) in enumerate(groupby(_members(shard), _key_of), 1):
                    listed = list(members)
                    done = (number + min(1.0, listed[-1].offset / size)) / len(paths)
                    yield RawRow(line, _columns(path, shard, key, listed), done, number)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{path}: must be a whole tar file, not compressed. "
                f"Received: {shorten(str(error))}. Write it again"
            ) from None


def _members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members that belong to a sample: no folders, nothing hidden, nothing without an ending."""
    while (member := shard.next()) is not None:
        shard.members.clear()  # type: ignore[attr-defined] # or it would keep them all
        name = PurePosixPath(member.name).name
        if not member.isdir() and "." in name.removeprefix(".") and not name.startswith("."):
            yield member


def _key_of(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0]))


def _columns(
    path: str, shard: tarfile.TarFile, key: str, members: Sequence[tarfile.TarInfo]
) -> Mapping[str, Any] | RowProblem:
    described: Mapping[str, Any] = {}
    columns: dict[str, Any] = {}
    for member in members:
        name, _, ending = PurePosixPath(member.name).name.partition(".")[2].rpartition(".")
        ending = ending.lower()
        if ending not in _COLUMNS:
            continue
        column = name or _COLUMNS[ending]
        if not member.isreg() or member.issparse():
            return _problem("a member must be a plain file", member, "a link or a device")
        value = _value(path, shard, member, ending)
        if isinstance(value, RowProblem):
            return value
        if not column:
            described = value
        elif column in columns:
            return _problem(f"a sample must have one {column} only", member, "another one")
        else:
            columns[column] = value
    return {"__key__": _printable(key), **described, **columns}


def _value(path: str, shard: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> Any:
    """The image, text or object that a member is, or what is wrong with it."""
    if ending in IMAGE_ENDINGS:
        return ImageInTar(path, _printable(member.name), member.offset_data, member.size)
    if member.size > MAX_LINE_BYTES:
        rule = f"a text must not be longer than {MAX_LINE_BYTES // 2**20} MB"
        return _problem(rule, member, f"{member.size:,} bytes")
    file = shard.extractfile(member)
    data = b"" if file is None else file.read()
    value = parse_json_line(data) if ending == "json" else decode_text(data)
    if isinstance(value, RowProblem):
        return _problem(f"{value.place} {value.rule}", member, value.received)
    if value is None:
        return _problem("must be one JSON object", member, "nothing")
    return value.strip() if ending == "cls" and isinstance(value, str) else value


def _problem(rule: str, member: tarfile.TarInfo, received: str) -> RowProblem:
    return RowProblem("sample", rule, f"{describe(_printable(member.name))}: {received}")


def _printable(name: str) -> str:
    """A name as Unicode: tar files hold bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
