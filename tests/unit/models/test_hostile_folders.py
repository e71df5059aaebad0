"""Model folders that are damaged or made to harm are read, or refused in our words."""

import json
import random
import shutil

import pytest

from tests.hostile import mutated, nested
from tests.tiny import tiny_sentence_transformer
from vembed.errors import VembedError
from vembed.models import load_encoder

VALUES = ["x", -1, [], {"a": 1}, True, 1.5, 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_sentence_transformer(tmp_path_factory.mktemp("whole") / "model", dense_features=8)


@pytest.fixture
def refusals(whole, tmp_path):
    """How often a folder is refused of those that a function makes of a file's bytes."""

    def count(change, *, files="*") -> tuple[int, int]:
        refused = total = 0
        for file in sorted(path for path in whole.rglob(files) if path.is_file()):
            for data in change(file.read_bytes()):
                folder = tmp_path / str(total)
                shutil.copytree(whole, folder)
                (folder / file.relative_to(whole)).write_bytes(data)
                total += 1
                try:
                    load_encoder(str(folder))
                except VembedError as error:
                    refused += 1
                    assert len(str(error)) < 3000  # noqa: PT017 - told shortly
                shutil.rmtree(folder)
        return refused, total

    return count


def test_damaged_files(refusals):
    draw = random.Random(4)

    def change(data: bytes) -> list[bytes]:
        cut = data[: len(data) * 6 // 10]
        return [b"", cut, b"\xff" + data, mutated(data, draw), b"[1]", b"null"]

    refused, total = refusals(change)
    assert refused > total // 2


def test_any_depth(refusals):
    refused, total = refusals(
        lambda data: [nested(n).encode() for n in (900, 100_000)], files="*.json"
    )
    assert refused > total // 2


def test_values_of_other_types(refusals):
    draw = random.Random(5)

    def change(data: bytes) -> list[bytes]:
        settings = json.loads(data)
        if not isinstance(settings, dict):
            return []
        keys = draw.sample(sorted(settings), min(6, len(settings)))
        return [json.dumps(settings | {key: draw.choice(VALUES)}).encode() for key in keys]

    refused, _ = refusals(change, files="*config*.json")
    assert refused > 10
