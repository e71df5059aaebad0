"""The temperature that a checkpoint was trained with: where a learned one starts, and is kept.

CLIP and SigLIP keep a `logit_scale` (SigLIP also a `logit_bias`) beside their towers. Here it is
the loss that scales similarities, so its parameters start from the checkpoint's, are trained and
clamped as any loss's, and go back into the model that is saved, for whoever reads it with
transformers.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn

from vembed.config import TrainConfig
from vembed.losses.matryoshka import innermost

logger = logging.getLogger(__name__)

_NAMES = ("logit_scale", "logit_bias")
_LEARNED_RANGE = (0.01, 1.0)


def start_from_checkpoint(config: TrainConfig, encoder: Any) -> None:
    """Let a temperature that is learned, and not set by the user, start from the encoder's own.

    What it starts from is set in `config`, so that the resolved settings say it.

    Args:
        config: Changed where `learn_temperature` is set.
        encoder: Has `logits` if its checkpoint has a scale.
    """
    own = getattr(encoder, "logits", {})
    if not config.learn_temperature or "logit_scale" not in own:
        return
    if "temperature" not in config.model_fields_set:
        least, most = _LEARNED_RANGE
        config.temperature = min(max(math.exp(-own["logit_scale"]), least), most)
        logger.info("temperature starts at %.4g, from the checkpoint", config.temperature)
    if config.loss_type == "sigmoid" and "logit_bias" in own:
        config.loss_kwargs = {"bias": own["logit_bias"], **config.loss_kwargs}


def keep_in_model(criterion: Any, encoder: Any) -> None:
    """Write what a loss learned of temperature and bias into the encoder that is to be saved."""
    set_logits = getattr(encoder, "set_logits", None)
    loss = innermost(criterion)
    learned = {name: getattr(loss, name, None) for name in _NAMES}
    learned = {name: value for name, value in learned.items() if isinstance(value, nn.Parameter)}
    if set_logits is not None and learned:
        set_logits(**learned)
