from __future__ import annotations

import json

import pytest

from tests.tiny import tiny_sentence_transformer
from vembed.errors import CheckpointError
from vembed.models.checkpoint_format import (
    CheckpointSettings,
    read_backbone_config,
    read_settings,
    write_settings,
)


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def modules(*types):
    folders = ["", "1_Pooling", "2_Normalize", "3_Dense"]
    return [
        {"idx": i, "name": str(i), "path": folders[i], "type": f"sentence_transformers.models.{t}"}
        for i, t in enumerate(types)
    ]


def test_a_plain_transformers_folder_says_nothing(tmp_path):
    put(tmp_path, "config.json", {"model_type": "bert"})
    assert read_settings(tmp_path) == CheckpointSettings(tmp_path)


def test_version_2_layout(tmp_path):
    put(tmp_path, "modules.json", modules("Transformer", "Pooling", "Normalize"))
    put(tmp_path, "sentence_bert_config.json", {"max_seq_length": 256, "do_lower_case": True})
    put(
        tmp_path,
        "1_Pooling/config.json",
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    )

    settings = read_settings(tmp_path)

    assert settings.pooling_method == "cls"
    assert settings.normalize is True
    assert (settings.max_seq_length, settings.do_lower_case) == (256, True)


def test_version_6_layout_as_the_library_writes_it(tmp_path):
    folder = tiny_sentence_transformer(
        tmp_path / "model",
        pooling="lasttoken",
        normalize=False,
        dense_features=8,
        prompts={"query": "q: ", "passage": "p: "},
        default_prompt_name="query",
    )

    settings = read_settings(folder)

    assert settings.pooling_method == "last_token"
    assert settings.normalize is False
    assert [dense.name for dense in settings.dense_folders] == ["2_Dense"]
    assert settings.prompt_for("query") == "q: "
    assert settings.prompt_for("document") == "p: "
    assert settings.default_prompt_name == "query"


def test_the_oldest_layout_has_the_backbone_in_a_folder_of_its_own(tmp_path):
    listed = modules("Transformer", "Pooling")
    listed[0]["path"] = "0_Transformer"
    put(tmp_path, "modules.json", listed)
    put(tmp_path, "0_Transformer/config.json", {"model_type": "distilbert"})
    put(tmp_path, "0_Transformer/sentence_distilbert_config.json", {"max_seq_length": 128})
    put(tmp_path, "1_Pooling/config.json", {})

    assert read_backbone_config(tmp_path) == {"model_type": "distilbert"}
    settings = read_settings(tmp_path)
    assert (settings.backbone_folder, settings.max_seq_length) == (tmp_path / "0_Transformer", 128)
    assert settings.pooling_method == "mean"


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({}, None, None, None),
        ({"query": "q: ", "document": "d: "}, None, "q: ", "d: "),
        ({"query": "q: ", "document": "", "passage": "p: "}, None, "q: ", "p: "),
        ({"query": "", "document": ""}, None, "", ""),
        ({"retrieval": "r: "}, "retrieval", "r: ", "r: "),
        ({"retrieval": "r: "}, None, None, None),
        ({"query": "q: "}, "query", "q: ", "q: "),
    ],
)
def test_prompts_by_role(tmp_path, prompts, default, query, document):
    settings = CheckpointSettings(tmp_path, prompts=prompts, default_prompt_name=default)
    assert settings.prompt_for("query") == query
    assert settings.prompt_for("document") == document


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("modules.json", modules("Transformer", "Normalize", "Pooling"), "in that order"),
        ("modules.json", modules("Transformer"), "Found: Transformer"),
        ("modules.json", [{"idx": 0, "path": "", "type": "custom_st.Transformer"}], "runs no code"),
        ("modules.json", [{"idx": 0, "path": "../x", "type": "x"}], "leads out of the folder"),
        ("modules.json", {"idx": 0}, "expected a list"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "in one way"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "Found: attention"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
    ],
)
def test_what_would_have_to_be_ignored_is_an_error(tmp_path, file, content, says):
    put(tmp_path, "modules.json", modules("Transformer", "Pooling"))
    put(tmp_path, "1_Pooling/config.json", {})
    put(tmp_path, file, content)
    with pytest.raises(CheckpointError, match=says):
        read_settings(tmp_path)


def test_options_that_are_not_used_are_named(tmp_path, caplog):
    put(tmp_path, "modules.json", modules("Transformer", "Pooling"))
    put(tmp_path, "1_Pooling/config.json", {})
    put(tmp_path, "sentence_bert_config.json", {"max_seq_length": 8, "model_args": {"x": 1}})

    read_settings(tmp_path)

    assert "not used by vembed: model_args" in caplog.text


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_backbone_config(tmp_path)


def test_a_folder_without_a_model_says_what_it_holds(tmp_path):
    put(tmp_path, "adapter_config.json", {})
    with pytest.raises(CheckpointError, match=r"not a model folder.*adapter only.*adapter_config"):
        read_backbone_config(tmp_path)


def test_written_settings_are_read_back(tmp_path):
    written = CheckpointSettings(
        backbone_folder=tmp_path,
        pooling_method="weighted_mean",
        normalize=True,
        dense_folders=(tmp_path / "2_Dense",),
        max_seq_length=77,
        do_lower_case=True,
        prompts={"query": "q: ", "document": ""},
        default_prompt_name="query",
    )
    write_settings(tmp_path, written, hidden_size=32)
    assert read_settings(tmp_path) == written
    assert (tmp_path / "3_Normalize").is_dir()
