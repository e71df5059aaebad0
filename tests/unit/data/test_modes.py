"""Rows of all nine modes, through both data sets, the collator and the loader."""

import json
import re
import tracemalloc

import datasets
import pytest
import torch

from tests.own_encoder import PictureProcessor
from tests.pictures import COLORS, cell, encode, mode_rows, noise, picture, plain, write_pictures
from tests.tiny import write_rows
from vembed.data import Collator, ImageRules, build_dataloader, load_dataset_records, split_holdout
from vembed.data.checking import RowRules, checked_rows
from vembed.data.sources import find_source
from vembed.errors import ConfigError, DataError
from vembed.images import ImageBytes, ImageFile, load_image
from vembed.modes import Item, RetrievalMode, all_modes

MODES = [str(mode) for mode in all_modes()]
NAMES = list(COLORS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and a file of rows for each mode beside them."""
    folder = write_pictures(tmp_path_factory.mktemp("modes"))
    for mode in MODES:
        write_rows(folder / f"{mode}.jsonl", mode_rows(mode))
    return folder


def load(path, mode, **kwargs):
    return load_dataset_records(path, retrieval_mode=mode, **kwargs)


def shape(item):
    """A text, the path of an image, or both: what a cell of a file said."""
    path = None if item.image is None else item.image.path
    if item.text is None or path is None:
        return item.text or path
    return {"text": item.text, "image": path}


def shapes(record):
    return {
        "query": shape(record.query),
        "positives": [shape(item) for item in record.positives],
        "negatives": [shape(item) for item in record.negatives],
    }


def same(batch, other):
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("streaming", [False, True])
def test_records_are_what_the_mode_says(folder, mode, streaming):
    records = list(load(folder / f"{mode}.jsonl", mode, streaming=streaming))
    assert [shapes(record) for record in records] == mode_rows(mode)
    for record in records:
        for place, item in (("query", record.query), ("positive[0]", record.positives[0])):
            if item.image is not None:
                assert item.image.where == f"{record.where}: {place}"
                assert load_image(item.image).size == (24, 16)


@pytest.mark.parametrize("mode", MODES)
def test_both_data_sets_give_the_same_records(folder, mode):
    path = folder / f"{mode}.jsonl"
    stored, stream = load(path, mode), load(path, mode, streaming=True)
    assert list(stream) == list(stored)
    assert stream.fields == stored.fields | {"negative"} == {"query", "positive", "negative"}
    for record, other in zip(stored, stream, strict=True):
        ids = [item.content_id for item in (record.query, *record.positives)]
        assert ids == [item.content_id for item in (other.query, *other.positives)]
    assert stored.query_ids.tolist() == [record.query.content_id for record in stored]


@pytest.mark.parametrize("mode", MODES)
def test_batches_have_the_keys_of_their_modalities(folder, mode):
    batch = Collator(PictureProcessor())(list(load(folder / f"{mode}.jsonl", mode)))
    query, document = mode.split("2")
    for role, modality, count in (
        ("query", query, 8), ("positive", document, 9), ("negative", document, 8),
    ):  # fmt: skip
        assert (f"{role}_input_ids" in batch) == (modality in "tm")
        assert (f"{role}_pixel_values" in batch) == (modality in "im")
        assert len(batch[f"{role}_attention_mask"]) == len(batch[f"ids_{role}"]) == count
        if modality in "im":
            assert batch[f"{role}_pixel_values"].shape == (count, 3, 4, 4)
    assert batch["counts_positive"].tolist() == [2, *[1] * 7]
    assert batch["counts_negative"].tolist() == [1, 0, 2, 1, 0, 3, 1, 0]
    # A positive that is another row's too, and a row's own content on both sides.
    assert batch["ids_positive"][1] == batch["ids_positive"][8] != batch["ids_positive"][0]
    if query == document:
        assert batch["ids_query"][0] == batch["ids_positive"][0]


@pytest.mark.parametrize("mode", ["t2i", "i2t", "m2i"])
@pytest.mark.parametrize("streaming", [False, True])
def test_batches_do_not_depend_on_workers(folder, mode, streaming):
    def batches(num_workers):
        loader = build_dataloader(
            load(folder / f"{mode}.jsonl", mode, streaming=streaming),
            Collator(PictureProcessor()), batch_size=3, seed=1, num_workers=num_workers,
            shuffle_buffer_size=5,
        )  # fmt: skip
        return list(loader)

    plain_batches, from_workers = batches(0), batches(2)
    assert [len(batch["row_index"]) for batch in plain_batches] == [3, 3, 2]
    for batch, other in zip(plain_batches, from_workers, strict=True):
        same(batch, other)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_breaks_later_is_named(tmp_path, streaming, num_workers):
    folder = write_pictures(tmp_path)
    path = write_rows(folder / "rows.jsonl", mode_rows("t2i"))
    dataset = load(path, "t2i", streaming=streaming)
    (folder / "blue.png").write_bytes(picture("blue")[:-20])
    loader = build_dataloader(
        dataset, Collator(PictureProcessor()), batch_size=2, seed=1, num_workers=num_workers,
        shuffle=False,
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        list(loader)
    assert re.match(
        rf"{path}:\d: (posi|nega)tive\[\d\]: an image must be whole. Received: 'blue.png', a PNG",
        str(caught.value),
    )


# --- where rows come from


def flat(mode):
    """The rows of a mode without lists and objects, as a CSV file has them."""
    query, document = mode.split("2")
    rows = []
    for number, name in enumerate(NAMES):
        row = {}
        for field, modality, color in (
            ("query", query, name),
            ("positive", document, name),
            ("negative", document, NAMES[number - 1]),
        ):
            value = cell(modality, color)
            if modality == "m":
                row |= {f"{field}_{part}": value[part] for part in value}
            else:
                row[field] = value
        rows.append(row)
    return rows


@pytest.mark.parametrize("mode", MODES)
def test_every_format_gives_the_same_rows(folder, mode):
    table = datasets.Dataset.from_list(flat(mode))
    table.to_csv(folder / f"{mode}.csv", index=False)
    table.to_csv(folder / f"{mode}.tsv", index=False, sep="\t")
    table.to_parquet(folder / f"{mode}.parquet")
    write_rows(folder / f"{mode}-flat.jsonl", flat(mode))
    expected = load(folder / f"{mode}-flat.jsonl", mode)
    assert shape(expected[0].query) == cell(mode[0], "red")
    assert [shape(n) for n in expected[1].negatives] == [cell(mode[2], "red")]
    for ending in ("csv", "tsv", "parquet"):
        dataset = load(folder / f"{mode}.{ending}", mode)
        assert [shapes(record) for record in dataset] == [shapes(record) for record in expected]
        assert dataset.fingerprint == expected.fingerprint


def embedded(names, feature):
    """Rows of texts and pictures that the table holds itself."""
    rows = {"caption": [f"the {n} one" for n in names], "image": [picture(n) for n in names]}
    if feature == "Image":
        rows["image"] = [{"bytes": data, "path": "a.png"} for data in rows["image"]]
        types = {"caption": datasets.Value("string"), "image": datasets.Image()}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(types))
    return datasets.Dataset.from_dict(rows)


@pytest.mark.parametrize("feature", ["Image", "bytes"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_the_table_holds(tmp_path, monkeypatch, feature, streaming):
    table = embedded(NAMES, feature)
    table.to_parquet(tmp_path / "f.parquet")
    table.save_to_disk(tmp_path / "arrow")
    datasets.Dataset.cleanup_cache_files(table)

    def load_dataset(name, config, *, split, streaming):
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    decoded = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args: decoded.append(args))
    for path in (tmp_path / "f.parquet", tmp_path / "arrow", "owner/name"):
        records = list(load(str(path), "t2i", streaming=streaming))
        assert [record.query.text for record in records] == table["caption"][:]
        images = [record.positives[0].image for record in records]
        assert [load_image(image).getpixel((0, 0)) for image in images] == list(COLORS.values())
        assert all(isinstance(image, ImageBytes) for image in images)
        assert images[0] == ImageBytes(picture("red"))
    assert decoded == []


def test_lists_of_images_and_objects_of_bytes(tmp_path):
    rows = [{"query": {"text": "q", "image": picture("red")},
             "positives": [{"text": n, "image": picture(n)} for n in NAMES[:2]]}] * 2  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "f.parquet")
    record = load(tmp_path / "f.parquet", "m2m")[1]
    assert [(i.text, load_image(i.image).getpixel((0, 0))) for i in record.positives] == [
        (n, COLORS[n]) for n in NAMES[:2]
    ]
    features = datasets.Features(
        {"query": datasets.Value("string"), "positives": [datasets.Image()]}
    )
    images = [[plain("red"), plain("blue")]]
    table = datasets.Dataset.from_dict({"query": ["q"], "positives": images}, features=features)
    table.to_parquet(tmp_path / "g.parquet")
    table.save_to_disk(tmp_path / "arrow")
    for name in ("g.parquet", "arrow"):
        (record,) = load(tmp_path / name, "t2i")
        pixels = [load_image(item.image).getpixel((0, 0)) for item in record.positives]
        assert pixels == [COLORS["red"], COLORS["blue"]]


def test_a_hub_set_that_names_files_needs_a_folder(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"caption": ["a"], "image": ["red.png"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(DataError, match=r"image: an image path needs a folder .*Set image_root"):
        load("owner/name", "t2i")
    rules = ImageRules(str(write_pictures(tmp_path)))
    assert load("owner/name", "t2i", images=rules)[0].positives[0].image.path == "red.png"
    outside = datasets.Dataset.from_list(
        [{"caption": "a", "image": {"bytes": None, "path": "/etc/passwd"}}]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: outside)
    with pytest.raises(DataError, match="owner/name:1: image: an image must lie under"):
        load("owner/name", "t2i", images=rules)


def test_beir_folders_with_images(tmp_path):
    write_pictures(tmp_path)
    rows = [{"_id": n, "text": f"the {n} one", "image": f"{n}.png"} for n in NAMES]
    write_rows(tmp_path / "queries.jsonl", rows)
    write_rows(tmp_path / "corpus.jsonl", [{**row, "title": "T"} for row in rows])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("".join(f"{n}\t{n}\t1\n" for n in NAMES))
    for mode in MODES:
        record = load(tmp_path, mode)[2]
        assert shape(record.query) == cell(mode[0], "blue")
        document = cell(mode[2], "blue")
        titled = {"t": "T the blue one", "m": {"text": "T the blue one", "image": "blue.png"}}
        assert [shape(item) for item in record.positives] == [titled.get(mode[2], document)]


# --- image_root


def test_paths_are_relative_to_the_data_file_or_to_image_root(tmp_path, monkeypatch):
    pictures = write_pictures(tmp_path / "pictures")
    path = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "positive": "red.png"}] * 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: positive\[0\]: there is no such image"):
        load(path, "t2i")
    assert load(path, "t2i", images=ImageRules(str(pictures)))[0].positives[0].image.path
    spec = {"path": str(path), "image_root": str(pictures)}
    assert load(spec, "t2i")[0].positives[0].image.path == "red.png"
    # Read in a worker, when the process may be elsewhere.
    monkeypatch.chdir(tmp_path)
    dataset = load("rows.jsonl", "t2i", images=ImageRules("pictures"))
    monkeypatch.chdir("/")
    assert load_image(dataset[0].positives[0].image).size == (24, 16)
    with pytest.raises(ConfigError, match="image_root: there is no folder '/nowhere'"):
        load(path, "t2i", images=ImageRules("/nowhere"))


def test_two_sets_with_the_same_names_are_told_apart(tmp_path):
    for name in ("a", "b"):
        write_pictures(tmp_path / name)
        write_rows(tmp_path / name / "rows.jsonl", mode_rows("t2i"))
    paths = [str(tmp_path / name / "rows.jsonl") for name in ("a", "b")]
    first, second = (load(paths, "t2i")[i].positives[0] for i in (0, 8))
    assert first.image.path == second.image.path == "red.png"
    assert (first.image.identity, second.image.identity) == ("a/red.png", "b/red.png")
    assert first.content_id != second.content_id
    # One set alone: the same wherever it lies.
    assert (
        load(paths[0], "t2i")[0].positives[0].content_id
        == Item(None, ImageFile("red.png", "/elsewhere")).content_id
    )


def test_holding_out_goes_by_the_image(tmp_path):
    write_pictures(tmp_path)
    rows = [{"query": f"{NAMES[i % 8]}.png", "positive": f"text {i}"} for i in range(32)]
    dataset = load(write_rows(tmp_path / "f.jsonl", rows), "i2t")
    train, holdout = split_holdout(dataset, 0.3)
    asked = [{record.query.image.path for record in side} for side in (train, holdout)]
    assert all(asked)
    assert not asked[0] & asked[1]


def test_a_text_that_looks_like_a_path_is_a_text(tmp_path):
    row = {"query": "TCP/IP or images/a.png", "positive": "http://169.254.169.254/"}
    (record,) = load(write_rows(tmp_path / "f.jsonl", [row]), "t2t")
    assert (record.query, record.positives[0]) == (Item(row["query"]), Item(row["positive"]))


# --- what is refused


@pytest.mark.parametrize(
    ("mode", "change", "expected"),
    [
        ("t2i", {"positives": ["../x.png"]}, "positives[0]: an image path must not contain '..'"),
        ("t2i", {"positives": ["/etc/passwd"]}, "positives[0]: an image must lie under"),
        ("i2t", {"query": "http://169.254.169.254/a.png"}, "query: an image path must be a file"),
        ("i2t", {"query": "file:///etc/passwd"}, "query: an image path must be a file, not a URL"),
        ("i2t", {"query": "a\0.png"}, "query: must not contain NUL characters"),
        ("i2t", {"query": "\udcff.png"}, "query: must be valid Unicode"),
        ("i2t", {"query": " "}, "query: an image path must not be empty"),
        ("i2t", {"query": 7}, "query: an image is expected: a path, or bytes. Received: 7"),
        ("i2t", {"query": {"text": "a"}}, "query: an image is expected"),
        ("i2t", {"query": ["red.png"]}, "query: an image is expected"),
        ("i2t", {"query": None}, "query: must not be empty. Received: null"),
        ("i2t", {"query": "gone.png"}, "query: there is no such image file. Received: 'gone.png'"),
        ("i2t", {"query": "."}, "query: an image must be a regular file"),
        ("i2t", {"query": "text.jpg"}, "query: an image must be one of JPEG, PNG"),
        ("i2t", {"query": "empty.png"}, "query: an image must not be empty"),
        ("i2t", {"query": "cut.jpg"}, "query: an image must be whole"),
        ("t2i", {"negatives": ["red.png", "cut.jpg"]}, "negative[1]: an image must be whole"),
        ("m2t", {"query": "red.png"}, "query: an object with text and image is expected"),
        ("m2t", {"query": {"text": "a"}}, "query: an object with text and image is expected"),
        ("m2t", {"query": {"text": "", "image": "red.png"}}, "query.text: must not be empty"),
        ("m2t", {"query": {"text": "a", "image": "../x"}}, "query.image: an image path must not"),
        ("m2t", {"query": {"text": "a", "image": None}}, "query.image: an image is expected"),
        ("t2m", {"positives": [{"text": "a", "image": "gone.png"}]}, "positive[0]: there is no"),
    ],
)
def test_cells_that_are_refused(tmp_path, mode, change, expected):
    write_pictures(tmp_path)
    (tmp_path / "text.jpg").write_text("<!DOCTYPE html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(encode(plain(), "JPEG")[:-40])
    rows = mode_rows(mode)
    rows[2] |= change
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        load(path, mode)
    assert str(caught.value).startswith(f"{path}:3: {expected}")
    assert "\n" not in str(caught.value)
    # A stream finds the same, at the latest when the image is decoded.
    with pytest.raises(DataError) as caught:
        [Collator(PictureProcessor())([record]) for record in load(path, mode, streaming=True)]
    assert str(caught.value).startswith(f"{path}:3: {expected}")


def test_all_bad_images_of_a_file_are_named_or_counted(tmp_path):
    rows = [{"query": "q", "positive": f"{i}.png"} for i in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(path, "t2i")
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    for number, line in enumerate(lines[:8]):
        rest = f"{path}:{number + 1}: positive[0]: there is no such image file. Received: "
        assert line.strip().startswith(f"{rest}'{number}.png'")
    assert lines[8] == "  and 4 more problems: 4 x positive: there is no such image file"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_pixel_limit_and_the_check_of_every_pixel(tmp_path, streaming):
    from tests.pictures import flipped_png

    (tmp_path / "wide.png").write_bytes(picture(size=(40, 30)))
    (tmp_path / "flipped.png").write_bytes(flipped_png(size=(30, 30)))
    path = write_rows(tmp_path / "f.jsonl", [{"image": "wide.png", "label": 1}] * 3)
    kwargs = {"streaming": streaming}
    decoded = ImageRules(max_pixels=1199, check="decode")
    with pytest.raises(DataError, match=r"f\.jsonl:1: query: an image must not have more than 1,1"):
        list(load(path, "i2i", images=decoded, **kwargs))
    record = next(iter(load(path, "i2i", images=ImageRules(max_pixels=1200), **kwargs)))
    assert record.query.image.limits.max_pixels == 1200
    path = write_rows(tmp_path / "g.jsonl", [{"image": "flipped.png", "label": 1}] * 3)
    assert len(list(load(path, "i2i", **kwargs))) == 3
    with pytest.raises(DataError, match=r"g\.jsonl:1: query: an image must be whole"):
        list(load(path, "i2i", images=ImageRules(check="decode"), **kwargs))


def test_images_of_a_table_are_not_kept_in_memory(tmp_path):
    pictures = [encode(noise(seed=number), "BMP") for number in range(1000)]
    table = {"query": [str(number) for number in range(1000)], "positive": pictures}
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(table).to_parquet(str(path), batch_size=50)
    size = sum(map(len, pictures))
    del pictures, table
    source = find_source(str(path), split="train", own_split=False, streaming=False)
    rules = RowRules(RetrievalMode.parse("t2i"), image_check="header")
    tracemalloc.start()
    try:
        assert sum(1 for _ in checked_rows(source, rules)) == 1000
        assert tracemalloc.get_traced_memory()[1] < size / 3
    finally:
        tracemalloc.stop()
