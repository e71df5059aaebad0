"""How a loss is chosen, built, and checked against the data."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from vembed.errors import ConfigError
from vembed.losses import (
    DISTILLATION_LOSSES,
    LOSSES,
    build_criterion,
    build_distillation_loss,
    check_row_fields,
)
from vembed.losses.info_nce import InfoNCE
from vembed.registry import resolve


class Distance(nn.Module):
    """A loss without settings: its constructor is `nn.Module`'s."""

    def forward(self, query, positive):
        return (query - positive).square().mean()


class Tempered(Distance):
    def __init__(self, temperature, margin=0.0):
        super().__init__()
        self.settings = {"temperature": temperature, "margin": margin}


class Anything(Distance):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings


def distance(query, positive):
    return (query - positive).square().mean()


def make_distance(margin=0.5):
    return Tempered(temperature=1.0, margin=margin)


def test_the_tables_import_no_torch_and_name_classes_that_exist():
    code = "import sys, vembed.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for table in (LOSSES, DISTILLATION_LOSSES):
        for name in table:
            loss = resolve("loss_type", name, table)
            assert issubclass(loss, nn.Module)
            assert "=" in loss.__doc__, name
    for name in LOSSES:
        loss = resolve("loss_type", name, LOSSES)
        assert loss.required_fields
        assert isinstance(loss.takes_tokens, bool)


def test_settings_reach_the_loss():
    criterion = build_criterion(
        "infonce", temperature=0.1, learn_temperature=True, bidirectional=True, tile_size=7
    )
    assert isinstance(criterion, InfoNCE)
    assert math.isclose(criterion.logit_scale.exp().item(), 10, rel_tol=1e-6)
    assert (criterion.bidirectional, criterion.tile_size) == (True, 7)


def test_a_loss_gets_only_the_settings_it_has():
    assert build_criterion("cosent", temperature=0.2).temperature == 0.2
    assert isinstance(build_criterion(Distance), Distance)
    assert build_criterion(Tempered, temperature=0.3, margin=1).settings == {
        "temperature": 0.3,
        "margin": 1,
    }
    assert build_criterion(Anything, temperature=0.3, margin=1).settings == {
        "temperature": 0.3,
        "learn_temperature": False,
        "bidirectional": False,
        "tile_size": "auto",
        "guided": False,
        "num_classes": None,
        "embedding_dim": None,
        "margin": 1,
    }


