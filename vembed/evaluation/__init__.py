"""Measuring a model: tasks, metrics, intervals, and what moved between two models.

Reports are in `vembed.evaluation.report`, apart because they load matplotlib.
"""

from vembed.evaluation.beir import read_beir, write_beir
from vembed.evaluation.gallery import Gallery, choose_gallery
from vembed.evaluation.intervals import Interval, MetricChange, compare, confidence_intervals
from vembed.evaluation.labelled import LabelledTask
from vembed.evaluation.metrics import compute_metrics, metric_label
from vembed.evaluation.moved import MovedQueries, MovedQuery, moved_queries
from vembed.evaluation.pairs import GradedPairsTask
from vembed.evaluation.reduced import ReducedTask, Reduction
from vembed.evaluation.results import Encode, EvalResult, EvalTask, Rankings
from vembed.evaluation.retrieval import RetrievalTask
from vembed.evaluation.tasks import load_eval_task, task_from_records

__all__ = [
    "Encode",
    "EvalResult",
    "EvalTask",
    "Gallery",
    "GradedPairsTask",
    "Interval",
    "LabelledTask",
    "MetricChange",
    "MovedQueries",
    "MovedQuery",
    "Rankings",
    "ReducedTask",
    "Reduction",
    "RetrievalTask",
    "choose_gallery",
    "compare",
    "compute_metrics",
    "confidence_intervals",
    "load_eval_task",
    "metric_label",
    "moved_queries",
    "read_beir",
    "task_from_records",
    "write_beir",
]
