"""When Python code that comes with a model may run: where the user says so, and only that code."""

from __future__ import annotations

from pathlib import Path

from vembed.config import is_commit
from vembed.errors import ConfigError
from vembed.models.json_files import read_object

_FILES = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def check_remote_code(model_name: str, path: str | Path, revision: str | None) -> None:
    """Raise ConfigError unless the code that would run is the code that the user can have read.

    That is the code in a folder of this machine, or in one commit of a hub model, whose branches
    and tags move. A model may also name code in *another* repository, which nothing pins.

    Args:
        model_name: As the user wrote it.
        path: The local folder that it stands for.
        revision: As the user wrote it.
    """
    is_local = model_name.startswith("package:") or Path(model_name).expanduser().is_dir()
    if not is_local and not is_commit(revision):
        raise ConfigError(
            f"trust_remote_code: runs code from the hub, so {model_name!r} needs a revision that "
            f"fixes which code: a commit, of 40 letters and digits. Received: {revision!r}"
        )
    for file in (Path(path) / name for name in _FILES):
        if foreign := [place for place in _auto_map(file) if "--" in place]:
            raise ConfigError(
                f"{file}: auto_map: names code in another repository, which no revision of this "
                f"model pins. Received: {foreign[0]!r}. Copy that code beside the model, and name "
                "it without the repository"
            )


def _auto_map(file: Path) -> list[str]:
    """Where a file of settings says that classes are, as `module.Class` or `owner/name--...`."""
    places = read_object(file).get("auto_map")
    listed = places.values() if isinstance(places, dict) else []
    nested = [place if isinstance(place, list | tuple) else [place] for place in listed]
    return [place for places in nested for place in places if isinstance(place, str)]
