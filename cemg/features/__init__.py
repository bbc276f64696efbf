"""Item features: text and image encoders, their cache, and the PCA of their outputs."""

from cemg.features.cache import FeatureCache
from cemg.features.encoding import Features
from cemg.features.pca import PCA
from cemg.features.text import TextConfig, check_text_model, encode_texts
from cemg.features.vision import ImageConfig, check_image_model, encode_images

__all__ = [
    "PCA",
    "FeatureCache",
    "Features",
    "ImageConfig",
    "TextConfig",
    "check_image_model",
    "check_text_model",
    "encode_images",
    "encode_texts",
]
