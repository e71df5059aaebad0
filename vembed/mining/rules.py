"""Which candidates may be negatives; checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from vembed.errors import ConfigError

Sampling = Literal["top", "random"]
ShortRows = Literal["keep", "drop", "error"]

_POOL = 10
"""Candidates for each negative, where a pool is drawn from and nobody said how large it is."""


@dataclass(frozen=True)
class MiningRules:
    """What makes a candidate a negative of a query.

    Candidates are ranked by similarity; documents that are known to belong to the query, as a
    positive or as a negative of its rows, are none, and neither is the query's own content.

    Attributes:
        num_negatives: Negatives of a query, at most.
        range_min: Nearest candidates that are passed over.
        range_max: Candidates that are looked at, those passed over included; None: all, or, where
            they are a pool to draw from (`random`, a cross-encoder), ten for each negative.
        max_score: Most similarity that a negative may have.
        min_score: Least similarity that it must have.
        absolute_margin: A candidate more similar than `positive - absolute_margin` is left out.
        relative_margin: A candidate more similar than `positive - relative_margin * |positive|` is.
        sampling: `top`: the most similar ones that the rules allow; `random`: any of them.
        seed: Of `random`; what a query gets does not depend on the other queries.
    """

    num_negatives: int = 3
    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling: Sampling = "top"
    seed: int = 42

    def __post_init__(self) -> None:
        """Check what can be checked without torch; margins are checked by `Margins`.

        Raises:
            ConfigError: if a rule cannot be meant, or no candidate could satisfy all.
        """
        for name, least in (("num_negatives", 1), ("range_min", 0), ("seed", 0)):
            _check_whole(name, getattr(self, name), least)
        if self.range_max is not None:
            _check_whole("range_max", self.range_max, self.range_min + self.num_negatives,
                         "range_min + num_negatives")  # fmt: skip
        for name in ("max_score", "min_score"):
            score = getattr(self, name)
            if score is not None and not (_is_number(score) and math.isfinite(score)):
                raise ConfigError(f"{name}: expected a number. Received: {score!r}")
        if None not in (self.min_score, self.max_score) and self.min_score > self.max_score:  # type: ignore[operator]
            raise ConfigError(
                f"min_score: must not exceed max_score, {self.max_score}. "
                f"Received: {self.min_score}"
            )
        if self.sampling not in get_args(Sampling):
            raise ConfigError(f"sampling: expected top or random. Received: {self.sampling!r}")

    def last_rank(self, *, is_pool: bool) -> int | None:
        """Candidates that are looked at, those passed over included; None for all of them.

        Args:
            is_pool: Whether all that are allowed are wanted, not just the first ones.
        """
        if self.range_max is None and (is_pool or self.sampling == "random"):
            return self.range_min + _POOL * self.num_negatives
        return self.range_max


@dataclass(frozen=True)
class Excluded:
    """Pairs of a query and a candidate that each rule left out; the first that does so counts.

    Attributes:
        known: Positives, negatives that the rows had, and the query's own content.
        rank: Nearer than `range_min`, or farther than `range_max`.
        min_score: Not similar enough, for queries that found fewer than wanted: those that found
            enough looked no further.
        margin: Too near to the positive.
        max_score: Too similar.
    """

    known: int = 0
    rank: int = 0
    min_score: int = 0
    margin: int = 0
    max_score: int = 0

    def __add__(self, other: Excluded) -> Excluded:
        sums = zip(vars(self).values(), vars(other).values(), strict=True)
        return Excluded(*(first + second for first, second in sums))


def check_faiss() -> None:
    """Raise ConfigError unless faiss, which searches, is installed."""
    if find_spec("faiss") is None:
        raise ConfigError(
            "mining: searches with faiss, which is not installed. Install it with: "
            "pip install 'vembed[mining]'"
        )


def check_output(output: Path, data: str, *, overwrite: bool) -> None:
    """Raise ConfigError unless the mined rows can be written to `output`.

    Args:
        output: The file.
        data: Where the rows are.
        overwrite: Whether it may replace another.
    """
    if output.suffix != ".jsonl":
        raise ConfigError(f"output: expected a name that ends in .jsonl. Received: {str(output)!r}")
    if not output.parent.is_dir():
        raise ConfigError(f"output: there is no folder {str(output.parent)!r}")
    if output.exists() and Path(data).exists() and output.samefile(data):
        raise ConfigError(f"output: {output} is the file of the rows. Name another")
    if output.exists() and not overwrite:
        raise ConfigError(
            f"output: {output} is there already. Name another, or give overwrite (--overwrite)"
        )


def check_short_rows(value: str) -> None:
    """Raise ConfigError unless it says what happens to rows with too few negatives."""
    if value not in get_args(ShortRows):
        raise ConfigError(f"short_rows: expected keep, drop or error. Received: {value!r}")


def _check_whole(name: str, value: object, least: int, what: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        meant = f"{what} = {least}" if what else str(least)
        raise ConfigError(
            f"{name}: expected a whole number of at least {meant}. Received: {value!r}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
