"""Secrets in what people write: hidden before it is written down, shown, or sent anywhere.

The one place that knows what a secret looks like. Configuration files, logs, error messages,
trackers and reports all pass through it; a file of a run can be handed on.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

HIDDEN = "[hidden]"

_SECRET_WORDS = frozenset(
    ("password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials")
    + ("apikey", "authorization")
)
_KEYS = frozenset(
    ("api", "access", "private", "secret", "auth", "account", "encryption", "signing")
)
# Parts of a text that models have names for; `chunk_tokens` and the like are numbers of them.
_TOKENS = frozenset(
    ("pad", "cls", "sep", "mask", "eos", "bos", "unk", "image", "video", "audio", "vision")
    + ("special", "additional", "start", "end", "begin", "query", "document", "prompt", "class")
    + ("per", "next", "previous", "last", "first", "new", "each")
)
# What stands behind a name in a message about it.
_RULE_WORDS = frozenset(
    ("unknown", "required", "expected", "must", "is", "has", "needs", "null", "none", "already")
)
_NOT_SECRET = frozenset(("PWD", "OLDPWD"))
_SHORTEST = 8

_FORMS = re.compile(
    r"""
      hf_[A-Za-z0-9]{16,}                             # Hugging Face
    | sk-[A-Za-z0-9_-]{16,}                           # OpenAI, Anthropic and others
    | gh[a-z]_[A-Za-z0-9]{16,} | github_pat_\w{16,}   # GitHub
    | glpat-[\w-]{16,}                                # GitLab
    | wandb_v\d_\w{16,}                               # Weights & Biases
    | (?:AKIA|ASIA)[0-9A-Z]{16}                       # Amazon
    | AIza[\w-]{30,} | ya29\.[\w-]{16,}               # Google
    | xox[a-z]-[\w-]{10,}                             # Slack
    | npm_[A-Za-z0-9]{30,} | pypi-[\w-]{30,}          # package registries
    | eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}              # JSON web tokens
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
# A path takes one of two slashes away.
_URL_USER = re.compile(r"(?P<kept>[a-z][a-z0-9+.-]+:/{1,2})[^/?#\s'\"@]+@", re.IGNORECASE)
_URL_QUERY = re.compile(
    r"(?P<kept>[?&][\w.-]*(?:token|key|secret|password|signature|\bsig|credential)[\w.-]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"(?P<kept>\b(?P<name>[a-z_][\w-]*)(?P<between>['\"]?\s*[=:]\s*['\"]?))(?P<value>[^\s'\",;&{}\[\]]+)",
    re.IGNORECASE,
)


@cache
def is_secret_name(name: str) -> bool:
    """Whether what goes by that name is a secret: `HF_TOKEN`, `apiKey`, `db.password`.

    What models call tokens, such as `pad_token` or `chunk_tokens`, is none.
    """
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", parted) if word]
    if not words:
        return False
    *before, last = words
    if _SECRET_WORDS.intersection(words) or last.endswith(("password", "passwd")):
        return True
    if last in ("key", "keys"):
        return bool(_KEYS.intersection(before))
    return last == "token" and not _TOKENS.intersection(before)


def redact(value: Any, *, name: str = "") -> Any:
    """A copy of settings, facts or any JSON-like value without the secrets in it.

    Args:
        value: Mappings, lists, texts and numbers; anything else is returned as it is.
        name: What the value goes by.
    """
    if isinstance(value, Mapping):
        return {_redacted(key): redact(part, name=str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact(part, name=name) for part in value]
    if value is None or isinstance(value, bool):
        return value
    if name and isinstance(value, str | int | float) and is_secret_name(name):
        return HIDDEN
    return _redacted(value)


def _redacted(value: Any) -> Any:
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """A message, path or URL without the secrets in it.

    Hidden are the forms that secrets of known services have, users and passwords of URLs, what is
    written after a secret's name (`api_key=...`), and the values that environment variables with
    such a name have in this process. A key that is only a run of letters, as older ones of Weights
    & Biases, has no form of its own: it is known by its name or by the environment.
    """
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = _FORMS.sub(HIDDEN, text)
    text = _URL_USER.sub(rf"\g<kept>{HIDDEN}@", text)
    text = _URL_QUERY.sub(rf"\g<kept>{HIDDEN}", text)
    return _ASSIGNED.sub(_hide_assigned, text)


def _hide_assigned(match: re.Match[str]) -> str:
    value = match["value"].lower()
    if not is_secret_name(match["name"]) or value in _RULE_WORDS or HIDDEN.startswith(value):
        return match.group()
    return f"{match['kept']}{HIDDEN}"


def _environment_secrets() -> list[str]:
    """Values of variables such as HF_TOKEN; longest first, as one may contain another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and name not in _NOT_SECRET and is_secret_name(name)
    }
    return sorted(found, key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return redact_text(super().format(record))


@contextmanager
def command_line_redacted() -> Iterator[None]:
    """Inside, `sys.argv` has no secrets: trackers keep the command that started a run."""
    original = sys.argv
    sys.argv = [redact_text(argument) for argument in original]
    try:
        yield
    finally:
        sys.argv = original
