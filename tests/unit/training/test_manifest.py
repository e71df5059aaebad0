"""Folders with a manifest: whole or not there, and any damage is found."""

from __future__ import annotations

import re

import pytest

from vembed.errors import CheckpointError
from vembed.training import manifest
from vembed.training.manifest import (
    MANIFEST,
    commit_folder,
    find_damage,
    read_manifest,
    remove_folder,
    remove_leftovers,
    replaced_folder,
    start_folder,
    write_text_safely,
)


def write(path, text="one", **facts):
    with replaced_folder(path, facts) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.bin").write_bytes(bytes(range(100)))
        (folder / "b.txt").write_text(text)
    return path


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_what_was_written_is_whole(tmp_path):
    folder = write(tmp_path / "x", step=3)
    assert find_damage(folder) is None
    found = read_manifest(folder)
    assert found.facts == {"step": 3}
    assert sorted(found.files) == ["b.txt", "inner/a.bin"]
    assert found.total_bytes == 103


@pytest.mark.parametrize("name", ["b.txt", "inner/a.bin", MANIFEST])
def test_every_kind_of_damage_to_every_file_is_found(tmp_path, name):
    file = write(tmp_path / "x") / name
    whole = file.read_bytes()
    damages = [b"", whole[: len(whole) * 6 // 10], whole[:-1], whole + b"\n"]
    damages += [flipped(whole, bit) for bit in range(0, 8 * len(whole), 5)]  # every bit of a byte
    for damage in damages:
        file.write_bytes(damage)
        found = find_damage(tmp_path / "x")
        assert found is not None
        assert found.file == file
        assert str(found).startswith(f"{file}: ")
    file.write_bytes(whole)
    assert find_damage(tmp_path / "x") is None
    file.unlink()
    assert str(find_damage(tmp_path / "x")) == f"{file}: is missing"


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_FORMAT", 2)
    write(tmp_path / "x")
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="format 2, but this version of vembed reads format 1"
    ):
        read_manifest(tmp_path / "x")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_new_folder_takes_the_place_of_an_earlier_one(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(manifest, "_exchange", lambda *_: False)
    write(tmp_path / "x")
    write(tmp_path / "x", "two")
    assert (tmp_path / "x" / "b.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_leaves_the_earlier_one(tmp_path):
    write(tmp_path / "x")
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "x") as folder:
        (folder / "nowhere" / "b.txt").write_text("half")
    assert (tmp_path / "x" / "b.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_there_is_a_whole_folder_at_any_instant(tmp_path, monkeypatch):
    write(tmp_path / "x")
    seen = []
    exchange = manifest._exchange

    def watched(one, other):
        seen.append([find_damage(one), find_damage(other)])
        swapped = exchange(one, other)
        seen.append([find_damage(one), find_damage(other)])
        return swapped

    monkeypatch.setattr(manifest, "_exchange", watched)
    write(tmp_path / "x", "two")
    assert seen == [[None, None], [None, None]]


def test_leftovers(tmp_path):
    write(tmp_path / "kept")
    for name in (".tmp-a", ".trash-b", ".old-kept"):
        (tmp_path / name).mkdir()
    # Killed between the two renames that stand for an exchange: the earlier one comes back.
    write(tmp_path / "lost").rename(tmp_path / ".old-lost")
    (tmp_path / ".tmp-file").write_text("half")
    for name in (".hidden", ".tmp-users"):
        (tmp_path / name).write_text("the user's")
    ours = re.compile("a|b|kept|lost|file")
    remove_leftovers(tmp_path, ours)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".hidden", ".tmp-users", "kept", "lost"]
    remove_leftovers(tmp_path / "nowhere", ours)


def test_removing_first_takes_the_name_away(tmp_path, monkeypatch):
    write(tmp_path / "x")
    removed = []
    monkeypatch.setattr(manifest.shutil, "rmtree", lambda path, **_: removed.append(path.name))
    remove_folder(tmp_path / "x")
    assert removed[-1] == ".trash-x"
    assert not (tmp_path / "x").exists()


def test_a_file_is_synced_before_its_folder_gets_its_name(tmp_path, monkeypatch):
    synced = []
    fresh = start_folder(tmp_path / "x")
    (fresh / "a").write_text("a")
    sync = manifest._sync
    monkeypatch.setattr(manifest, "_sync", lambda path: (synced.append(path.name), sync(path)))
    commit_folder(fresh, tmp_path / "x")
    assert sorted(synced[:2]) == ["a", MANIFEST]
    assert synced[2:] == [".tmp-x", tmp_path.name]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_earlier_folder_goes_after_the_new_name_is_on_the_disk(
    tmp_path, monkeypatch, can_exchange
):
    if not can_exchange:
        monkeypatch.setattr(manifest, "_exchange", lambda *_: False)
    write(tmp_path / "x")
    events = []
    sync, remove = manifest._sync, manifest.shutil.rmtree
    fresh = start_folder(tmp_path / "x")
    monkeypatch.setattr(manifest, "_sync", lambda path: (events.append(path.name), sync(path)))

    def recorded_remove(path, **settings):
        if path.exists():
            events.append("removed")
        remove(path, **settings)

    monkeypatch.setattr(manifest.shutil, "rmtree", recorded_remove)
    commit_folder(fresh, tmp_path / "x")
    assert events.count("removed") == 1
    assert events[events.index("removed") - 1] == tmp_path.name


def test_the_names_of_new_folders_above_are_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(manifest, "_sync", synced.append)
    start_folder(tmp_path / "run" / "checkpoints" / "x")
    assert set(synced) == {tmp_path, tmp_path / "run"}


def test_text_is_replaced_at_once(tmp_path):
    file = tmp_path / "a.txt"
    write_text_safely(file, "é")
    write_text_safely(file, "two")
    assert file.read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
