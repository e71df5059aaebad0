"""Rows of a batch that have the same input: it is encoded once, and its gradients are summed.

Copies within queries, or within documents (positives and negatives together), share one embedding
and so one dropout mask. A query and a document never do: a text that is its own positive is told
apart by nothing but dropout (Gao, Yao and Chen, 2021, "SimCSE").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Place = tuple[str, int]
"""A row: its role, and its number there."""


@dataclass(frozen=True)
class CopiesOf:
    """At most one copy of each of some rows.

    Attributes:
        role: Of the copies.
        rows: Their numbers there.
        positions: Which of the rows each is a copy of, as positions among these.
    """

    role: str
    rows: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Copies:
    """Which rows are encoded, and which are copies of them.

    Attributes:
        encoded: By role, the rows that are encoded, in order.
        origin: By role, for each row the encoded row with its input: itself, unless it is a copy.
        copies: Of encoded rows that have some: where.
    """

    encoded: dict[str, list[int]]
    origin: dict[str, list[Place]]
    copies: dict[Place, list[Place]]

    @classmethod
    def find(
        cls, lengths: Mapping[str, Sequence[int]], keys: Mapping[str, Sequence[int]]
    ) -> Copies:
        """Compare the rows of a batch.

        Args:
            lengths: By role, as many numbers as it has rows.
            keys: By role, a number for each row, equal where the model's input is equal. All rows
                of a role that has none are different.
        """
        found = cls({role: [] for role in lengths}, {role: [] for role in lengths}, {})
        first: dict[int, Place] = {}
        for role, of_role in lengths.items():
            own = keys.get(role)
            for row in range(len(of_role)):
                place = (role, row)
                origin = place if own is None else first.setdefault(own[row], place)
                found.origin[role].append(origin)
                if origin == place:
                    found.encoded[role].append(row)
                else:
                    found.copies.setdefault(origin, []).append(place)
        return found

    def rounds(self, role: str, rows: Sequence[int]) -> Iterator[CopiesOf]:
        """The copies of some encoded rows, no row twice in a round.

        Adding up copies by rounds gives the same sum on every device each time, which an addition
        of several numbers to one place by atomic operations does not.
        """
        of_rows = [self.copies.get((role, row), []) for row in rows] if self.copies else []
        for number in range(max(map(len, of_rows), default=0)):
            by_role: dict[str, CopiesOf] = {}
            for position, places in enumerate(of_rows):
                if number < len(places):
                    copy_role, row = places[number]
                    of_role = by_role.setdefault(copy_role, CopiesOf(copy_role, [], []))
                    of_role.rows.append(row)
                    of_role.positions.append(position)
            yield from by_role.values()
