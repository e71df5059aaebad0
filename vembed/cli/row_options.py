"""Flags of the commands that read rows without a configuration: as in training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import yaml

from vembed.errors import ConfigError
from vembed.modes import RetrievalMode
from vembed.training.yaml_settings import read_yaml_value


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """`--retrieval_mode`, `--column_mapping`."""
    add = parser.add_argument
    add("--retrieval_mode", help="query and document: t text, i image, m both, as in t2i "
        "(default: as the model was trained, where its folder says so; else t2t)")  # fmt: skip
    add("--column_mapping", nargs="+", metavar="FIELD=COLUMN", default=[],
        help="our field name and your column name, as in query=question, or "
        "'{query: question}'")  # fmt: skip


def read_column_mapping(pairs: Sequence[str]) -> dict[str, str] | None:
    """What `--column_mapping` says; None where it says nothing.

    Raises:
        ConfigError: if it says neither pairs nor a mapping.
    """
    if len(pairs) == 1 and pairs[0].startswith("{"):
        return _yaml_mapping(pairs[0])
    broken = [pair for pair in pairs if not all(pair.partition("="))]
    if broken:
        raise ConfigError(f"--column_mapping: expected FIELD=COLUMN. Received: {broken[0]!r}")
    return dict(pair.split("=", 1) for pair in pairs) or None


def _yaml_mapping(text: str) -> dict[str, str] | None:
    """`{query: question}`, as `vembed train` takes it."""
    try:
        mapping = read_yaml_value(text, as_yaml=False)
    except yaml.YAMLError:
        mapping = None
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise ConfigError(
            "--column_mapping: expected FIELD=COLUMN, or {FIELD: COLUMN, ...}. "
            f"Received: {text!r}"
        )
    return mapping or None


def resolve_retrieval_mode(chosen: str | None, model: str | None) -> RetrievalMode:
    """What the flag says, else what the model was trained for."""
    from vembed.models import resolve_model_path
    from vembed.training.checkpoint import read_run_settings

    if chosen is None and model is not None:
        chosen = read_run_settings(resolve_model_path(model)).get("retrieval_mode")
    return RetrievalMode.parse(chosen or "t2t")
