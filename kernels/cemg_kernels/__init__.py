"""The operations of CEMG on plain arrays. Each has a reference in PyTorch and faster backends."""

from . import attention as attention  # registers the operations of the decoder
from .constrained.beam_step import trie_beam_step
from .constrained.prior import ItemPrior
from .constrained.softmax import trie_softmax
from .graph.bipartite import BipartiteGraph
from .graph.propagate import lightgcn_propagate
from .quantize.residual import residual_quantize
from .runtime.dispatch import backends, fast_kernels_enabled, use_fast_kernels
from .runtime.forking import watch_forks
from .runtime.registry import register
from .trie.filters import ItemFilter, RequestFilter
from .trie.live import LiveTrie
from .trie.trie import Trie

watch_forks()
register("decoder", ("native", "torch", "reference"))  # the C++ beam search, which cemg.decoding calls

__all__ = [
    "BipartiteGraph",
    "ItemFilter",
    "ItemPrior",
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
