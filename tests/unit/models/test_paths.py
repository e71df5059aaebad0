from __future__ import annotations

import sys

import pytest

from tests.tiny import write_rows
from vembed.errors import ConfigError
from vembed.models import resolve_model_path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes installed packages that carry models; importing one would be an error."""

    def make(name, *model_folders):
        root = tmp_path / name
        root.mkdir()
        (root / "__init__.py").write_text("raise RuntimeError('imported')")
        for folder in model_folders:
            write_rows(root / folder / "config.json", [{"model_type": "bert"}])
            write_rows(root / folder / "1_Pooling" / "config.json", [{"pooling_mode": "mean"}])
        return root

    monkeypatch.syspath_prepend(str(tmp_path))
    return make


def test_a_local_folder_is_itself(tmp_path):
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)


def test_a_package_is_found_without_importing_it(package):
    root = package("carries_one", "model")

    for name in ("package:carries_one", "package:carries-one", "package:carries_one/model"):
        assert resolve_model_path(name) == str(root / "model")
    assert "carries_one" not in sys.modules


def test_a_package_that_is_itself_the_model_folder(package):
    root = package("carries_self", ".")
    assert resolve_model_path("package:carries_self") == str(root)


def test_several_models_in_a_package_must_be_told_apart(package):
    package("carries_two", "small", "large")
    with pytest.raises(ConfigError, match=r"package:carries_two/large, package:carries_two/small"):
        resolve_model_path("package:carries_two")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", "there is no folder"),
        ("/no/such/folder", "there is no folder"),
        ("~/no-such-folder", "there is no folder"),
        ("runs/quick/final", "there is no folder"),
        ("package:not_installed_anywhere", "pip install not_installed_anywhere"),
        ("package:json.decoder", "names no installed package"),
        ("package:carries_none", "carries no model"),
        ("package:carries_none/nowhere", "has no folder 'nowhere'"),
        ("package:carries_none/../other", "has no folder"),
        ("some-owner/some-model", "cannot be fetched"),
        ("no spaces allowed", "cannot be fetched"),
        ("", "expected a text"),
        (None, "expected a text"),
    ],
)
def test_a_name_that_leads_nowhere_says_so(package, name, says):
    package("carries_none")
    package("other", ".")
    with pytest.raises(ConfigError, match=says):
        resolve_model_path(name)


def test_an_unreachable_hub_id_names_the_three_forms():
    with pytest.raises(ConfigError, match=r"local folder.*package:NAME.*hub id"):
        resolve_model_path("some-owner/some-model", revision="main")


def test_a_file_is_not_a_folder(tmp_path):
    file = write_rows(tmp_path / "model.safetensors", [])
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model_path(str(file))


def test_a_hub_id_comes_from_the_cache_when_offline(tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--some-owner--cached-model"
    snapshot = repository / "snapshots" / commit
    write_rows(snapshot / "config.json", [{"model_type": "bert"}])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    assert resolve_model_path("some-owner/cached-model") == str(snapshot)
