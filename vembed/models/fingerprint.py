"""What tells one set of weights from another, without loading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors", "*.bin")
_BLOCKS = 64
_BLOCK_BYTES = 64 * 2**10


def fingerprint(folder: str | Path) -> str:
    """A hash of the files that make a model: names, sizes and contents.

    Of a large file, 64 blocks spread evenly stand for all of it: training changes weights
    everywhere, and reading tens of gigabytes takes minutes.

    Args:
        folder: Local folder of a model.
    """
    root = Path(folder)
    digest = hashlib.blake2b(digest_size=16)
    found = {path for pattern in _PATTERNS for path in root.rglob(pattern) if path.is_file()}
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        size = path.stat().st_size
        digest.update(repr((path.relative_to(root).as_posix(), size)).encode())
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(file.read())
                continue
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK_BYTES) // (_BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
