"""The operations of CEMG on plain arrays; one file each, reference and backends side by side.

Imports as ``cemg_kernels``, wherever the files lie. From the repository's root they can also be found as
``kernels``, where ``transformers`` probes for a package of that name: so the import itself passes, and using
any name of it raises.
"""

if __name__ == "cemg_kernels":
    from .dispatch import backends, fast_kernels_enabled, use_fast_kernels
    from .forking import watch_forks
    from .item_filter import ItemFilter
    from .lightgcn_propagate import BipartiteGraph, lightgcn_propagate
    from .live_trie import LiveTrie
    from .request_filter import RequestFilter
    from .residual_quantize import residual_quantize
    from .trie import Trie
    from .trie_beam_step import trie_beam_step
    from .trie_softmax import trie_softmax

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
else:

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"these files import as cemg_kernels, not as {__name__}: write `from cemg_kernels import {name}` "
            "(and `pip install -e .` once, from the repository root)"
        )
