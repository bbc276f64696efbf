# The interface of the C++ module. A module built from another version of this file is not loaded, so every
# change of the interface belongs here. `int` arguments without a default that name a tensor are addresses;
# 0 stands for a tensor that is not there. Shapes are in csrc/include/cemg, under the same names.

import enum
from collections.abc import Sequence

INTERFACE: str  # the hash of this file that the module was built with
PANEL: int  # columns of a panel of Linear.panels
MAX_STEPS: int  # decode steps of a search
MAX_LEVELS: int
MAX_CODEBOOK_SIZE: int
MAX_NODES: int
NO_NODE: int

def build_info() -> dict[str, object]: ...
def use_one_thread() -> None: ...
def launch_trie_kernel(
    name: str, arguments: Sequence[int], count: int, device: int, stream: int
) -> None: ...  # only if build_info()["cuda"] is not empty
def lightgcn_propagate(
    *, row_ptr: int, neighbours: int, inv_sqrt_degree: int, vertices: int, x: int, dim: int, layers: int,
    out: int, scratch: int,
) -> None: ...  # fmt: skip
def residual_quantize(
    *, x: int, rows: int, codebooks: int, levels: int, codebook_size: int, dim: int, codes: int,
    quantized: int,
) -> None: ...  # fmt: skip

class SparseRows:
    def __init__(self, *, starts: int, items: int, values: int, rows: int, top: int) -> None: ...

def memory_scores(
    transitions: SparseRows, similar: SparseRows, *, history: int, transition_weights: int,
    similar_weights: int, repeat_weights: int, size: int, factors: int, items: int, scores: int,
) -> int: ...  # fmt: skip
def trie_problem(
    *, code: int, code_bytes: int, first_child: int, rows: int, num_edges: int, num_words: int,
    num_items: int, levels: int, codebook_size: int,
) -> str: ...  # fmt: skip
def first_invalid_id(ids: int, num_items: int) -> int: ...
def trie_softmax(
    trie: TrieView, filter: FilterView | None, logits: int, logsumexp: int, normalize: Normalize,
    nodes: int, rows: int, out: int,
) -> None: ...  # fmt: skip
def trie_beam_step(
    trie: TrieView, filter: FilterView | None, logits: int, logsumexp: int, normalize: Normalize,
    scores: int, nodes: int, users: int, beams: int, width: int, next_scores: int, parents: int, codes: int,
    next_nodes: int, pruned: int, prior: PriorView | None = None, generator: int = 0, next_generator: int = 0,
) -> None: ...  # fmt: skip
def build_prior(
    *, items: int, mass: int, counts: int, known: int, rank_of: int, num_items: int, num_inner: int,
    filter: FilterView | None, requests: int, size: int, ranks: int, sums: int, weight: int,
) -> bool: ...  # fmt: skip

class TrieBuilder:
    def __init__(
        self, *, codes: int, code_bytes: int, rows: int, levels: int, codebook_size: int
    ) -> None: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def num_inner(self) -> int: ...
    @property
    def duplicates(self) -> list[tuple[int, int]]: ...
    def write(self, *, code: int, code_bytes: int, rows: int) -> PackedWords: ...

class PackedWords:
    @property
    def size(self) -> int: ...
    def copy_to(self, out: int) -> None: ...

class FilterView:
    def __init__(
        self, *, open: int = 0, filter_of: int = 0, closed: int = 0, words: int = 0, max_closed: int = 0,
        rows_per_request: int = 1,
    ) -> None: ...  # fmt: skip

class PriorView:
    def __init__(self, *, ranks: int, sums: int, weight: int, size: int) -> None: ...

