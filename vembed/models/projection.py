"""The linear layer after pooling that sentence-transformers calls Dense."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vembed.errors import CheckpointError

_PLAIN = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
    "use_residual": False,
}


class Projection(nn.Module):
    """`activation(linear(x))`, in the type of its weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: type[nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation()

    @property
    def out_features(self) -> int:
        """Columns of the output."""
        return self.linear.out_features

    def forward(self, embeddings: Tensor) -> Tensor:
        """`[B, in_features]` to `[B, out_features]`."""
        projected: Tensor = self.activation(self.linear(embeddings.to(self.linear.weight.dtype)))
        return projected

    @classmethod
    def load(cls, folder: Path) -> Projection:
        """Read a Dense module's folder.

        Raises:
            CheckpointError: if it is not a plain Dense on sentence embeddings with an activation of
                torch.nn, or has no weights that fit.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: config.json cannot be read ({error})") from error
        odd = {key: config[key] for key in _PLAIN if config.get(key, _PLAIN[key]) != _PLAIN[key]}
        if odd:
            raise CheckpointError(f"{folder}: a Dense module with {odd} is not supported")
        projection = cls(
            config["in_features"],
            config["out_features"],
            bias=config.get("bias", True),
            activation=_activation(folder, config.get("activation_function")),
        )
        try:
            projection.load_state_dict(_read_weights(folder))
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        return projection

    def save(self, folder: Path) -> None:
        """Write what `load` and sentence-transformers read."""
        folder.mkdir(parents=True, exist_ok=True)
        activation = type(self.activation)
        config = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: weight.detach().cpu() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _activation(folder: Path, path: str | None) -> type[nn.Module]:
    """The class that a config names, of torch.nn only: a checkpoint never says what to import."""
    package, _, name = (path or "torch.nn.modules.activation.Tanh").rpartition(".")
    found = getattr(nn, name, None) if package.startswith("torch.nn") else None
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise CheckpointError(f"{folder}: activation {path!r} is not a module of torch.nn")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        weights: dict[str, Tensor] = torch.load(
            folder / "pytorch_model.bin", map_location="cpu", weights_only=True
        )
        return weights
    raise CheckpointError(f"{folder}: no model.safetensors")
