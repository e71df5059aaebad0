"""vembed: fine-tune embedding models on Hugging Face Accelerate."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Resolved on first use: `import vembed` must not pay for torch.
_LAZY = {
    "Trainer": "vembed.trainer:VEmbedFactoryTrainer",
    "VEmbedFactoryTrainer": "vembed.trainer:VEmbedFactoryTrainer",
    "Predictor": "vembed.inference:Predictor",
    "VEmbedFactoryPredictor": "vembed.inference:Predictor",
    "TrainConfig": "vembed.config:TrainConfig",
    "VembedError": "vembed.errors:VembedError",
}

__all__ = [  # noqa: PLE0604 - the names are strings, of a table
    "__version__",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vembed' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(import_module(module), attribute)