def test_functions_and_objects_serve_as_losses():
    assert build_criterion(distance) is distance
    made = Distance()
    assert build_criterion(made) is made
    assert build_criterion(make_distance, margin=2).settings["margin"] == 2
    path = f"{__name__}:distance"
    assert build_criterion(path) is distance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "infonse"}, "did you mean 'infonce'"),
        ({"loss_type": "infonce", "margin": 1}, "'margin'.*it accepts: temperature"),
        ({"loss_type": "cosent", "learn_temperature": True}, "'cosent' has no learn_temperature"),
        ({"loss_type": "supcon", "bidirectional": True}, "'supcon' has no loss_bidirectional"),
        ({"loss_type": "cosent", "tile_size": 8}, "'cosent' has no loss_tile_size"),
        ({"loss_type": distance, "tile_size": 8}, "has no loss_tile_size"),
        ({"loss_type": Distance, "margin": 1}, "margin"),
        ({"loss_type": Distance(), "margin": 1}, "has no margin"),
        ({"loss_type": distance, "learn_temperature": True}, "has no learn_temperature"),
        ({"loss_type": "infonce", "temperature": 0}, "temperature: must be above 0. Received: 0"),
        ({"loss_type": "supcon", "temperature": -1.0}, "temperature: must be above 0"),
        (
            {"loss_type": "infonce", "temperature": 0.001, "learn_temperature": True},
            r"within \[0.01, 1\].*Received: 0.001",
        ),
        ({"loss_type": "infonce", "tile_size": 0}, "tile_size: .*Received: 0"),
        ({"loss_type": "infonce", "tile_size": True}, "tile_size: .*Received: True"),
        ({"loss_type": "sigmoid", "tile_size": "big"}, "tile_size: .*Received: 'big'"),
        ({"loss_type": "infonce", "absolute_margin": 2.1}, "absolute_margin: .*Received: 2.1"),
        ({"loss_type": "sigmoid", "relative_margin": 95}, "relative_margin: .*-1 to 1.*95"),
        ({"loss_type": "sigmoid", "absolute_margin": "5%"}, "absolute_margin: .*Received: '5%'"),
        ({"loss_type": "infonce", "relative_margin": True}, "relative_margin: .*Received: True"),
        ({"loss_type": "infonce", "absolute_margin": math.nan}, "absolute_margin: .*nan"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_criterion(**arguments)


def test_distillation_losses():
    assert build_distillation_loss(temperature=0.5).temperature == 0.5
    with pytest.raises(ConfigError, match="did you mean 'similarity_kl'"):
        build_distillation_loss("similarity_k")
    with pytest.raises(ConfigError, match="temperature"):
        build_distillation_loss(temperature=0)


@pytest.mark.parametrize(
    ("loss_type", "fields"),
    [
        ("infonce", {"query", "positive"}),
        ("sigmoid", {"query", "positive", "negatives"}),
        ("cosent", {"query", "positive", "score"}),
        ("supcon", {"query", "label"}),
        (distance, {"query"}),
    ],
)
def test_rows_that_fit(loss_type, fields):
    check_row_fields(build_criterion(loss_type), fields)


@pytest.mark.parametrize(
    ("loss_type", "fields", "message"),
    [
        ("infonce", {"query", "label"}, "InfoNCE needs positive .*: label, query.*fit.*: supcon"),
        ("cosent", {"query", "positive"}, "CoSENT needs score.*fit.*: infonce, sigmoid"),
        ("cosent", {"query", "label"}, "CoSENT needs positive and score.*fit.*: supcon"),
        (
            "supcon",
            {"query", "positive", "score"},
            "needs label.*fit these rows: cosent, angle, cosine_mse",
        ),
        ("supcon", {"query"}, "fit these rows: none"),
    ],
)
def test_rows_that_do_not_fit_name_the_losses_that_do(loss_type, fields, message):
    with pytest.raises(ConfigError, match=message):
        check_row_fields(build_criterion(loss_type), fields)


@pytest.mark.parametrize("loss_type", ["infonce", "sigmoid"])
def test_a_learned_temperature_stays_in_range(loss_type):
    criterion = build_criterion(loss_type, learn_temperature=True)
    for value, kept in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        with torch.no_grad():
            criterion.logit_scale.fill_(value)
        criterion.clamp()
        assert math.isclose(criterion.logit_scale.item(), kept, rel_tol=1e-6)
    fixed = build_criterion(loss_type, learn_temperature=False)
    fixed.clamp()
    assert list(fixed.parameters()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"positive": None}, "needs positives"),
        ({"positive": torch.ones(3, 2)}, "2 queries, 3 positives"),
        ({"counts_positive": torch.tensor([1, 2])}, "add up to 3 positives"),
        ({"counts_positive": torch.tensor([2])}, "-1 ids and counts"),
        ({"ids_positive": torch.tensor([1, 2, 3])}, r"\+1 ids and counts"),
        ({"ids_negative": torch.tensor([1])}, "one entry per row"),
    ],
)
def test_rows_and_ids_that_disagree(rows, message):
    if "ids_negative" in rows:
        rows = rows | {"negative": torch.ones(2, 2)}
    batch = {"positive": torch.ones(2, 2)} | rows
    with pytest.raises(ValueError, match=message):
        build_criterion("infonce")(torch.ones(2, 2), **batch)


def test_other_losses_check_their_rows():
    query = torch.ones(2, 2)
    with pytest.raises(ConfigError, match="2 queries, 2 positives, 1 scores"):
        build_criterion("cosent")(query, query, scores=torch.ones(1))
    with pytest.raises(ConfigError, match="2 queries, None positives"):
        build_criterion("cosent")(query, None, scores=torch.ones(2))
    with pytest.raises(ConfigError, match="2 items, 3 labels"):
        build_criterion("supcon")(query, labels=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="needs the teacher's embeddings"):
        build_distillation_loss()({"query": query}, {})
    with pytest.raises(ConfigError, match="the same rows.*'positive': 1"):
        build_distillation_loss()(
            {"query": query, "positive": query}, {"query": query, "positive": query[:1]}
        )
