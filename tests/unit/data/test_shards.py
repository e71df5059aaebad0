"""Tar shards in the layout of webdataset."""

import io
import json
import os
import pickle
import random
import tarfile

import pytest

from tests.own_encoder import PictureProcessor
from tests.pictures import COLORS, picture
from vembed.data import Collator, ImageRules, build_dataloader, load_dataset_records
from vembed.data.problems import RowProblem
from vembed.data.shards import read_shards
from vembed.data.sources import find_source
from vembed.errors import ConfigError, DataError
from vembed.images import ImageInTar, load_image

NAMES = list(COLORS)


def write_shard(path, members, **kwargs):
    """A tar file of (name, bytes) pairs; a TarInfo stands for itself."""
    with tarfile.open(path, "w", **kwargs) as shard:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder, *, count=2):
    """All colours over some shards: `000.png`, `000.txt`, `000.json`."""
    for shard in range(count):
        members = []
        for number, name in list(enumerate(NAMES))[shard::count]:
            row = {"color": name, "text": "not this one"}
            members += [
                (f"data/{number:03}.json", json.dumps(row).encode()),
                (f"data/{number:03}.png", picture(name)),
                (f"data/{number:03}.txt", f"the {name} one".encode()),
            ]
        write_shard(folder / f"pairs-{shard}.tar", members)
    return str(folder / "pairs-*.tar")


def columns(path):
    return [row.values for row in read_shards([str(path)])]


def load(path, mode="t2i", **kwargs):
    return load_dataset_records(path, retrieval_mode=mode, **kwargs)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pattern_of_shards_is_rows_of_images_and_texts(tmp_path, streaming):
    pattern = write_shards(tmp_path)
    records = list(load(pattern, streaming=streaming))
    ordered = NAMES[::2] + NAMES[1::2]
    assert [record.query.text for record in records] == [f"the {name} one" for name in ordered]
    images = [record.positives[0].image for record in records]
    assert [load_image(i).getpixel((0, 0)) for i in images] == [COLORS[name] for name in ordered]
    assert [r.where for r in records][3:5] == [
        f"{tmp_path}/pairs-0.tar:4",
        f"{tmp_path}/pairs-1.tar:1",
    ]
    assert images[4].where == f"{tmp_path}/pairs-1.tar:1: positive[0]"
    assert images[4].identity == "pairs-1.tar/data/001.png"
    # Where the picture lies, not the picture.
    assert len(pickle.dumps(records)) < 5000
    assert list(load(pattern, streaming=not streaming)) == records
    assert [r.query.text for r in load(pattern, column_mapping={"query": "color"})] == ordered
    assert len(list(load(str(tmp_path / "pairs-1.tar"), "i2t", streaming=streaming))) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_read_members_in_places(tmp_path, streaming):
    dataset = load(write_shards(tmp_path), streaming=streaming)
    seen = []
    for num_workers in (0, 2):
        loader = build_dataloader(
            dataset, Collator(PictureProcessor()), batch_size=3, seed=0, num_workers=num_workers
        )
        seen.append([batch["positive_pixel_values"].sum().item() for batch in loader])
    assert seen[0] == seen[1]


def test_members_are_columns(tmp_path):
    path = write_shard(
        tmp_path / "a.tar",
        [
            ("./", b""),
            ("a/7.query.txt", b"ask"),
            ("a/7.positive.JPEG", b"1"),
            ("a/7.negative_1.png", b"22"),
            ("a/7.cls", b"3\n"),
            ("a/7.npy", b"no column"),
            ("a/._7.png", b"hidden"),
            ("a/7", b"no ending"),
            ("b/7.jpg", b"another sample"),
            ("b/7.json", b' {"caption": "c", "image": "of.jpg"}'),
            ("c", b""),
        ],
    )
    first, second = columns(path)
    assert list(first) == ["__key__", "query", "positive", "negative_1", "label"]
    assert (first["query"], first["label"], first["__key__"]) == ("ask", "3", "a/7")
    assert [first[name].read() for name in ("positive", "negative_1")] == [b"1", b"22"]
    assert first["positive"] == ImageInTar(str(path), "a/7.positive.JPEG", 2048, 1)
    assert second["caption"] == "c"
    assert second["image"].member == "b/7.jpg"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("1.jpg", b""), ("1.png", b"")], "a sample must have one image only. Received: '1.png'"),
        ([("1.json", b"[1]")], "line must be one JSON object. Received: '1.json' (a text): [1]"),
        ([("1.json", b" ")], "must be one JSON object. Received: '1.json'"),
        ([("1.txt", b"\xff")], "line must be UTF-8. Received: '1.txt'"),
        ([(tarfile.TarInfo("1.jpg"), b"")], ""),
    ],
)
def test_samples_that_are_refused(tmp_path, members, expected):
    if not expected:
        members[0][0].type, members[0][0].linkname = tarfile.SYMTYPE, "/etc/passwd"
        expected = "a member must be a plain file. Received: '1.jpg'"
    (values,) = columns(write_shard(tmp_path / "a.tar", members))
    assert isinstance(values, RowProblem)
    assert expected in values.describe_at("a.tar:1")


