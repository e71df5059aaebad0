"""Encoding with a trained model."""

from vembed.inference.encoding import encode_items
from vembed.inference.predictor import Predictor

VEmbedFactoryPredictor = Predictor

__all__ = ["Predictor", "VEmbedFactoryPredictor", "encode_items"]
