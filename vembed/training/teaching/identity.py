"""What a stored vector was computed by, and of what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from vembed.config import TrainConfig
from vembed.data import Record
from vembed.errors import ConfigError
from vembed.inference.vector_store import item_key, pair_key
from vembed.models.fingerprint import fingerprint
from vembed.models.paths import local_model_path
from vembed.models.protocol import Role
from vembed.modes import Item, RetrievalMode

FILE_NAME = "teacher.json"
_FORMAT = 1


@dataclass(frozen=True)
class TeacherFacts:
    """Who wrote a cache: what every vector in it has in common.

    Attributes:
        model: The teacher's name, as in the settings.
        revision: Its revision, likewise.
        weights: Hash of its files.
        dtype: Type of its weights.
        modalities: Letters of what it embeds.
        size: Numbers in a vector.
        kind: `embeddings` of items, or `scores` of pairs, which are vectors of size 1.
        format: Version of the files.
    """

    model: str
    revision: str | None
    weights: str
    dtype: str
    modalities: str
    size: int
    kind: Literal["embeddings", "scores"] = "embeddings"
    format: int = _FORMAT

    def write(self, folder: Path) -> None:
        """Write `teacher.json`."""
        part = folder / f".{FILE_NAME}.{os.getpid()}"
        part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        part.replace(folder / FILE_NAME)


def read_facts(folder: Path) -> TeacherFacts | None:
    """What `write` wrote; None where nothing did.

    Raises:
        ConfigError: if the folder holds something else.
    """
    path = folder / FILE_NAME
    # Listed first: what another process wrote by now, it wrote after `teacher.json`.
    others = folder.is_dir() and any(
        not there.name.startswith(f".{FILE_NAME}.") for there in folder.iterdir()
    )
    if not path.exists():
        if others:
            raise ConfigError(
                f"teacher_cache: {folder} is a folder of other files, or {FILE_NAME} was removed "
                "from it, which says whose vectors they are. Name a new or empty one"
            )
        return None
    try:
        return TeacherFacts(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"teacher_cache: {path} cannot be read ({error}). Name another folder"
        ) from error


def check_facts(facts: TeacherFacts, config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError if a cache is stale: written by another teacher than that of the settings.

    The teacher is not loaded. Where its files are on this machine they decide, wherever they lie
    now; otherwise its name and revision do.
    """
    differences = []
    path = local_model_path(str(config.teacher_model_name), config.teacher_revision)
    if path is None:
        for name, value in (
            ("teacher_model_name", config.teacher_model_name),
            ("teacher_revision", config.teacher_revision),
        ):
            written = getattr(facts, name.removeprefix("teacher_").removesuffix("_name"))
            if written != value:
                differences.append(f"{name} {written} (now {value})")
    elif (weights := fingerprint(path)) != facts.weights:
        differences.append(
            f"the weights {facts.weights[:8]} of {facts.model} (those of "
            f"{config.teacher_model_name} are {weights[:8]} now)"
        )
    if facts.dtype != teacher_dtype(config):
        differences.append(f"teacher_dtype {facts.dtype} (now {teacher_dtype(config)})")
    if facts.format != _FORMAT:
        differences.append(f"format {facts.format} (now {_FORMAT})")
    if differences:
        raise ConfigError(
            f"teacher_cache: {folder} is stale: it was written with {' and '.join(differences)}. "
            "Name another folder, or remove this one, and run `vembed teach`"
        )


def teacher_dtype(config: TrainConfig) -> str:
    """Type of the teacher's weights."""
    return config.teacher_dtype or config.torch_dtype


def taught_roles(modalities: frozenset[str] | set[str], config: TrainConfig) -> tuple[str, ...]:
    """The roles whose items a teacher can embed.

    Raises:
        ConfigError: if there are none.
    """
    mode = RetrievalMode.parse(config.retrieval_mode)
    roles: tuple[str, ...] = ("query",) if mode.query in modalities else ()
    roles += ("positive", "negative") if mode.document in modalities else ()
    if not roles:
        raise ConfigError(
            f"teacher_model_name: {config.teacher_model_name} embeds "
            f"{', '.join(sorted(modalities))}, and retrieval_mode {mode} has neither as a side"
        )
    return roles


@dataclass(frozen=True)
class TaughtItem:
    """One thing that a teacher embeds.

    Attributes:
        role: Role in the row: `query`, `positive` or `negative`.
        item: The thing.
        prompt: Put before it instead of the teacher's own prompt; None for that one.
    """

    role: str
    item: Item
    prompt: str | None

    @property
    def side(self) -> Role:
        """What a processor calls the role."""
        return "query" if self.role == "query" else "document"

    @cached_property
    def key(self) -> int:
        """A 63-bit hash of everything that decides the vector, but for the teacher."""
        return item_key(self.item, self.side, self.prompt)


@dataclass(frozen=True)
class TaughtPair:
    """A query and a document that a cross-encoder scores.

    Attributes:
        role: Role of the document: `positive` or `negative`.
        query: Text of the query.
        document: Text of the document.
    """

    role: str
    query: str
    document: str

    @cached_property
    def key(self) -> int:
        """A 63-bit hash of both texts."""
        return pair_key(self.query, self.document)


Taught = TaughtItem | TaughtPair


def taught_pairs(record: Record) -> Iterator[TaughtPair]:
    """The query of a row with each of its positives, then negatives."""
    query = str(record.query.text)
    for role, items in (("positive", record.positives), ("negative", record.negatives)):
        yield from (TaughtPair(role, query, str(item.text)) for item in items)


def taught_items(record: Record, roles: tuple[str, ...]) -> Iterator[TaughtItem]:
    """The items of a row, role by role."""
    if "query" in roles:
        yield TaughtItem("query", record.query, record.query_prompt)
    for role, items in (("positive", record.positives), ("negative", record.negatives)):
        if role in roles:
            yield from (TaughtItem(role, item, record.document_prompt) for item in items)
