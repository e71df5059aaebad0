"""What a disk says when it does not take what is written. Nothing here needs torch."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from pathlib import Path

_REASONS = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES,
    errno.EPERM,
})  # fmt: skip
# safetensors is written in Rust, whose errors keep the number in their text only.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# torch.save drops the number.
_TORCH_ERROR = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos")


def disk_problem(error: BaseException) -> str | None:
    """What the disk said, if an error of writing came from it; None if it came from elsewhere."""
    if isinstance(error, OSError) and error.errno in _REASONS:
        return os.strerror(error.errno)
    text = str(error)
    if (found := _RUST_ERROR.search(text)) and int(found[1]) in _REASONS:
        return os.strerror(int(found[1]))
    if _TORCH_ERROR.search(text):
        return "the file could not be written whole"
    return None


def free_bytes(path: Path) -> int:
    """What is free where `path` is or will be."""
    return shutil.disk_usage(_existing(path)).free


def mount_of(path: Path) -> Path:
    """Where the disk begins that `path` is or will be on."""
    found = _existing(path).resolve()
    while not found.is_mount():
        found = found.parent
    return found


def folder_bytes(path: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def as_size(count: float) -> str:
    """Bytes in words: `1.2 GB`."""
    if count < 1000:
        return f"{count:.0f} bytes"
    units = ["bytes", "kB", "MB", "GB", "TB"]
    power = min(len(units) - 1, int(math.log(count, 1000)))
    return f"{count / 1000**power:.1f} {units[power]}"


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
