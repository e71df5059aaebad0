"""Retrieval modes: two modalities around a `2`, such as `t2i`. Parsed, not enumerated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from vembed.errors import ConfigError
from vembed.images import ImageSource

TEXT = "t"
IMAGE = "i"
MULTIMODAL = "m"
MODALITIES = {TEXT: "text", IMAGE: "image", MULTIMODAL: "text+image"}


@dataclass(frozen=True)
class RetrievalMode:
    """What a query and a document (positive or negative) consist of.

    Attributes:
        query: Modality letter of the query side: `t` text, `i` image, `m` text+image.
        document: Modality letter of the positives and negatives.
    """

    query: str
    document: str

    @classmethod
    def parse(cls, mode: str | RetrievalMode) -> RetrievalMode:
        """Read a mode such as `"t2i"`, in small letters or capitals.

        Raises:
            ConfigError: if `mode` is not two of the letters t, i, m around a 2.
        """
        if isinstance(mode, RetrievalMode):
            return mode
        query, two, document = str(mode).lower().partition("2")
        if two and query in MODALITIES and document in MODALITIES:
            return cls(query, document)
        known = ", ".join(str(m) for m in all_modes())
        raise ConfigError(
            "retrieval_mode: expected two of t (text), i (image), m (text+image) around a 2, such "
            f"as t2i. Received: {mode!r}. One of: {known}"
        )

    def __str__(self) -> str:
        return f"{self.query}2{self.document}"

    @property
    def has_images(self) -> bool:
        """Whether one of the sides has an image."""
        return {self.query, self.document} != {TEXT}

    @property
    def has_texts(self) -> bool:
        """Whether one of the sides has a text."""
        return {self.query, self.document} != {IMAGE}


def all_modes(modalities: frozenset[str] = frozenset(MODALITIES)) -> list[RetrievalMode]:
    """Every mode whose both sides are in `modalities`, in the order t, i, m."""
    letters = [letter for letter in MODALITIES if letter in modalities]
    return [RetrievalMode(query, document) for query in letters for document in letters]


@dataclass(frozen=True)
class Item:
    """One thing to embed: a text, an image, or both.

    Attributes:
        text: The text, or None.
        image: Where the image's bytes are, or None; `vembed.images.load_image` decodes it.
    """

    text: str | None = None
    image: ImageSource | None = None

    @property
    def content_id(self) -> int:
        """A 63-bit hash of the content, the same everywhere: equal items are duplicates."""
        content = repr(self.content).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1

    @property
    def content(self) -> tuple[str | None, str | None]:
        """The text, and what identifies the image."""
        return self.text, None if self.image is None else self.image.identity

    def located(self, where: str) -> Item:
        """The same item, whose image knows where it is named (`file:line: field`)."""
        return self if self.image is None else replace(self, image=replace(self.image, where=where))

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.text, self.image) if part is not None)
