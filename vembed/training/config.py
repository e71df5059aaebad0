"""The configuration of a run, from a YAML file and the command line.

Precedence, lowest first: defaults, the YAML file, `--config_override key=value` from left to right,
`--key value`. The type of a setting decides how its text is read, not YAML: `lr: 5e-5` is a number
although PyYAML takes it for text, `revision: 1e5` is text although PyYAML takes it for a number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from vembed.config import (
    ALIASES,
    SECTIONS,
    Problem,
    Setting,
    SettingsError,
    TrainConfig,
    find_conflicts,
    merge_spellings,
    problem_list,
)
from vembed.errors import ConfigError, did_you_mean
from vembed.training.manifest import write_text_safely
from vembed.training.yaml_settings import read_yaml_settings, read_yaml_value


class DistributedConfig(NamedTuple):
    """What decides how gradients are computed and reduced."""

    use_grad_ckpt: bool
    use_grad_cache: bool
    find_unused: bool


def get_distributed_config(config: TrainConfig | Mapping[str, Any]) -> DistributedConfig:
    """Gradient checkpointing, gradient cache and unused parameters, as `(a, b, c)`."""
    config = TrainConfig.coerce(config)
    return DistributedConfig(
        use_grad_ckpt=config.gradient_checkpointing,
        use_grad_cache=config.use_gradient_cache,
        find_unused=config.ddp_find_unused_parameters,
    )


def load_and_parse_config(
    argv: Sequence[str] | None = None,
    *,
    required: Collection[str] = (),
    prog: str | None = None,
    about: str = "Fine-tune an embedding model.",
) -> TrainConfig:
    """Read `--config FILE`, `--config_override KEY=VALUE ...` and `--KEY VALUE` flags.

    `config.origins` says where each value came from.

    Args:
        argv: Arguments without the program's name; None takes those of this process.
        required: Keys that must be set; `vembed.config.RUN_REQUIRES` for a whole run.
        prog: Name of the program in `--help`.
        about: What it does, in one sentence, for `--help`.

    Raises:
        ConfigError: listing every problem with its place.
    """
    words = [*map(_with_underscores, sys.argv[1:] if argv is None else argv)]
    arguments, unknown = _build_parser(prog, about).parse_known_args(words)
    file_settings, problems = _file_settings(arguments.config or [])
    if problems:
        # A file that could not be read may have held them.
        required = ()
    problems += _unknown_arguments(unknown)
    levels = [
        file_settings,
        _override_settings(arguments.config_override or [], problems),
        _flag_settings(arguments, problems),
    ]
    chosen, broken = _resolve(levels, problems)
    config = TrainConfig(**{key: setting.value for key, setting in chosen.items()})
    config._origins.update({key: setting.origin for key, setting in chosen.items()})
    for conflict in find_conflicts(config, required):
        # What follows from a value that is already reported would only be noise.
        if not broken.intersection(conflict.keys):
            problems.append(conflict.located(config.origins.get(conflict.keys[0])))
    if problems:
        raise ConfigError(problem_list(problems))
    return config


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write every setting as YAML that `--config` reads; a comment says where a value came from.

    Secrets are hidden: a run that needs them must be given them again.
    """
    text = "# Every setting of a run. What is not a default says where it came from.\n\n"
    write_text_safely(Path(path), text + render_config(config, config.origins))


def render_config(config: TrainConfig, notes: Mapping[str, str]) -> str:
    """Every setting as a line of YAML under the heading of its section, with notes as comments."""
    headings = {first: title for title, first in SECTIONS.items()}
    lines = []
    for key, value in config.redacted().items():
        if key in headings:
            lines.append(f"\n# --- {headings[key]}")
        line = f"{key}: {_as_yaml(value)}"
        lines.append(f"{line:<36}  # {notes[key]}" if key in notes else line)
    return "\n".join(lines).lstrip("\n") + "\n"


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return str(text).removesuffix("...\n").rstrip("\n")


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(problem_list([message]))


