"""`vembed teach` and the run that reads what it stored."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pictures import mode_rows, picture, write_pictures
from tests.tiny import PAIRS, tiny_bert, tiny_clip, tiny_cross_encoder, tiny_qwen2_vl, write_rows
from vembed.config import DatasetSpec, TrainConfig
from vembed.data import load_dataset_records
from vembed.errors import ConfigError, DataError
from vembed.images import as_image_source
from vembed.models import load_encoder
from vembed.models.cross_encoder import CrossEncoder
from vembed.modes import Item
from vembed.training.loss_files import load_losses
from vembed.training.run import run_training
from vembed.training.teaching import build
from vembed.training.teaching import teach as teaching
from vembed.training.teaching.cache import TeacherCache
from vembed.training.teaching.identity import TaughtItem, taught_items, taught_roles
from vembed.training.teaching.teach import teach

ROLES = ("query", "positive", "negative")


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("teacher") / "bert", hidden_size=16, seed=3)


@pytest.fixture
def rows_path(tmp_path):
    rows = [dict(pair) for pair in PAIRS]
    rows[2]["negatives"] = ["the sun is cold", PAIRS[5]["positive"]]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def settings(tmp_path, teacher_path, rows_path):
    return {
        "teacher_model_name": str(teacher_path),
        "teacher_cache": str(tmp_path / "cache"),
        "data_path": str(rows_path),
        "teacher_chunk_size": 7,
        "device": "cpu",
    }


@pytest.fixture
def run(tmp_path, settings, tiny_st_path):
    """Trains on what was stored; gives the weights and the log of metrics."""

    def train(name="run", **changes):
        folder = tmp_path / name
        taught = {key: value for key, value in settings.items() if key != "teacher_chunk_size"}
        base = {
            **taught, "model_name": str(tiny_st_path), "output_dir": str(folder),
            "max_steps": 3, "batch_size": 6, "logging_steps": 1, "lr": 0.05, "progress": False,
            "optimizer": "sgd",
        }  # fmt: skip
        run_training({**base, **changes})
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return load_file(folder / "final" / "model.safetensors"), [json.loads(n) for n in lines]

    return train


def cache_of(settings):
    return TeacherCache.open(TrainConfig.coerce(settings))


def test_every_different_item_is_stored_once_and_is_what_the_teacher_says(settings, teacher_path):
    result = teach(settings)
    assert (result.items, result.computed, result.size) == (49, 49, 16)
    cache = cache_of(settings)
    assert len(cache.store) == 49
    rows = load_dataset_records(settings["data_path"])
    items = [item for record in rows for item in taught_items(record, ROLES)]
    encoder = load_encoder(str(teacher_path))
    with torch.no_grad():
        for item in items[:5] + items[-5:]:
            expected = encoder(**encoder.processor([item.item], role=item.side))
            torch.testing.assert_close(cache.vectors([item]), expected, rtol=0, atol=1e-5)


def test_a_second_time_nothing_is_computed_nor_loaded(settings, monkeypatch):
    teach(settings)
    monkeypatch.setattr(teaching, "build_teacher_model", lambda _: 1 / 0)
    assert teach(settings).computed == 0


def test_new_rows_are_added(settings, tmp_path):
    teach(settings)
    more = [*PAIRS, {"query": "a new query", "positive": "a new answer"}]
    settings["data_path"] = str(write_rows(tmp_path / "more.jsonl", more))
    assert teach(settings).computed == 2


def test_work_that_was_cut_short_is_gone_on_with(settings, monkeypatch):
    whole = dict(settings, teacher_cache=settings["teacher_cache"] + "-whole")
    teach(whole)
    embed, calls = teaching._Teacher.embed, []

    def dies(self, items):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, items)

    monkeypatch.setattr(teaching._Teacher, "embed", dies)
    with pytest.raises(KeyboardInterrupt):
        teach(settings)
    assert len(cache_of(settings).store) == 14
    assert teach(settings).computed == 49 - 14
    stores = [cache_of(s).store for s in (settings, whole)]
    assert np.array_equal(stores[0]._keys, stores[1]._keys)
    keys = stores[0]._keys
    np.testing.assert_allclose(stores[0].read(keys), stores[1].read(keys), atol=1e-6)


def test_a_run_reads_the_cache_and_never_loads_the_teacher(
    settings, run, monkeypatch, tmp_path, teacher_path
):
    beside, beside_log = run("beside", teacher_cache=None, distillation_alpha=0)
    teach(settings)
    shutil.copytree(teacher_path, tmp_path / "copy")  # where it lies does not matter
    settings["teacher_model_name"] = str(tmp_path / "copy")
    monkeypatch.setattr(build, "build_teacher_model", lambda _: 1 / 0)
    stored, stored_log = run("stored", distillation_alpha=0)
    for name, weights in beside.items():
        torch.testing.assert_close(stored[name], weights, rtol=0, atol=1e-5)
    assert [line.keys() for line in stored_log] == [line.keys() for line in beside_log]
    assert stored_log[0]["loss_distillation.similarity_kl"] == pytest.approx(
        beside_log[0]["loss_distillation.similarity_kl"], rel=1e-4
    )
    without, _ = run("without", teacher_model_name=None, teacher_cache=None)
    assert max(float((without[n] - stored[n]).abs().max()) for n in stored) > 1e-4


def test_data_workers_read_the_cache(settings, run):
    teach(settings)
    here, there = (run(f"workers-{n}", num_workers=n)[0] for n in (0, 2))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_every_part_of_the_loss_and_its_weight_are_logged(settings, run):
    kinds = {"similarity_kl": 1, "embedding": 0.5, "relational": 2, "score": 1}
    teach(settings)
    _, lines = run(distillation_loss=kinds, distillation_alpha=0.25)
    for line in lines[:3]:
        assert line["weight_task"] == 0.25
        assert {k for k in line if k.startswith("weight_")} == {
            "weight_task", *(f"weight_distillation.{kind}" for kind in kinds)
        }  # fmt: skip
        parts = [key.removeprefix("weight_") for key in line if key.startswith("weight_")]
        total = sum(line[f"weight_{part}"] * line[f"loss_{part}"] for part in parts)
        assert total == pytest.approx(line["loss"], rel=1e-5)
    assert lines[0]["weight_distillation.relational"] == 1.5


def test_a_student_that_keeps_tokens_is_refused(settings, teacher_path):
    student = load_encoder(str(teacher_path), pooling_method="none")
    message = "model_name: .* a vector for each token.* or remove teacher_model_name"
    with pytest.raises(ConfigError, match=message):
        build.build_teaching(TrainConfig.coerce(settings), student)


def test_the_projection_is_kept_to_go_on_from_and_is_not_in_the_model(settings, run, tmp_path):
    teach(settings)
    kinds = {"similarity_kl": 1, "embedding": 1}
    run(distillation_loss=kinds, save_steps=2, save_total_limit=None)
    folder = tmp_path / "run"
    kept = load_file(folder / "checkpoints" / "step-000002" / "losses.safetensors")
    assert {name: tuple(t.shape) for name, t in kept.items()} == {
        "distillation.losses.1.projection": (32, 16)
    }
    config = TrainConfig.coerce({**settings, "distillation_loss": kinds})
    loss = build.build_teaching(config, load_encoder(str(folder / "final"))).loss
    before = loss.losses[1].projection.detach().clone()
    load_losses(folder / "checkpoints" / "step-000002", None, loss)
    assert not torch.equal(loss.losses[1].projection, before)  # it was trained
    assert not list((folder / "final").rglob("losses*"))
    assert not any("projection" in name for name in load_file(folder / "final/model.safetensors"))


def test_a_cross_encoder_scores_pairs_once(settings, run, tmp_path, monkeypatch):
    settings["teacher_model_name"] = str(tiny_cross_encoder(tmp_path / "judge"))
    with pytest.raises(ConfigError, match="is a cross-encoder.*Set teacher_cache"):
        run("beside", teacher_cache=None)
    assert teach(settings).computed == len(PAIRS) + 2
    assert teach(settings).computed == 0
    cache = cache_of(settings)
    record = load_dataset_records(settings["data_path"])[2]
    judge = CrossEncoder(settings["teacher_model_name"])
    documents = [record.positives[0].text, *(item.text for item in record.negatives)]
    expected = judge.score([(record.query.text, text) for text in documents], chunk_tokens=4096)
    np.testing.assert_allclose(cache.vectors(cache.taught(record))[:, 0], expected, atol=1e-5)
    monkeypatch.setattr(teaching, "CrossEncoder", lambda *_, **__: 1 / 0)
    rows = [{**p, "negatives": ["the sun is cold"]} for p in PAIRS]
    settings["data_path"] = str(write_rows(tmp_path / "more.jsonl", rows))
    with pytest.raises(ConfigError, match="lacks 23 items of 23 rows.*: negative"):
        run("more", holdout_ratio=0)
    monkeypatch.undo()
    teach(settings)
    _, lines = run("taught")
    assert lines[0]["loss_distillation.score"] > 0
    with pytest.raises(ConfigError, match="embedding needs a teacher's embeddings.*score"):
        run("kind", distillation_loss="embedding")


def test_margin_mse_learns_from_the_scores_of_a_cross_encoder(settings, run, tmp_path):
    rows = [{**p, "negatives": ["the sun is cold"]} for p in PAIRS]
    settings["data_path"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    settings["teacher_model_name"] = str(tiny_cross_encoder(tmp_path / "judge"))
    teach(settings)
    cached, lines = run("cached", loss_type="margin_mse", holdout_ratio=0)
    assert not any("distillation" in name for name in lines[0])  # they are heard once

    cache = cache_of(settings)
    for row, record in zip(rows, load_dataset_records(settings["data_path"]), strict=True):
        row["teacher_scores"] = cache.vectors(cache.taught(record))[:, 0].tolist()
    settings["data_path"] = str(write_rows(tmp_path / "scored.jsonl", rows))
    teacher = {"teacher_model_name": None, "teacher_cache": None}
    written, _ = run("written", loss_type="margin_mse", holdout_ratio=0, **teacher)
    assert cached.keys() == written.keys()
    assert all(torch.equal(cached[name], written[name]) for name in cached)

    both = {"loss_type": "margin_mse", "distillation_loss": "score", "holdout_ratio": 0}
    settings["data_path"] = str(tmp_path / "rows.jsonl")
    _, lines = run("both", **both)
    assert lines[0]["loss_task"] > 0
    assert lines[0]["loss_distillation.score"] > 0


def test_what_margin_mse_needs_is_told_with_who_gives_it(settings, run, tmp_path):
    rows = [{**p, "negatives": ["the sun is cold"]} for p in PAIRS]
    settings["data_path"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    teacher = {"teacher_model_name": None, "teacher_cache": None}
    with pytest.raises(ConfigError, match="A cross-encoder gives them.*teacher_cache") as caught:
        run("alone", loss_type="margin_mse", **teacher)
    fitting = str(caught.value).partition("Losses that fit these rows: ")[2]
    assert "infonce" in fitting
    assert "maxsim" not in fitting  # it needs a vector for each token


# --- stale and partial caches


def test_a_cache_that_lacks_rows_says_which_and_what_to_run(settings, run, tmp_path):
    teach(settings)
    more = [*PAIRS[:4], {"query": "new", "positive": "a new answer"}, *PAIRS[4:]]
    path = write_rows(tmp_path / "more.jsonl", more)
    with pytest.raises(ConfigError) as caught:
        run(data_path=str(path), holdout_ratio=0)
    text = str(caught.value)
    assert f"lacks 2 items of 1 rows (of 25), the first at {path}:5: query" in text
    assert "`vembed teach`" in text


def test_rows_that_were_taught_need_no_look_at_their_items(settings, run, monkeypatch):
    teach(settings)
    monkeypatch.setattr(TeacherCache, "missing", lambda self, items: 1 / 0)
    rows = load_dataset_records(settings["data_path"])
    cache = cache_of(settings)
    cache.require(rows)
    cache.require(rows.select([3, 1]))
    with pytest.raises(ZeroDivisionError):
        cache.require(
            load_dataset_records(DatasetSpec(path=settings["data_path"], query_prompt="x"))
        )


def test_a_part_that_was_removed_is_missed_before_training(settings, run, tmp_path):
    teach(settings)
    removed = min((tmp_path / "cache").glob("*.keys.npy"))
    removed.unlink()
    with pytest.raises(ConfigError, match=r"lacks 7 items of .* `vembed teach`"):
        run()
    assert teach(settings).computed == 7
    cache_of(settings).require(load_dataset_records(settings["data_path"]))


def test_rows_of_which_one_side_was_taught_are_not_known_for_both(settings):
    teach(settings)
    rows, cache = load_dataset_records(settings["data_path"]), cache_of(settings)
    for path in [*cache.folder.glob("rows-*"), *cache.folder.glob("*.keys.npy")]:
        path.unlink()
    one_side = TeacherCache(cache.folder, cache.facts, ("query",))
    one_side.cover(rows)
    one_side.require(rows)
    with pytest.raises(ConfigError, match="lacks 49 items"):
        cache_of(settings).require(rows)


def test_damaged_knowledge_of_rows_is_named(settings, tmp_path):
    teach(settings)
    (kept,) = (tmp_path / "cache").glob("rows-*")
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(ConfigError, match=f"{kept.name} is damaged.*Remove it"):
        cache_of(settings).require(load_dataset_records(settings["data_path"]))


def test_a_stream_says_it_at_the_row(settings, run, tmp_path):
    teach(settings)
    path = write_rows(tmp_path / "more.jsonl", [*PAIRS[:20], {"query": "new", "positive": "b"}])
    stream = {"streaming": True, "holdout_ratio": 0, "data_path": str(path), "epochs": 1}
    with pytest.raises(DataError, match=rf"{path}:21: query is not in teacher_cache.*vembed teach"):
        run(**stream, max_steps=4)
    teach({**settings, **stream, "max_steps": 4})
    run("again", **stream, max_steps=4)


def test_no_cache(settings, run):
    with pytest.raises(ConfigError, match="is empty. Run `vembed teach`"):
        run()


def test_a_cache_of_other_weights_is_stale(settings, run, tmp_path):
    teach(settings)
    other = tiny_bert(tmp_path / "other", hidden_size=16, seed=4)
    for call in (lambda: run(teacher_model_name=str(other)),
                 lambda: teach({**settings, "teacher_model_name": str(other)})):  # fmt: skip
        with pytest.raises(ConfigError, match="is stale: it was written with the weights"):
            call()


def test_a_cache_of_another_dtype_is_stale(settings):
    teach(settings)
    with pytest.raises(ConfigError, match=r"stale.*teacher_dtype float32 \(now bfloat16\)"):
        teach({**settings, "teacher_dtype": "bfloat16"})


def test_a_teacher_that_is_not_on_this_machine_goes_by_its_name(settings, tmp_path):
    teach(settings)
    path = tmp_path / "cache" / "teacher.json"
    facts = json.loads(path.read_text()) | {"model": "owner/teacher", "revision": "v1"}
    path.write_text(json.dumps(facts))
    named = {**settings, "teacher_model_name": "owner/teacher", "teacher_revision": "v1"}
    assert len(cache_of(named).store) == 49
    with pytest.raises(ConfigError, match=r"stale.*teacher_revision v1 \(now v2\)"):
        cache_of({**named, "teacher_revision": "v2"})


def test_another_folder_is_not_written_into(settings, rows_path):
    with pytest.raises(ConfigError, match="folder of other files"):
        teach({**settings, "teacher_cache": str(rows_path.parent)})


def test_vectors_of_an_unknown_teacher_are_not_added_to(settings, tmp_path):
    teach(settings)
    (tmp_path / "cache" / "teacher.json").unlink()
    with pytest.raises(ConfigError, match=r"teacher.json was removed"):
        teach(settings)


def test_what_a_killed_process_left_of_its_facts_is_no_other_file(settings, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".teacher.json.17").write_text("{")
    assert teach(settings).computed == 49


def test_settings_are_checked_first():
    with pytest.raises(ConfigError, match="teacher_cache: required"):
        teach({"teacher_model_name": "m", "data_path": "d"})


# --- keys


def test_what_decides_a_vector_decides_its_key():
    item = TaughtItem("query", Item("a text"), None)
    assert item.key == TaughtItem("query", Item("a text"), None).key
    others = [
        TaughtItem("positive", Item("a text"), None),
        TaughtItem("query", Item("a text"), ""),
        TaughtItem("query", Item("another"), None),
    ]
    assert len({item.key, *(other.key for other in others)}) == 4
    assert (
        TaughtItem("positive", Item("x"), None).key == TaughtItem("negative", Item("x"), None).key
    )


def test_a_picture_is_read_once_for_its_key(tmp_path, monkeypatch):
    image, reads = as_image_source(write_pictures(tmp_path) / "red.png"), []
    read = type(image).read
    monkeypatch.setattr(type(image), "read", lambda self: reads.append(1) or read(self))
    item = TaughtItem("query", Item(image=image), None)
    assert item.key == item.key
    assert len(reads) == 1


def test_a_picture_that_was_replaced_is_another(settings, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    clip = tiny_clip(tmp_path / "clip")
    settings |= {
        "teacher_model_name": str(clip), "retrieval_mode": "t2i", "image_root": str(pictures),
        "data_path": str(write_rows(tmp_path / "captions.jsonl", mode_rows("t2i"))),
    }  # fmt: skip
    assert teach(settings).computed > 0
    assert teach(settings).computed == 0
    (pictures / "red.png").write_bytes(picture((1, 2, 3)))
    assert teach(settings).computed == 1


# --- teachers of another modality


def test_a_teacher_of_texts_teaches_the_text_side_of_a_student_of_images(
    settings, run, tmp_path, teacher_path
):
    pictures = write_pictures(tmp_path / "pictures")
    mode = {
        "model_name": str(tiny_clip(tmp_path / "clip")), "retrieval_mode": "t2i",
        "image_root": str(pictures), "holdout_ratio": 0, "distillation_loss": {
            "similarity_kl": 1, "embedding": 1, "relational": 1},
        "data_path": str(write_rows(tmp_path / "captions.jsonl", mode_rows("t2i"))),
    }  # fmt: skip
    _, beside = run("beside", **{**mode, "teacher_cache": None})
    teach({**settings, **{k: mode[k] for k in ("retrieval_mode", "image_root", "data_path")}})
    _, stored = run("stored", **mode)
    assert stored[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-4)
    with pytest.raises(ConfigError, match="score needs teacher_scores"):
        run("score", **{**mode, "distillation_loss": "score"})
    with pytest.raises(ConfigError, match="m embeds t, and retrieval_mode i2i has neither"):
        taught_roles(set("t"), TrainConfig(retrieval_mode="i2i", teacher_model_name="m"))


def test_a_vision_language_model_teaches_two_towers(settings, run, tmp_path):
    mode = {
        "retrieval_mode": "t2i", "image_root": str(write_pictures(tmp_path / "pictures")),
        "data_path": str(write_rows(tmp_path / "captions.jsonl", mode_rows("t2i"))),
        "teacher_model_name": str(tiny_qwen2_vl(tmp_path / "vlm")),
    }  # fmt: skip
    student = {"model_name": str(tiny_clip(tmp_path / "clip")), "holdout_ratio": 0, "max_steps": 1,
               "distillation_loss": {"similarity_kl": 1, "embedding": 1}}  # fmt: skip
    _, beside = run("beside", **mode, **student, teacher_cache=None)
    teach({**settings, **mode})
    _, stored = run("stored", **mode, **student)
    assert stored[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-4)
    assert cache_of({**settings, **mode}).roles == ROLES


def test_scores_in_the_rows_need_no_teacher(settings, run, tmp_path):
    rows = [{**p, "negatives": ["the sun is cold"], "teacher_scores": [4.0, -3.0]} for p in PAIRS]
    alone = {
        "teacher_model_name": None, "teacher_cache": None, "distillation_loss": "score",
        "distillation_kwargs": {"score": {"teacher_temperature": 4.0}},
        "data_path": str(write_rows(tmp_path / "scored.jsonl", rows)),
    }  # fmt: skip
    _, lines = run(**alone)
    assert lines[0]["loss_distillation.score"] > 0
    report = json.loads((tmp_path / "run" / "first_step.json").read_text())
    assert report["teacher"]["temperature"] == 4.0
    assert report["teacher"]["softmax"]["evenness"] > 0.5
    plain = write_rows(tmp_path / "plain.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="score needs teacher_scores.*column_mapping"):
        run("plain", **{**alone, "data_path": str(plain)})
