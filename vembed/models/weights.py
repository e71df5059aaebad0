"""A backbone's weights: read without gaps, and written with nothing lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from vembed.errors import CheckpointError, ConfigError
from vembed.models.merging import merged
from vembed.models.quantization import quantization_options

UNREADABLE = (OSError, EOFError, SafetensorError, UnpicklingError)
"""What reading a file of weights raises where it is damaged, or would run code."""

_TALKATIVE = ("modeling_utils", "configuration_utils")

_builder: ContextVar[Callable[[Any], Any] | None] = ContextVar("_builder", default=None)


def load_backbone(
    folder: Path,
    *,
    torch_dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    quantization: str | None = None,
) -> Any:
    """The model in `folder`, without task head; a pooler that the checkpoint lacks is taken off.

    The arguments are those of `load_encoder`.

    Raises:
        CheckpointError: if weights are missing, of another shape, or cannot be read.
        ConfigError: if transformers cannot load such a model here.
    """
    options: dict[str, Any] = {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if build := _builder.get():
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        options |= {"dtype": config.dtype if torch_dtype == "auto" else torch_dtype}
        return build(partial(AutoModel.from_config, config, **options))
    if quantization is not None:
        options |= quantization_options(quantization, torch_dtype)
    backbone, info = _read_backbone(
        folder, dtype=torch_dtype, trust_remote_code=trust_remote_code, **options
    )
    lost = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    lost += sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} weights are missing or of another shape than config.json says, "
            f"and would start random: {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}"
        )
    if any(name.startswith("pooler.") for name in info["missing_keys"]):
        backbone.pooler = None
    text_config = backbone.config.get_text_config()
    if getattr(text_config, "use_cache", False):
        text_config.use_cache = False  # keys and values for generation, which no embedding needs
    return backbone


@contextmanager
def without_weights(build: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside, backbones are made from their config alone, and no weight is read.

    Args:
        build: Calls what it is given, which returns the backbone, where its weights take no memory.
    """
    token = _builder.set(build)
    try:
        yield
    finally:
        _builder.reset(token)


def _read_backbone(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers found missing or of another shape."""
    try:
        with _unreported():
            found: tuple[Any, dict[str, Any]] = AutoModel.from_pretrained(
                folder,
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported by the caller, with what is missing
                **options,
            )
            return found
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error})") from error
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load this model ({error})") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Of a config.json that no model can have, it raises whatever happens to it.
        raise CheckpointError(
            f"{folder}: transformers cannot load this model ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _unreported() -> Iterator[None]:
    """Inside, transformers does not list the heads that no embedding needs, or odd token ids.

    SigLIP's published config names a start token beyond its own vocabulary.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(_is_error)  # a higher level would have transformers say other things
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def take_off_pooler(backbone: Any) -> dict[str, Tensor]:
    """Remove the head that BERT-like models put on the first token, and return its weights."""
    pooler = getattr(backbone, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return {}
    backbone.pooler = None
    return {f"pooler.{name}": tensor.detach() for name, tensor in pooler.state_dict().items()}


def save_backbone(backbone: Any, folder: Path, taken_off: dict[str, Tensor]) -> None:
    """Write weights and config as transformers does, with adapters merged in.

    LoRA adapters are merged into a copy on the CPU; the backbone's own weights stay as they are.

    Args:
        backbone: The model, with adapters or without.
        folder: Where to write.
        taken_off: What `take_off_pooler` returned: a folder without these weights would load
            elsewhere with random ones.
    """
    model = merged(backbone)
    extra = {name: tensor.to(model.dtype) for name, tensor in taken_off.items()}
    model.save_pretrained(folder, state_dict={**model.state_dict(), **extra})
