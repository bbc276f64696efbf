"""The operations of CEMG on plain arrays, each with a reference and its fast backends."""

from .constrained.beam_step import trie_beam_step
from .constrained.softmax import trie_softmax
from .graph.propagate import BipartiteGraph, lightgcn_propagate
from .quantize.residual import residual_quantize
from .runtime.dispatch import backends, fast_kernels_enabled, use_fast_kernels
from .runtime.forking import watch_forks
from .trie.item_filter import ItemFilter
from .trie.live import LiveTrie
from .trie.request_filter import RequestFilter
from .trie.trie import Trie

watch_forks()

__all__ = [
    "BipartiteGraph",
    "ItemFilter",
    "LiveTrie",
    "RequestFilter",
    "Trie",
    "backends",
    "fast_kernels_enabled",
    "lightgcn_propagate",
    "residual_quantize",
    "trie_beam_step",
    "trie_softmax",
    "use_fast_kernels",
]
