from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from vembed.cli import main
from vembed.errors import ConfigError
from vembed.quickstart import text as quickstart
from vembed.training.config import load_and_parse_config

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_st_path) -> list[str]:
    """Flags that make the quickstart small, in an empty folder."""
    monkeypatch.setattr(quickstart, "PACKAGES", ("jinja2",))
    monkeypatch.chdir(tmp_path)
    return ["--model_name", str(tiny_st_path), "--max_steps", "2", "--batch_size", "8"]


def test_main_job_from_an_empty_folder(small, tmp_path, capfd):
    assert main(["quickstart", *small]) == 0

    shown = capfd.readouterr().out
    assert "pairs to train on" in shown
    for metric in ("nDCG@10", "MRR@10", "Recall@1", "Recall@10"):
        assert metric in shown
    assert (tmp_path / "quickstart" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "quickstart" / "report" / "report.html").is_file()
    steps = (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert "loss" in json.loads(steps[0])


def test_it_can_be_run_again(small):
    assert main(["quickstart", *small, "--output_dir", "out"]) == 0
    assert main(["quickstart", *small, "--output_dir", "out"]) == 0


def test_flags_win_over_the_recipe(small, tmp_path):
    assert (
        main(["quickstart", *small, "--mixed_precision", "no", "--config_override", "lr=1e-3"]) == 0
    )

    saved = load_and_parse_config(["--config", str(tmp_path / "quickstart" / "config.yaml")])
    assert saved.lr == 1e-3
    assert saved.mixed_precision == "no"
    assert saved.max_steps == 2


def test_a_mistake_costs_no_time(monkeypatch):
    monkeypatch.setattr(quickstart, "build_api_docs", lambda *a, **k: pytest.fail("data was built"))

    with pytest.raises(ConfigError, match="batchsize.*did you mean 'batch_size'"):
        quickstart.main(["--batchsize", "3"])


def test_recipe_is_of_the_package_that_the_extra_installs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module = quickstart.BASE_MODEL.removeprefix("package:").split("/")[0]
    recipe = load_and_parse_config(["--config", str(quickstart.RECIPE)])

    assert module.replace("_", "-") in project["optional-dependencies"]["quickstart"]
    assert recipe.model_name == quickstart.BASE_MODEL
    assert recipe.data_path is None
