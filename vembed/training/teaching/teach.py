"""`vembed teach`: the teacher embeds every item of the training rows, once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from vembed.chunking import chunk_tokens_on
from vembed.config import TEACH_REQUIRES, TrainConfig, check
from vembed.data import Record, RecordDataset
from vembed.errors import ConfigError
from vembed.inference import encode_items
from vembed.inference.vector_store import Vectors, as_keys
from vembed.models import resolve_model_path
from vembed.models.cross_encoder import CrossEncoder, is_cross_encoder
from vembed.models.fingerprint import fingerprint
from vembed.models.protocol import Encoder
from vembed.models.remote_code import check_remote_code
from vembed.training.model_builder import build_teacher_model
from vembed.training.run_data import build_quarantine, load_rows
from vembed.training.teaching.cache import TeacherCache, roles_of
from vembed.training.teaching.identity import (
    Taught,
    TaughtItem,
    TaughtPair,
    TeacherFacts,
    check_facts,
    read_facts,
    teacher_dtype,
)

OnProgress = Callable[[float], None]
"""Told the share of the rows that is done."""


@dataclass(frozen=True)
class TeachResult:
    """What was done.

    Attributes:
        folder: The cache.
        items: Different items of the rows.
        computed: Those that this process computed.
        size: Numbers in a vector.
        seconds: How long it took.
    """

    folder: Path
    items: int
    computed: int
    size: int
    seconds: float


def teach(
    config: TrainConfig | Mapping[str, Any], on_progress: OnProgress = lambda share: None
) -> TeachResult:
    """Compute what is missing of a teacher's embeddings of all rows of `data_path`.

    Any number of processes may do it at once, started together or not: each takes a chunk of items
    that no other works on. One that dies loses its chunk only, and another takes it over.

    Raises:
        ConfigError: if settings cannot work, or the cache was written by another teacher.
        DataError: if a row cannot be used.
    """
    config = TrainConfig.coerce(config)
    if problems := check(config, required=TEACH_REQUIRES):
        raise ConfigError("\n".join(problems))
    started = time.perf_counter()
    rows = load_rows(config, config.data_path, build_quarantine(config), streaming=config.streaming)
    teacher = _Teacher(config)
    cache = teacher.open_cache()
    items = computed = 0
    postponed = []
    for chunk in _chunks(rows, cache, config.teacher_chunk_size, on_progress):
        items += len(chunk)
        done = _compute(cache, teacher, chunk, wait=False)
        computed += done or 0
        if done is None:
            postponed.append(chunk)
    for chunk in postponed:
        computed += _compute(cache, teacher, chunk, wait=True) or 0
    if isinstance(rows, RecordDataset):
        cache.cover(rows)
    return TeachResult(
        cache.folder, items, computed, cache.facts.size, time.perf_counter() - started
    )


@dataclass
class _Teacher:
    """The teacher, loaded when there is something to compute."""

    config: TrainConfig
    _encoder: Encoder | None = field(default=None, init=False)
    _cross_encoder: CrossEncoder | None = field(default=None, init=False)

    def open_cache(self) -> TeacherCache:
        folder = Path(str(self.config.teacher_cache))
        folder.mkdir(parents=True, exist_ok=True)
        facts = read_facts(folder)
        if facts is None:
            facts = self._introduce()
            facts.write(folder)
        else:
            check_facts(facts, self.config, folder)
        return TeacherCache(folder, facts, roles_of(facts, self.config))

    def embed(self, taught: list[Taught]) -> Vectors:
        """`[n, D]`; `[n, 1]` of pairs."""
        tokens = chunk_tokens_on(_device(self.config).type, self.config.chunk_tokens)
        pairs = [(pair.query, pair.document) for pair in taught if isinstance(pair, TaughtPair)]
        if pairs:
            return self._judge().score(pairs, chunk_tokens=tokens)[:, None]
        items = [item for item in taught if isinstance(item, TaughtItem)]
        encoder = self._loaded()
        vectors = np.empty((len(items), encoder.embedding_dim), dtype=np.float32)
        kinds = {(item.side, item.prompt) for item in items}
        for side, prompt in sorted(kinds, key=repr):
            rows = [n for n, i in enumerate(items) if (i.side, i.prompt) == (side, prompt)]
            embedded = encode_items(
                encoder,
                [items[row].item for row in rows],
                role=side,
                prompt=prompt,
                chunk_tokens=tokens,
            )
            # A teacher that keeps tokens was refused when it was loaded.
            vectors[rows] = cast(Vectors, embedded)
        return vectors

    def _introduce(self) -> TeacherFacts:
        config = self.config
        name = str(config.teacher_model_name)
        path = resolve_model_path(name, config.teacher_revision)
        scores = is_cross_encoder(path)
        if scores and config.retrieval_mode != "t2t":
            raise ConfigError(
                f"teacher_model_name: {name} is a cross-encoder of texts, and retrieval_mode is "
                f"{config.retrieval_mode}. Take t2t, or a teacher that embeds"
            )
        encoder = None if scores else self._loaded()
        return TeacherFacts(
            model=name,
            revision=config.teacher_revision,
            weights=fingerprint(path),
            dtype=teacher_dtype(config),
            modalities="t" if encoder is None else "".join(sorted(encoder.modalities)),
            size=1 if encoder is None else encoder.embedding_dim,
            kind="scores" if scores else "embeddings",
        )

    def _judge(self) -> CrossEncoder:
        if self._cross_encoder is None:
            config = self.config
            name = str(config.teacher_model_name)
            path = resolve_model_path(name, config.teacher_revision)
            if config.trust_remote_code:
                check_remote_code(name, path, config.teacher_revision)
            self._cross_encoder = CrossEncoder(
                path,
                torch_dtype=teacher_dtype(config),
                trust_remote_code=config.trust_remote_code,
                device=_device(config),
            )
        return self._cross_encoder

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            encoder = build_teacher_model(self.config)
            assert encoder is not None  # noqa: S101 - the program requires its name
            self._encoder = encoder.to(_device(self.config))
        return self._encoder


def _device(config: TrainConfig) -> torch.device:
    """This process's: no process group is needed to share the work."""
    accelerator = torch.accelerator.current_accelerator()
    if config.device == "cpu" or accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(accelerator.type, local)


def _compute(
    cache: TeacherCache, teacher: _Teacher, chunk: list[Taught], *, wait: bool
) -> int | None:
    """Compute what is missing of a chunk; None if another process works on it."""
    missing = cache.missing(chunk)
    if not missing:
        return 0
    keys = as_keys([item.key for item in missing])
    with cache.store.claim(keys, wait=wait) as is_ours:
        if not is_ours:
            return None
        if cache.store.has_part(keys):  # by a process that has just finished it
            return 0
        cache.store.write(keys, teacher.embed(missing))
    return len(missing)


def _chunks(
    rows: Any, cache: TeacherCache, size: int, on_progress: OnProgress
) -> Iterator[list[Taught]]:
    """Different items in the order of the rows, `size` at a time: the same in every process."""
    seen: set[int] = set()
    chunk: list[Taught] = []
    total = len(rows) if isinstance(rows, RecordDataset) else None
    records: Iterator[Record] = (
        iter(rows) if total is None else (rows[number] for number in range(total))
    )
    for number, record in enumerate(records, 1):
        for item in cache.taught(record):
            key = item.key
            if key not in seen:
                seen.add(key)
                chunk.append(item)
        while len(chunk) >= size:
            yield chunk[:size]
            chunk = chunk[size:]
            on_progress(0.0 if total is None else number / total)
    if chunk:
        yield chunk
    on_progress(1.0)
