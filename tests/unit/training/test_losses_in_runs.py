"""Losses in whole runs: which data they take, how batches are made, what is kept of them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.tiny import PAIRS, tiny_bert, write_rows
from vembed.config import TrainConfig
from vembed.data import load_dataset_records
from vembed.errors import CheckpointError, ConfigError, DataError
from vembed.evaluation import load_eval_task
from vembed.inference import Predictor
from vembed.losses import LOSSES, build_criterion
from vembed.losses.proxies import ArcFace
from vembed.modes import Item
from vembed.registry import resolve
from vembed.training.loss_files import load_losses
from vembed.training.run import choose_batch_sampler, run_training

PAIR_ROWS = [dict(row) for row in PAIRS[:12]]
ROWS = {
    "label": [{"text": row["query"], "label": f"l{n % 3}"} for n, row in enumerate(PAIR_ROWS)],
    "score": [{**row, "score": n % 2} for n, row in enumerate(PAIR_ROWS)],
    "teacher_scores": [
        {**row, "negatives": ["the sun is cold"], "teacher_scores": [5.0, -n]}
        for n, row in enumerate(PAIR_ROWS)
    ],
    "positive": PAIR_ROWS,
}
"""Rows by a field that a loss requires."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_bert(tmp_path_factory.mktemp("model") / "bert"))


@pytest.fixture
def run(tmp_path, model):
    """Runs two steps on rows."""

    def train(rows, **settings):
        path = tmp_path / "rows.jsonl"
        write_rows(path, rows)
        return run_training(
            {
                "model_name": model,
                "data_path": str(path),
                "holdout_ratio": 0,
                "output_dir": str(tmp_path / "run"),
                "overwrite_output_dir": True,
                "device": "cpu",
                "batch_size": 6,
                "max_steps": 2,
                "lr": 0.01,
                "logging_steps": 1,
                "progress": False,
                **settings,
            }
        )

    return train


def rows_for(loss_type):
    required = build_criterion(loss_type, num_classes=2, embedding_dim=2).required_fields
    fields = ("teacher_scores", "score", "label", "positive")
    return ROWS[next(field for field in fields if field in required)]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_trains(run, loss_type):
    takes_tokens = resolve("loss_type", loss_type, LOSSES).takes_tokens
    settings = {"pooling_method": "none"} if takes_tokens else {}
    result = run(rows_for(loss_type), loss_type=loss_type, use_gradient_cache=True, **settings)
    losses = [line["loss"] for line in result.state.history if "loss" in line]
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())


@pytest.mark.parametrize(
    ("loss_type", "rows", "message"),
    [
        ("arcface", "positive", "ArcFace needs label.*Losses that fit.*infonce, sigmoid, triplet"),
        ("infonce", "label", "InfoNCE needs positive.*fit these rows: supcon, label_triplet, arc"),
        ("margin_mse", "score", "MarginMSE needs negative and teacher_scores.*cosent, angle, cos"),
    ],
)
def test_rows_that_do_not_fit_are_found_before_training(run, loss_type, rows, message):
    with pytest.raises(ConfigError, match=message):
        run(ROWS[rows], loss_type=loss_type)


def test_one_row_without_a_score_is_named_by_its_place(run):
    rows = [*ROWS["score"][:5], {**ROWS["score"][5], "score": None}, *ROWS["score"][6:]]
    with pytest.raises(
        ConfigError, match=rf"CoSENT needs score.* 1 of {len(rows)} rows, the first at .*:6\. Fill"
    ):
        run(rows, loss_type="cosent")


def test_a_loss_whose_arguments_ask_for_more(run):
    with pytest.raises(ConfigError, match="Triplet needs negative in every row"):
        run(PAIR_ROWS, loss_type="triplet", loss_kwargs={"triplets": "own"})


def test_a_label_of_a_pair_is_a_score(run):
    rows = [{**row, "label": n % 2} for n, row in enumerate(PAIR_ROWS)]
    with pytest.raises(ConfigError, match=r"column_mapping: \{score: YOUR_COLUMN\}"):
        run(rows, loss_type="contrastive")
    run(rows, loss_type="contrastive", column_mapping={"score": "label"})


def test_scores_on_another_scale_are_found_before_training(run):
    rows = [{**row, "score": float(n % 6)} for n, row in enumerate(PAIR_ROWS)]
    with pytest.raises(ConfigError, match=r"from -1 to 1.*from 0 to 5.*\{score_scale: 5\}"):
        run(rows, loss_type="cosine_mse")
    run(rows, loss_type="cosine_mse", loss_kwargs={"score_scale": 5})
    with pytest.raises(ConfigError, match="Contrastive takes scores from 0 to 1"):
        run(rows, loss_type="contrastive")


def test_queries_that_moved_are_shown_for_rankings_only(run, capsys):
    for rows, loss_type, count in ((PAIR_ROWS, "infonce", 1), (ROWS["score"], "cosent", 0)):
        run(rows, loss_type=loss_type, holdout_ratio=0.4)
        assert capsys.readouterr().out.count("Right answer ranked higher") == count


