"""What the images of a data set are like: sizes, formats, damage, the same picture twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from vembed.images import ImageError, ImageFacts, ImageSource, probe_image

PERCENTILES = (50, 90, 99, 100)
_THREADS = 8


@dataclass(frozen=True)
class ImageSummary:
    """The images of one role.

    Attributes:
        count: Number of items with an image.
        widths: Percentile (50, 90, 99, 100) to pixels, of those that can be decoded.
        heights: The same of their height.
        formats: Format, such as `JPEG`, to the number of items.
    """

    count: int
    widths: dict[int, int]
    heights: dict[int, int]
    formats: dict[str, int]


@dataclass(frozen=True)
class _Look:
    """What decoding an image showed; `facts` or an error."""

    facts: ImageFacts | None
    content: bytes
    error: str


@dataclass
class ImageTally:
    """Looks at images, each of them once.

    Attributes:
        broken: What is wrong with each image that cannot be decoded, with `file:line: field`.
        copies: `file:line: field` of each image whose bytes are those of an earlier one.
    """

    broken: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    _looks: dict[str, _Look] = field(default_factory=dict)
    _contents: set[bytes] = field(default_factory=set)
    _roles: dict[str, list[ImageFacts]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, role: str, images: Iterable[ImageSource]) -> None:
        """Decode some more images of a role."""
        listed = list(images)
        fresh: dict[str, ImageSource] = {}
        for image in listed:
            if image.identity not in self._looks:
                fresh.setdefault(image.identity, image)
        with ThreadPoolExecutor(_THREADS) as pool:
            for image, look in zip(fresh.values(), pool.map(_look_at, fresh.values()), strict=True):
                self._note(image, look)
        looks = [self._looks[image.identity] for image in listed]
        self._counts[role] += len(looks)
        known = self._roles.setdefault(role, [])
        known += [look.facts for look in looks if look.facts is not None]

    def _note(self, image: ImageSource, look: _Look) -> None:
        self._looks[image.identity] = look
        if look.error:
            self.broken.append(look.error)
        elif look.content in self._contents:
            self.copies.append(image.where)
        self._contents.add(look.content)

    def summaries(self) -> dict[str, ImageSummary]:
        """A summary for each role that has images."""
        return {
            role: ImageSummary(
                count=self._counts[role],
                widths=_percentiles([facts.width for facts in found]),
                heights=_percentiles([facts.height for facts in found]),
                formats=dict(Counter(facts.format for facts in found)),
            )
            for role, found in self._roles.items()
            if self._counts[role]
        }


def _look_at(image: ImageSource) -> _Look:
    try:
        facts = probe_image(image, decode=True)
        return _Look(facts, hashlib.blake2b(image.read(), digest_size=16).digest(), "")
    except ImageError as error:
        return _Look(None, b"", str(error))


def _percentiles(values: list[int]) -> dict[int, int]:
    if not values:
        return {}
    at = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {p: int(value) for p, value in zip(PERCENTILES, at, strict=True)}
