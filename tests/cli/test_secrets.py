"""A planted secret is in no file of a run, in no output, and in nothing that trackers keep."""

import json
import random
import string
import subprocess

import pytest
import yaml

from tests.tiny import PAIRS
from vembed.cli import main

DRAW = random.Random(11)


def planted(prefix: str = "") -> str:
    return prefix + "".join(DRAW.choices(string.ascii_letters + string.digits, k=34))


BY_FORM, BY_NAME, IN_URL = planted("hf_"), planted(), planted()
ENVIRONMENT = {"HF_TOKEN": planted(), "WANDB_API_KEY": planted(), "MY_DB_PASSWORD": planted()}
PLANTED = [BY_FORM, BY_NAME, IN_URL, *ENVIRONMENT.values()]

OWN = """
from vembed.data.batch_plans import RandomBatches

class Plan(RandomBatches):
    def __init__(self, dataset, batch_size, *, api_key, **options):
        super().__init__(dataset, batch_size, **options)
"""


@pytest.fixture
def config_file(tmp_path, tiny_st_path):
    """Settings that hold a secret wherever one can be, and work."""
    rows = tmp_path / f"rows-{BY_FORM}.jsonl"
    bad = {"query": "a", "positive": f"https://me:{IN_URL}@example.org/x?a=\0"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS, bad]))
    (tmp_path / "own.py").write_text(OWN)
    settings = {
        "model_name": str(tiny_st_path),
        "data_path": rows.name,
        "on_bad_record": "quarantine",
        "max_bad_records": 1,
        "batch_sampler": "own:Plan",
        "device": "cpu",
        "batch_size": 4,
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "output_dir": "run",
        "report_to": ["wandb", "tensorboard", "swanlab"],
        "project_name": f"p-{BY_FORM}",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    return "train.yaml"


def found(text: str) -> list[str]:
    return [secret for secret in PLANTED if secret in text]


def test_a_run_leaves_none_behind(vembed, tmp_path, config_file):
    remote = f"https://me:{IN_URL}@example.org/code.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    tags = [BY_FORM, f"'https://me:{IN_URL}@example.org'", *list(ENVIRONMENT.values())[::2]]
    done = vembed(
        "train", "--config", config_file, "--config_override",
        f"batch_sampler_kwargs={{api_key: {BY_NAME}}}",
        f"tags=[{', '.join(tags)}]",
        "--run_name", f"run of {ENVIRONMENT['WANDB_API_KEY']}",
        PYTHONPATH=str(tmp_path), WANDB_MODE="offline", SWANLAB_MODE="offline",
        WANDB_SILENT="true", **ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not found(done.stdout + done.stderr)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names > {"config.yaml", "vembed_config.json", "quarantine.jsonl", "first_step.json"}
    assert any("events.out" in name for name in names)
    assert any(name.endswith(".wandb") for name in names)
    assert (tmp_path / "run" / "swanlog").is_dir()
    assert "[hidden]" in (tmp_path / "run" / "config.yaml").read_text()
    assert "[hidden]" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    leaks = {str(path): found(path.read_bytes().decode("latin-1")) for path in files}
    assert not {path: secrets for path, secrets in leaks.items() if secrets}
    assert not found(" ".join(names))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data_path", f"https://me:{IN_URL}@example.org/rows.jsonl"],
        ["train", "--model_name", f"/models/{BY_FORM}", "--data_path", "rows.jsonl"],
        [
            "train",
            "--config_override",
            f"wandb_api_key={BY_NAME}",
            f"lr={BY_FORM}",
            "--epochs",
            "x",
        ],
        ["train", "--config_override", f"password={BY_NAME}", BY_FORM],
        ["evaluate", "--model", f"https://me:{IN_URL}@example.org/m", "--data", BY_FORM],
        [BY_FORM],
    ],
)
def test_nor_does_a_mistake_show_one(tmp_path, monkeypatch, capsys, tiny_st_path, arguments):
    monkeypatch.chdir(tmp_path)
    if "--data_path" in arguments and "--model_name" not in arguments:
        arguments = [*arguments, "--model_name", str(tiny_st_path)]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert not found(shown.out + shown.err)
    assert not list(tmp_path.iterdir())
