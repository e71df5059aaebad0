"""Images kept as the model reads them, where the settings ask for it."""

from __future__ import annotations

import logging

from vembed.config import TrainConfig
from vembed.errors import ConfigError
from vembed.models.dual import DualProcessor
from vembed.models.image_processor import ImageProcessor
from vembed.models.pixel_cache import PixelCache
from vembed.models.protocol import Encoder

logger = logging.getLogger(__name__)


def cache_images(encoder: Encoder, config: TrainConfig) -> None:
    """Let an encoder's processor read images from `image_cache`, and store those it makes.

    Raises:
        ConfigError: if the encoder makes something else of images than `PixelCache` keeps, or the
            folder cannot be written.
    """
    if config.image_cache is None:
        return
    processor = encoder.processor
    images = processor.image if isinstance(processor, DualProcessor) else processor
    if not isinstance(images, ImageProcessor):
        raise ConfigError(
            "image_cache: works with models of images whose image processor makes every image the "
            f"same size. Received: {config.model_label!r} (model_type {encoder.model_type}). Set "
            "image_cache: null"
        )
    images.cache = cache = PixelCache(config.image_cache, images.image_processor)
    size = cache.image_bytes / 2**10
    logger.info("%-14s %s, %.0f KiB for each image", "image cache", cache.folder, size)
