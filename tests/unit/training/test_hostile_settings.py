"""Settings from a stranger: every bad file is refused with its line, soon, and runs nothing."""

import gzip
import os
import re
import time

import pytest

from tests.hostile import GOOD_SETTINGS, BadSettings, bad_settings
from vembed.config import RUN_REQUIRES, TrainConfig
from vembed.errors import ConfigError, exit_status
from vembed.training.config import load_and_parse_config, save_config
from vembed.training.yaml_settings import MOST_BYTES

TYPES = {key: str(field.annotation) for key, field in TrainConfig.model_fields.items()}
NUMBERS = [key for key, kind in TYPES.items() if re.fullmatch(r"<class '(int|float)'>", kind)]
SWITCHES = [key for key, kind in TYPES.items() if kind == "<class 'bool'>"]
FILES = bad_settings(NUMBERS, SWITCHES, list(TYPES), 600, seed=5)


def load(path) -> int:
    """What `vembed train` does before anything else."""
    load_and_parse_config(["--config", str(path)], required=RUN_REQUIRES)
    return 0


@pytest.fixture
def refusal(tmp_path, capsys):
    """What is said about a file, once it is refused with status 2 and in time."""

    def read(text) -> str:
        path = tmp_path / "train.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        started = time.process_time()
        assert exit_status(lambda: load(path)) == 2
        assert time.process_time() - started < 10
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert len(said) < 5000
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said)
        return said

    return read


def test_the_base_is_fine(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("\n".join(GOOD_SETTINGS))
    assert load(path) == 0
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(GOOD_SETTINGS).replace("\n ", "\r\n ").encode())
    assert load(path) == 0


def complaint(file: BadSettings, refusal) -> str:
    try:
        said = refusal(file.text)
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return f"{file}: {error!r}"
    places = [int(line) for line in re.findall(r"^  train\.yaml:(\d+):", said, re.MULTILINE)]
    # What is not closed may show only where the next setting begins, or at the end.
    later = file.kind.split(",")[0] in ("not closed", "indented", "no colon", "two values")
    fits = any(line >= file.line for line in places) if later else file.line in places
    return "" if fits else f"{file.kind}, line {file.line} of {file.text[:400]!r}: {said}"


def test_six_hundred_bad_files_are_refused_with_their_line(refusal):
    assert len(FILES) == 600
    assert {file.kind.split(",")[0] for file in FILES} >= {"number", "switch", "unknown", "a tag"}
    wrong = [said for file in FILES if (said := complaint(file, refusal))]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(FILES)}", *wrong[:10]])


def laughs(levels: int) -> str:
    """Aliases of aliases: a few lines that stand for 9 to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize("key", ["", "tags", "loss_kwargs", "data_path"])
def test_aliases_that_stand_for_a_billion_values(refusal, key):
    indented = laughs(10).replace("\n", "\n  ")
    said = refusal(f"{key}:\n  {indented}" if key else laughs(10))
    assert "a value must not be of more than 10,000 values" in said


def test_a_chain_of_aliases_is_a_depth_too(refusal):
    links = [f"  - &a{n} [*a{n - 1}]" for n in range(1, 2000)]
    said = refusal("\n".join(["tags:", "  - &a0 [x]", *links]))
    assert "train.yaml:51: a value must not have more than 50 levels" in said


def test_what_contains_itself_may_not_be_repeated_either(refusal):
    said = refusal("freeze: &a [*a]\ntags: *a\nlr: x")
    assert said.count("cannot contain itself") == 1
    assert "train.yaml:3: lr" in said


def test_aliases_that_stand_for_little_are_fine(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        "report_to: wandb\ntags: &a [x, y]\nfreeze: *a\nloss_kwargs: {<<: {m: 2001-01-01}, n: .inf}"
    )
    config = load_and_parse_config(["--config", str(path)])
    assert config.freeze == ["x", "y"]
    assert config.loss_kwargs == {"m": "2001-01-01", "n": float("inf")}
    save_config(config, tmp_path / "again.yaml")
    assert load_and_parse_config(["--config", str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize(
    "text",
    [
        b"#" * (MOST_BYTES + 1),
        gzip.compress(b"lr: 1"),
        bytes(range(256)),
        "\n".join(f"key{n}: 1" for n in range(5000)).encode(),
        b"lr: [" + b"[" * 100_000,
    ],
)
def test_files_that_are_no_settings(refusal, text):
    assert re.search(r"train\.yaml:\d+:|must not be larger than 1 MB", refusal(text))


def test_a_file_without_end_is_not_read_to_its_end(capsys):
    assert exit_status(lambda: load("/dev/zero")) == 2
    assert "must not be larger" in capsys.readouterr().err


def test_a_folder_or_a_name_that_none_can_have(tmp_path, capsys):
    for path in (tmp_path, "a\0b", os.path.join("x" * 5000, "y")):
        assert exit_status(lambda path=path: load(path)) == 2
        assert "--config: cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["{a: !!int ''}", "{a: !!bool x}", "{a: !!timestamp x}", "{" * 999]
)
def test_values_of_the_command_line(value):
    with pytest.raises(ConfigError, match="--loss_kwargs: expected keys with values"):
        load_and_parse_config(["--loss_kwargs", value])


@pytest.mark.parametrize("value", ["a\0b", "\ud800", ["\x1b[2J"], {"a": "\x07"}, {"\0": 1}])
def test_characters_in_python(value):
    key = {str: "output_dir", list: "tags", dict: "loss_kwargs"}[type(value)]
    with pytest.raises(ConfigError, match=f"{key}: must not contain the character"):
        TrainConfig(**{key: value})
    with pytest.raises(ConfigError, match="must not contain the character"):
        TrainConfig()[key] = value
