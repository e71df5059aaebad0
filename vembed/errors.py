"""The errors a user can meet. Each is also the built-in that fits, for `except ValueError`.

Pattern of every message: what rule, what was received, where, what to do.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable

from vembed.redaction import redact_text

_WAIT_FOR_FIRST_PROCESS_S = 3.0
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class VembedError(Exception):
    """Base of every error that vembed raises on purpose.

    Attributes:
        exit_code: The status of a program that it ends.
        is_shared: Whether the first process of several tells it too.
        may_end_others: Whether the launcher, when it sees this process end, may end others that
            still have something to say.
    """

    exit_code = 1
    is_shared = False
    may_end_others = True


class ConfigError(VembedError, ValueError):
    """A setting, flag or combination of settings that cannot work."""

    exit_code = 2


class DataError(VembedError, ValueError):
    """A data file or row that cannot be used. The message starts with its `file:line`, if any."""

    exit_code = 2


class CheckpointError(VembedError, OSError):
    """A model folder that is missing, incomplete, or does not fit."""

    exit_code = 2


class DiskError(VembedError, OSError):
    """A disk that is full or cannot be written to."""

    exit_code = 3


class LostSaveError(DiskError):
    """A save that a disk did not take, as every process knows."""

    is_shared = True


class NonFiniteError(VembedError, ArithmeticError):
    """A loss or a gradient that is infinite or no number."""

    exit_code = 5
    is_shared = True


class DistributedError(VembedError, RuntimeError):
    """Processes that disagree, or fewer processes than were asked for."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x' or 'y'?)` with the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def exit_status(program: Callable[[], int]) -> int:
    """Run a program and return its exit status; what a user can meet is told in one message.

    Of several processes the first one speaks: the message is almost always the same for all. The
    others wait, for the launcher to end them, and speak only if it has not: then theirs differs.

    Errors that are no VembedError keep their traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        return program()
    except VembedError as error:
        if rank and error.may_end_others:
            time.sleep(_WAIT_FOR_FIRST_PROCESS_S)
        if not (rank and error.is_shared):
            message = _visible(redact_text(str(error)))
            sys.stderr.write(f"vembed{f' (process {rank})' if rank else ''}: {message}\n")
        return error.exit_code
    except KeyboardInterrupt:
        if not rank:
            sys.stderr.write("vembed: interrupted\n")
        return 130


def _visible(message: str) -> str:
    """A message whose characters a terminal shows rather than obeys."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], message)


def find_control_character(text: str) -> str | None:
    """The first character of a text that no name, path or prompt has, as it is shown; else None.

    NUL, escapes that a terminal would obey, and halves of surrogate pairs; not tabs or line breaks.
    """
    found = _CONTROL.search(text)
    return None if found is None else ascii(found.group())


def shorten(text: str, *, quote: bool = False, most: int = 80) -> str:
    """The beginning of `text`, then `...`, in a form that any log takes.

    Args:
        text: Of the user's data: it may be long, or no valid Unicode.
        quote: Put it in quotes, with escapes for what cannot be shown.
        most: Characters of it that are shown.
    """
    cut = text[:most]
    end = "..." if len(text) > most else ""
    shown = repr(cut) if quote else cut.encode("utf-8", "backslashreplace").decode("utf-8")
    return shown + end


def quote_path(path: str) -> str:
    """A path or URL as it is shown: more of it than of other texts, because its end names it."""
    return shorten(path, quote=True, most=120)
