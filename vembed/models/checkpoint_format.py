"""The folder layout that sentence-transformers, transformers and vembed share, read and written.

Only JSON is handled here; weights and tokenizers are read and written by the encoder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vembed.errors import CheckpointError
from vembed.models.json_files import read_json, read_object, require_types

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

OWN_POOLING = "pooler"
"""The `pooling_method` of models that give one vector themselves; they need no Pooling module."""

NO_POOLING = "none"
"""The `pooling_method` of models that keep a vector for each token (late interaction)."""

TOKEN_INPUT = "token_embeddings"
"""sentence-transformers' name of what its modules work on in such models."""

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
_KEEP_TOKENS = ("MultiVectorEncoder", "ColBERT")
"""How sentence-transformers, and PyLate up to version 3, name a late-interaction model."""

# What sentence-transformers and PyLate can do with tokens, and vembed does not.
_TOKEN_RULES = (
    "query_expansion",
    "do_query_expansion",
    "query_length",
    "document_length",
    "skiplist_words",
    "keep_only_token_ids",
)
# Settings of the Transformer module that vembed follows, or that say what it assumes anyway.
_TRANSFORMER_KEYS = {
    "max_seq_length",
    "do_lower_case",
    "transformer_task",
    "modality_config",
    "module_output_name",
    "processing_kwargs",
}
# Our own key in config_sentence_transformers.json, which that library passes over.
_TEXT_LENGTH = "vembed_max_seq_length"
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
        calls: Modality, by sentence-transformers' name, to the model's method that embeds it.
            Empty for models that read texts alone, through `forward`.
        processing: Arguments that sentence-transformers must give to the processor.
        token_rules: Settings of a late-interaction model that vembed does not follow.
    """

    backbone_folder: Path
    pooling_method: str | None = None
    normalize: bool | None = None
    dense_folders: tuple[Path, ...] = ()
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    calls: Mapping[str, str] = field(default_factory=dict)
    processing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    token_rules: tuple[str, ...] = ()

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
    config: dict[str, Any] = read_object(folder / "config.json")
    require_types(folder / "config.json", config, {"model_type": str})
    if config.get("model_type"):
        return config
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
    adapter = " (it holds a LoRA adapter only: merge it into its base model first)"
    raise CheckpointError(
        f"{str(path)!r} is not a model folder: {folder / 'config.json'} is missing or names no "
        f"model_type"
        f"{adapter if 'adapter_config.json' in found else ''}. Found there: {found or 'nothing'}"
    )


def _read_model_config(file: Path) -> dict[str, Any]:
    config = read_object(file)
    types = {"prompts": dict, "default_prompt_name": str, "model_type": str, _TEXT_LENGTH: int}
    require_types(file, config, types)
    prompts = config.get("prompts") or {}
    require_types(file, prompts, dict.fromkeys(prompts, str))
    return config


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
    transformer = _read_transformer_config(_backbone_folder(root, modules))
    # Before version 5.4 the module for CLIP had a name of its own.
    pools_itself = (
        kinds[0] == "CLIPModel" or transformer.get("module_output_name") == "sentence_embedding"
    )
    model = _read_model_config(root / "config_sentence_transformers.json")
    keeps_tokens = model.get("model_type") in _KEEP_TOKENS or "MultiVectorMask" in kinds
    first_dense = 1 if pools_itself or keeps_tokens else 2
    dense = kinds.count("Dense")
    normalize = kinds[-1] == "Normalize"
    expected = ["Pooling"] * (not pools_itself and not keeps_tokens) + ["Dense"] * dense
    expected += ["MultiVectorMask"] * (keeps_tokens and "MultiVectorMask" in kinds)
    expected += ["Normalize"] * normalize
    if kinds[0] not in ("Transformer", "CLIPModel") or kinds[1:] != expected:
        raise CheckpointError(
            f"{root / 'modules.json'}: vembed reads Transformer, Pooling (unless the model pools "
            f"itself, or keeps a vector for each token), any number of Dense, MultiVectorMask (of "
            f"a model that keeps them), and at most one Normalize, in that order. "
            f"Found: {', '.join(kinds)}"
        )
    if model.get("truncate_dim"):
        raise CheckpointError(
            f"{root / 'config_sentence_transformers.json'}: truncate_dim is not supported"
        )
    prompts = {name: text or "" for name, text in (model.get("prompts") or {}).items()}
    if keeps_tokens:
        # PyLate's names for what it puts before a text.
        prefixes = {role: model.get(f"{role}_prefix") for role in ("query", "document")}
        prompts |= {role: prefix for role, prefix in prefixes.items() if prefix}
    return CheckpointSettings(
        backbone_folder=_backbone_folder(root, modules),
        pooling_method=OWN_POOLING
        if pools_itself
        else NO_POOLING
        if keeps_tokens
        else _read_pooling(root / modules[1]["path"] / "config.json"),
        normalize=normalize or keeps_tokens,
        dense_folders=tuple(
            root / module["path"] for module in modules[first_dense : first_dense + dense]
        ),
        max_seq_length=transformer.get("max_seq_length", model.get(_TEXT_LENGTH)),
        do_lower_case=bool(transformer.get("do_lower_case")),
        prompts=prompts,
        default_prompt_name=model.get("default_prompt_name"),
        token_rules=_token_rules(root, modules, model=model, transformer=transformer)
        if keeps_tokens
        else (),
    )


def _token_rules(
    root: Path,
    modules: Sequence[Mapping[str, Any]],
    *,
    model: Mapping[str, Any],
    transformer: Mapping[str, Any],
) -> tuple[str, ...]:
    """What a late-interaction model does that vembed does not, such as to leave tokens out."""
    # What PyLate up to version 3 did where its folder says nothing.
    silent = {"do_query_expansion": True, "skiplist_words": ["punctuation"]}
    told = {**(silent if model.get("model_type") == "ColBERT" else {}), **model}
    masks = [
        read_object(root / module["path"] / "config.json")
        for module in modules
        if str(module["type"]).endswith("MultiVectorMask")
    ]
    configs = (told, transformer, *masks)
    rules = tuple(rule for rule in _TOKEN_RULES if any(config.get(rule) for config in configs))
    any_length = model.get("model_type") == "MultiVectorEncoder" and not any(
        str(module["type"]).endswith("Normalize") for module in modules
    )
    return (*rules, "vectors of any length") if any_length else rules


def is_router(path: str | Path) -> bool:
    """Whether a folder holds several models, of which the input decides which one is used."""
    root = Path(path)
    modules = _read_modules(root)
    return bool(modules) and _module_kind(root, modules[0]) == "Router"


def read_router(path: str | Path) -> CheckpointSettings:
    """What a folder with a text and an image encoder says about both.

    Raises:
        CheckpointError: if it was not written by `write_router`.
    """
    root = Path(path)
    kinds = [_module_kind(root, module) for module in _read_modules(root)]
    routes = set(read_object(root / "router_config.json").get("structure", {}))
    if kinds not in (["Router"], ["Router", "Normalize"]) or routes != {"text", "image"}:
        raise CheckpointError(
            f"{root}: vembed reads a Router for text and image, and at most one Normalize. "
            f"Found: {', '.join(kinds)}; routes {', '.join(sorted(routes)) or 'none'}"
        )
    for folder in ("text", "image", "text_projection", "image_projection"):
        if not (root / folder).is_dir():
            raise CheckpointError(
                f"{root}: no folder {folder!r}. vembed reads Routers that it wrote itself"
            )
    return CheckpointSettings(root, normalize=kinds[-1] == "Normalize")


def write_router(
    path: str | Path,
    *,
    routes: Mapping[str, str],
    normalize: bool,
    prompts: Mapping[str, str],
) -> None:
    """Write modules.json and router_config.json beside models that are in folders of their own.

    Args:
        path: Where to write.
        routes: Modality to the folder of the projection behind its model; the model's own folder
            has the modality's name. What brings a model's vectors to unit length is left out.
        normalize: Whether vectors have unit length after the projection.
        prompts: Prompt texts by name.
    """
    root = Path(path)
    types: dict[str, str] = {}
    structure: dict[str, list[str]] = {}
    for modality, projection in routes.items():
        own = {
            "/".join(part for part in (modality, module["path"]) if part): module["type"]
            for module in _read_modules(root / modality)
            if _module_kind(root, module) != "Normalize"
        }
        own[projection] = "sentence_transformers.models.Dense"
        types |= own
        structure[modality] = list(own)
    parameters = {
        "default_route": next(iter(routes)),
        "allow_empty_key": True,
        "route_mappings": {},
    }
    router = {"types": types, "structure": structure, "parameters": parameters}
    _write_json(root / "router_config.json", router)
    names = ["Router", *(["Normalize"] if normalize else [])]
    folders = ["", "1_Normalize"][: len(names)]
    if normalize:
        (root / folders[-1]).mkdir(parents=True, exist_ok=True)
    _write_json(root / "modules.json", _list_modules(names, folders))
    _write_json(
        root / "config_sentence_transformers.json",
        {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _list_modules(names: Sequence[str], folders: Sequence[str]) -> list[dict[str, Any]]:
    """The content of modules.json."""
    return [
        {"idx": i, "name": str(i), "path": folder, "type": f"{_package_of(name)}.{name}"}
        for i, (name, folder) in enumerate(zip(names, folders, strict=True))
    ]


def _package_of(module: str) -> str:
    if module == "MultiVectorMask":
        return "sentence_transformers.multi_vector_encoder.modules"
    return "sentence_transformers.models"


def write_settings(path: str | Path, settings: CheckpointSettings, *, hidden_size: int) -> None:
    """Write modules.json and what goes with it.

    sentence-transformers 2 to 6 all read it for texts, and from 5.4 on what has `settings.calls`.

    Args:
        path: Model folder; `settings.backbone_folder` must be the same, and
            `settings.dense_folders` lie in it.
        settings: What to write; pooling_method and normalize must be set.
        hidden_size: Columns of the backbone's output.
    """
    root = Path(path)
    keeps_tokens = settings.pooling_method == NO_POOLING
    pools = settings.pooling_method not in (OWN_POOLING, NO_POOLING)
    names = ["Transformer", *(["Pooling"] if pools else [])]
    folders = ["", *(["1_Pooling"] if pools else [])]
    names += ["Dense"] * len(settings.dense_folders)
    folders += [folder.name for folder in settings.dense_folders]
    if keeps_tokens:
        names.append("MultiVectorMask")
        folders.append(f"{len(folders)}_MultiVectorMask")
        _write_json(root / folders[-1] / "config.json", {"skiplist_words": []})
    if settings.normalize:
        names.append("Normalize")
        folders.append(f"{len(folders)}_Normalize")
        (root / folders[-1]).mkdir(parents=True, exist_ok=True)
        if keeps_tokens:
            _write_json(root / folders[-1] / "config.json", {"module_input_name": TOKEN_INPUT})
    _write_json(root / "modules.json", _list_modules(names, folders))
    if pools:
        flags = {
            key: POOLING_NAMES[mode] == settings.pooling_method
            for key, mode in _POOLING_FLAGS.items()
        }
        pooling = {"word_embedding_dimension": hidden_size, **flags, "include_prompt": True}
        _write_json(root / "1_Pooling" / "config.json", pooling)
    _write_json(root / "sentence_bert_config.json", _transformer_config(settings))
    model: dict[str, Any] = {
        "prompts": dict(settings.prompts),
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": "meanmaxsim" if keeps_tokens else "cosine",
    }
    if keeps_tokens:
        model["model_type"] = "MultiVectorEncoder"
    if _counts_text_alone(settings):
        model[_TEXT_LENGTH] = settings.max_seq_length
    _write_json(root / "config_sentence_transformers.json", model)


def _counts_text_alone(settings: CheckpointSettings) -> bool:
    """Whether texts share a sequence with images, which sentence-transformers would cut as well."""
    return "message" in settings.calls


def _transformer_config(settings: CheckpointSettings) -> dict[str, Any]:
    if not settings.calls:
        return {
            "max_seq_length": settings.max_seq_length,
            "do_lower_case": settings.do_lower_case,
        }
    pools_itself = settings.pooling_method == OWN_POOLING
    output = "pooler_output" if pools_itself else "last_hidden_state"
    calls = {
        modality: {"method": method, "method_output_name": output}
        | ({"format": "structured"} if modality == "message" else {})
        for modality, method in settings.calls.items()
    }
    config: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": calls,
        "module_output_name": "sentence_embedding" if pools_itself else "token_embeddings",
    }
    if settings.max_seq_length is not None and not _counts_text_alone(settings):
        config["max_seq_length"] = settings.max_seq_length
    if settings.processing:
        config["processing_kwargs"] = {kind: dict(kw) for kind, kw in settings.processing.items()}
    return config


def _read_modules(root: Path) -> list[dict[str, Any]]:
    file = root / "modules.json"
    if not file.is_file():
        return []
    modules = read_json(file)
    if not isinstance(modules, list) or not all(_is_module(module) for module in modules):
        raise CheckpointError(f"{file}: expected a list of modules, each with a type and a path")
    for module in modules:
        if not (root / module["path"]).resolve().is_relative_to(root.resolve()):
            raise CheckpointError(f"{file}: path {module['path']!r} leads out of the folder")
    return sorted(modules, key=lambda module: int(module.get("idx", 0)))


def _is_module(module: object) -> bool:
    return isinstance(module, dict) and all(
        isinstance(module.get(key), str) for key in ("type", "path")
    )


def _backbone_folder(root: Path, modules: list[dict[str, Any]]) -> Path:
    return root / modules[0]["path"] if modules else root


def _module_kind(root: Path, module: dict[str, Any]) -> str:
    """Class name of a module; the package path before it differs between versions 2 and 6."""
    package, _, name = str(module["type"]).rpartition(".")
    if package.partition(".")[0] not in ("sentence_transformers", "pylate"):
        raise CheckpointError(
            f"{root / 'modules.json'}: module {module['type']!r} is not one of "
            f"sentence-transformers' or PyLate's own; vembed runs no code that a checkpoint names"
        )
    return name


def _read_transformer_config(folder: Path) -> dict[str, Any]:
    files = [folder / name for name in _TRANSFORMER_CONFIGS if (folder / name).is_file()]
    config = read_object(files[0]) if files else {}
    require_types(files[0] if files else folder, config, {"max_seq_length": int})
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise CheckpointError(
            f"{files[0]}: transformer_task {config['transformer_task']!r} is not that of an "
            f"embedding model (feature-extraction)"
        )
    known = {*_TRANSFORMER_KEYS, *_TOKEN_RULES}
    if other := [key for key, value in config.items() if value and key not in known]:
        logger.warning("%s: not used by vembed: %s", files[0], ", ".join(other))
    return config


def _read_pooling(file: Path) -> str:
    config = read_object(file)
    mode = config.get("pooling_mode")
    if mode is None:
        flagged = [name for flag, name in _POOLING_FLAGS.items() if config.get(flag)]
        mode = flagged or ["mean"]
    modes = list(mode) if isinstance(mode, list | dict) else [mode]
    if len(modes) != 1 or modes[0] not in POOLING_NAMES:
        raise CheckpointError(
            f"{file}: vembed pools in one way, of {', '.join(POOLING_NAMES)}. "
            f"Found: {', '.join(map(str, modes))}"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{file}: include_prompt=false (Instructor models) is not supported")
    return POOLING_NAMES[modes[0]]


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
