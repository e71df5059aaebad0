"""Which columns of a similarity matrix are no negatives for which rows.

The relation can be as large as the matrix itself (a batch of one repeated item), so it is kept as
lists and written out for a few rows at a time. It lives on the CPU: its sizes depend on the data,
and asking a device for each of them would stop the step again and again.

# Shapes: R rows, C columns, L related pairs
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class _Positions:
    """For each key, the positions that hold it."""

    def __init__(self, keys: Tensor, num_keys: int) -> None:
        self._positions = keys.argsort(stable=True)
        self._counts = torch.bincount(keys, minlength=num_keys)
        self._starts = self._counts.cumsum(0) - self._counts

    def lookup(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of each of `keys`, one list after the other, and the lists' lengths."""
        counts = self._counts[keys]
        skipped = self._starts[keys] - (counts.cumsum(0) - counts)
        index = skipped.repeat_interleave(counts)
        return self._positions[index + torch.arange(len(index))], counts


class Relevance:
    """The pairs (row, column) that must not count as negatives.

    A column is relevant to a row when the row's id and the column's id are related anywhere in the
    batch. So every copy of a relevant item is relevant, wherever it stands and whoever brought it.
    """

    def __init__(
        self, row_ids: Tensor, column_ids: Tensor, related_rows: Tensor, related_columns: Tensor
    ) -> None:
        """Index the relation.

        Args:
            row_ids: `[R]` int64 on the CPU; equal ids are the same thing.
            column_ids: `[C]` int64 on the CPU.
            related_rows: `[L]` row ids of the related pairs; ids that no row has are ignored.
            related_columns: `[L]` their column ids; each must be the id of some column.
        """
        rows, self._row_keys = torch.unique(row_ids, return_inverse=True)
        columns, self._column_keys = torch.unique(column_ids, return_inverse=True)
        known = torch.isin(related_rows, rows)
        row_keys = torch.searchsorted(rows, related_rows[known])
        pairs = torch.unique(
            row_keys * len(columns) + torch.searchsorted(columns, related_columns[known])
        )
        self._pair_columns = pairs % max(1, len(columns))
        self._pair_rows = pairs // max(1, len(columns))
        self._pairs_of_row = _Positions(self._pair_rows, len(rows))
        self._columns_of_key = _Positions(self._column_keys, len(columns))
        self._num_keys = (len(rows), len(columns))
        self._num_related_R = self.count(torch.ones(len(column_ids), dtype=torch.bool))

    @classmethod
    def identity(cls, first: int, rows: int, columns: int) -> Relevance:
        """Row `i` is related to column `first + i` only: to itself among the rows of all."""
        own = torch.arange(first, first + rows)
        return cls(own, torch.arange(columns), own, own)

    @classmethod
    def classes(cls, row_classes: Tensor, column_classes: Tensor) -> Relevance:
        """A row is related to the columns of its class.

        Args:
            row_classes: `[R]` int64 on the CPU; each is the class of some column.
            column_classes: `[C]` int64 on the CPU.
        """
        known = torch.unique(row_classes)
        return cls(row_classes, column_classes, known, known)

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Related pairs of some rows: numbers from `rows.start` on, and columns, ascending."""
        keys = self._row_keys[rows]
        found, num_found = self._pairs_of_row.lookup(keys)
        columns, num_columns = self._columns_of_key.lookup(self._pair_columns[found])
        row = torch.arange(len(keys)).repeat_interleave(num_found).repeat_interleave(num_columns)
        columns, order = columns.sort(stable=True)
        return row[order], columns

    def in_tiles(self, rows: slice, width: int) -> Iterator[tuple[Tensor, ...]]:
        """Related pairs of some rows, for each tile of `width` columns in turn.

        Yields:
            An index `i` of the tile, on the CPU: `tile[i]` are the related pairs. Two lists of
            numbers, or, where they would take more room than the tile, `[r, c]` bool.
        """
        columns = range(0, len(self._column_keys), width)
        if self._num_related_R[rows].sum() > (rows.stop - rows.start) * width // 8:
            for start in columns:
                yield (self._dense(rows, slice(start, start + width)),)
            return
        row, column = self.pairs(rows)
        ends = torch.searchsorted(column, torch.tensor(columns) + width)
        lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
        of_tiles = (torch.split(index, lengths) for index in (row, column % width))
        yield from zip(*of_tiles, strict=True)

    def _dense(self, rows: slice, columns: slice) -> Tensor:
        """`[r, c]`, which pairs are related."""
        # By the keys that occur here, of which there are no more than rows and columns; a row's
        # own list of pairs may be as long as the batch.
        row_keys, row = torch.unique(self._row_keys[rows], return_inverse=True)
        column_keys, column = torch.unique(self._column_keys[columns], return_inverse=True)
        found, num_found = self._pairs_of_row.lookup(row_keys)
        row_of_pair = torch.arange(len(row_keys)).repeat_interleave(num_found)
        here = torch.isin(self._pair_columns[found], column_keys)
        column_of_pair = torch.searchsorted(column_keys, self._pair_columns[found][here])
        related = torch.zeros(len(row_keys), len(column_keys), dtype=torch.bool)
        related[row_of_pair[here], column_of_pair] = True
        return related[row].index_select(1, column)

    def count(self, columns: Tensor) -> Tensor:
        """How many of some columns are related to each row, without room for the pairs.

        Args:
            columns: `[C]` bool on the CPU, which columns to count.

        Returns:
            `[R]` int64.
        """
        rows, keys = self._num_keys
        of_key = torch.zeros(keys, dtype=torch.int64).index_add(
            0, self._column_keys, columns.long()
        )
        of_row = torch.zeros(rows, dtype=torch.int64)
        return of_row.index_add(0, self._pair_rows, of_key[self._pair_columns])[self._row_keys]


def link_components(left: Tensor, right: Tensor) -> Tensor:
    """Of each pair (left, right), the number of the connected component that it belongs to.

    Args:
        left: `[L]` int64 ids on the CPU.
        right: `[L]` int64 ids, told apart from those on the left also where the numbers are equal.

    Returns:
        `[L]` int64, from 0.
    """
    lefts, from_left = torch.unique(left, return_inverse=True)
    rights, to_right = torch.unique(right, return_inverse=True)
    component = torch.arange(len(lefts))
    while True:
        # Each side takes the smallest number of its neighbours; then numbers are followed to where
        # they lead, which halves the length of chains.
        of_right = torch.full((len(rights),), len(lefts)).scatter_reduce(
            0, to_right, component[from_left], "amin"
        )
        smaller = component.scatter_reduce(0, from_left, of_right[to_right], "amin")
        smaller = smaller[smaller]
        if torch.equal(smaller, component):
            return component[from_left]
        component = smaller
