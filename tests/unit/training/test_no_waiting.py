"""A step asks the device nothing, whatever the encoder does: on meta any question is an error."""

from contextlib import nullcontext

import pytest
import torch

from tests.numerics.test_copies import KEYS, ToyEncoder, batch
from vembed.losses import build_criterion
from vembed.training import gradient_cache
from vembed.training.data_utils import place_batch, row_keys, unpack_extras, unpack_roles
from vembed.training.gradient_cache import GradientCache
from vembed.training.objective import Objective

META = torch.device("meta")


class NoRandomState:
    """There is none on meta."""

    def __init__(self, device):
        pass

    def restore(self):
        pass


def flat_batch() -> dict:
    """A batch as a collator makes it, with copies, padded on the right."""
    inputs, lengths = batch()
    flat = {}
    for role, of_role in inputs.items():
        flat |= {f"{role}_{name}": tensor for name, tensor in of_role.items()}
        flat |= {f"lengths_{role}": lengths[role], f"keys_{role}": KEYS[role]}
        flat[f"ids_{role}"] = torch.tensor(KEYS[role])
    return flat | {"counts_positive": torch.ones(6, dtype=torch.int64)}


@pytest.mark.parametrize("keep", [0, "all"])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid", "triplet"])
def test_a_step_asks_nothing(loss, keep, monkeypatch):
    monkeypatch.setattr(gradient_cache, "RandomState", NoRandomState)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    placed = place_batch(flat_batch(), META)
    encoder = ToyEncoder().to(META)
    objective = Objective(build_criterion(loss).to(META))
    inputs = unpack_roles(placed, "t2t")
    GradientCache(chunk_size=2, keep=keep).backward(
        encode=lambda inputs: encoder(**inputs),
        inputs=inputs,
        lengths={role: placed[f"lengths_{role}"] for role in inputs},
        keys=row_keys(placed),
        objective=lambda embeddings: objective(embeddings, unpack_extras(placed)),
        backward=torch.Tensor.backward,
    )
    assert encoder.layer.weight.grad.is_meta
    torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
    torch.optim.AdamW(encoder.parameters(), foreach=True).step()
