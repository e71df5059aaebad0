"""An encoder of your own: the TextCNN of Kim (2014), trained from scratch on your rows.

First make an untrained one, with a tokenizer of the words in the rows, then train it:

    python examples/text_cnn.py runs/text_cnn_new examples/data/pairs.jsonl
    PYTHONPATH=examples vembed train --config examples/text_cnn.yaml

Any program that loads the result is told the same name:
`Predictor("runs/text_cnn/final", encoder_mode="text_cnn:TextCNN")`.

Yoon Kim, 2014, "Convolutional Neural Networks for Sentence Classification".
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vembed.models.processor import TextProcessor

SETTINGS = {
    "embed_size": 128,  # of a token
    "filter_sizes": [3, 4, 5],  # tokens that a filter sees at a time
    "num_filters": 100,  # of each size
    "dropout": 0.5,
    "embedding_dim": 128,  # of a text
    "max_seq_length": 64,
}


class TextCNN(nn.Module):
    """Filters over a few neighbouring tokens; each keeps its strongest answer in the text."""

    modalities = frozenset("t")
    pooling_method = "max over time"
    model_type = "text_cnn"
    normalize = True

    def __init__(self, path: str, *, max_seq_length: int | None = None) -> None:
        """Load the folder at `path`: settings, tokenizer, and weights once there are any."""
        super().__init__()
        folder = Path(path)
        self.settings = json.loads((folder / "config.json").read_text())
        self.settings["max_seq_length"] = max_seq_length or self.settings["max_seq_length"]
        self.processor = TextProcessor(
            AutoTokenizer.from_pretrained(folder), max_seq_length=self.settings["max_seq_length"]
        )
        self.embedding_dim = self.settings["embedding_dim"]
        self.backbone = build_layers(self.settings, len(self.processor.tokenizer))
        if (folder / "model.safetensors").exists():
            self.load_state_dict(load_file(folder / "model.safetensors"))

    def forward(
        self, *, input_ids: Tensor, attention_mask: Tensor, normalize: bool | None = None
    ) -> Tensor:
        """B texts of T tokens, E numbers each, to `[B, D]`."""
        real_BT1 = attention_mask.unsqueeze(-1)
        tokens_BET = (self.backbone["words"](input_ids) * real_BT1).transpose(1, 2)
        found = []
        for filters in self.backbone["filters"]:
            # As many places as tokens, whatever the filter's size; zeros stand behind the last.
            padded_BET = functional.pad(tokens_BET, (0, filters.kernel_size[0] - 1))
            answers_BFT = functional.relu(filters(padded_BET))
            # Places of padding do not count: a text must not depend on its neighbours in a batch.
            found.append((answers_BFT * attention_mask.unsqueeze(1)).amax(-1))
        text_BD = self.backbone["head"](torch.cat(found, dim=-1))
        return text_BD if normalize is False else functional.normalize(text_BD, dim=-1)

    def describe(self) -> dict[str, Any]:
        """For the log."""
        return {"model_type": self.model_type, **self.settings}

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that the constructor reads."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"model_type": self.model_type, **self.settings}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        self.processor.save_pretrained(folder)
        save_file(self.state_dict(), folder / "model.safetensors")


def build_layers(settings: dict[str, Any], vocabulary: int) -> nn.ModuleDict:
    size, count, widths = (settings[k] for k in ("embed_size", "num_filters", "filter_sizes"))
    return nn.ModuleDict(
        {
            "words": nn.Embedding(vocabulary, size),
            "filters": nn.ModuleList(nn.Conv1d(size, count, width) for width in widths),
            "head": nn.Sequential(
                nn.Dropout(settings["dropout"]),
                nn.Linear(count * len(widths), settings["embedding_dim"]),
            ),
        }
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side="right"
    )


def main(folder: Path, rows: Path) -> None:
    """Write an untrained TextCNN; change its config.json before training as you like."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    texts = [value for row in lines for value in row.values() if isinstance(value, str)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    train_tokenizer(texts).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
