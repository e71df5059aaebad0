"""Vectors in fewer bytes: a byte or a bit for each number.

`int8` cuts the range of each dimension into 256 steps; the ranges come from a sample. `binary` and
`ubinary` keep signs, eight in a byte, as signed or unsigned bytes. All are what
sentence-transformers' `quantize_embeddings` gives under these names.

# Shapes: n vectors, D size, B = ceil(D / 8) bytes; Q queries, N documents
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from vembed.errors import ConfigError, DataError

Precision = Literal["float32", "int8", "binary", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Floats = npt.NDArray[np.float32]

RESCORED = 40
"""Nearest documents by Hamming distance that are put in order by the query's own numbers: four
times ten, as Yamada et al. (2021, BPR) and sentence-transformers do for the first ten."""

_STEPS = 255


@dataclass(frozen=True, eq=False)
class Ranges:
    """The lowest and the highest value of each dimension, `[D]` each."""

    lowest_D: Floats
    highest_D: Floats

    @classmethod
    def of(cls, sample_nD: Floats) -> Ranges:
        """Of some vectors, at least one; better of thousands.

        Raises:
            ConfigError: if there are none.
        """
        if not len(sample_nD):
            raise ConfigError("int8: ranges come from a sample of vectors. Received: none")
        return cls(sample_nD.min(axis=0), sample_nD.max(axis=0))

    @classmethod
    def load(cls, path: str | Path) -> Ranges:
        """What `save` wrote.

        Raises:
            DataError: if there is no such file, or something else in it.
        """
        try:
            both = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: ranges cannot be read ({error})") from error
        if getattr(both, "ndim", 0) != 2 or len(both) != 2 or not np.isfinite(both).all():
            raise DataError(f"{path}: expected two rows of numbers, as vembed encode writes them")
        return cls(*both.astype(np.float32))

    def save(self, path: str | Path) -> None:
        """Write both rows, `[2, D]`, as a .npy file."""
        with Path(path).open("wb") as file:
            np.save(file, np.stack([self.lowest_D, self.highest_D]))

    @property
    def step_D(self) -> Floats:
        """Between two neighbouring codes; above 0 also where a dimension never varies."""
        step_D = (self.highest_D - self.lowest_D) / np.float32(_STEPS)
        return np.asarray(np.where(step_D > 0, step_D, np.float32(1)))

    def encode(self, vectors_nD: Floats) -> npt.NDArray[np.int8]:
        """Which of 256 steps each number is in, from -128 to 127; beyond the range, the last.

        Raises:
            ConfigError: if vectors are of another size.
        """
        if vectors_nD.shape[1] != len(self.lowest_D):
            raise ConfigError(
                f"int8: the ranges are of {len(self.lowest_D)} dimensions. Received: vectors of "
                f"{vectors_nD.shape[1]}"
            )
        steps_nD = np.floor((vectors_nD - self.lowest_D) / self.step_D)
        codes: npt.NDArray[np.int8] = (np.clip(steps_nD, 0, _STEPS) - 128).astype(np.int8)
        return codes

    def decode(self, codes_nD: npt.NDArray[np.int8]) -> Floats:
        """The middle of each step: at most half a step from what was encoded."""
        middle_nD = codes_nD.astype(np.float32) + np.float32(128.5)
        return np.asarray(np.minimum(middle_nD * self.step_D + self.lowest_D, self.highest_D))


def pack_signs(vectors_nD: Floats, *, signed: bool = False) -> npt.NDArray[np.int8 | np.uint8]:
    """`[n, B]`, a bit for each number, set where it is above 0; the first in the highest bit.

    Args:
        vectors_nD: Of any length.
        signed: As signed bytes, 128 less.
    """
    packed_nB = np.packbits(vectors_nD > 0, axis=1)
    return (packed_nB.astype(np.int16) - 128).astype(np.int8) if signed else packed_nB


def quantize(
    vectors_nD: Floats, precision: Precision, ranges: Ranges | None = None
) -> npt.NDArray[np.float32 | np.int8 | np.uint8]:
    """Vectors in a precision.

    Args:
        vectors_nD: As a model gives them.
        precision: `float32` leaves them as they are.
        ranges: Of int8, those of the vectors that it will be compared with; None: its own.

    Raises:
        ConfigError: if the precision is another word, or ranges do not fit.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision: expected one of {', '.join(PRECISIONS)}. Received: {precision!r}"
        )
    if precision == "float32":
        return vectors_nD
    if precision == "int8":
        return (ranges or Ranges.of(vectors_nD)).encode(vectors_nD)
    return pack_signs(vectors_nD, signed=precision == "binary")


@dataclass(frozen=True, eq=False)
class BinaryVectors:
    """Vectors that are searched by their signs; as queries, they put in order by their numbers.

    Attributes:
        vectors_nD: What the signs are of.
    """

    vectors_nD: Floats

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.vectors_nD)

    def __getitem__(self, rows: slice) -> BinaryVectors:
        """Some of them."""
        return BinaryVectors(self.vectors_nD[rows])

    @property
    def signs_nD(self) -> npt.NDArray[np.float64]:
        """1 for a bit that is set, else -1."""
        return np.where(self.vectors_nD > 0, 1.0, -1.0)

    def unit_nD(self) -> npt.NDArray[np.float64]:
        """The vectors themselves, of length one."""
        wide = self.vectors_nD.astype(np.float64)
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        return np.asarray(wide / np.maximum(length, np.finfo(np.float64).tiny))


def paired_rescored(queries: BinaryVectors, documents: BinaryVectors) -> npt.NDArray[np.float64]:
    """`[n]` cosines of the numbers of item i of one side and the signs of item i of the other."""
    size = queries.vectors_nD.shape[1]
    return np.asarray((queries.unit_nD() * documents.signs_nD).sum(1) / np.sqrt(size))


def search_scores(
    queries: BinaryVectors, documents: BinaryVectors, *, rescored: int = RESCORED
) -> npt.NDArray[np.float64]:
    """`[Q, N]`, whose order is that of a search by Hamming distance with rescoring.

    The `rescored` nearest documents by Hamming distance come first, by the cosine of the query's
    numbers and the document's signs (from 1 to 3); then the others, by the share of equal bits
    (from -1 to 1, as 1 minus twice the share of unequal ones).
    """
    size = queries.vectors_nD.shape[1]
    scores_QN = queries.signs_nD @ documents.signs_nD.T / size
    count = min(rescored, len(documents))
    if count:
        first_QR = np.argpartition(-scores_QN, count - 1, axis=1)[:, :count]
        cosines_QN = queries.unit_nD() @ documents.signs_nD.T / np.sqrt(size)
        best_QR = np.take_along_axis(cosines_QN, first_QR, axis=1) + 2
        np.put_along_axis(scores_QN, first_QR, best_QR, axis=1)
    return np.asarray(scores_QN)
