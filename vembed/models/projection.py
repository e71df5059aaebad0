"""The linear layer after pooling, or on each token, that sentence-transformers calls Dense."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vembed.errors import CheckpointError
from vembed.models.checkpoint_format import NO_POOLING, OWN_POOLING, TOKEN_INPUT
from vembed.models.json_files import read_object, require_types
from vembed.models.weights import UNREADABLE

_PLACES = ("sentence_embedding", TOKEN_INPUT)
_PLAIN = {
    "module_input_name": _PLACES,
    "module_output_name": _PLACES,
    "use_residual": (False,),
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
        """`[..., in_features]` to `[..., out_features]`."""
        projected: Tensor = self.activation(self.linear(embeddings.to(self.linear.weight.dtype)))
        return projected

    @classmethod
    def load(cls, folder: Path) -> Projection:
        """Read a Dense module's folder.

        Raises:
            CheckpointError: if it is not a plain Dense with an activation of torch.nn, or has no
                weights that fit.
        """
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json")
        config = read_object(folder / "config.json")
        sizes = {"in_features": int, "out_features": int}
        require_types(folder / "config.json", config, sizes | {"activation_function": str})
        if lacking := [key for key in sizes if not (config.get(key) or 0) > 0]:
            raise CheckpointError(f"{folder / 'config.json'}: {lacking[0]}: must be above 0")
        given = {key: config[key] for key in _PLAIN if config.get(key) is not None}
        odd = {key: value for key, value in given.items() if value not in _PLAIN[key]}
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

    def save(self, folder: Path, *, on_tokens: bool = False) -> None:
        """Write what `load` and sentence-transformers read.

        Args:
            folder: Made when missing.
            on_tokens: Whether it is for the vector of each token.
        """
        folder.mkdir(parents=True, exist_ok=True)
        activation = type(self.activation)
        config = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        }
        if on_tokens:
            config |= {"module_input_name": TOKEN_INPUT, "module_output_name": TOKEN_INPUT}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: weight.detach().cpu() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def new_projection(in_features: int, out_features: int) -> Projection:
    """A linear layer without bias that starts orthogonal: it distorts angles least.

    Random numbers come from the process's generator, so that processes with one seed agree.
    """
    projection = Projection(in_features, out_features, bias=False)
    nn.init.orthogonal_(projection.linear.weight)
    return projection


def load_projections(
    folders: Sequence[Path], *, input_size: int, projection_dim: int | None, dtype: torch.dtype
) -> list[Projection]:
    """The projections of a checkpoint, and a new one if its vectors are not of the size asked for.

    Args:
        folders: Dense modules, in order.
        input_size: Columns of what the first one gets.
        projection_dim: Columns wanted of the last one; None for as many as there are.
        dtype: Type of the weights.

    Raises:
        CheckpointError: if a folder cannot be read.
    """
    projections = [Projection.load(folder) for folder in folders]
    size = projections[-1].out_features if projections else input_size
    if projection_dim is not None and projection_dim != size:
        projections.append(new_projection(size, projection_dim))
    return [projection.to(dtype) for projection in projections]


def apply_projections(projections: Iterable[nn.Module], embedding_BD: Tensor) -> Tensor:
    """One after the other; the result is float32 or wider."""
    for projection in projections:
        embedding_BD = projection(embedding_BD)
    return embedding_BD.to(torch.promote_types(embedding_BD.dtype, torch.float32))


def save_projections(
    projections: Iterable[nn.Module], folder: Path, *, pooling_method: str
) -> tuple[Path, ...]:
    """Write each into a folder of its own in `folder`, numbered as sentence-transformers does.

    Args:
        projections: Those of an encoder.
        folder: The model folder.
        pooling_method: Whether the Pooling module, which comes first, is there, and what they are
            for.

    Returns:
        The folders.
    """
    folders = []
    start = 1 if pooling_method in (OWN_POOLING, NO_POOLING) else 2
    for number, projection in enumerate(projections, start=start):
        folders.append(folder / f"{number}_Dense")
        projection.save(  # type: ignore[operator]
            folders[-1], on_tokens=pooling_method == NO_POOLING
        )
    return tuple(folders)


def _activation(folder: Path, path: str | None) -> type[nn.Module]:
    """The class that a config names, of torch.nn only: a checkpoint never says what to import."""
    package, _, name = (path or "torch.nn.modules.activation.Tanh").rpartition(".")
    found = getattr(nn, name, None) if package.startswith("torch.nn") else None
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    raise CheckpointError(f"{folder}: activation {path!r} is not a module of torch.nn")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / "model.safetensors").is_file():
            return load_file(folder / "model.safetensors")
        if (folder / "pytorch_model.bin").is_file():
            weights: dict[str, Tensor] = torch.load(
                folder / "pytorch_model.bin", map_location="cpu", weights_only=True
            )
            return weights
    except (*UNREADABLE, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error})") from error
    raise CheckpointError(f"{folder}: no model.safetensors")