def test_class_vectors_train_and_are_kept_for_resuming_only(run, tmp_path):
    run(ROWS["label"], loss_type="arcface", save_steps=1, save_total_limit=None)
    steps = [tmp_path / "run" / "checkpoints" / f"step-00000{step}" for step in (1, 2)]
    first, second = (load_file(step / "losses.safetensors")["loss.proxies"] for step in steps)
    assert first.shape == (3, 32)
    assert not torch.equal(first, second)
    assert not list((tmp_path / "run" / "final").rglob("losses*"))
    assert "proxies" not in load_file(tmp_path / "run" / "final" / "model.safetensors")
    fresh = ArcFace(num_classes=3, embedding_dim=32)
    load_losses(steps[1], fresh)
    assert torch.equal(fresh.proxies, second)


def test_parameters_of_another_loss_are_refused(run, tmp_path):
    run(ROWS["label"], loss_type="arcface", save_steps=1)
    step = tmp_path / "run" / "checkpoints" / "step-000002"
    with pytest.raises(CheckpointError, match="(?s)does not fit ArcFace.*on the same labels"):
        load_losses(step, ArcFace(num_classes=4, embedding_dim=32))
    with pytest.raises(CheckpointError, match="no such file"):
        load_losses(tmp_path / "run" / "final", nn.Linear(1, 1))


def test_validation_labels_have_the_numbers_of_training(run, tmp_path):
    """Validated on rows of one label, whose own number would be 0."""
    losses = []
    for label in ("l0", "l2"):
        rows = [row for row in ROWS["label"] if row["label"] == label]
        write_rows(tmp_path / "val.jsonl", rows)
        dataset = load_dataset_records(str(tmp_path / "val.jsonl"))
        assert {record.label for record in dataset} == {0}
        history = run(
            ROWS["label"],
            loss_type="normalized_softmax",
            val_data_path=str(tmp_path / "val.jsonl"),
            metric_for_best="loss",
            batch_size=12,
            max_steps=40,
            eval_steps=20,
        ).state.history
        losses.append([line["val_loss"] for line in history if "val_loss" in line])
    # Learned by heart, so what stands for another class would cost much.
    assert all(last < first / 2 for first, *_, last in losses)


def test_an_unknown_validation_label(run, tmp_path):
    write_rows(tmp_path / "val.jsonl", [{"text": word, "label": "x"} for word in ("a", "b")])
    arguments = {"val_data_path": str(tmp_path / "val.jsonl")}
    with pytest.raises(DataError, match="label 'x' is not among the labels of the training rows"):
        run(ROWS["label"], loss_type="arcface", **arguments)
    run(ROWS["label"], loss_type="supcon", **arguments)


def test_classes_of_a_stream_are_not_known(run):
    with pytest.raises(ConfigError, match="num_classes.*a stream"):
        run(ROWS["label"], loss_type="arcface", streaming=True)


def test_batches_are_made_as_the_loss_needs_them(caplog):
    criterion = build_criterion("supcon")
    config = {"model_name": "m", "data_path": "d", "loss_type": "supcon"}

    def choose(**settings):
        return choose_batch_sampler(TrainConfig(**config, **settings), criterion)

    assert choose() == "class_balanced"
    assert choose(batch_sampler="random") == "random"
    assert choose(streaming=True) == "random"
    assert "class_balanced, which a stream cannot give" in caplog.text
    assert choose_batch_sampler(TrainConfig(**config), build_criterion("infonce")) == "random"


def test_a_run_uses_the_batch_sampler(run, monkeypatch):
    seen = []
    from vembed.training import data_utils, trainer

    unpack = data_utils.unpack_extras
    monkeypatch.setattr(
        trainer, "unpack_extras", lambda batch: seen.append(batch["labels"]) or unpack(batch)
    )
    run(ROWS["label"], loss_type="supcon", batch_sampler_kwargs={"samples_per_class": 2})
    assert all(labels.bincount().tolist() == [2, 2, 2] for labels in seen)


