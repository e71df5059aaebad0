"""Flags of the commands that read images without a configuration: as in training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vembed.errors import ConfigError
from vembed.image_urls import read_host
from vembed.images import MOST_PIXELS, ImageLimits

if TYPE_CHECKING:
    from vembed.data import ImageRules


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """`--image_root`, `--image_hosts`, `--max_image_pixels`."""
    most = ImageLimits().max_pixels
    add = parser.add_argument
    add("--image_root", help="folder that image paths are relative to (default: that of the data)")
    add("--image_hosts", nargs="+", metavar="HOST", default=[],
        help="hosts that images may be fetched from (default: none, URLs are refused)")  # fmt: skip
    add("--max_image_pixels", type=int, default=most, metavar="PIXELS",
        help=f"an image of more pixels is an error (default: {most})")  # fmt: skip


def image_rules(arguments: argparse.Namespace) -> ImageRules:
    """What the flags say.

    Raises:
        ConfigError: if a host or a number cannot be meant.
    """
    # After the flags are looked at, because it imports torch.
    hosts = []
    for host in arguments.image_hosts:
        try:
            hosts.append(read_host(host))
        except ValueError as error:
            raise ConfigError(f"--image_hosts: {error}. Received: {host!r}") from None
    if not 0 < arguments.max_image_pixels <= MOST_PIXELS:
        raise ConfigError(
            f"--max_image_pixels: must be from 1 to {MOST_PIXELS}. "
            f"Received: {arguments.max_image_pixels}"
        )
    from vembed.data import ImageRules

    return ImageRules(arguments.image_root, arguments.max_image_pixels, tuple(hosts))
