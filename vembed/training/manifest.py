"""Folders that are whole or not there: written aside, listed in a manifest, put in place at once.

A manifest holds the size and the SHA-256 of every file, so that what a kill, a full disk or a bad
disk has left can be told from what was written. It vouches for itself, too. Nothing here needs
torch.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vembed.errors import CheckpointError

MANIFEST = "manifest.json"

_FORMAT = 1
_NEW, _OLD, _GONE = ".tmp-", ".old-", ".trash-"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        files: Size in bytes and SHA-256 of every file, by its path in the folder.
        facts: What else its writer noted, such as the step.
    """

    files: dict[str, tuple[int, str]]
    facts: dict[str, Any]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written.

    Attributes:
        file: Which.
        reason: What is wrong with it.
    """

    file: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def fresh_path(path: Path) -> Path:
    """Where the folder is made that will be `path`."""
    return _beside(path, _NEW)


def start_folder(path: Path) -> Path:
    """An empty folder beside `path`, to be filled and then committed in its place."""
    fresh = fresh_path(path)
    shutil.rmtree(fresh, ignore_errors=True)
    made = [parent for parent in fresh.parents if not parent.exists()]
    fresh.mkdir(parents=True)
    for parent in made:
        _sync(parent.parent)  # or the names of folders above could be lost with what is in them
    return fresh


def commit_folder(fresh: Path, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Put a folder that is complete in the place of `path`; an earlier one there is removed.

    Everything is on the disk before the name changes, so that there is a whole folder at `path`
    at any instant, the earlier one or the new one.

    Args:
        fresh: From `start_folder`.
        path: Its place.
        facts: Kept in the manifest.
    """
    _write_manifest(fresh, facts or {})
    for folder, _, files in os.walk(fresh, topdown=False):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if not path.exists():
        fresh.rename(path)
    elif _exchange(fresh, path):
        # The earlier one may go only when the disk knows that it has lost its name.
        _sync(path.parent)
        shutil.rmtree(fresh)
    else:
        # For an instant `path` is missing; `remove_leftovers` puts the earlier one back.
        old = _beside(path, _OLD)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        fresh.rename(path)
        _sync(path.parent)
        shutil.rmtree(old)
    _sync(path.parent)


@contextmanager
def replaced_folder(path: Path, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` if nothing goes wrong."""
    fresh = start_folder(path)
    try:
        yield fresh
        commit_folder(fresh, path, facts)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder in such a way that a part of it can never be taken for the whole."""
    gone = _beside(path, _GONE)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    _sync(path.parent)
    shutil.rmtree(gone)


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what an interrupted process has left half done right under `folder`.

    Args:
        folder: May be missing.
        names: Of the folders and files that are written there: the user's own are left alone.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        prefix = next((p for p in (_NEW, _OLD, _GONE) if path.name.startswith(p)), None)
        if prefix is None or not names.fullmatch(path.name.removeprefix(prefix)):
            continue
        whole = path.with_name(path.name.removeprefix(prefix))
        if prefix == _OLD and not whole.exists():
            path.rename(whole)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_text_safely(path: Path, text: str) -> None:
    """Write a file that at any instant has its old content or the new one."""
    fresh = _beside(path, _NEW)
    fresh.write_text(text, encoding="utf-8")
    _sync(fresh)
    fresh.replace(path)
    _sync(path.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; its files are not looked at.

    Raises:
        CheckpointError: naming the file, if it is missing or not as it was written.
    """
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    try:
        content = json.loads(text)
        written = content.pop("sha256")
        files = {name: (size, digest) for name, (size, digest) in content["files"].items()}
        manifest = Manifest(files, content["facts"])
        version = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: is not as it was written") from None
    if written != _digest_of(content) or text != _as_text(content, written):
        raise CheckpointError(f"{file}: is not as it was written")
    if version != _FORMAT:
        raise CheckpointError(
            f"{file}: format {version}, but this version of vembed reads format {_FORMAT}"
        )
    return manifest


def find_damage(folder: Path) -> Damage | None:
    """The first file of a folder that is not as its manifest says; None if all are.

    Reads every file. One that the manifest does not name is no damage.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Damage(folder / MANIFEST, str(error).removeprefix(f"{folder / MANIFEST}: "))
    for name, (size, digest) in manifest.files.items():
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return Damage(file, f"has {found:,} bytes, but {size:,} were written")
            if _digest(file) != digest:
                return Damage(file, "its content changed after it was written (SHA-256 differs)")
        except FileNotFoundError:
            return Damage(file, "is missing")
        except OSError as error:
            return Damage(file, f"cannot be read ({error})")
    return None


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)  # of a copied folder
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": _FORMAT,
        "facts": dict(facts),
        "files": {
            path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)]
            for path in files
        },
    }
    text = _as_text(content, _digest_of(content))
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _as_text(content: Mapping[str, Any], digest: str) -> str:
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}")


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do it for folders, and do not need to.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one operation; whether the system can."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if sys.platform != "linux" or swap is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    if swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
