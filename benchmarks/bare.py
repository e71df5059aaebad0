"""The limit: transformers alone on tokens that are ready, and nothing else.

*Packed*: texts side by side in rows as wide as the longest, each filled with the longest that still
fits (best-fit decreasing). A block-diagonal mask keeps each text to itself, and positions start
anew with each, so that its vector is what it would be alone. *Sorted*: a row for each text, cut by
length into passes that pad least. Packing has less padding, but pays attention over whole rows.

One pass after another goes forward and back with gradients of the vectors that are given, which no
trainer can know before its loss has seen all of them; loss, clipping, optimizer and tokenizer do
not run at all.

# Shapes: R rows, W tokens of a row, n texts, D size
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vembed.chunking import chunk_overhead, plan_chunks

Ids = Sequence[Sequence[int]]

# What goes through the model together. On a CPU the attention matrices of a packed pass should
# stay in its caches: rows times width squared.
_CPU_ATTENTION = 2**19
_CPU_TOKENS = 2048
_ACCELERATOR_TOKENS = 2**16


@dataclass(frozen=True)
class Pass:
    """What goes through the model together.

    Attributes:
        ids_RW: Token ids.
        positions_RW: Of each token in its text.
        mask: True where a token of the row may look at another `[R, 1, W, W]`, or where there is a
            token `[R, W]`.
        text_of_token: Number of each real token's text among `texts`, row after row.
        is_real_RW: False on padding.
        counts_n: Tokens of each text.
        texts: Which texts these are.
    """

    ids_RW: Tensor
    positions_RW: Tensor
    mask: Tensor
    text_of_token: Tensor
    is_real_RW: Tensor
    counts_n: Tensor
    texts: Tensor

    def to(self, device: str) -> Pass:
        return Pass(*(tensor.to(device) for tensor in vars(self).values()))


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


def pack(ids: Ids, device: str = "cpu") -> list[Pass]:
    """All texts, packed without padding but at the end of rows."""
    lengths = [len(text) for text in ids]
    width = max(lengths)
    rows = fill_rows(lengths, width)
    together = _CPU_ATTENTION // width**2 if device == "cpu" else _ACCELERATOR_TOKENS // width
    size = max(together, 1)
    passes = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [_lay_out(ids, rows, width).to(device) for rows in passes]


def sort(ids: Ids, device: str = "cpu") -> list[Pass]:
    """All texts, a row for each, those of similar length together."""
    budget = _CPU_TOKENS if device == "cpu" else _ACCELERATOR_TOKENS
    chunks = plan_chunks(
        [len(text) for text in ids], max_tokens=budget, overhead=chunk_overhead(device)
    )
    passes = []
    for chunk in chunks:
        padded = _lay_out(ids, [[text] for text in chunk], max(len(ids[text]) for text in chunk))
        passes.append(replace(padded, mask=padded.is_real_RW).to(device))
    return passes


ARRANGEMENTS = {"packed": pack, "sorted": sort}


def _lay_out(ids: Ids, rows: list[list[int]], width: int) -> Pass:
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
    return Pass(
        ids_RW,
        positions_RW,
        # Padding sees padding: a token that sees nothing would be not-a-number.
        (text_RW[:, None, :, None] == text_RW[:, None, None, :]),
        text_RW[is_real_RW],
        is_real_RW,
        torch.tensor([len(ids[text]) for text in texts]),
        torch.tensor(texts),
    )


def embed(model: Any, packed: Pass) -> Tensor:
    """Mean of each text's token vectors `[n, D]`, of length one, in the order of `packed.texts`."""
    hidden_RWD = model(
        input_ids=packed.ids_RW,
        position_ids=packed.positions_RW,
        attention_mask=packed.mask,
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


def train_pass(model: Any, passes: Sequence[Pass], grads_nD: Tensor, precision: str) -> None:
    """Forward and backward over all texts; `grads_nD` by number of the text."""
    for packed in passes:
        with autocast(packed.ids_RW.device.type, precision):
            vectors = embed(model, packed)
        vectors.backward(grads_nD[packed.texts])
