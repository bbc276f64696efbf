"""From a trained generator and a catalog to items (SPEC §4, inference)."""

from cemg.decoding.engine import Decoder, Normalize, Recommendations
from cemg.decoding.exact import score_all
from cemg.decoding.processor import TrieLogitsProcessor, plain_generation
from cemg.decoding.vllm import VllmDecoder
from cemg.decoding.yardstick import TransformersDecoder, dict_trie

__all__ = [
    "Decoder",
    "Normalize",
    "Recommendations",
    "TransformersDecoder",
    "TrieLogitsProcessor",
    "VllmDecoder",
    "dict_trie",
    "plain_generation",
    "score_all",
]
