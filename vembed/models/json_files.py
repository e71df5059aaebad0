"""JSON files of model folders, which may be damaged, or made by somebody who means no good."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vembed.errors import CheckpointError, shorten


def read_object(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file.

    Raises:
        CheckpointError: if it holds something else, or cannot be read.
    """
    if not file.is_file():
        return {}
    values = read_json(file)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must be a JSON object. Received: {type(values).__name__}")
    return values


def read_json(file: Path) -> Any:
    """Whatever a file holds.

    Raises:
        CheckpointError: if it cannot be read, or is nested too deeply.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error


def require_types(file: Path, values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raise CheckpointError if a value that is there and not null is of another type."""
    for key, kind in types.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(
                f"{file}: {key}: must be of type {kind.__name__}. Received: {shorten(repr(value))}"
            )
