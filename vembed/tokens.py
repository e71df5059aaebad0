"""Token ids of texts, one text after the other, and the one way to pad them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Tokens:
    """The tokens of n texts, S in all, without padding.

    Attributes:
        ids: `[S]`.
        lengths: `[n]`, tokens of each text.
        types: `[S]`, token types; None stands for zeros.
    """

    ids: Numbers
    lengths: Numbers
    types: Numbers | None = None

    @classmethod
    def of_lists(
        cls, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
    ) -> Self:
        """From what a tokenizer returns."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        total = int(lengths.sum())
        flat = np.fromiter(chain.from_iterable(ids), np.int64, total)
        if types is None:
            return cls(flat, lengths)
        return cls(flat, lengths, np.fromiter(chain.from_iterable(types), np.int64, total))

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Self:
        """The texts of several, one after the other."""
        types = [part.types for part in parts if part.types is not None]
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate(types) if types else None,
        )

    def take(self, rows: Numbers) -> Tokens:
        """The texts of these numbers, in this order."""
        starts = np.cumsum(self.lengths) - self.lengths
        lengths = self.lengths[rows]
        places = ranges(starts[rows], lengths)
        return Tokens(self.ids[places], lengths, None if self.types is None else self.types[places])


@dataclass(frozen=True)
class Padding:
    """How texts become one rectangle.

    Attributes:
        names: The model inputs to make: `input_ids`, and of `attention_mask` and `token_type_ids`
            those that the model takes.
        token_id: What `input_ids` are filled up with.
        token_type: What `token_type_ids` are filled up with.
        side: Where padding goes.
        width: Tokens of every row; None takes those of the longest text.
    """

    names: tuple[str, ...]
    token_id: int
    token_type: int
    side: Literal["left", "right"]
    width: int | None = None

    def inputs(self, tokens: Tokens) -> dict[str, Tensor]:
        """Model inputs `[n, T]` int64."""
        lengths = tokens.lengths
        width = int(lengths.max()) if self.width is None else self.width
        columns = np.arange(width)
        if self.side == "right":
            is_real = columns < lengths[:, None]
        else:
            is_real = columns >= width - lengths[:, None]
        made: dict[str, Tensor] = {}
        for name in self.names:
            if name == "attention_mask":
                array = is_real.astype(np.int64)
            elif name == "input_ids":
                array = _filled(self.token_id, is_real.shape)
                array[is_real] = tokens.ids
            else:
                array = _filled(self.token_type, is_real.shape)
                if tokens.types is not None:
                    array[is_real] = tokens.types
                elif self.token_type:
                    array[is_real] = 0
            made[name] = torch.from_numpy(array)
        return made


def _filled(number: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    # Zeros come from the system, unwritten.
    return np.full(shape, number, np.int64) if number else np.zeros(shape, np.int64)


def ranges(starts: Numbers, counts: Numbers) -> Numbers:
    """`starts[0], starts[0] + 1, ...`, `counts[0]` numbers, then those of the next."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)
