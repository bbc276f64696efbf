"""From a trained generator and a catalog to items (SPEC §4, inference)."""

from cemg.decoding.engine import Decoder, Normalize, Recommendations
from cemg.decoding.engines import make_decoder
from cemg.decoding.exact import score_all
from cemg.decoding.integrations.logits_processor import TrieLogitsProcessor, plain_generation
from cemg.decoding.integrations.transformers import TransformersDecoder, dict_trie
from cemg.decoding.integrations.vllm import VllmDecoder
from cemg.decoding.timings import record_timings

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
