"""`mine_hard_negatives`: rows in, the same rows with hard negatives out."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vembed.data import ImageRules, RecordDataset
from vembed.data.file_names import data_folder, file_name_warning
from vembed.data.problems import RowProblem
from vembed.data.sources import Source, find_source
from vembed.errors import ConfigError, DataError, shorten
from vembed.image_urls import ImageUrl
from vembed.images import ImageFile
from vembed.inference.predictor import resolve_device
from vembed.inference.vector_store import written_whole
from vembed.losses.margins import Margins
from vembed.mining.choosing import Chosen, choose
from vembed.mining.pairs import Pairs
from vembed.mining.rescoring import Cosines, Judge, PairScores, as_probability
from vembed.mining.results import MiningResult, find_examples
from vembed.mining.rows import Pool, load_corpus, load_rows, number_items
from vembed.mining.rules import MiningRules, ShortRows, check_faiss, check_output, check_short_rows
from vembed.mining.vectors import Embedder, ModelChoice, VectorRows, blocks, open_vectors
from vembed.mining.writing import RowWriter
from vembed.models.protocol import Role
from vembed.modes import RetrievalMode

Progress = Callable[[str, int], AbstractContextManager[Callable[[float], None]]]
"""Begins to show how much of something is done; gives what tells of more."""

logger = logging.getLogger(__name__)

_LOOKED_AT = 500
_WINDOW_ROWS = 4096  # written at a time: a document that several of them have is read once


@contextmanager
def _in_silence(label: str, total: int) -> Iterator[Callable[[float], None]]:
    yield lambda amount: None


@dataclass(frozen=True)
class Corpus:
    """Candidates that are not the positives of the rows.

    Attributes:
        path: Any file of rows, or a BEIR folder, whose documents are a title and a text.
        column: Column of the text.
        image_column: Column of the image.
        split: Of a data set with splits.
    """

    path: str
    column: str = "text"
    image_column: str = "image"
    split: str = "train"


def mine_hard_negatives(
    data: str | Path,
    *,
    output: str | Path,
    model: str | ModelChoice | None = None,
    corpus: str | Corpus | None = None,
    retrieval_mode: str | RetrievalMode = "t2t",
    column_mapping: Mapping[str, str] | None = None,
    split: str = "train",
    images: ImageRules = ImageRules(),  # noqa: B008 - frozen
    rules: MiningRules = MiningRules(),  # noqa: B008 - frozen
    cross_encoder: str | None = None,
    scores: bool = False,
    short_rows: ShortRows = "keep",
    query_vectors: str | Path | None = None,
    corpus_vectors: str | Path | None = None,
    cache: str | Path | None = None,
    overwrite: bool = False,
    examples: int = 0,
    progress: Progress = _in_silence,
) -> MiningResult:
    """Write the rows of `data` with hard negatives: near the query, but no answer to it.

    Every distinct query is compared with every distinct candidate, exactly; see `MiningRules` for
    what makes a candidate a negative, and `vembed.mining.choosing` for the margins of NV-Retriever
    (Moreira et al., 2024, arXiv 2407.15831), whose best are those of `relative_margin=0.05`.

    Vectors are kept on disk by content, so that a call that was killed goes on where it was when it
    is made again, and writes the same bytes.

    Args:
        data: Rows of a query and its positives, in any form that training reads.
        output: File of JSON Lines to write: the rows as they came, with the negatives in the column
            that has those of the row, else in `negatives`.
        model: What decides which documents are near; not needed where both vectors are given.
        corpus: Where the candidates are; None: all positives of all rows.
        retrieval_mode: Modality of queries and documents.
        column_mapping: Our field to the file's column, as in training.
        split: Rows of a data set with splits.
        images: Where images are, and what they are held to.
        rules: Which candidates are negatives.
        cross_encoder: Scores the candidates within the ranks anew; order, margins and bounds are
            then by the sigmoid of its scores.
        scores: Write `teacher_scores` for all positives and negatives of each row: cosines, or
            what the cross-encoder says, without a sigmoid, as `vembed teach` stores it.
        short_rows: What happens to a row with fewer negatives than `rules` ask for: `keep` it with
            those there are, `drop` it, or `error`.
        query_vectors: What `vembed encode` made of the queries of all rows, a .npy.
        corpus_vectors: Likewise, of the corpus; without one, of the positives, one for each row.
        cache: Folder that keeps vectors for another call; None: `OUTPUT.cache`, removed at the end.
        overwrite: Whether a file may be replaced.
        examples: How many queries to show.
        progress: Told what is done.

    Raises:
        ConfigError: if an argument cannot be meant.
        DataError: if a row cannot be used, or too many are short.
    """
    request = _Request(
        data=str(data), output=Path(output),
        model=ModelChoice(model) if isinstance(model, str) else model,
        corpus=Corpus(corpus) if isinstance(corpus, str) else corpus,
        mode=RetrievalMode.parse(retrieval_mode), column_mapping=column_mapping, split=split,
        images=images, rules=rules, cross_encoder=cross_encoder, scores=scores,
        short_rows=short_rows, query_vectors=query_vectors, corpus_vectors=corpus_vectors,
        kept_cache=None if cache is None else Path(cache), overwrite=overwrite,
        examples=examples, progress=progress,
    )  # fmt: skip
    return _mine(request)


@dataclass(frozen=True)
class _Request:
    """The arguments of `mine_hard_negatives`."""

    data: str
    output: Path
    model: ModelChoice | None
    corpus: Corpus | None
    mode: RetrievalMode
    column_mapping: Mapping[str, str] | None
    split: str
    images: ImageRules
    rules: MiningRules
    cross_encoder: str | None
    scores: bool
    short_rows: ShortRows
    query_vectors: str | Path | None
    corpus_vectors: str | Path | None
    kept_cache: Path | None
    overwrite: bool
    examples: int
    progress: Progress

    @property
    def cache(self) -> Path:
        """Where vectors are stored."""
        return self.kept_cache or Path(f"{self.output}.cache")

    @property
    def source(self) -> Source:
        """The rows as their file has them."""
        return find_source(self.data, split=self.split, own_split=False, streaming=False)

    def writer(self) -> RowWriter:
        """Writes them with more negatives."""
        return RowWriter(self.column_mapping, self.mode, text_cells=self.source.text_cells)


def _mine(request: _Request) -> MiningResult:
    started = time.perf_counter()
    _check(request)
    pool = _load(request)
    search = _Search(request, pool)
    chosen = search.run()
    written = _write(request, pool, chosen, search.written_scores)
    if request.kept_cache is None:
        search.remove_cache()
    counts_Q = chosen.counts_Q
    return MiningResult(
        output=request.output,
        rows=len(pool.rows),
        written=written.rows,
        queries=len(pool.queries),
        candidates=pool.candidates,
        negatives=written.negatives,
        short_rows=int((counts_Q[pool.query_R] < request.rules.num_negatives).sum()),
        excluded=chosen.excluded,
        positive_score=float(search.positive_scores_P.mean()),
        negative_score=float(np.nanmean(chosen.scores_QN)) if counts_Q.any() else math.nan,
        computed=search.computed,
        examples=find_examples(pool, chosen, search.positive_scores_P, request.examples),
        cache=request.kept_cache,
        seconds=time.perf_counter() - started,
    )


def _check(request: _Request) -> None:
    """Raise ConfigError about what can be seen before rows are read."""
    check_faiss()
    check_output(request.output, request.data, overwrite=request.overwrite)
    check_short_rows(request.short_rows)
    Margins(request.rules.absolute_margin, request.rules.relative_margin)
    has_both = request.query_vectors is not None and request.corpus_vectors is not None
    if request.model is None and not has_both:
        raise ConfigError(
            "model: is needed, unless query_vectors and corpus_vectors are both given. Name a model"
        )
    if request.model is not None and has_both:
        raise ConfigError(
            "model: has no use beside query_vectors and corpus_vectors. Leave it or one of them out"
        )
    if request.cross_encoder is not None and str(request.mode) != "t2t":
        raise ConfigError(
            f"cross_encoder: is for texts, and retrieval_mode is {request.mode}. Leave it out"
        )


def _load(request: _Request) -> Pool:
    """Read rows and corpus, all checked, and number what is in them."""
    rows = load_rows(
        request.data,
        mode=request.mode,
        column_mapping=request.column_mapping,
        images=request.images,
        split=request.split,
    )
    corpus = None
    if request.corpus is not None:
        corpus = load_corpus(
            request.corpus.path,
            modality=request.mode.document,
            column=request.corpus.column,
            image_column=request.corpus.image_column,
            images=request.images,
            split=request.corpus.split,
        )
    if not request.scores and {"teacher_scores"} & {*rows.fields, *rows.gaps}:
        raise ConfigError(
            f"{request.data}: rows have teacher_scores, and mined negatives would have none. Give "
            "scores (--scores), which writes them anew for all, or remove the column"
        )
    _check_image_folders(request, rows, corpus)
    _warn_of_file_names(request, rows)
    # Once before hours of encoding: has every column a form in JSON?
    first = next(_raw_rows(request))
    request.writer().line(first.values, [], None, first.where)
    return number_items(rows, corpus, with_negatives=request.scores)


def _warn_of_file_names(request: _Request, rows: RecordDataset) -> None:
    first = list(islice(rows, _LOOKED_AT))
    sides = {
        "queries": [record.query for record in first],
        "documents": [item for record in first for item in record.positives],
    }
    folder = request.images.root or data_folder(request.data)
    warning = file_name_warning(request.data, request.mode, sides, folder)
    if warning is not None:
        logger.warning(warning)


def _check_image_folders(
    request: _Request, rows: RecordDataset, corpus: RecordDataset | None
) -> None:
    """Raise an error if what is written would lead to other images, or to none."""
    if not request.mode.has_images:
        return
    for item in (rows[0].query, *rows[0].positives):
        if item.image is not None and not isinstance(item.image, ImageFile | ImageUrl):
            raise DataError(
                f"{rows[0].where}: mining writes JSON Lines, which hold paths of images, and these "
                "rows hold images. Write the images to files, and name these in the rows"
            )
    folders = [
        folder for each in (rows, corpus) if each is not None for folder in each.image_folders
    ]
    (own, *others) = [folder.root for folder in folders] or [""]
    if any(other != own for other in others):
        raise ConfigError(
            f"image_root: images of the rows are relative to {own!r}, those of the corpus to "
            f"{others[0]!r}. Name a folder that holds both, and write paths relative to it"
        )
    beside = os.path.abspath(request.output.parent)
    if request.images.root is None and own and beside != own:
        raise ConfigError(
            f"output: image paths are relative to {own!r}, and training would look for them beside "
            f"{str(request.output)!r}. Write it into that folder, or name that folder as "
            "image_root here and in training"
        )


class _Search:
    """What the rows are searched with.

    Attributes:
        positive_scores_P: How similar each positive is to its query, on the scale of the rules.
        written_scores: What rows get as `teacher_scores`; None if they get none.
    """

    def __init__(self, request: _Request, pool: Pool) -> None:
        """Encode what is not on disk yet."""
        self._request = request
        self._pool = pool
        mode = request.mode
        self._embedder: Embedder | None = None
        if request.model is not None:
            self._embedder = Embedder(
                request.model, request.cache, {"query": mode.query, "document": mode.document}
            )
        self._queries, self._documents = self._vectors("query"), self._vectors("document")
        sizes = [side[np.zeros(1, np.int64)].shape[1] for side in (self._queries, self._documents)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"vectors of queries have {sizes[0]} numbers, those of documents {sizes[1]}. Take "
                "both from one model"
            )
        self._judge: Judge | None = None
        scores: PairScores = Cosines(self._queries, self._documents)
        if request.cross_encoder is not None:
            device = resolve_device(None if request.model is None else request.model.device)
            self._judge = scores = Judge(
                request.cross_encoder, request.cache, pool.queries, pool.documents, device
            )
        self.written_scores = scores if request.scores else None
        found = scores(pool.positives)
        self.positive_scores_P = found if self._judge is None else as_probability(found)

    @property
    def computed(self) -> int:
        """Items that were encoded, and pairs that were scored."""
        return sum(part.computed for part in (self._embedder, self._judge) if part is not None)

    def run(self) -> Chosen:
        """The negatives of every query."""
        pool, rules = self._pool, self._request.rules
        with self._request.progress("searching", len(pool.queries)) as advance:
            chosen = choose(
                self._queries,
                self._documents,
                candidates=pool.candidates,
                known=pool.known,
                positives=pool.positives,
                positive_scores_P=self.positive_scores_P,
                query_ids_Q=pool.rows.query_ids[pool.first_row_Q],
                rules=rules,
                judge=self._judge,
                advance=advance,
            )
        short_R = np.flatnonzero(chosen.counts_Q[pool.query_R] < rules.num_negatives)
        if len(short_R) and self._request.short_rows == "error":
            raise DataError(
                f"{self._request.data}: {len(short_R):,} of {len(pool.rows):,} rows have fewer "
                f"than {rules.num_negatives} negatives, the first is "
                f"{pool.rows[short_R[0]].where}. Loosen a rule, or set short_rows to keep or drop"
            )
        return chosen

    def remove_cache(self) -> None:
        """Remove what was stored, and the folder if nothing else is in it."""
        folder = self._request.cache
        for part in (self._embedder, self._judge):
            if part is not None:
                shutil.rmtree(part.folder)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _vectors(self, role: Role) -> VectorRows:
        request, pool = self._request, self._pool
        is_query = role == "query"
        file = request.query_vectors if is_query else request.corpus_vectors
        items = pool.queries if is_query else pool.documents
        if file is None:
            assert self._embedder is not None  # noqa: S101 - checked before rows were read
            with request.progress("queries" if is_query else "documents", len(items)) as advance:
                return self._embedder.embed(items, role, advance)
        if is_query:
            return open_vectors(
                file, rows=len(pool.rows), numbers=pool.first_row_Q, setting="query_vectors"
            )
        _check_one_vector_each(request, pool)
        count = len(pool.rows if request.corpus is None else pool.documents.sets[0])
        return open_vectors(file, rows=count, numbers=pool.source_N, setting="corpus_vectors")


def _check_one_vector_each(request: _Request, pool: Pool) -> None:
    """Raise ConfigError unless every document has a row in `corpus_vectors`."""
    if request.corpus is None and len(pool.positives_R.values) != len(pool.rows):
        raise ConfigError(
            "corpus_vectors: without a corpus, row k is the positive of row k, and some rows have "
            "several. Write the positives to a file, and give it as the corpus"
        )
    if len(missing := np.flatnonzero(pool.source_N < 0)):
        shown = shorten(str(pool.documents.read([int(missing[0])])[0]), quote=True)
        raise ConfigError(
            f"corpus_vectors: {len(missing):,} positives or negatives of the rows are not in the "
            f"corpus, such as {shown}, and have no vector. Add them to the corpus, or give the "
            "model instead"
        )


@dataclass(frozen=True)
class _Written:
    """How much was written."""

    rows: int
    negatives: int


def _write(request: _Request, pool: Pool, chosen: Chosen, scores: PairScores | None) -> _Written:
    """The rows with their negatives; the file is there when all of it is."""
    raw, writer = _raw_rows(request), request.writer()
    rows = negatives = 0
    with (
        request.progress("writing", len(pool.rows)) as advance,
        written_whole(request.output) as file,
    ):
        for window in blocks(len(pool.rows), _WINDOW_ROWS):
            listed = [_documents_of(pool, chosen, row) for row in window]
            flat = np.concatenate([each.mined for each in listed])
            items = iter(pool.documents.read(flat.tolist()))
            told = iter([] if scores is None else _scores(scores, listed).tolist())
            for each in listed:
                row = next(raw)
                mined = list(islice(items, len(each.mined)))
                own = None if scores is None else list(islice(told, each.count))
                if len(mined) < request.rules.num_negatives and request.short_rows == "drop":
                    continue
                file.write(writer.line(row.values, mined, own, row.where).encode())
                rows, negatives = rows + 1, negatives + len(mined)
            advance(len(window))
    return _Written(rows, negatives)


@dataclass(frozen=True)
class _Documents:
    """Document numbers of one row: its own, positives first, and those that were mined."""

    query: int
    own: NDArray[np.int64]
    mined: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.own) + len(self.mined)


def _documents_of(pool: Pool, chosen: Chosen, row: int) -> _Documents:
    query = int(pool.query_R[row])
    mined = chosen.documents_QN[query]
    own = np.concatenate([pool.positives_R[row], pool.negatives_R[row]])
    return _Documents(query, own, mined[mined >= 0])


def _scores(scores: PairScores, listed: list[_Documents]) -> NDArray[np.float64]:
    """Of all documents of some rows, row after row."""
    queries = np.repeat([each.query for each in listed], [each.count for each in listed])
    documents = [part for each in listed for part in (each.own, each.mined)]
    return scores(Pairs(queries, np.concatenate(documents)))


@dataclass(frozen=True)
class _Raw:
    """A row as its file has it, and its `file:line`."""

    values: Mapping[str, Any]
    where: str


def _raw_rows(request: _Request) -> Iterator[_Raw]:
    """The rows once more, as many as there were.

    Raises:
        DataError: if the file has changed.
    """
    source = request.source
    for row in source.read():
        if isinstance(row.values, RowProblem):
            break
        yield _Raw(row.values, f"{source.files[row.file]}:{row.line}")
    raise DataError(f"{request.data}: the file has changed since it was read. Mine again")
