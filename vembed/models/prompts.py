"""The texts put before a query, a document, and what has no role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vembed.models.protocol import Role


@dataclass(frozen=True)
class Prompts:
    """What goes before an item; `""` for nothing.

    Attributes:
        query: Before every query.
        document: Before every document.
        default: Before an item whose role is not given.
    """

    query: str = ""
    document: str = ""
    default: str = ""

    def of_role(self, role: Role | None) -> str:
        """The prompt of a role."""
        return {"query": self.query, "document": self.document}.get(role or "", self.default)

    def of_items(
        self, count: int, role: Role | None, own: Sequence[str | None] | None
    ) -> list[str]:
        """The prompt of each of `count` items of a role.

        Args:
            count: Number of items.
            role: Their role.
            own: One per item, instead of the role's; None as an entry keeps the role's.
        """
        of_role = self.of_role(role)
        return [of_role] * count if own is None else [of_role if p is None else p for p in own]

    def describe(self) -> dict[str, str]:
        """For the log."""
        return {"query_prompt": repr(self.query), "document_prompt": repr(self.document)}

    def stored_among(self, others: Mapping[str, str]) -> dict[str, str]:
        """A checkpoint's named prompts, with those of the two roles as they are now."""
        other_names = {"passage", "corpus"} & set(others)
        return {
            **others,
            "query": self.query,
            "document": self.document,
            **dict.fromkeys(sorted(other_names), self.document),
        }