class _HelpFormatter(argparse.HelpFormatter):
    """Shows `--lr VALUE`: only argparse takes the value for optional, so that we report it."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.const is None and action.metavar is not None:
            return str(action.metavar)
        return super()._format_args(action, default_metavar)


def _build_parser(prog: str | None, about: str) -> argparse.ArgumentParser:
    """A parser of the command line that leaves every complaint to us."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s --config FILE [--config_override KEY=VALUE ...] [--KEY VALUE ...]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=f"{about} Later sources win: defaults, --config, --config_override from left "
        "to right, --KEY VALUE.",
    )
    # Every value is optional for argparse, so that one that is missing is reported with the rest.
    one = partial(parser.add_argument, nargs="?", action="append")
    parser.set_defaults(config=None, config_override=None)
    one("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "--config_override",
        metavar="KEY=VALUE ...",
        nargs="*",
        action="append",
        help="settings that win over the file's; several, and the flag may be repeated",
    )
    # Launchers pass the number of the process on this machine; it is read from the environment.
    one("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    _add_settings(parser)
    return parser


def _with_underscores(word: str) -> str:
    """`--max-restarts` as `--max_restarts`; every other word as it is."""
    flag, equals, value = word.partition("=")
    key = flag.removeprefix("--").replace("-", "_")
    is_ours = flag.startswith("--") and (key in TrainConfig.model_fields or key in ALIASES)
    return f"--{key}{equals}{value}" if is_ours else word


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting and each alias, generated from `TrainConfig`."""
    spellings = {name: [name] for name in TrainConfig.model_fields}
    for alias, name in ALIASES.items():
        spellings[name].append(alias)
    starts = {first: title for title, first in SECTIONS.items()}
    for name, field in TrainConfig.model_fields.items():
        if name in starts:
            group = parser.add_argument_group(starts[name])
        const = "true" if field.annotation in (bool, bool | None) else None
        help_text = f"{field.description} (default: {_as_yaml(_default(name))})".replace("%", "%%")
        for spelling in spellings[name]:
            shown = help_text if spelling == name else f"another spelling of --{name}"
            group.add_argument(
                f"--{spelling}",
                nargs="?",
                action="append",
                const=const,
                metavar="VALUE",
                help=shown,
            )


def _default(name: str) -> Any:
    default = TrainConfig.model_fields[name].get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def _unknown_arguments(arguments: Sequence[str]) -> Iterator[str]:
    known = [*TrainConfig.model_fields, *ALIASES, "config", "config_override"]
    follows_flag = False
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument.split("=")[0]
            near = did_you_mean(flag.lstrip("-").replace("-", "_"), known)
            yield f"{flag}: unknown setting{near}"
        elif not follows_flag:
            yield f"{argument!r}: not a flag; settings are written --KEY VALUE"
        # What follows an unknown flag is most likely its value.
        follows_flag = argument.startswith("-") and "=" not in argument


def _file_settings(paths: Sequence[str | None]) -> tuple[list[Setting], list[str]]:
    if not paths:
        return [], []
    path, *more = paths
    if path is None or more:
        return [], ["--config: expected one file after it, once"]
    return read_yaml_settings(Path(path), _reads_as_yaml)


def _override_settings(groups: Sequence[Sequence[str]], problems: list[str]) -> list[Setting]:
    origin = "--config_override"
    settings = []
    for group in groups:
        if not group:
            problems.append(f"{origin}: expected KEY=VALUE. Received: nothing")
        for text in group:
            key, equals, value = text.partition("=")
            if equals and key:
                settings.append(_from_text(key.strip(), value, origin))
            else:
                problems.append(f"{origin}: expected KEY=VALUE. Received: {text!r}")
    return settings


def _flag_settings(arguments: argparse.Namespace, problems: list[str]) -> list[Setting]:
    settings = []
    for key, values in vars(arguments).items():
        if key in ("config", "config_override", "local_rank"):
            continue
        origin = f"--{key}"
        if None in values:
            problems.append(f"{origin}: expected a value after it")
        elif len(set(values)) > 1:
            problems.append(f"{origin}: given more than once: {', '.join(map(repr, values))}")
        else:
            settings.append(_from_text(key, values[0], origin))
    return settings


def _from_text(key: str, text: str, origin: str) -> Setting:
    """A setting from the command line, where only lists, mappings and null are more than text."""
    if text == "null":
        return Setting(key, None, origin)
    if text.startswith(("[", "{")) and _is_container(key):
        try:
            return Setting(key, read_yaml_value(text, as_yaml=_reads_as_yaml(key)), origin)
        except yaml.YAMLError:
            # The type of the setting refuses the text, and says what it expects.
            return Setting(key, text, origin)
    return Setting(key, text, origin)


def _annotation(key: str) -> str:
    field = TrainConfig.model_fields.get(ALIASES.get(key, key))
    return "" if field is None else str(field.annotation)


def _is_container(key: str) -> bool:
    return any(kind in _annotation(key) for kind in ("list[", "dict[", "tuple["))


def _reads_as_yaml(key: str) -> bool:
    """Whether nothing but YAML says of what type the values in `key` are."""
    return "Any" in _annotation(key)


def _resolve(
    levels: Sequence[Sequence[Setting]], problems: list[str]
) -> tuple[dict[str, Setting], set[str]]:
    """The winning setting of each key, and the keys that have a problem. Adds to `problems`.

    Every level is validated, so that a mistake is reported although a flag overrides it.
    """
    chosen: dict[str, Setting] = {}
    broken: set[str] = set()
    for level in levels:
        settings, found = merge_spellings(level)
        try:
            TrainConfig(**{key: setting.value for key, setting in settings.items()})
        except SettingsError as error:
            found += error.problems
        for problem in sorted(found, key=lambda problem: _position(problem, settings)):
            problems.append(problem.located(_origin_of(problem, settings)))
            broken.update(problem.keys)
        chosen.update({k: s for k, s in settings.items() if k not in broken})
    return chosen, broken


def _position(problem: Problem, settings: Mapping[str, Setting]) -> int:
    keys = list(settings)
    return min((keys.index(key) for key in problem.keys if key in settings), default=len(keys))


def _origin_of(problem: Problem, settings: Mapping[str, Setting]) -> str | None:
    setting = next((settings[key] for key in problem.keys if key in settings), None)
    return None if setting is None else setting.origin
