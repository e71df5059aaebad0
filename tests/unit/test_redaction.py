"""Secrets are known by their names and forms, and nothing else is taken for one."""

import io
import logging
import random
import string
import sys

import pytest

from vembed.config import TrainConfig
from vembed.errors import ConfigError, exit_status
from vembed.redaction import (
    HIDDEN,
    RedactingFormatter,
    command_line_redacted,
    is_secret_name,
    redact,
    redact_text,
)

LETTERS = string.ascii_letters + string.digits


def canary(length: int, seed: int = 0, alphabet: str = LETTERS) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


@pytest.mark.parametrize(
    "name",
    ["token", "HF_TOKEN", "hf-token", "api_key", "apiKey", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY",
     "AWS_SESSION_TOKEN", "password", "db.password", "PGPASSWORD", "dbPassword", "client_secret",
     "passphrase", "Authorization", "credentials", "accessKey", "ssh_private_key"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert redact({"a": [{name: "x"}]}) == {"a": [{name: HIDDEN}]}
    assert redact({name: 1234}) == {name: HIDDEN}
    assert redact({name: None}) == {name: None}
    assert redact_text(f"{name}=abc1 rest") == f"{name}={HIDDEN} rest"
    assert redact_text(f'{{"{name}": "abc1", "b": 2}}') == f'{{"{name}": "{HIDDEN}", "b": 2}}'


@pytest.mark.parametrize("name", [*TrainConfig.model_fields, "pad_token", "tokens", "text_key", ""])
def test_other_names(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "secret",
    ["hf_" + canary(34), "sk-" + canary(48), "sk-ant-api03-" + canary(60), "ghp_" + canary(36),
     "github_pat_" + canary(60), "glpat-" + canary(20), "wandb_v1_" + canary(40),
     "AKIA" + canary(16, 0, string.ascii_uppercase), "AIza" + canary(35), "xoxb-" + canary(40),
     "eyJ" + canary(20) + "." + canary(40) + "." + canary(30),
     f"-----BEGIN RSA PRIVATE KEY-----\n{canary(64)}\n{canary(64)}\n-----END RSA PRIVATE KEY-----"],
)  # fmt: skip
def test_forms_of_secrets(secret):
    for text in ("{}", "rows-{}.jsonl", "see {} there", "['{}']", "a\n{}\nb"):
        assert redact_text(text.format(secret)) == text.format(HIDDEN)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pa55@example.org/a?b=c", f"https://{HIDDEN}@example.org/a?b=c"),
        ("s3://pa55word@bucket/x", f"s3://{HIDDEN}@bucket/x"),
        ("https://e.org/a?sig=abc&n=1&X-Amz-Signature=d", f"https://e.org/a?sig={HIDDEN}&n=1&X-Amz-"
         f"Signature={HIDDEN}"),
        ("https://e.org/x@y/z", "https://e.org/x@y/z"),
    ],
)  # fmt: skip
def test_urls(url, shown):
    assert redact_text(f"cannot read '{url}'.") == f"cannot read '{shown}'."
    assert redact_text(redact_text(url)) == redact_text(url)


@pytest.mark.parametrize(
    "text",
    ["step 10/100  loss 0.1234  lr 1.20e-05", "train.yaml:3: wandb_password: unknown setting",
     "revision 5c38ec7c405ec4b44b94cc5a9bb96e735b38267a", "tokens: 12", "a@b.org: hello",
     "/home/u/runs/a-b_c/config.yaml", "sk-learn", "hf_hub", "chunk_tokens=4096"],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert redact_text(text) == text


def test_what_the_environment_holds(monkeypatch):
    key = canary(40, alphabet="0123456789abcdef")
    assert redact_text(f"found {key}") == f"found {key}"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact_text(f"found {key} in short") == f"found {HIDDEN} in short"


def test_settings_keep_their_form():
    config = TrainConfig(loss_kwargs={"api_key": "x", "margin": 0.5}, tags=["hf_" + canary(30)])
    assert config.redacted() == TrainConfig(
        loss_kwargs={"api_key": HIDDEN, "margin": 0.5}, tags=[HIDDEN]
    ).model_dump(mode="json")
    assert config.loss_kwargs["api_key"] == "x"
    assert TrainConfig().redacted() == TrainConfig().model_dump(mode="json")


def test_messages_of_programs(capsys):
    secret = "hf_" + canary(30)

    def fail() -> int:
        raise ConfigError(f"model_name: no {secret!r}\x1b[2J\n  second line\ta")

    assert exit_status(fail) == 2
    assert (
        capsys.readouterr().err == f"vembed: model_name: no '{HIDDEN}'\\x1b[2J\n  second line\ta\n"
    )


def test_log_lines_and_their_tracebacks():
    stream, secret = io.StringIO(), "hf_" + canary(30)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter())
    logger = logging.Logger("a logger of its own")
    logger.addHandler(handler)
    try:
        raise ValueError(secret)
    except ValueError:
        logger.exception("loading %s", secret)
    assert secret not in stream.getvalue()
    assert stream.getvalue().startswith(f"loading {HIDDEN}\nTraceback")


def test_the_command_line_is_put_back(monkeypatch):
    argv = ["vembed", "--tags", "hf_" + canary(30)]
    monkeypatch.setattr(sys, "argv", argv)
    with command_line_redacted():
        assert sys.argv == ["vembed", "--tags", HIDDEN]
    assert sys.argv is argv
