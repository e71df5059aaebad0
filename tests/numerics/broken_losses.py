"""Losses with the mistakes that are made most often, for `loss_type: package.module:Name`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vembed.distributed import gather_counts, process_count
from vembed.losses.info_nce import InfoNCE


class TimesProcesses(nn.Module):
    """What follows from scaling by the number of processes "because DDP averages"."""

    required_fields = frozenset({"positive"})

    def __init__(self) -> None:
        super().__init__()
        self.right = InfoNCE()

    def forward(self, query, positive, negative, ids_query, ids_positive):
        ids = {"ids_query": ids_query, "ids_positive": ids_positive}
        return self.right(query, positive, negative, **ids) * process_count()


class OverProcesses(TimesProcesses):
    """A mean over processes that is taken twice."""

    def forward(self, query, positive, negative, ids_query, ids_positive):
        loss = super().forward(query, positive, negative, ids_query, ids_positive)
        return loss / process_count() ** 2


class MeanOfMeans(TimesProcesses):
    """Takes the mean of its own rows: right as long as all processes have equally many."""

    def forward(self, query, positive, negative, ids_query, ids_positive):
        ids = {"ids_query": ids_query, "ids_positive": ids_positive}
        share = process_count() * len(query) / sum(gather_counts(len(query), query.device))
        return self.right(query, positive, negative, **ids) / share


class WithoutGather(nn.Module):
    """Ranks the rows of its own process only."""

    required_fields = frozenset({"positive"})

    def forward(self, query: Tensor, positive: Tensor) -> Tensor:
        logits = functional.normalize(query) @ functional.normalize(positive).T * 20
        return functional.cross_entropy(logits, torch.arange(len(query)))


class TemperatureTimesProcesses(InfoNCE):
    """The encoder's gradient is right, that of the learned temperature is W times too long."""

    def __init__(self, temperature: float = 0.05, learn_temperature: bool = True) -> None:
        super().__init__(temperature, learn_temperature=True)
        self.logit_scale.register_hook(lambda grad: grad * process_count())
