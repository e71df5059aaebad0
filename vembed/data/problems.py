"""What is wrong with a row, said in one way, and the counting of many such problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vembed.errors import DataError, shorten

PROBLEM_LIMIT = 20
"""Problems after which a file is read no further: enough to see their kinds."""

SHOWN_PROBLEMS = 8
"""Problems that a message lists, before it counts the others."""

_SHOWN_NAMES = 12
_SHOWN_DEPTH = 5


class RowProblem(Exception):
    """One thing that is wrong in one row; turned into a DataError where file and line are known."""

    def __init__(
        self,
        field: str,
        rule: str,
        received: str = "",
        *,
        place: str = "",
        advice: str = "",
        ends_reading: bool = False,
        file: str = "",
        about_columns: bool = False,
    ) -> None:
        """Assign.

        Args:
            field: The field, or `line` when the row could not be read at all.
            rule: What it should have been.
            received: What it is, as `describe` or `shorten` wrote it.
            place: The field as the file writes it (column, list position) when that says more.
            advice: What to do, as a sentence.
            ends_reading: Whether nothing can be read behind it, so that it is no matter of one row.
            file: The image file it is about; another state of it may be better.
            about_columns: Whether it is a matter of which columns there are, so that rows with the
                same columns have the same problem.
        """
        super().__init__(f"{field}: {rule}")
        self.field = field
        self.rule = rule
        self.received = received
        self.place = place or field
        self.advice = advice
        self.ends_reading = ends_reading
        self.file = file
        self.about_columns = about_columns

    @property
    def kind(self) -> str:
        """What problems of the same sort have in common."""
        return f"{self.field}: {self.rule}"

    def describe_at(self, where: str) -> str:
        """The whole message. `where` is `file:line`, or the file."""
        advice = f" {self.advice}" if self.advice else ""
        return f"{where}: {self.place}: {self.reason}{advice}"

    @property
    def reason(self) -> str:
        """The rule and what was received."""
        return f"{self.rule}.{f' Received: {self.received}.' if self.received else ''}"


class ProblemLog:
    """Keeps the first problems of a file and counts the others by kind."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._columns: set[tuple[str, str]] = set()
        self._kinds: Counter[str] = Counter()
        self._total = 0

    @property
    def is_full(self) -> bool:
        """Whether reading on would tell nothing new."""
        return self._total >= PROBLEM_LIMIT

    def add(self, problem: RowProblem, where: str) -> None:
        """Note a problem met at `where` (`file:line`)."""
        self._total += 1
        columns = (problem.kind, problem.received)
        if len(self._shown) == SHOWN_PROBLEMS or columns in self._columns:
            self._kinds[problem.kind] += 1
            return
        self._shown.append(problem.describe_at(where))
        if problem.about_columns:
            self._columns.add(columns)

    def raise_if_any(self) -> None:
        """Raise one DataError about everything that was added, if anything was."""
        if self._total:
            stopped = f" (stopped at {PROBLEM_LIMIT})" if self.is_full else ""
            raise DataError(self.summary(stopped))

    def summary(self, remark: str = "") -> str:
        """The first problems, and of what kinds the others are; the remark goes with their count.

        What is wrong with the columns is told once.
        """
        lines = list(self._shown)
        if more := self._kinds.total():
            kinds = "; ".join(f"{count} x {kind}" for kind, count in self._kinds.most_common())
            lines.append(f"and {more} more problem{'s' if more > 1 else ''}{remark}: {kinds}")
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Unreadable:
    """A value that the file has, but that cannot be had: it is no text and no number of Python's.

    Attributes:
        reason: Why.
    """

    reason: str


def describe(value: Any) -> str:
    """A value as it is shown to the user: shortened, with its kind in words."""
    if isinstance(value, Unreadable):
        return f"a value that cannot be read ({shorten(value.reason)})"
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"{shorten(value, quote=True)} (a text)"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    kinds = {bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, list | tuple):
        kind = f"a list of {len(value)}"
    else:
        kind = kinds.get(type(value), f"of type {type(value).__name__}")
    shown = str(value).lower() if isinstance(value, bool) else _outline(value)
    return f"{shorten(shown)} ({kind})"


def _outline(value: Any, depth: int = 0) -> str:
    """The beginning of `repr(value)`, however deep or long it is."""
    if not isinstance(value, list | tuple | dict):
        return shorten(value, quote=True) if isinstance(value, str) else repr(value)
    left, right = "{}" if isinstance(value, dict) else "[]"
    if depth == _SHOWN_DEPTH:
        return f"{left}...{right}"
    parts = []
    for part in islice(value.items() if isinstance(value, dict) else value, _SHOWN_NAMES):
        if isinstance(value, dict):
            parts.append(f"{shorten(str(part[0]), quote=True)}: {_outline(part[1], depth + 1)}")
        else:
            parts.append(_outline(part, depth + 1))
    more = ", ..." if len(value) > _SHOWN_NAMES else ""
    return f"{left}{', '.join(parts)}{more}{right}"


def list_names(names: Iterable[str]) -> str:
    """Quoted names, a dozen at most."""
    quoted = [shorten(name, quote=True) for name in names]
    rest = len(quoted) - _SHOWN_NAMES
    shown = ", ".join(quoted[:_SHOWN_NAMES])
    return f"{shown} and {rest} more" if rest > 0 else shown or "none"
