"""`vembed`: help, mistakes, and that neither waits for torch."""

import sys

import pytest

from vembed import __version__
from vembed.cli import COMMANDS, main

HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft", "matplotlib", "scipy", "pandas")
# Runs the command and then prints which of the slow imports it did.
PROBE = f"""
import sys
from vembed.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
print("imported:", [name for name in {HEAVY} if name in sys.modules])
sys.exit(status)
"""
QUANTIZED = ["--model_name", "m", "--data_path", "d", "--use_lora", "true", "--lora_quantization",
             "4bit", "--device", "cpu"]  # fmt: skip
BAD_YAML = "model_name: m\nlr: fast\nbatchsize: 3\ndata_path: d\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["nothing"], 2),
        (["train", "--help"], 0),
        (["train", "--config", "bad.yaml"], 2),
        (["train"], 2),
        (["check", "--config", "bad.yaml"], 2),
        (["train", *QUANTIZED], 2),
        (["evaluate", "--help"], 0),
        (["evaluate"], 2),
        (["mine", "--help"], 0),
        (["mine", "--model", "m", "--data", "d", "--output", "o"], 2),
        (["mine", "--model", "m", "--data", "d", "--output", "o.jsonl", "--range_max", "1"], 2),
        (["encode", "--help"], 0),
        (["encode", "--model", "m", "--data", "d", "--output", "o"], 2),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(shell, tmp_path, arguments, status):
    (tmp_path / "bad.yaml").write_text(BAD_YAML)
    done = shell(sys.executable, "-c", PROBE, *arguments)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("imported: []\n")
    assert "Traceback" not in done.stderr


def test_the_entrypoint_does_not_either(shell, tmp_path):
    (tmp_path / "bad.yaml").write_text(BAD_YAML)
    probe = PROBE.replace("vembed.cli", "vembed.entrypoints.train")
    done = shell(sys.executable, "-c", probe, "--config", "bad.yaml")
    assert done.returncode == 2
    assert done.stdout == "imported: []\n"


def test_a_wrong_config_as_the_user_sees_it(vembed, tmp_path):
    (tmp_path / "bad.yaml").write_text(BAD_YAML)
    done = vembed("train", "--config", "bad.yaml", "--use_lorra", "--epochs", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "vembed: 4 problems in the configuration:\n"
        "  --use_lorra: unknown setting (did you mean 'use_lora' or 'use_rslora'?)\n"
        "  bad.yaml:2: lr: expected a number. Received: 'fast'\n"
        "  bad.yaml:3: batchsize: unknown setting (did you mean 'batch_size' or 'batch_sampler'?)\n"
        "  --epochs: must be above 0. Received: '0'\n"
    )


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vembed {__version__}\n"


def test_without_a_command_the_help_is_shown_and_it_is_a_mistake(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_an_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"vembed: unknown command 'trian' (did you mean 'train'?). One of: {', '.join(COMMANDS)}\n"
    )
