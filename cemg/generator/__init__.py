"""Generation of the next item's codes: vocabulary, prompts, backbones and weights.

Training is in ``cemg.generator.training``, which inference does not import.
"""

from cemg.generator.backbones import BackboneConfig, build_backbone, start_from_codebooks
from cemg.generator.config import GeneratorConfig
from cemg.generator.prompts import Prompter
from cemg.generator.vocabulary import Vocabulary
from cemg.generator.weights import load_weights, weights_of

__all__ = [
    "BackboneConfig", "GeneratorConfig", "Prompter", "Vocabulary", "build_backbone", "load_weights",
    "start_from_codebooks", "weights_of",
]  # fmt: skip
