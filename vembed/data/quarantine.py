"""Rows that cannot be used: left out and written down, up to a cap."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vembed.data.problems import ProblemLog, RowProblem
from vembed.errors import ConfigError, DataError
from vembed.redaction import redact_text

DEFAULT_MAX_BAD_RECORDS = 0.01
FILE_NAME = "quarantine.jsonl"

_FIRST_LOOK_ROWS = 1000
_KEPT_ROWS = 1000


@dataclass(frozen=True)
class BadRecord:
    """A row that was left out.

    Attributes:
        where: `file:line`.
        field: The cell, as the file names it.
        reason: What it should be, and what it is.
    """

    where: str
    field: str
    reason: str

    @classmethod
    def of(cls, problem: RowProblem, where: str) -> BadRecord:
        """A problem met at `where`."""
        return cls(redact_text(where), redact_text(problem.place), redact_text(problem.reason))

    def as_json(self) -> str:
        """The line of the quarantine file."""
        line = {"where": self.where, "field": self.field, "reason": self.reason}
        return json.dumps(line, ensure_ascii=False)


class Quarantine:
    """Takes the rows of a run's data sets that cannot be used, instead of ending the run.

    A row is left out before batches are made, so that batches are full, and the same on every
    process and for any number of workers.
    """

    def __init__(self, max_bad_records: float = DEFAULT_MAX_BAD_RECORDS) -> None:
        """Assign and check.

        Args:
            max_bad_records: Most bad rows of one data set: below 1 a share of its rows, from 1 on
                a number.

        Raises:
            ConfigError: if it is not above 0.
        """
        if not max_bad_records > 0:
            raise ConfigError(f"max_bad_records: must be above 0. Received: {max_bad_records}")
        self.max_bad_records = max_bad_records
        self._stored: dict[str, BadRecord] = {}
        self._streamed: dict[str, BadRecord] = {}
        self._path: Path | None = None

    @property
    def records(self) -> list[BadRecord]:
        """The rows that were left out; of a stream, the first thousand in this process."""
        return [*self._stored.values(), *self._streamed.values()]

    def admit(self, path: str, bad: Iterable[tuple[str, RowProblem]], total: int) -> None:
        """Take the bad rows of a data set that is read to its end.

        Args:
            path: The data set.
            bad: Where each is (`file:line`), and its problem.
            total: Rows of the data set, the bad ones included.

        Raises:
            DataError: if they are more than the cap, or all there is.
        """
        tally = Tally(path, self.max_bad_records)
        for where, problem in bad:
            tally.count(problem, where)
            self._stored[where] = BadRecord.of(problem, where)
        tally.rows = total
        tally.close()

    def write(self, path: str | Path) -> None:
        """Write what was left out, a JSON object per line; streams add theirs when they are read.

        Call it on the main process, before the loaders start their workers.
        """
        self._path = Path(path)
        lines = "".join(f"{record.as_json()}\n" for record in self._stored.values())
        self._path.write_text(lines, encoding="utf-8", errors="backslashreplace")

    def tally(self, path: str, *, in_first_worker: bool) -> Tally:
        """The tally of one pass over a stream.

        Args:
            path: The data set.
            in_first_worker: Whether this process tells of the bad rows: every worker meets them.
        """
        return Tally(path, self.max_bad_records, self._note if in_first_worker else None)

    def begin_pass(self, *, in_first_worker: bool) -> None:
        """Forget what an earlier pass over a stream has written."""
        if self._path is not None and in_first_worker:
            self.write(self._path)

    def _note(self, record: BadRecord) -> None:
        if len(self._streamed) < _KEPT_ROWS:
            self._streamed[record.where] = record
        if self._path is not None:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{record.as_json()}\n")


class Tally:
    """Counts the rows of one data set, and ends the reading when too many are bad.

    Attributes:
        rows: Rows so far.
    """

    def __init__(
        self, path: str, limit: float, note: Callable[[BadRecord], None] | None = None
    ) -> None:
        """Assign.

        Args:
            path: The data set.
            limit: As `max_bad_records`.
            note: Told of every bad row.
        """
        self.rows = 0
        self._path = path
        self._limit = limit
        self._note = note
        self._bad = 0
        self._log = ProblemLog()

    def count(self, problem: RowProblem, where: str) -> None:
        """Count a bad row."""
        self._bad += 1
        self._log.add(problem, where)
        if self._note is not None:
            self._note(BadRecord.of(problem, where))

    def add(self, problem: RowProblem, where: str) -> None:
        """Count a bad row of a data set whose end is not known.

        Raises:
            DataError: if they are too many already: a number is exceeded, or a share of the rows
                so far, once these are a thousand.
        """
        self.count(problem, where)
        if self._limit >= 1 or self.rows >= _FIRST_LOOK_ROWS:
            self._check()

    def close(self) -> None:
        """Look at the whole data set.

        Raises:
            DataError: if too many rows are bad, or all of them.
        """
        self._check(ended=True)
        if self._bad and self._bad == self.rows:
            raise DataError(f"{self._path}: no row of it can be used. {self._log.summary()}")

    def _check(self, *, ended: bool = False) -> None:
        if self._bad <= (self._limit if self._limit >= 1 else self._limit * self.rows):
            return
        cap = f"{self._limit:g}" if self._limit >= 1 else f"{self._limit:.2%} of the rows"
        remedy = ""
        if ended and self._bad < self.rows:
            remedy = f". To leave these rows out, set max_bad_records: {self._bad}"
        counted = f" of {self.rows:,}" if self.rows else ""
        raise DataError(
            f"{self._path}: max_bad_records: at most {cap} may be bad. "
            f"Received: {self._bad:,}{counted}{remedy}.\n  {self._log.summary()}"
        )
