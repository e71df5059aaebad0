"""One run at a time in an output folder. Nothing here needs torch.

Two runs that write the same names aside would commit a mixture of both, with a manifest that
vouches for it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from vembed.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"

_POLL_S = 0.2
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class OutputLock:
    """Says that a folder is in use, until it is left or the process dies, however it dies.

    A record lock of POSIX: unlike that of `flock`, data workers do not inherit it, so that it does
    not outlive the process that took it; and it reaches across machines on NFS. It does not keep
    out another run of the same process. A disk that knows no locks is used without one.
    """

    def __init__(self, folder: Path, *, wait_s: float = 0.0) -> None:
        """Assign.

        Args:
            folder: `output_dir` of a run. If it is missing it is made, and removed again if
                nothing is written there.
            wait_s: How long to wait for a run that is about to end.
        """
        self._folder = folder
        self._wait_s = wait_s
        self._made: list[Path] = []
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            # Where the disk takes no change any more it stays, and is nobody's.
            with suppress(OSError):
                (self._folder / LOCK_NAME).unlink()
            os.close(self._descriptor)
            self._descriptor = None
        with suppress(OSError):  # something is in it by now
            for folder in self._made:
                folder.rmdir()

    def take(self) -> None:
        """Take it.

        Raises:
            ConfigError: if another process has it, or the folder cannot be made.
        """
        until = time.monotonic() + self._wait_s
        is_told = False
        while not self._try():
            in_use = f"output_dir: {self._folder} is in use by {self._holder()}"
            if time.monotonic() >= until:
                raise ConfigError(f"{in_use}. Wait until it has ended, or name another folder")
            if not is_told:
                logger.warning("%s; waiting %g s for its end", in_use, self._wait_s)
                is_told = True
            time.sleep(_POLL_S)

    def _make_folder(self) -> None:
        missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"output_dir: {self._folder} must be a folder, or one that can be made. Received: "
                f"{error.strerror}"
            ) from None
        self._made = self._made or missing

    def _try(self) -> bool:
        """Take it if nobody has it; whether there is nothing to wait for."""
        path = self._folder / LOCK_NAME
        self._make_folder()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return False  # who made the folder has removed it
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                return True
            if error.errno in _TAKEN:
                return False
            raise
        if not _is_at(path, descriptor):
            # Its holder has removed it in the meantime, and the next one makes another.
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return True

    def _holder(self) -> str:
        path = self._folder / LOCK_NAME
        # What is closed here is no lock of this process: it has none.
        name = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
        return f"another run ({name})" if name else "another run"


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