def _lines(result):
    path = result.model_path.parent / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_matryoshka_is_trained_logged_and_measured_by_dimension(run, tmp_path):
    write_rows(tmp_path / "test.jsonl", PAIR_ROWS)
    result = run(
        PAIR_ROWS,
        use_mrl=True,
        mrl_dims=[8, 16],
        mrl_weights=[2.0, 0.5],
        learn_temperature=True,
        use_gradient_cache=True,
        use_lora=True,
        val_data_path=str(tmp_path / "test.jsonl"),
        test_data_path=str(tmp_path / "test.jsonl"),
    )
    trained = [line for line in _lines(result) if "loss" in line]
    for line in trained:
        parts = [line[f"loss_mrl.{dim}"] for dim in (32, 16, 8)]
        assert line["loss_task"] == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2])
        assert line["loss"] == pytest.approx(line["loss_task"])
    assert "temperature" in trained[0]
    validated = [line for line in _lines(result) if "val_ndcg@10" in line]
    assert "val_ndcg@10[8]" in validated[0]
    rows = {change.metric: change for change in result.proof.changes}
    assert list(rows)[-2:] == ["ndcg@10[16]", "ndcg@10[8]"]
    task = load_eval_task(tmp_path / "test.jsonl")
    for model, side in ((str(result.model_path), "after"),):
        predictor = Predictor(model, device="cpu", truncate_dim=8)
        measured = task.evaluate(predictor.encode_items).metrics["ndcg@10"]
        assert measured == pytest.approx(getattr(rows["ndcg@10[8]"], side), abs=1e-6)
    assert "nDCG@10 [8]" in (result.model_path.parent / "report" / "report.html").read_text()


def test_a_matryoshka_of_layers_is_trained_logged_and_validated(run, tmp_path, model, caplog):
    """The loss of a layer is that of a model which has no more."""
    write_rows(tmp_path / "test.jsonl", PAIR_ROWS[:6])
    with caplog.at_level(logging.INFO, logger="vembed"):
        result = run(
            PAIR_ROWS[:6],
            use_mrl=True,
            mrl_dims=[32],
            mrl_layers=[1],
            lr=1e-9,
            dropout=0,
            val_data_path=str(tmp_path / "test.jsonl"),
        )
    (first, *_), validated = (
        [n for n in _lines(result) if key in n] for key in ("loss", "val_loss")
    )
    predictor = Predictor(model, device="cpu", keep_layers=[0])
    sides = (predictor.encode_items(load_side(side), side) for side in ("query", "document"))
    vectors = [torch.from_numpy(side) for side in sides]
    alone = build_criterion("infonce")(vectors[0], positive=vectors[1])
    assert first["loss_mrl.layers1.32"] == pytest.approx(float(alone), abs=1e-4)
    assert first["loss_task"] == pytest.approx(first["loss_mrl.32"] + first["loss_mrl.layers1.32"])
    assert validated[-1]["val_loss"] == pytest.approx(first["loss_task"], abs=1e-4)
    (line,) = [m for m in caplog.messages if m.startswith("loss ")]
    assert "weights add up to 2)" in line
    assert "at chance 3.58" in line  # twice ln 6


def load_side(side):
    return [Item(row["query" if side == "query" else "positive"]) for row in PAIR_ROWS[:6]]


def test_the_first_step_tells_of_a_matryoshka(run, caplog):
    with caplog.at_level(logging.INFO, logger="vembed"):
        run(PAIR_ROWS, use_mrl=True, mrl_dims=[8, 16])
    told = "\n".join(caplog.messages)
    assert "lacks the whole size of the vectors, 32" in told
    (line,) = [m for m in caplog.messages if m.startswith("loss ")]
    assert "Matryoshka of InfoNCE (weights add up to 3)" in line
    # Three times ln 6, the candidates of each of three dimensions.
    assert "at chance 5.37" in line
    assert "mrl.8 " in line


@pytest.mark.parametrize("loss_type", ["arcface", "normalized_softmax"])
def test_class_vectors_of_a_matryoshka_are_kept_as_without(run, tmp_path, loss_type):
    run(ROWS["label"], loss_type=loss_type, use_mrl=True, mrl_dims=[8], save_steps=1)
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "losses.safetensors")
    assert list(kept) == ["loss.proxies"]
    plain = build_criterion(loss_type, num_classes=3, embedding_dim=32)
    load_losses(tmp_path / "run" / "checkpoints" / "step-000002", plain)
    torch.testing.assert_close(plain.proxies.detach(), kept["loss.proxies"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mrl_dims": [8]}, "mrl_dims: has no use without Matryoshka"),
        ({"mrl_weights": [1]}, "mrl_weights: has no use without Matryoshka"),
        ({"mrl_layers": [1]}, "has no use without Matryoshka"),
        ({"use_mrl": True, "mrl_layers": [1, 1]}, "different numbers"),
        ({"use_mrl": True, "mrl_layers": [2]}, "2 layers, which are always trained.*Received: .2"),
        ({"use_mrl": True, "mrl_weights": [1]}, "says nothing without mrl_dims"),
        ({"use_mrl": True, "mrl_dims": [8, 4], "mrl_weights": [1]}, "each of the 2 mrl_dims"),
        ({"use_mrl": True, "mrl_dims": [8, 8]}, "different numbers"),
        ({"use_mrl": True, "mrl_dims": [64, 8]}, "32 numbers. Received: 64"),
        ({"use_mrl": True, "loss_type": "maxsim", "pooling_method": "none"}, "each token"),
    ],
)
def test_a_matryoshka_that_cannot_be_is_refused(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(PAIR_ROWS, **settings)
