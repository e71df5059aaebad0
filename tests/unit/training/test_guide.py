"""A guide model: its own inputs, its own vectors, and what the loss makes of them."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny import PAIRS, tiny_bert, tiny_qwen3, write_rows
from vembed.config import TrainConfig
from vembed.data import BORROWED, Collator, load_dataset_records
from vembed.errors import ConfigError
from vembed.losses import build_criterion
from vembed.models import load_encoder
from vembed.training.data_utils import unpack_extras
from vembed.training.guide import Guide, build_guide
from vembed.training.run import run_training


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    rows = [dict(row) for row in PAIRS[:6]]
    rows[2]["negatives"] = ["the sun is cold"]
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    return list(load_dataset_records(str(path)))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return load_encoder(str(tiny_bert(tmp_path_factory.mktemp("student") / "bert")))


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Of another tokenizer and another size."""
    return Guide(
        load_encoder(str(tiny_qwen3(tmp_path_factory.mktemp("guide") / "qwen3"))),
        retrieval_mode="t2t",
        chunk_tokens=32,
    )


def test_the_guide_reads_its_own_inputs(records, student, guide):
    batch = guide.collator(Collator(student.processor))(records)
    assert batch["query_input_ids"].shape != batch["guide_query_input_ids"].shape
    found = guide.embed(batch)
    assert {name: len(rows) for name, rows in found.items()} == {
        "guide_query": 6, "guide_positive": 6, "guide_negative": 1,
    }  # fmt: skip
    alone = Collator(guide.encoder.processor)(records)
    truth = guide.encoder(
        input_ids=alone["query_input_ids"], attention_mask=alone["query_attention_mask"]
    )
    torch.testing.assert_close(found["guide_query"], truth, atol=1e-5, rtol=0)


def test_the_guide_is_frozen_and_its_inputs_are_no_extras(records, student, guide):
    assert not any(parameter.requires_grad for parameter in guide.encoder.parameters())
    assert not guide.encoder.training
    batch = guide.collator(Collator(student.processor))(records)
    assert not any(name.startswith("guide_") for name in unpack_extras(batch))
    assert not any(rows.requires_grad for rows in guide.embed(batch).values())


def test_a_borrowed_row_has_no_guide_either(records, student, guide):
    batch = {**guide.collator(Collator(student.processor))(records[:1]), BORROWED: True}
    assert {len(rows) for rows in guide.embed(batch).values()} == {0}


def test_a_guided_loss_without_a_guide_says_so(records):
    query = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="Set guide_model_name"):
        build_criterion("infonce", guided=True)(query, query)
    with pytest.raises(ConfigError, match="embeddings of .3, 2, 0. queries"):
        build_criterion("infonce", guided=True)(
            query, query, guide_query=torch.ones(3, 2), guide_positive=query
        )
    with pytest.raises(
        ConfigError, match=r"'cosent' has no guide \(guide_model_name\): .*: infonce, sigmoid"
    ):
        build_criterion("cosent", guided=True)


def test_a_guide_that_keeps_tokens_is_refused(tmp_path):
    tokens = load_encoder(str(tiny_bert(tmp_path / "bert")), pooling_method="none")
    tokens.save_pretrained(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"guide_model_name: .* gives a vector for each token"):
        build_guide(TrainConfig(guide_model_name=str(tmp_path / "tokens")), torch.device("cpu"))


def history(folder, **settings):
    rows = [dict(row) for row in PAIRS[:12]]
    for number in (1, 5):
        rows[number]["positive"] = rows[number]["positive"].upper() + "!"
    write_rows(folder / "rows.jsonl", rows)
    run = run_training(
        {
            "model_name": str(
                # Without dropout, whose masks are drawn chunk by chunk.
                tiny_bert(
                    folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
                )
            ),
            "data_path": str(folder / "rows.jsonl"),
            "val_data_path": str(folder / "rows.jsonl"),
            "holdout_ratio": 0,
            "output_dir": str(folder / "run"),
            "overwrite_output_dir": True,
            "device": "cpu",
            "batch_size": 6,
            "max_steps": 2,
            "logging_steps": 1,
            "progress": False,
            **settings,
        }
    )
    return run.state.history


def test_a_run_with_a_guide(tmp_path):
    """Training and validation ask the guide; the cache changes nothing."""
    guide = str(tiny_qwen3(tmp_path / "guide"))
    plain = history(tmp_path)
    guided = history(tmp_path, guide_model_name=guide)
    cached = history(
        tmp_path, guide_model_name=guide, use_gradient_cache=True, gradient_cache_chunk_size=2
    )
    assert guided != plain
    assert not any("val_loss" in line and line in plain for line in guided)
    for one, other in zip(guided, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    saved = json.loads((tmp_path / "run" / "final" / "vembed_config.json").read_text())
    assert saved["guide_model_name"] == guide
    assert not list((tmp_path / "run").rglob("*qwen*"))
