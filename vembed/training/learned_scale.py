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
from vembed.losses import learns_temperature, own_temperature, takes_argument
from vembed.losses.matryoshka import innermost

logger = logging.getLogger(__name__)

_NAMES = ("logit_scale", "logit_bias")
_LEARNED_RANGE = (0.01, 1.0)


def resolve_temperature(config: TrainConfig, encoder: Any) -> None:
    """Settle what the user left open: the temperature, and whether it is trained.

    A temperature that is not set is the encoder's own, trained on as it was, where the encoder has
    one and the loss can train it; else it is the loss's own. A loss that cannot would be bound to a
    number that was learned for other comparisons, such as those of texts with images.

    Args:
        config: Set in it, so that the resolved settings say it.
        encoder: Has `logits` if its checkpoint has a scale.
    """
    own, loss = getattr(encoder, "logits", {}), config.loss_type
    is_open = config.temperature is None
    is_own = is_open and "logit_scale" in own and takes_argument(loss, "learn_temperature")
    if config.learn_temperature is None:
        config.learn_temperature = is_own or (is_open and learns_temperature(loss))
    if is_own:
        least, most = _LEARNED_RANGE
        config.temperature = min(max(math.exp(-own["logit_scale"]), least), most)
        how = "starts at" if config.learn_temperature else "is"
        logger.info("temperature %s %.4g, from the checkpoint", how, config.temperature)
    elif is_open:
        config.temperature = own_temperature(loss)
    if loss == "sigmoid" and config.learn_temperature and "logit_bias" in own:
        config.loss_kwargs = {"bias": own["logit_bias"], **config.loss_kwargs}


def keep_in_model(criterion: Any, encoder: Any) -> None:
    """Write what a loss learned of temperature and bias into the encoder that is to be saved."""
    set_logits = getattr(encoder, "set_logits", None)
    loss = innermost(criterion)
    learned = {name: getattr(loss, name, None) for name in _NAMES}
    learned = {name: value for name, value in learned.items() if isinstance(value, nn.Parameter)}
    if set_logits is not None and learned:
        set_logits(**learned)
