"""A backbone with fewer layers: which stay, and that it is saved and loaded as such."""

from __future__ import annotations

import pytest
import torch

from tests.pictures import plain
from tests.tiny import tiny_bert, tiny_clip, tiny_modernbert, tiny_qwen3, tiny_vit
from vembed.errors import ConfigError
from vembed.images import as_image_source
from vembed.models import check_layers, load_encoder
from vembed.models.layers import _chosen
from vembed.modes import Item
from vembed.training.model_builder import build_model


@pytest.mark.parametrize(
    ("keep", "count", "chosen"),
    [
        (3, 6, [0, 2, 5]),
        (2, 6, [0, 5]),
        (1, 6, [0]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (4, 12, [0, 4, 7, 11]),
        ([1, 3], 6, [1, 3]),
    ],
)
def test_which_layers_stay(keep, count, chosen):
    assert _chosen(keep, count) == chosen


FAMILIES = {"bert": tiny_bert, "modernbert": tiny_modernbert, "qwen3": tiny_qwen3, "vit": tiny_vit}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [2, [0, 2]])
def test_a_smaller_model_is_saved_and_loaded_as_one(family, keep, tmp_path):
    path = FAMILIES[family](tmp_path / "whole", num_hidden_layers=4)
    small = load_encoder(str(path), keep_layers=keep)
    small.save_pretrained(tmp_path / "small")
    again = load_encoder(str(tmp_path / "small"))
    whole = load_encoder(str(path))
    item = Item(image=as_image_source(plain())) if family == "vit" else Item("a red apple")
    vectors = [e(**e.processor([item], role="query")) for e in (small, again, whole)]
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=1e-6)
    assert (vectors[2] - vectors[0]).abs().max() > 1e-3
    assert again.backbone.config.num_hidden_layers == 2
    sizes = [sum(p.numel() for p in e.parameters()) for e in (small, whole)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("keep", "words"),
    [(9, "the model has 2 layers. Received: 9"), ([0, 5], "from 0 to 1"), ([1, 0], "rising")],
)
def test_layers_that_are_not_there(tiny_bert_path, keep, words):
    with pytest.raises(ConfigError, match=words):
        load_encoder(str(tiny_bert_path), keep_layers=keep)


def test_a_layer_that_is_built_otherwise_cannot_move(tmp_path):
    path = tiny_modernbert(tmp_path / "whole", num_hidden_layers=4)
    with pytest.raises(ConfigError, match="layer 1 of a modernbert is built unlike layer 0"):
        load_encoder(str(path), keep_layers=[1, 2])


# --- beside the whole model


def embed(encoder, item, **options):
    return encoder(**encoder.processor([item], role="query"), **options)


@pytest.mark.parametrize("projection", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_beside_the_whole_are_those_of_a_model_that_has_no_more(
    family, projection, tmp_path
):
    """Also what follows the layers: a norm, in ModernBERT, Qwen3 and ViT."""
    path = FAMILIES[family](tmp_path / "new", num_hidden_layers=4)
    torch.manual_seed(1)
    made = load_encoder(str(path), projection_dim=projection)
    with torch.no_grad():  # a norm of ones would leave directions as they are
        for weight in (p for p in made.backbone.parameters() if p.ndim == 1):
            weight.add_(torch.randn_like(weight), alpha=0.3)
    made.save_pretrained(path := tmp_path / "whole")
    pooling = {"pooling_method": "cls"} if family == "vit" else {}
    whole = load_encoder(str(path), **pooling)
    item = Item(image=as_image_source(plain())) if family == "vit" else Item("a red apple")
    check_layers(whole, [3, 1])
    vectors = embed(whole, item, layers=[3, 1])
    assert vectors.shape == (1, 3, whole.embedding_dim)
    for number, keep in enumerate([[0, 1, 2], [0], None]):
        alone = load_encoder(str(path), keep_layers=keep, **pooling)
        torch.testing.assert_close(vectors[:, number], embed(alone, item), rtol=0, atol=1e-6)
    assert (vectors[:, 0] - vectors[:, 2]).abs().max() > 1e-3
    torch.testing.assert_close(embed(whole, item), vectors[:, 2])  # nothing stays attached


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_layers_beside_the_whole_with_recomputed_activations(family, tmp_path):
    path = FAMILIES[family](tmp_path / "whole", num_hidden_layers=3)
    gradients = []
    for recompute in (False, True):
        encoder = build_model({"model_name": str(path), "gradient_checkpointing": recompute})
        encoder.train()
        torch.manual_seed(0)
        vectors = embed(encoder, Item("a red apple"), layers=[1, 2])
        (vectors * torch.arange(vectors.numel()).view_as(vectors)).sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for expected, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, expected)


def test_what_follows_the_layers_is_no_guess(tmp_path):
    """A step between the last layer and the result that no module takes is refused."""

    class Doubled(torch.nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone, self.config = backbone, backbone.config

        def forward(self, **inputs):
            output = self.backbone(**inputs)
            output.last_hidden_state = output.last_hidden_state * 2
            return output

    encoder = load_encoder(str(tiny_bert(tmp_path / "bert", num_hidden_layers=4)))
    encoder.backbone = Doubled(encoder.backbone)
    with pytest.raises(ConfigError, match="after its last layer is not known"):
        embed(encoder, Item("a red apple"), layers=[1])


def test_layers_that_cannot_be_trained_beside_the_whole(tmp_path, tiny_bert_path):
    path = tiny_vit(tmp_path / "vit", num_hidden_layers=4)
    for encoder, words in (
        (load_encoder(str(tiny_bert_path)), "2 layers, which are always trained.*Received: .1, 2"),
        (load_encoder(str(path), pooling_method="pooler"), "pooling_method pooler"),
        (load_encoder(str(tiny_clip(tmp_path / "clip"))), "Received: DualEncoder"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_layers(encoder, [1, 2])


def test_two_towers_have_no_one_stack(tmp_path):
    with pytest.raises(ConfigError, match="does not take keep_layers"):
        load_encoder(str(tiny_clip(tmp_path / "clip")), keep_layers=1)
