from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.training.test_trainer import make_trainer
from vembed.training import table_gradients
from vembed.training.table_gradients import large_tables, merged_table_gradients

CHUNKS = [torch.tensor([[1, 2, 2], [0, 4, 0]]), torch.tensor([[4, 4]]), torch.tensor([[3]])]


class Layers(nn.Module):
    """Tokens to vectors, by a table with padding and one that is smaller."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(6, 4, dtype=torch.float64, **options)
        self.kinds = nn.Embedding(2, 4, dtype=torch.float64)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, ids):
        return self.linear(self.words(ids) + self.kinds(ids % 2)).tanh().sum(1)


@pytest.fixture(autouse=True)
def tables_of_six_rows_are_large(monkeypatch):
    monkeypatch.setattr(table_gradients, "_LEAST_ROWS", 6)


def backward(model, *, merged: bool, chunks=CHUNKS) -> dict[str, torch.Tensor | None]:
    def run():
        # As in a step: everything forward, then everything back.
        outputs = [model(chunk) for chunk in chunks]
        torch.autograd.backward([(out * torch.arange(4)).sum() for out in outputs])

    if merged:
        with merged_table_gradients(large_tables(model)):
            run()
    else:
        run()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(actual, expected):
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_gradient_is_that_of_autograd(padding_idx, repeats):
    # Three times the chunks are more tokens than the table has rows, so it gathers in between.
    chunks = CHUNKS * repeats
    expected = backward(Layers(padding_idx=padding_idx), merged=False, chunks=chunks)
    actual = backward(Layers(padding_idx=padding_idx), merged=True, chunks=chunks)
    assert_same(actual, expected)
    assert actual["words.weight"].abs().sum() > 0


def test_it_is_added_to_what_is_there():
    twice, once = Layers(), Layers()
    backward(twice, merged=True)
    backward(once, merged=False)
    assert_same(
        backward(twice, merged=True),
        {name: 2 * p.grad for name, p in once.named_parameters()},
    )


def test_a_table_is_filled_once_for_all_chunks(monkeypatch):
    filled = []
    add = table_gradients._Merged.add_to_grad
    monkeypatch.setattr(
        table_gradients._Merged, "add_to_grad", lambda self: (filled.append(self), add(self))
    )
    backward(Layers(), merged=True, chunks=CHUNKS[1:])
    assert len(filled) == 1


def test_which_tables_are_merged():
    model = nn.ModuleList(
        [
            nn.Embedding(6, 2),
            nn.Embedding(5, 2),
            nn.Embedding(6, 2, sparse=True),
            nn.Embedding(6, 2, max_norm=1.0),
            nn.Embedding(6, 2, scale_grad_by_freq=True),
            nn.EmbeddingBag(6, 2),
        ]
    )
    assert large_tables(model) == [model[0]]


def test_a_frozen_table_gets_no_gradient():
    model = Layers()
    model.words.weight.requires_grad_(False)
    assert backward(model, merged=True)["words.weight"] is None


def test_who_listens_to_the_gradient_hears_it():
    model, heard = Layers(), []
    model.words.weight.register_hook(lambda grad: heard.append(grad) or 2 * grad)
    expected = 2 * backward(Layers(), merged=False)["words.weight"]
    torch.testing.assert_close(backward(model, merged=True)["words.weight"], expected)
    assert heard


def test_the_model_is_as_before_also_after_an_error():
    model = Layers()
    with pytest.raises(IndexError), merged_table_gradients(large_tables(model)):
        model(torch.tensor([[7]]))
    assert "forward" not in vars(model.words)
    assert model.words.weight.grad is None
    assert_same(backward(model, merged=False), backward(Layers(), merged=False))


class Words(nn.Module):
    """Token ids to the mean of their vectors, which the padding is left out of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4)

    def forward(self, input_ids, attention_mask):
        return (self.words(input_ids) * attention_mask[..., None]).sum(1)


@pytest.mark.parametrize(
    "settings", [{}, {"use_gradient_cache": True, "gradient_cache_chunk_size": 1}]
)
def test_a_step_merges_the_tables_of_all_its_chunks(tmp_path, monkeypatch, settings):
    ids = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
    batch = {
        f"{role}_{name}": tensor
        for role, of_role in (("query", ids), ("positive", (ids + 1) * (ids > 0)))
        for name, tensor in (("input_ids", of_role), ("attention_mask", (of_role > 0).long()))
    }
    looked_up, grads = [], []
    monkeypatch.setattr(table_gradients._Merged, "_take", _counted(looked_up))
    for tables in (large_tables, lambda _: []):
        monkeypatch.setattr("vembed.training.trainer.large_tables", tables)
        trainer = make_trainer(tmp_path, model=Words(), batches=[batch], chunk_tokens=3, **settings)
        trainer.prepare()
        trainer.step(batch)
        grads.append(trainer.encoder.words.weight.grad)
    torch.testing.assert_close(*grads)
    assert len(looked_up) > 2, "more than a chunk of each role"


def _counted(calls):
    take = table_gradients._Merged._take

    def counted(self, ids, grad):
        calls.append(ids)
        take(self, ids, grad)

    return counted
