"""Decoding: from a trained generator and a catalog to recommended items."""

from cemg.decoding.beams import Recommendations
from cemg.decoding.engine import Decoder
from cemg.decoding.exact import score_all
from cemg.decoding.integrations.logits_processor import TrieLogitsProcessor, plain_generation
from cemg.decoding.integrations.transformers import TransformersDecoder, dict_trie
from cemg.decoding.integrations.vllm import VllmDecoder
from cemg.decoding.make_decoder import make_decoder
from cemg.decoding.timings import record_timings
from cemg_kernels.constrained.softmax import Normalize

__all__ = [
    "Decoder",
    "Normalize",
    "Recommendations",
    "TransformersDecoder",
    "TrieLogitsProcessor",
    "VllmDecoder",
    "dict_trie",
    "make_decoder",
    "plain_generation",
    "record_timings",
    "score_all",
]
