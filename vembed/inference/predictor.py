"""`Predictor`: texts and images to vectors with a saved model, in three lines."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt
import torch

from vembed.chunking import DEFAULT_CHUNK_TOKENS
from vembed.data.file_names import names_image_file
from vembed.errors import ConfigError, DataError, quote_path
from vembed.images import ImageSource, as_image_source
from vembed.inference.encoding import check_truncate_dim, encode_items
from vembed.models import load_encoder
from vembed.models.protocol import Encoder, Role
from vembed.modes import IMAGE, Item
from vembed.quantized_vectors import Precision, Ranges, quantize
from vembed.token_vectors import TokenVectors, Vectors, max_sim

if TYPE_CHECKING:
    from PIL.Image import Image

Encoded = npt.NDArray[np.float32 | np.int8 | np.uint8] | list[npt.NDArray[np.float32]]
"""`[n, D]`; of a model that keeps a vector for each token, an array `[T_i, D]` for each item."""

OpenImage = Union["PathLike[str]", "Image", ImageSource]
"""No text: a path object, an image of Pillow, or a source of `vembed.images`."""

ImageLike = str | OpenImage

Input = str | Item | OpenImage
"""A `str` is a text; see `OpenImage` for images."""

Side = Input | Sequence[Input] | npt.NDArray[Any] | Sequence[npt.NDArray[Any]]
"""Of a similarity: what `Predictor.encode` takes, or what it gave."""


class Predictor:
    """A loaded model, ready to embed.

    Example:
        >>> predictor = Predictor("runs/vembed/final")  # doctest: +SKIP
        >>> queries = predictor.encode_query(["how do I read a file?"])  # doctest: +SKIP
        >>> scores = predictor.similarity(queries, predictor.encode_document(texts))  # doctest:
        +SKIP
    """

    def __init__(
        self,
        model_path: str | Path,
        device: str | torch.device | None = None,
        truncate_dim: int | None = None,
        **load_options: Any,
    ) -> None:
        """Load a model.

        Args:
            model_path: Local folder, `package:NAME[/subdir]`, or hub id.
            device: Such as `"cpu"`, `"cuda:1"` or `"mps"`; None takes an accelerator when there is
                one.
            truncate_dim: How many numbers of each vector are kept, the first, as a model trained
                with `use_mrl` allows; unit vectors have unit length afterwards too. None keeps all.
            load_options: Those of `vembed.models.load_encoder`, such as `torch_dtype` or
                `max_seq_length`.

        Raises:
            ConfigError: if the name cannot be resolved, or an option or the device does not fit.
            CheckpointError: if the folder is not a model.
        """
        self.device = resolve_device(device)
        self.encoder: Encoder = load_encoder(str(model_path), **load_options)
        self.encoder.to(self.device)
        check_truncate_dim(self.encoder, truncate_dim)
        self.truncate_dim = truncate_dim

    @property
    def embedding_dim(self) -> int:
        """Columns of every result."""
        return self.truncate_dim or int(self.encoder.embedding_dim)

    def encode(
        self,
        inputs: Input | Sequence[Input],
        *,
        role: Role | None = None,
        batch_size: int | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        precision: Precision = "float32",
        ranges: Ranges | None = None,
    ) -> Encoded:
        """Embed texts, images, or items of both.

        Args:
            inputs: One or n of them. A `str` is a text; a `pathlib.Path`, an image of Pillow or a
                source of `vembed.images` is an image.
            role: `"query"` or `"document"` puts that role's prompt before each; None the model's
                default prompt, which most models do not have.
            batch_size: Most texts in a forward pass; None lets their length decide.
            normalize: Unit length or not; None takes the model's own.
            prompt: Text put before each instead of the role's; `""` for none.
            precision: `float32`; `int8`, a byte for each number; `ubinary` or `binary`, a bit (see
                `vembed.quantized_vectors`).
            ranges: Of `int8`; None takes those of these vectors, which should then be thousands.

        Returns:
            `[n, D]` float32, two-dimensional for a single text too; of a model that keeps a vector
            for each token, a list of n arrays `[T_i, D]`. In another precision `[n, D]` int8, or
            `[n, D / 8]` bytes.

        Raises:
            DataError: if an input is none of these, gives no token, or is a `str` that names an
                image file while the model embeds images: was the image meant?
            ConfigError: if `role`, `batch_size` or `precision` is not one that exists or fits.
        """
        if role not in (None, "query", "document"):
            raise ConfigError(f"role: expected 'query', 'document' or None. Received: {role!r}")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1. Received: {batch_size}")
        vectors = encode_items(
            self.encoder,
            self._as_items(inputs),
            role=role,
            prompt=prompt,
            normalize=normalize,
            truncate_dim=self.truncate_dim,
            max_items=batch_size,
            chunk_tokens=DEFAULT_CHUNK_TOKENS if batch_size is None else None,
        )
        if not isinstance(vectors, TokenVectors):
            return quantize(vectors, precision, ranges)
        if precision != "float32":
            raise ConfigError(
                f"precision: a vector for each token is float32 here. Received: {precision!r}"
            )
        return list(vectors)

    def encode_text(self, texts: str | Sequence[str], **options: Any) -> Encoded:
        """`encode` of texts, those that name image files too; `options` are its keywords."""
        listed: list[Any] = [texts] if _is_one(texts) else list(texts)
        return self.encode([Item(t) if isinstance(t, str) else t for t in listed], **options)

    def encode_image(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> Encoded:
        """Embed images.

        Args:
            images: One or n: paths, images of Pillow, or sources of `vembed.images`.
            options: Keyword arguments of `encode`.

        Raises:
            DataError: if one cannot be read, or the model embeds no images.
        """
        listed: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        return self.encode([Item(image=as_image_source(image)) for image in listed], **options)

    def encode_query(self, inputs: Input | Sequence[Input], **options: Any) -> Encoded:
        """`encode` in the role of queries; `options` are its keyword arguments."""
        return self.encode(inputs, role="query", **options)

    def encode_document(self, inputs: Input | Sequence[Input], **options: Any) -> Encoded:
        """`encode` in the role of documents; `options` are its keyword arguments."""
        return self.encode(inputs, role="document", **options)

    def encode_items(self, items: Sequence[Item], role: Role) -> Vectors:
        """Embed items in a role: the function that evaluation tasks ask for."""
        return encode_items(self.encoder, items, role=role, truncate_dim=self.truncate_dim)

    def similarity(
        self,
        a: Side,
        b: Side,
    ) -> npt.NDArray[np.float32]:
        """Cosine similarities `[n, m]` of n and m texts, images or vectors.

        Of a model that keeps a vector for each token: MaxSim of queries `a` and documents `b`, as
        the mean over a query's tokens.

        Args:
            a: Texts, images (`pathlib.Path`, images of Pillow), or what `encode` gave.
            b: The same.

        Raises:
            DataError: if the vectors of the two sides differ in size or kind; as `encode` does.
        """
        left, right = self._unit_vectors(a), self._unit_vectors(b)
        shapes = [_size_of(side) for side in (left, right)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"similarity: both sides need vectors of one size and kind. "
                f"Received: {' and '.join(shapes)}"
            )
        if isinstance(left, TokenVectors) and isinstance(right, TokenVectors):
            return max_sim(left, right).astype(np.float32)
        scores: npt.NDArray[np.float32] = np.asarray(left) @ np.asarray(right).T
        return scores

    def _unit_vectors(self, side: Side) -> Vectors:
        if not isinstance(side, np.ndarray):
            several: Any = [side] if _is_one(side) else side
            listed: list[Any] = list(several)
            if not listed or not all(isinstance(entry, np.ndarray) for entry in listed):
                return encode_items(
                    self.encoder,
                    self._as_items(listed),
                    role=None,
                    normalize=True,
                    truncate_dim=self.truncate_dim,
                )
            return TokenVectors.from_arrays(listed)
        if side.dtype.kind in "iu":
            raise DataError(
                "similarity: takes numbers, not the codes of another precision. Received: an array "
                f"of {side.dtype}. Decode int8 with its ranges (vembed.quantized_vectors)"
            )
        vectors: npt.NDArray[np.float32] = np.atleast_2d(side).astype(np.float32)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: npt.NDArray[np.float32] = vectors / np.maximum(length, np.finfo(np.float32).tiny)
        return unit

    def _as_items(self, inputs: Any) -> list[Item]:
        listed = [inputs] if _is_one(inputs) else list(inputs)
        return [self._as_item(entry, position) for position, entry in enumerate(listed)]

    def _as_item(self, entry: Any, position: int) -> Item:
        if not _is_one(entry):
            raise DataError(
                f"a text or an image is expected, or a list of them. "
                f"Received: {type(entry).__name__} at position {position}"
            )
        if isinstance(entry, Item):
            return entry
        if not isinstance(entry, str):
            return Item(image=as_image_source(entry))
        if IMAGE in self.encoder.modalities and names_image_file(entry):
            shown = quote_path(entry)
            raise DataError(
                f"{shown} names an image file, but a str is embedded as a text. "
                f"For the image, give pathlib.Path({shown}), or use encode_image; "
                "for the text, encode_text"
            )
        return Item(text=entry)


def _is_one(value: Any) -> bool:
    """Whether it is a text, an item or an image, rather than several."""
    from PIL.Image import Image

    return isinstance(value, str | Item | PathLike | ImageSource | Image)


def _size_of(side: Vectors) -> str:
    if isinstance(side, TokenVectors):
        return f"size {side.flat_SD.shape[1]}, one for each token"
    return f"size {side.shape[1]}"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None takes an accelerator when there is one.

    Raises:
        ConfigError: if it cannot be used here.
    """
    if device is None:
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, there in found.items() if there), "cpu"))
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {str(device)!r} cannot be used here ({error})") from error
    return resolved
