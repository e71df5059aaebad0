"""Benchmarks run, on little work; what they compare is the same work, and they notice if not."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.tiny import tiny_sentence_transformer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of the folder, as the scripts import each other."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_sentence_transformer(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.timeout(900)
def test_every_benchmark_of_speed_runs(model, pairs_path, tmp_path, benchmark):
    command = [sys.executable, str(BENCHMARKS / "suite.py"), "--quick", "--tokens", "64"]
    command += ["--model", str(model), "--pairs", str(pairs_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-4000:]
    suite = benchmark("suite")
    parts = re.split(r"^## (\w+)$", done.stdout, flags=re.MULTILINE)
    tables = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert tuple(tables) == suite.SPEED
    assert all(re.search(r"^\| --- ", table, re.MULTILINE) for table in tables.values())


def test_every_script_is_in_the_suite(benchmark):
    suite = benchmark("suite")
    scripts = {
        path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text("utf-8")
    }

    assert scripts == {*suite.SPEED, *suite.QUALITY, *suite.WHOLE_RUNS, "suite"}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, 100, size=n).tolist() for n in (3, 30, 4, 17, 9, 30, 11, 12)]


def test_packed_texts_get_the_vectors_they_have_alone(model, texts, benchmark):
    bare = benchmark("bare")
    backbone, _ = bare.load_bare(str(model))
    backbone.eval().double()
    (packed,) = bare.pack(texts)

    with torch.no_grad():
        vectors = bare.embed(backbone, packed)[packed.texts.argsort()]
        alone = [bare.embed(backbone, bare.pack([text])[0])[0] for text in texts]
        passes = bare.sort(texts)
        by_length = torch.cat([bare.embed(backbone, part) for part in passes])
        packed.mask[:] = True
        leaking = bare.embed(backbone, packed)[packed.texts.argsort()]

    assert packed.ids_RW.shape == (4, 30)
    torch.testing.assert_close(vectors, torch.stack(alone), atol=1e-6, rtol=0)
    order = torch.cat([part.texts for part in passes]).argsort()
    torch.testing.assert_close(by_length[order], torch.stack(alone), atol=1e-6, rtol=0)
    assert (vectors - leaking).abs().max() > 1e-2


def test_rows_are_filled_and_hold_every_text_once(benchmark):
    bare = benchmark("bare")
    lengths = [5, 5, 4, 3, 3, 2, 1, 1]

    rows = bare.fill_rows(lengths, width=8)

    assert sorted(text for row in rows for text in row) == list(range(8))
    assert [sum(lengths[text] for text in row) for row in rows] == [8, 8, 8]


def test_ratios_are_taken_within_a_round(benchmark):
    harness = benchmark("harness")

    def rounds(*cpu: float) -> list:
        return [harness.Round(cpu_s=c, wall_s=2 * c, peak_mib=10, tokens=30) for c in cpu]

    found = harness.Comparison(
        title="work",
        unit="pairs",
        units=6,
        rounds={"ours": rounds(1, 2, 4), "theirs": rounds(2, 3, 12)},
        facts={"theirs": {"real_tokens": 20}},
        differences={"theirs": {"gradient": 1e-6}},
    )

    assert found.ratios("theirs") == [2, 1.5, 3]
    head, _, ours, theirs = found.markdown().splitlines()
    assert "tokens / real" in head
    assert ours == "| ours | 3 | 1.5 | 1 | 1 | 10 | 1.50 |  |"
    assert theirs == (
        "| theirs | 2 | 1 | 2.00 [1.50, 3.00] | 2.00 [1.50, 3.00] | 10 | 1.50 | 1.0e-06 |"
    )


def test_other_numbers_are_no_comparison(tmp_path, benchmark):
    harness = benchmark("harness")
    for name, values in (("ours", [1.0, 2.0]), ("near", [1.0, 2.00001]), ("far", [1.0, 2.1])):
        np.save(tmp_path / f"gradient@{name}.npy", values)

    differences = harness._differences(tmp_path, ["ours", "near", "far"])

    assert differences["near"]["gradient"] == pytest.approx(1e-5 / 5**0.5, rel=1e-3)
    with pytest.raises(RuntimeError, match="gradient of 'far' differs by 4.5e-02"):
        harness._check_differences("work", differences, 1e-4)
    harness._check_differences("work", {"near": differences["near"]}, 1e-4)
