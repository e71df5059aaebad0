"""Cross-encoders: a query and a document in one sequence, to one score. They teach and judge.

# Shapes: n pairs, T tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vembed.chunking import count_tokens, plan_chunks, take_rows
from vembed.errors import CheckpointError, ConfigError
from vembed.models.json_files import read_object
from vembed.models.tokenizing import choose_length
from vembed.models.weights import UNREADABLE

_SUFFIX = "ForSequenceClassification"


def is_cross_encoder(folder: str | Path) -> bool:
    """Whether a model's folder says that it classifies sequences, as cross-encoders do."""
    architectures = read_object(Path(folder) / "config.json").get("architectures") or []
    return any(str(name).endswith(_SUFFIX) for name in architectures)


class CrossEncoder:
    """A transformers model with a head of one number, and its tokenizer."""

    def __init__(
        self,
        folder: str,
        *,
        torch_dtype: str = "float32",
        trust_remote_code: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load it, in eval mode.

        Args:
            folder: The model's.
            torch_dtype: Type of the weights.
            trust_remote_code: Run Python code in the folder, after `check_remote_code`.
            device: Where it runs.

        Raises:
            CheckpointError: if its files cannot be read.
            ConfigError: if it gives more than one number, or nothing says how long pairs may be.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        # Left unset, transformers would ask on the terminal whether code may run.
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch_dtype, **options
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
        except (*UNREADABLE, ValueError) as error:
            raise CheckpointError(
                f"{folder}: cannot be read as a cross-encoder ({error})"
            ) from error
        labels = self.model.config.num_labels
        if labels != 1:
            raise ConfigError(
                f"{folder}: a cross-encoder gives one score for a pair. Received: a model with "
                f"{labels} labels"
            )
        self.model.to(device).eval()
        self._device = torch.device(device)
        self._max_length = choose_length(
            None, None, of_tokenizer=self.tokenizer.model_max_length, text_model=self.model
        ).value

    def score(
        self, pairs: Sequence[tuple[str, str]], *, chunk_tokens: int
    ) -> npt.NDArray[np.float32]:
        """`[n]`, the model's own number for each pair, without a sigmoid.

        Args:
            pairs: Query and document.
            chunk_tokens: Most padded tokens in a forward pass.
        """
        queries, documents = zip(*pairs, strict=True)
        inputs = self.tokenizer(
            list(queries), list(documents), padding=True, truncation=True,
            max_length=self._max_length, return_tensors="pt",
        )  # fmt: skip
        scores = np.empty(len(pairs), dtype=np.float32)
        for rows in plan_chunks(count_tokens(inputs), max_tokens=chunk_tokens):
            chunk = {k: v.to(self._device) for k, v in take_rows(inputs, rows).items()}
            with torch.no_grad():
                scores[rows] = self.model(**chunk).logits[:, 0].float().cpu().numpy()
        return scores
