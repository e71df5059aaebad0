"""What a user may say about the images of rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from vembed.errors import ConfigError
from vembed.images import ImageFolder, ImageLimits

ImageCheck = Literal["header", "decode"]
"""How images are looked at before they are needed; see `vembed.images.probe_image`."""


@dataclass(frozen=True)
class ImageRules:
    """Where images are, and what they are held to.

    Attributes:
        root: Folder that image paths are relative to, and must stay under; None: that of the data
            file.
        max_pixels: Most pixels of an image.
        hosts: Hosts that images may be fetched from.
        check: How images are looked at while rows are read: `header` finds missing, foreign,
            oversized and truncated files, `decode` damage in the middle too, at the price of
            decoding every image once more.
    """

    root: str | None = None
    max_pixels: int = ImageLimits().max_pixels
    hosts: tuple[str, ...] = ()
    check: ImageCheck = "header"

    @property
    def limits(self) -> ImageLimits:
        """What is refused before decoding."""
        return ImageLimits(max_pixels=self.max_pixels, hosts=self.hosts)

    def folder(self, default: str | None, *, root: str | None = None) -> ImageFolder | None:
        """What the image paths of one data set are relative to; None when there is no such folder.

        Args:
            default: The data set's own folder.
            root: A folder that the user named for this data set alone; it wins.

        Raises:
            ConfigError: if the user names a folder that there is not.
        """
        named = root or self.root
        if named is not None and not os.path.isdir(os.path.expanduser(named)):
            raise ConfigError(f"image_root: there is no folder {named!r}")
        chosen = named or default
        if chosen is None:
            return None
        return ImageFolder(os.path.abspath(os.path.expanduser(chosen)), limits=self.limits)
