"""Settings that an embedded example fills in by itself."""

from __future__ import annotations

from collections.abc import Collection

from vembed.config import TrainConfig
from vembed.errors import ConfigError


def refuse_settings(config: TrainConfig, keys: Collection[str], *, recipe: str) -> None:
    """Check that the user does not set what the example fills in.

    Raises:
        ConfigError: naming the first such setting, rather than passing over it.
    """
    for key in keys:
        if key in config.origins:
            raise ConfigError(
                f"{key}: {recipe} makes its own. Received: {config[key]!r} from "
                f"{config.origins[key]}. Leave it out, or use vembed train"
            )
