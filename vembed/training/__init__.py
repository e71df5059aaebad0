"""Training: the `Trainer`, its loop, and the builders of its parts.

Names resolve on first use, so that reading a configuration does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "DistributedConfig": "config",
    "Evaluator": "evaluator",
    "StepOutput": "trainer",
    "Trainer": "trainer",
    "apply_lora": "model_builder",
    "build_model": "model_builder",
    "build_optimizer": "optimizer_builder",
    "build_scheduler": "optimizer_builder",
    "build_teacher_model": "model_builder",
    "enable_static_graph": "model_builder",
    "get_distributed_config": "config",
    "load_and_parse_config": "config",
    "resolve_tracker": "optimizer_builder",
    "run_training": "run",
    "save_checkpoint": "checkpoint",
    "save_config": "config",
}

__all__ = list(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vembed.training' has no attribute {name!r}")
    return getattr(import_module(f"vembed.training.{_MODULES[name]}"), name)
