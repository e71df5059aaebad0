"""Where a model lies: local folder, installed package, or the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vembed.errors import ConfigError
from vembed.models.json_files import read_object

_FORMS = (
    "A model is named by a local folder, by package:NAME[/subdir] for weights that an installed "
    "package carries, or by a hub id such as sentence-transformers/all-MiniLM-L6-v2"
)
# What loading reads: other formats of the same weights (ONNX, OpenVINO, TensorFlow) would be
# downloaded for nothing.
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors"]
_OTHER_FORMATS = ["onnx/*", "openvino/*", "original/*", "consolidated*"]


def resolve_model_path(model_name: str, revision: str | None = None) -> str:
    """The local folder of a model, downloaded first when it is a hub id.

    Args:
        model_name: Local folder, `package:NAME[/subdir]`, or hub id (`name` or `owner/name`).
        revision: Commit, tag or branch, of a hub id only.

    Raises:
        ConfigError: if nothing is found under that name, or it cannot be fetched.
    """
    if not isinstance(model_name, str) or not model_name.strip():
        raise ConfigError(f"model: expected a text. Received: {model_name!r}. {_FORMS}")
    if model_name.startswith("package:"):
        return str(_package_folder(model_name))
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise ConfigError(f"model {model_name!r} is a file; name the folder that it lies in")
    if _looks_like_path(model_name):
        raise ConfigError(f"model: there is no folder {model_name!r}. {_FORMS}")
    return _hub_folder(model_name, revision)


def local_model_path(model_name: str, revision: str | None = None) -> str | None:
    """As `resolve_model_path`, without the network: None for a hub id that is not in the cache.

    Raises:
        ConfigError: if a name that is no hub id cannot be found.
    """
    is_folder = Path(model_name).expanduser().is_dir()
    if model_name.startswith("package:") or is_folder or _looks_like_path(model_name):
        return resolve_model_path(model_name, revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model_name, revision=revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name[-1] == "/"
    )


def _package_folder(model_name: str) -> Path:
    name, _, subdir = model_name.removeprefix("package:").partition("/")
    # A distribution's name has dashes where its module has underscores.
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations:
        raise ConfigError(
            f"model {model_name!r} names no installed package {module!r}; "
            f"install it with `pip install {name}`"
        )
    root = Path(locations[0])
    if not subdir:
        return root if _is_model_folder(root) else _only_model_folder(root, model_name)
    folder = (root / subdir).resolve()
    if not folder.is_relative_to(root.resolve()) or not folder.is_dir():
        raise ConfigError(
            f"model {model_name!r}: package {module!r} has no folder {subdir!r} (in {root})"
        )
    return folder


def _only_model_folder(root: Path, model_name: str) -> Path:
    found = sorted(c.parent for c in root.rglob("config.json") if _is_model_folder(c.parent))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            f"model {model_name!r} carries no model (no config.json with a model_type under {root})"
        )
    names = ", ".join(f"{model_name}/{folder.relative_to(root).as_posix()}" for folder in found)
    raise ConfigError(f"model {model_name!r} carries several models; name one: {names}")


def _is_model_folder(folder: Path) -> bool:
    # sentence-transformers puts a config.json into each module's folder: only the backbone's has a
    # model_type.
    return "model_type" in read_object(folder / "config.json")


def _hub_folder(model_name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    def fetch(patterns: list[str]) -> str:
        return snapshot_download(
            model_name, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS
        )

    try:
        folder = fetch(_FILES)
        if not any(Path(folder).rglob("*.safetensors")):
            folder = fetch([*_FILES, "*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {model_name!r}{at} is no local folder, is not in the hub's cache, and "
            f"cannot be fetched from the hub ({type(error).__name__}: {reason}). {_FORMS}"
        ) from error
    return folder
