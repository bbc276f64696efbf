"""Generation of the next item's codes: vocabulary, prompts, backbones, training (SPEC §4)."""

from cemg.generator.backbones import BackboneConfig, build_backbone, start_from_codebooks
from cemg.generator.prompts import Prompter
from cemg.generator.training import GeneratorConfig, load_weights, train_generator, weights_of
from cemg.generator.vocabulary import Vocabulary, symbol

__all__ = [
    "BackboneConfig", "GeneratorConfig", "Prompter", "Vocabulary", "build_backbone", "load_weights",
    "start_from_codebooks", "symbol", "train_generator", "weights_of",
]  # fmt: skip
