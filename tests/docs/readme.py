"""README.md cut into what can be checked: code blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(language: str, *, document: Path = README) -> list[str]:
    """The code blocks of a language, in their order."""
    text = document.read_text(encoding="utf-8")
    return [code for name, code in _BLOCK.findall(text) if name == language]


def block_with(language: str, text: str) -> str:
    """The one code block of a language that has `text` in it."""
    (block,) = [block for block in blocks(language) if text in block]
    return block


def commands(program: str, *, document: Path = README) -> list[list[str]]:
    """The words of every command line in bash blocks that starts with `program`."""
    lines = "".join(blocks("bash", document=document)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == program]


def links(document: Path) -> list[str]:
    """Targets of the links in a document."""
    return _LINK.findall(_BLOCK.sub("", document.read_text(encoding="utf-8")))