def test_images_in_shards_are_checked(tmp_path):
    members = [
        ("1.jpg", picture(format="JPEG")),
        ("1.txt", b"a"),
        ("2.jpg", b"text"),
        ("2.txt", b"b"),
    ]
    path = write_shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError) as caught:
        load(str(path))
    assert str(caught.value).startswith(
        f"{path}:2: positive[0]: an image must be one of JPEG, PNG, WEBP, GIF, BMP. "
        "Received: '2.jpg' in 'a.tar', which begins with b'text'"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_have_limits_and_are_told_apart(tmp_path, streaming):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, count=1)
    paths = [str(tmp_path / name / "pairs-0.tar") for name in ("a", "b")]
    rules = ImageRules(max_pixels=1000)
    images = [r.positives[0].image for r in load(paths, images=rules, streaming=streaming)]
    assert images[0].identity == "a/pairs-0.tar/data/000.png"
    assert images[8].identity == "b/pairs-0.tar/data/000.png"
    assert {image.limits.max_pixels for image in images} == {1000}
    with pytest.raises(
        DataError, match=r"pairs-0\.tar:1: positive\[0\]: an image must not have mo"
    ):
        list(load(paths[0], images=ImageRules(max_pixels=9, check="decode"), streaming=streaming))


def test_names_that_are_no_unicode(tmp_path):
    members = [("\udcff.png", picture()), ("\udcff.txt", b"a")]
    path = write_shard(tmp_path / "a.tar", members, errors="surrogateescape")
    (record,) = load(str(path))
    assert record.positives[0].image.identity == "a.tar/\\xff.png"
    assert load_image(record.positives[0].image).size == (24, 16)


def test_files_that_are_no_shards(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("1.jpg", picture() * 50), ("1.txt", b"a")])
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:2000])
    (tmp_path / "text.tar").write_text("text")
    (tmp_path / "empty.tar").write_bytes(b"")
    write_shard(tmp_path / "none.tar", [])
    with tarfile.open(tmp_path / "gzip.tar", "w:gz") as shard:
        shard.addfile(tarfile.TarInfo("1.txt"))
    for name in ("cut", "text", "empty", "gzip"):
        with pytest.raises(DataError, match=rf"{name}\.tar: must be a whole tar file, not compr"):
            load(str(tmp_path / f"{name}.tar"))
    with pytest.raises(DataError, match="must have rows"):
        load(str(tmp_path / "none.tar"))
    (tmp_path / "a.tgz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a compressed tar cannot be read in places: unpack it"):
        load(str(tmp_path / "a.tgz"))


def test_patterns_without_files(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        load(str(tmp_path / "no-*.tar"))
    with pytest.raises(DataError, match=r"Write a pattern as in shards-\*\.tar"):
        load(str(tmp_path / "a-{000..009}.tar"))
    with pytest.raises(ConfigError, match="a single file has no splits"):
        load({"path": write_shards(tmp_path), "split": "train"})


def test_any_mutation_of_a_shard_is_read_or_refused(tmp_path):
    write_shards(tmp_path, count=1)
    data = (tmp_path / "pairs-0.tar").read_bytes()
    chooser = random.Random(0)
    path = tmp_path / "broken.tar"
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(3):
            header = 512 * chooser.randrange(len(broken) // 512)
            broken[header + chooser.randrange(160)] = chooser.randrange(256)
        path.write_bytes(bytes(broken[: chooser.choice([len(broken), len(broken) // 2])]))
        try:
            list(load(str(path), streaming=True, images=ImageRules(check="decode")))
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path}:")  # noqa: PT017
    assert 50 < refused < 150


def test_a_shard_that_changed_is_read_again(tmp_path):
    pattern = write_shards(tmp_path)
    first = find_source(pattern, split="train", own_split=False, streaming=False)
    assert len(load(pattern)) == 8
    write_shard(tmp_path / "pairs-1.tar", [("1.png", picture()), ("1.txt", b"new")])
    again = find_source(pattern, split="train", own_split=False, streaming=False)
    assert first.stamp != again.stamp
    assert load(pattern)[4].query.text == "new"
    assert all(os.path.isabs(file) for file in again.files)
