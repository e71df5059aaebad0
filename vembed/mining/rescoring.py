"""Scores of query and document: cosines, or what a cross-encoder says of both together.

# Shapes: n pairs
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vembed.chunking import DEFAULT_CHUNK_TOKENS
from vembed.errors import ConfigError
from vembed.evaluation.search import paired_cosines
from vembed.inference.vector_store import VectorStore, as_keys, pair_key
from vembed.mining.pairs import Pairs
from vembed.mining.vectors import Items, VectorRows
from vembed.models.cross_encoder import CrossEncoder, is_cross_encoder
from vembed.models.fingerprint import fingerprint
from vembed.models.paths import resolve_model_path

Floats = NDArray[np.float64]

_CHUNK_PAIRS = 4096


class PairScores(Protocol):
    """What says how well a query and a document belong together."""

    def __call__(self, pairs: Pairs) -> Floats:
        """`[n]`, by the numbers of queries and documents."""
        ...


class Cosines:
    """Of the vectors that the search compares."""

    def __init__(self, queries: VectorRows, documents: VectorRows) -> None:
        """Assign."""
        self._queries = queries
        self._documents = documents

    def __call__(self, pairs: Pairs) -> Floats:
        """`[n]`."""
        found = np.empty(len(pairs), dtype=np.float64)
        for start in range(0, len(pairs), _CHUNK_PAIRS):
            part = slice(start, start + _CHUNK_PAIRS)
            queries = self._queries[pairs.queries[part]]
            found[part] = paired_cosines(queries, self._documents[pairs.documents[part]])
        return found


class Judge:
    """A cross-encoder, loaded only for pairs that are not on disk yet.

    Attributes:
        folder: Where scores are kept.
        computed: Pairs that it scored.
    """

    def __init__(
        self, name: str, cache: Path, queries: Items, documents: Items, device: torch.device
    ) -> None:
        """Find what is there.

        Raises:
            ConfigError: if there is no such model, or it is no cross-encoder.
        """
        self._path = resolve_model_path(name)
        if not is_cross_encoder(self._path):
            raise ConfigError(
                f"cross_encoder: {name!r} does not classify sequences, as cross-encoders do. Name "
                "one that does, or give it as the model"
            )
        text = json.dumps(["cross-encoder", fingerprint(self._path)])
        self.folder = cache / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._store = VectorStore(self.folder, 1)
        self._queries, self._documents = queries, documents
        self._device = device
        self._model: CrossEncoder | None = None
        self.computed = 0

    def __call__(self, pairs: Pairs) -> Floats:
        """`[n]`, the model's own numbers, without a sigmoid."""
        found = np.empty(len(pairs), dtype=np.float64)
        for start in range(0, len(pairs), _CHUNK_PAIRS):
            part = slice(start, start + _CHUNK_PAIRS)
            found[part] = self._score(pairs.queries[part], pairs.documents[part])
        return found

    def _score(
        self, query_numbers: NDArray[np.int64], document_numbers: NDArray[np.int64]
    ) -> Floats:
        queries = self._queries.read(query_numbers.tolist())
        documents = self._documents.read(document_numbers.tolist())
        texts = [(str(q.text), str(d.text)) for q, d in zip(queries, documents, strict=True)]
        keys = as_keys([pair_key(*pair) for pair in texts])
        new, first = np.unique(keys[~self._store.has(keys)], return_index=True)
        if len(new):
            missing = np.flatnonzero(~self._store.has(keys))[first]
            scores = self._load().score(
                [texts[n] for n in missing.tolist()], chunk_tokens=DEFAULT_CHUNK_TOKENS
            )
            self._store.write(keys[missing], scores[:, None])
            self._store.refresh()
            self.computed += len(missing)
        return self._store.read(keys)[:, 0].astype(np.float64)

    def _load(self) -> CrossEncoder:
        if self._model is None:
            self._model = CrossEncoder(self._path, device=self._device)
        return self._model


def as_probability(scores: Floats) -> Floats:
    """The sigmoid of a cross-encoder's numbers, on whose scale margins and bounds are."""
    return np.asarray(0.5 * (1.0 + np.tanh(scores / 2)))
