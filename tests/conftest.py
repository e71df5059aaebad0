"""Settings and fixtures of every test: no network, few threads, tiny models built once."""

from __future__ import annotations

import os
import signal
import sys
import tempfile

# Before anything imports torch, transformers or datasets; child processes inherit them.
_SCRATCH = tempfile.TemporaryDirectory(prefix="vembed-tests-")
os.environ["HF_HOME"] = os.path.join(_SCRATCH.name, "hf")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_SCRATCH.name, "datasets")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

# A background job of a shell ignores SIGINT, and so would all that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """An Accelerator keeps its settings in class attributes: they would leak into the next test."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_bert_path(tmp_path_factory) -> Path:
    from tests.tiny import tiny_bert

    return tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_modernbert_path(tmp_path_factory) -> Path:
    from tests.tiny import tiny_modernbert

    return tiny_modernbert(tmp_path_factory.mktemp("models") / "tiny-modernbert")


@pytest.fixture(scope="session")
def tiny_qwen3_path(tmp_path_factory) -> Path:
    from tests.tiny import tiny_qwen3

    return tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tiny_st_path(tmp_path_factory) -> Path:
    """A sentence-transformers folder: mean pooling, Normalize, prompts for query and document."""
    from tests.tiny import tiny_sentence_transformer

    return tiny_sentence_transformer(
        tmp_path_factory.mktemp("models") / "tiny-st",
        prompts={"query": "query: ", "document": "passage: "},
    )


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory) -> Path:
    from tests.tiny import write_pairs

    return write_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


@pytest.fixture(scope="session")
def beir_path(tmp_path_factory) -> Path:
    from tests.tiny import write_beir

    return write_beir(tmp_path_factory.mktemp("rows") / "beir")
