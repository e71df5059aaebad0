"""The hub: whether models can be fetched, and where they are kept."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from vembed.config import TrainConfig
from vembed.training.environment.finding import Finding

_PATIENCE_S = 2.0
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def check_hub(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether the hub can be reached and its cache be written.

    Args:
        config: Reads `model_name`: a folder needs no hub.
        environment: Reads `HF_HOME`, `HF_ENDPOINT`, the switches for working offline and proxies.
    """
    name = "hub"
    default = os.path.join(environment.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = Path(environment.get("HF_HOME", default)).expanduser()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        remedy = "Set HF_HOME to a folder that can be written"
        return Finding(name, "problem", f"its cache {cache} cannot be written", remedy)
    off = [
        key for key in _SWITCHES if environment.get(key, "").lower() in ("1", "true", "yes", "on")
    ]
    endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co")
    is_needed = config.model_name is None or not Path(config.model_name).expanduser().is_dir()
    if off:
        found = f"offline by {', '.join(off)}; models come from {cache}"
        remedy = f"To fetch models: unset {' '.join(off)}"
    elif any(environment.get(key) for key in _PROXIES):
        return Finding(name, "ok", f"{endpoint} behind a proxy; cache {cache}")
    elif not _answers(endpoint):
        found = f"{endpoint} does not answer within {_PATIENCE_S:g} s; models come from {cache}"
        remedy = "Fetch models elsewhere and name their folders, or set HF_ENDPOINT to a mirror"
    else:
        return Finding(name, "ok", f"{endpoint} answers; cache {cache}")
    if is_needed:
        return Finding(name, "warning", found, remedy)
    return Finding(name, "ok", f"{found}; model_name is a folder")


def _answers(endpoint: str) -> bool:
    """Whether a server takes a connection; looking its name up may take much longer than asked."""
    parts = urlsplit(endpoint)
    found: list[bool] = []

    def connect() -> None:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE_S).close()
        except (OSError, UnicodeError):
            return
        found.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return bool(found)