class TrieView:
    def __init__(
        self, *, code: int, code_bytes: int, first_child: int, num_inner: int, num_nodes: int,
        codebook_size: int,
    ) -> None: ...  # fmt: skip
    def lookup(self, filter: FilterView | None, prefixes: int, length: int, out: int, rows: int) -> None: ...
    def advance(self, filter: FilterView | None, nodes: int, codes: int, out: int, rows: int) -> None: ...
    def keep(self, filter: FilterView | None, nodes: int, out: int, rows: int) -> None: ...
    def children(
        self, filter: FilterView | None, nodes: int, out_codes: int, out_nodes: int, rows: int
    ) -> None: ...
    def mask(self, filter: FilterView | None, nodes: int, out: int, rows: int) -> None: ...
    def interval(self, filter: FilterView | None, nodes: int, out: int, rows: int) -> None: ...
    def open_inner(self, open: int) -> None: ...
    def close_nodes(
        self, filter: FilterView | None, *, excluded: int, requests: int, max_excluded: int, levels: int,
        closed: int,
    ) -> int: ...  # fmt: skip

class Normalize(enum.Enum):
    VOCAB = 0
    LEVEL = 1
    VALID = 2

class Activation(enum.Enum):
    NONE = 0
    RELU = 1
    SILU = 2
    GELU = 3
    GELU_TANH = 4

class Linear:
    def __init__(
        self, *, in_features: int = 0, out_features: int = 0, panels: int = 0, bias: int = 0
    ) -> None: ...

class Norm:
    def __init__(self, *, weight: int = 0, bias: int = 0, eps: float = 0.0) -> None: ...

class TransformerLayer:
    def __init__(
        self, *, attention_norm: Norm, qkv: Linear, query_norm: Norm = ..., key_norm: Norm = ...,
        attention_out: Linear, cross_norm: Norm = ..., cross_query: Linear = ...,
        cross_key_value: Linear = ..., cross_out: Linear = ..., feed_forward_norm: Norm, gate: Linear = ...,
        up: Linear, down: Linear, activation: Activation,
    ) -> None: ...  # fmt: skip

class Transformer:
    def __init__(
        self, *, hidden_size: int, heads: int, kv_heads: int, head_dim: int, attention_scale: float,
        embedding: int, vocabulary: int, final_norm: Norm, final_scale: float,
    ) -> None: ...  # fmt: skip
    def add_layer(self, layer: TransformerLayer) -> None: ...
    def set_code_table(self, *, table: int, first_code: int, num_codes: int) -> None: ...

class PositionTables:
    def __init__(self, *, embedding: int = 0, cosine: int = 0, sine: int = 0, bias: int = 0) -> None: ...

class Prompts:
    def __init__(self, *, tokens: int, mask: int, batch: int, length: int) -> None: ...

class BeamInput:
    def __init__(self, *, tokens: int, parents: int, active: int = 0, beams: int) -> None: ...

class LogitsRequest:
    def __init__(
        self, *, columns: Linear, vocabulary: Linear = ..., logits: int, logsumexp: int = 0
    ) -> None: ...

class ProfileEvent:
    @property
    def name(self) -> str: ...
    @property
    def end(self) -> float: ...

class SearchRequest:
    def __init__(
        self, *, normalize: Normalize, beam_width: int, first_token: int, start_token: int,
        prompt_positions: PositionTables, step_positions: Sequence[PositionTables],
        level_columns: Sequence[Linear], vocabulary: Linear = ..., code_tokens: int = 0,
        prior: PriorView | None = None,
    ) -> None: ...  # fmt: skip

class SearchResult:
    def __init__(self, *, scores: int, leaves: int, codes: int, pruned: int) -> None: ...

class SearchTimings:
    @property
    def prefill(self) -> float: ...
    @property
    def decode_steps(self) -> float: ...
    @property
    def selection(self) -> float: ...
    @property
    def rows(self) -> int: ...

class BeamSearch:
    def __init__(self, encoder: Transformer | None, decoder: Transformer, threads: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def profile_events(self) -> list[ProfileEvent]: ...
    def set_profiling(self, enabled: bool) -> None: ...
    def prefill(
        self, prompts: Prompts, prompt_positions: PositionTables, start_token: int,
        start_positions: PositionTables, request: LogitsRequest,
    ) -> None: ...  # fmt: skip
    def decode_step(self, input: BeamInput, positions: PositionTables, request: LogitsRequest) -> None: ...
    def search(
        self, prompts: Prompts, trie: TrieView, filter: FilterView | None, request: SearchRequest,
        result: SearchResult,
    ) -> SearchTimings: ...  # fmt: skip
    def reset_to_prefill(self) -> None: ...
