"""The limit: transformers alone on tokens that are ready, without padding, and nothing else.

Texts are packed into rows side by side. A block-diagonal mask keeps each to itself, and positions
start anew with each, so that its vector is what it would be alone. Rows are as wide as the longest
text; each is filled with the longest that still fits (best-fit decreasing). One pass after another
goes forward and back with gradients of the vectors that are given, which no trainer can know before
its loss has seen all of them; loss, clipping, optimizer and tokenizer do not run at all.

# Shapes: R rows, W tokens of a row, n texts, D size
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

PASS_TOKENS = {"cpu": 4096}
"""Tokens that go through the model together; more are slower on a CPU, whose caches they leave."""
_ACCELERATOR_PASS_TOKENS = 2**16


@dataclass(frozen=True)
class Packed:
    """Some rows of packed texts.

    Attributes:
        ids_RW: Token ids.
        positions_RW: Of each token in its text.
        mask_R1WW: True where a token of the row may look at another.
        text_of_token: Number of each real token's text among `texts`, row after row.
        is_real_RW: False on padding.
        counts_n: Tokens of each text.
        texts: Which texts these are.
    """

    ids_RW: Tensor
    positions_RW: Tensor
    mask_R1WW: Tensor
    text_of_token: Tensor
    is_real_RW: Tensor
    counts_n: Tensor
    texts: Tensor

    def to(self, device: str) -> Packed:
        return Packed(*(tensor.to(device) for tensor in vars(self).values()))


def fill_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Texts of each row, by best-fit decreasing; no row has more than `width` tokens."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted: room of a row, number of the row
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[text], -1))
        if at == len(free):
            insort(free, (width - lengths[text], len(rows)))
            rows.append([text])
        else:
            room, row = free.pop(at)
            rows[row].append(text)
            insort(free, (room - lengths[text], row))
    return rows


def pack(ids: Sequence[Sequence[int]], device: str = "cpu") -> list[Packed]:
    """All texts, packed, cut into passes."""
    lengths = [len(text) for text in ids]
    width = max(lengths)
    rows = fill_rows(lengths, width)
    together = max(PASS_TOKENS.get(device, _ACCELERATOR_PASS_TOKENS) // width, 1)
    passes = [rows[i : i + together] for i in range(0, len(rows), together)]
    return [_pack_rows(ids, rows, width).to(device) for rows in passes]


def _pack_rows(ids: Sequence[Sequence[int]], rows: list[list[int]], width: int) -> Packed:
    ids_RW = torch.zeros(len(rows), width, dtype=torch.int64)
    positions_RW = torch.zeros_like(ids_RW)
    text_RW = torch.full_like(ids_RW, -1)
    texts = [text for row in rows for text in row]
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for text in row:
            end = start + len(ids[text])
            ids_RW[r, start:end] = torch.tensor(ids[text])
            positions_RW[r, start:end] = torch.arange(end - start)
            text_RW[r, start:end] = number
            start, number = end, number + 1
    is_real_RW = text_RW >= 0
    return Packed(
        ids_RW,
        positions_RW,
        # Padding sees padding: a token that sees nothing would be not-a-number.
        (text_RW[:, None, :, None] == text_RW[:, None, None, :]),
        text_RW[is_real_RW],
        is_real_RW,
        torch.tensor([len(ids[text]) for text in texts]),
        torch.tensor(texts),
    )


def embed(model: Any, packed: Packed) -> Tensor:
    """Mean of each text's token vectors `[n, D]`, of length one, in the order of `packed.texts`."""
    hidden_RWD = model(
        input_ids=packed.ids_RW,
        position_ids=packed.positions_RW,
        attention_mask=packed.mask_R1WW,
    ).last_hidden_state
    tokens = hidden_RWD[packed.is_real_RW].float()
    sums_nD = tokens.new_zeros(len(packed.texts), tokens.shape[1])
    sums_nD = sums_nD.index_add(0, packed.text_of_token, tokens)
    return functional.normalize(sums_nD / packed.counts_n[:, None], dim=-1)


def autocast(device: str, precision: str) -> Any:
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def load_bare(folder: str, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of transformers."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return model.to(device), AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=tokens)["input_ids"]
    return ids


def train_pass(model: Any, passes: Sequence[Packed], grads_nD: Tensor, precision: str) -> None:
    """Forward and backward over all texts; `grads_nD` by number of the text."""
    for packed in passes:
        with autocast(packed.ids_RW.device.type, precision):
            vectors = embed(model, packed)
        vectors.backward(grads_nD[packed.texts])
