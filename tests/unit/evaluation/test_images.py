"""Evaluation tasks of items with images: rows and BEIR folders, in every mode."""

import json

import numpy as np
import pytest

from tests.pictures import COLORS, flipped_png, huge_png, mode_rows, picture, write_pictures
from tests.tiny import write_rows
from vembed.data import ImageRules, Quarantine
from vembed.errors import DataError, VembedError
from vembed.evaluation import (
    GradedPairsTask,
    LabelledTask,
    RetrievalTask,
    load_eval_task,
    moved_queries,
    read_beir,
    write_beir,
)
from vembed.images import load_image
from vembed.modes import Item, all_modes

MODES = [str(mode) for mode in all_modes()]
NAMES = list(COLORS)


def colour_encode(items, role):
    """A perfect model of the pictures and of their captions."""
    rows = []
    for item in items:
        named = [COLORS[name] for name in NAMES if item.text and name in item.text.split()]
        seen = [] if item.image is None else [load_image(item.image).getpixel((0, 0))]
        rows.append(np.mean([*named, *seen], axis=0) - 120)
    return np.array(rows, dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def beir(folder, mode):
    """The items of the pictures as a BEIR folder."""
    from vembed.images import ImageFolder

    def item(modality, name):
        text = None if modality == "i" else f"the {name} one"
        image = None if modality == "t" else ImageFolder(str(folder)).find(f"{name}.png")
        return Item(text, image)

    query, document = mode.split("2")
    queries = {f"q-{name}": item(query, name) for name in NAMES}
    corpus = {f"d-{name}": item(document, name) for name in NAMES}
    write_beir(folder / mode, queries, corpus, {f"q-{n}": {f"d-{n}": 1} for n in NAMES})
    return queries, corpus


@pytest.mark.parametrize("mode", MODES)
def test_beir_folders_in_every_mode(folder, mode):
    queries, corpus = beir(folder, mode)
    rules = ImageRules(str(folder))
    data = read_beir(folder / mode, retrieval_mode=mode, images=rules)
    assert (data.queries, data.corpus) == (queries, corpus)
    task = load_eval_task(folder / mode, retrieval_mode=mode, images=rules)
    assert isinstance(task, RetrievalTask)
    assert task.describe() == {"queries": 8, "documents": 8, "relevant pairs": 8}
    assert task.evaluate(colour_encode).metrics["recall@1"] == 1
    image = data.queries["q-red"].image
    if image is not None:
        assert image.where == f"{folder / mode}/queries.jsonl:1: image"


@pytest.mark.parametrize("mode", MODES)
def test_rows_in_every_mode(folder, mode):
    path = write_rows(folder / f"{mode}.jsonl", mode_rows(mode))
    task = load_eval_task(path, retrieval_mode=mode)
    assert isinstance(task, RetrievalTask)
    assert task.describe()["documents"] == 8
    result = task.evaluate(colour_encode)
    assert result.metrics["recall@1"] > 0.9
    shown = moved_queries(result, result)
    assert shown.unchanged_count == 8


def test_moved_queries_show_where_the_image_is(folder):
    path = write_rows(folder / "moved.jsonl", mode_rows("i2i"))
    task = load_eval_task(path, retrieval_mode="i2i")
    signs = {"query": -1, "document": 1}
    before = task.evaluate(lambda items, role: colour_encode(items, role) * signs[role])
    moved = moved_queries(before, task.evaluate(colour_encode))
    assert moved.improved[0].query in {f"'{name}.png'" for name in NAMES}
    assert moved.improved[0].top_after == moved.improved[0].query


def test_labelled_and_graded_images(folder):
    rows = [{"image": f"{name}.png", "label": i % 2} for i, name in enumerate(NAMES)]
    task = load_eval_task(write_rows(folder / "labels.jsonl", rows), retrieval_mode="i2i")
    assert isinstance(task, LabelledTask)
    assert task.describe() == {"images": 8, "labels": 2}
    assert task.evaluate(colour_encode).items == "images"
    rows = [{"image1": f"{n}.png", "image2": "red.png", "score": i} for i, n in enumerate(NAMES)]
    task = load_eval_task(write_rows(folder / "scores.jsonl", rows), retrieval_mode="i2i")
    assert isinstance(task, GradedPairsTask)
    assert np.isfinite(task.evaluate(colour_encode).metrics["spearman"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"image": "../x.png"}, "image: an image path must not contain '..'"),
        ({"image": "gone.png"}, "image: there is no such image file"),
        ({"image": "bomb.png"}, "image: an image must not have more than 50,000,000 pixels"),
        ({}, "image: an image is expected"),
        ({"image": "flipped.png"}, None),
    ],
)
def test_bad_images_of_a_beir_folder(tmp_path, line, expected):
    write_pictures(tmp_path)
    (tmp_path / "bomb.png").write_bytes(huge_png(9000, 9000))
    (tmp_path / "flipped.png").write_bytes(flipped_png())
    rows = [{"_id": "a", "text": "", "image": "red.png"}, {"_id": "b", "text": "", **line}]
    write_rows(tmp_path / "corpus.jsonl", rows)
    write_rows(tmp_path / "queries.jsonl", [{"_id": "q", "text": "red"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q\ta\t1\n")
    rules = ImageRules() if expected else ImageRules(check="decode")
    with pytest.raises(DataError) as caught:
        load_eval_task(tmp_path, retrieval_mode="t2i", images=rules)
    wanted = expected or "image: an image must be whole"
    assert str(caught.value).startswith(f"{tmp_path}/corpus.jsonl:2: {wanted}")
    if expected is None:
        assert load_eval_task(tmp_path, retrieval_mode="t2i")


def test_bad_rows_of_a_test_set(folder):
    rows = mode_rows("t2i")
    rows[0]["positives"] = ["gone.png"]
    path = write_rows(folder / "bad.jsonl", rows)
    with pytest.raises(DataError, match=r"bad\.jsonl:1: positive\[0\]"):
        load_eval_task(path, retrieval_mode="t2i")
    quarantine = Quarantine(1)
    task = load_eval_task(path, retrieval_mode="t2i", quarantine=quarantine)
    assert task.describe()["queries"] == 7
    assert len(quarantine.records) == 1


def test_the_folder_of_the_rows_may_be_another(folder, tmp_path):
    write_rows(tmp_path / "f.jsonl", mode_rows("i2t"))
    task = load_eval_task(
        tmp_path / "f.jsonl", retrieval_mode="i2t", images=ImageRules(str(folder))
    )
    assert task.evaluate(colour_encode).metrics["recall@1"] > 0.9


def test_what_broke_is_named_by_its_image(folder):
    path = write_rows(folder / "nan.jsonl", mode_rows("i2i"))
    task = load_eval_task(path, retrieval_mode="i2i")
    with pytest.raises(VembedError, match=r"the first is \"'red\.png'\""):
        task.evaluate(lambda items, role: colour_encode(items, role) * np.nan)


def test_a_beir_folder_holds_images_as_files(tmp_path):
    from vembed.images import ImageBytes

    item = Item(None, ImageBytes(picture()))
    with pytest.raises(DataError, match="holds images as files"):
        write_beir(tmp_path, {"q": "a"}, {"d": item}, {"q": {"d": 1}})
    write_beir(tmp_path, {"q": "a"}, {"d": Item("b")}, {"q": {"d": 1}})
    assert "image" not in json.loads((tmp_path / "corpus.jsonl").read_text())
