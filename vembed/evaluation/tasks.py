"""From a file or records to the evaluation task that fits them: the fields of the rows decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vembed.data import ImageRules, Quarantine, load_dataset_records
from vembed.data.records import Record
from vembed.errors import DataError
from vembed.evaluation.beir import is_beir_folder
from vembed.evaluation.labelled import LabelledTask
from vembed.evaluation.pairs import GradedPairsTask
from vembed.evaluation.results import EvalTask
from vembed.evaluation.retrieval import RetrievalTask
from vembed.modes import RetrievalMode


def load_eval_task(
    path: str | Path,
    *,
    column_mapping: Mapping[str, str] | None = None,
    retrieval_mode: str | RetrievalMode = "t2t",
    images: ImageRules = ImageRules(),  # noqa: B008 - frozen
    quarantine: Quarantine | None = None,
    split: str = "test",
) -> EvalTask:
    """The task in a BEIR folder, or in any file of rows that training can read.

    Args:
        path: BEIR folder, or any rows that training can read.
        column_mapping: Our field name to the column name; not for BEIR folders.
        retrieval_mode: Modality of query and document, as in `t2t`.
        images: Where images are, and what they are held to.
        quarantine: Takes rows that cannot be used; not of BEIR folders, whose judgements need all.
        split: Which `qrels/SPLIT.tsv`, or which split of a hub data set.

    Raises:
        DataError: if the data cannot be read, or its rows fit no task.
    """
    if is_beir_folder(path):
        return RetrievalTask.from_beir(
            path, split=split, retrieval_mode=retrieval_mode, images=images
        )
    dataset = load_dataset_records(
        str(path),
        retrieval_mode=retrieval_mode,
        column_mapping=column_mapping,
        images=images,
        quarantine=quarantine,
        split=split,
    )
    return task_from_records([dataset[row] for row in range(len(dataset))], Path(path).stem)


def task_from_records(records: Sequence[Record], name: str) -> EvalTask:
    """The task that fits the fields which every record has.

    Score and positive: graded pairs. Positive: retrieval. Label: labelled texts.

    Raises:
        DataError: if there are no records, or they fit none of these.
    """
    if not records:
        raise DataError(f"{name}: expected rows to evaluate on. Received: none")
    if all(record.positives for record in records):
        if all(record.score is not None for record in records):
            return GradedPairsTask.from_records(records, name=name)
        return RetrievalTask.from_records(records, name=name)
    if all(record.label is not None for record in records):
        return LabelledTask.from_records(records, name=name)
    odd = next(record for record in records if not record.positives)
    raise DataError(
        f"{odd.where}: evaluation needs a positive in every row (with a score: graded pairs), or a "
        "label in every row. Received: rows of both forms. Split them into two files"
    )
