"""The folder layout that sentence-transformers, transformers and vembed share, read and written.

Only JSON is handled here; weights and tokenizers are read and written by the encoder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vembed.errors import CheckpointError

logger = logging.getLogger(__name__)

POOLING_NAMES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}
"""sentence-transformers' pooling modes, each with vembed's name for it."""

# Before version 6 each mode was a boolean key of 1_Pooling/config.json.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_CONFIGS = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# Settings of the Transformer module that vembed follows, or that say what it assumes anyway.
_TRANSFORMER_KEYS = {
    "max_seq_length",
    "do_lower_case",
    "transformer_task",
    "modality_config",
    "module_output_name",
}
_DOCUMENT_PROMPT_NAMES = ("document", "passage", "corpus")


@dataclass(frozen=True)
class CheckpointSettings:
    """What a model folder says about how to embed with it; None where it says nothing.

    Attributes:
        backbone_folder: Where config.json, weights and tokenizer are.
        pooling_method: vembed's name of the pooling.
        normalize: Whether vectors have unit length.
        dense_folders: Projections after pooling, in order.
        max_seq_length: Tokens kept of a text.
        do_lower_case: Whether texts are lower-cased before the tokenizer sees them.
        prompts: Prompt texts by name.
        default_prompt_name: The prompt used where no role is given.
    """

    backbone_folder: Path
    pooling_method: str | None = None
    normalize: bool | None = None
    dense_folders: tuple[Path, ...] = ()
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    def prompt_for(self, role: str) -> str | None:
        """The text put before a `"query"` or `"document"`; None where the checkpoint is silent.

        Documents go by several names in published models. sentence-transformers writes an empty
        `document` prompt beside a `passage` one that was meant, so an empty one does not end the
        search.
        """
        names = ("query",) if role == "query" else _DOCUMENT_PROMPT_NAMES
        own = [self.prompts[name] for name in names if name in self.prompts]
        if own:
            return next((prompt for prompt in own if prompt), "")
        return self.prompts.get(self.default_prompt_name or "")


def read_backbone_config(path: str | Path) -> dict[str, Any]:
    """The backbone's config.json of a model folder, which has a `model_type`.

    Raises:
        CheckpointError: if there is none.
    """
    folder = _backbone_folder(Path(path), _read_modules(Path(path)))
    config: dict[str, Any] = _read_json(folder / "config.json")
    if config.get("model_type"):
        return config
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
    adapter = " (it holds a LoRA adapter only: merge it into its base model first)"
    raise CheckpointError(
        f"{str(path)!r} is not a model folder: {folder / 'config.json'} is missing or names no "
        f"model_type"
        f"{adapter if 'adapter_config.json' in found else ''}. Found there: {found or 'nothing'}"
    )


def read_settings(path: str | Path) -> CheckpointSettings:
    """What the folder at `path` says, whether sentence-transformers wrote it or transformers alone.

    Raises:
        CheckpointError: if it has modules or options that vembed would have to ignore.
    """
    root = Path(path)
    modules = _read_modules(root)
    if not modules:
        return CheckpointSettings(root)
    kinds = [_module_kind(root, module) for module in modules]
    dense = kinds.count("Dense")
    normalize = kinds[-1] == "Normalize"
    if kinds != ["Transformer", "Pooling", *["Dense"] * dense, *["Normalize"] * normalize]:
        raise CheckpointError(
            f"{root / 'modules.json'}: vembed reads Transformer, Pooling, any number of Dense, and "
            f"at most one Normalize, in that order. Found: {', '.join(kinds)}"
        )
    transformer = _read_transformer_config(_backbone_folder(root, modules))
    model = _read_json(root / "config_sentence_transformers.json")
    if model.get("truncate_dim"):
        raise CheckpointError(
            f"{root / 'config_sentence_transformers.json'}: truncate_dim is not supported"
        )
    return CheckpointSettings(
        backbone_folder=_backbone_folder(root, modules),
        pooling_method=_read_pooling(root / modules[1]["path"] / "config.json"),
        normalize=normalize,
        dense_folders=tuple(root / module["path"] for module in modules[2 : 2 + dense]),
        max_seq_length=transformer.get("max_seq_length"),
        do_lower_case=bool(transformer.get("do_lower_case")),
        prompts={name: text or "" for name, text in (model.get("prompts") or {}).items()},
        default_prompt_name=model.get("default_prompt_name"),
    )


def write_settings(path: str | Path, settings: CheckpointSettings, *, hidden_size: int) -> None:
    """Write modules.json and what goes with it, as sentence-transformers 2 to 6 all read it.

    Args:
        path: Model folder; `settings.backbone_folder` must be the same, and
            `settings.dense_folders` lie in it.
        settings: What to write; pooling_method and normalize must be set.
        hidden_size: Columns of the backbone's output.
    """
    root = Path(path)
    names = ["Transformer", "Pooling", *["Dense"] * len(settings.dense_folders)]
    names += ["Normalize"] if settings.normalize else []
    folders = ["", "1_Pooling", *(folder.name for folder in settings.dense_folders)]
    folders += [f"{len(folders)}_Normalize"] if settings.normalize else []
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{name}"}
        for i, (name, folder) in enumerate(zip(names, folders, strict=True))
    ]
    flags = {
        key: POOLING_NAMES[mode] == settings.pooling_method for key, mode in _POOLING_FLAGS.items()
    }
    pooling = {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True}
    _write_json(root / "modules.json", modules)
    _write_json(root / "1_Pooling" / "config.json", pooling)
    if settings.normalize:
        (root / folders[-1]).mkdir(parents=True, exist_ok=True)
    _write_json(
        root / "sentence_bert_config.json",
        {"max_seq_length": settings.max_seq_length, "do_lower_case": settings.do_lower_case},
    )
    _write_json(
        root / "config_sentence_transformers.json",
        {
            "prompts": dict(settings.prompts),
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": "cosine",
        },
    )


def _read_modules(root: Path) -> list[dict[str, Any]]:
    file = root / "modules.json"
    if not file.is_file():
        return []
    modules = _read_json(file)
    if not isinstance(modules, list) or not all({"type", "path"} <= set(m) for m in modules):
        raise CheckpointError(f"{file}: expected a list of modules, each with a type and a path")
    for module in modules:
        if not (root / module["path"]).resolve().is_relative_to(root.resolve()):
            raise CheckpointError(f"{file}: path {module['path']!r} leads out of the folder")
    return sorted(modules, key=lambda module: int(module.get("idx", 0)))


def _backbone_folder(root: Path, modules: list[dict[str, Any]]) -> Path:
    return root / modules[0]["path"] if modules else root


def _module_kind(root: Path, module: dict[str, Any]) -> str:
    """Class name of a module; the package path before it differs between versions 2 and 6."""
    package, _, name = str(module["type"]).rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise CheckpointError(
            f"{root / 'modules.json'}: module {module['type']!r} is not one of "
            f"sentence-transformers' own; vembed runs no code that a checkpoint names"
        )
    return name


def _read_transformer_config(folder: Path) -> dict[str, Any]:
    files = [folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file()]
    config = _read_json(files[0]) if files else {}
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise CheckpointError(
            f"{files[0]}: transformer_task {config['transformer_task']!r} is not that of an "
            f"embedding model (feature-extraction)"
        )
    if other := [key for key, value in config.items() if value and key not in _TRANSFORMER_KEYS]:
        logger.warning("%s: not used by vembed: %s", files[0], ", ".join(other))
    return config


def _read_pooling(file: Path) -> str:
    config = _read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:
        flagged = [name for flag, name in _POOLING_FLAGS.items() if config.get(flag)]
        mode = flagged or ["mean"]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in POOLING_NAMES:
        raise CheckpointError(
            f"{file}: vembed pools in one way, of {', '.join(POOLING_NAMES)}. "
            f"Found: {', '.join(modes)}"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{file}: include_prompt=false (Instructor models) is not supported")
    return POOLING_NAMES[modes[0]]


def _read_json(file: Path) -> Any:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
