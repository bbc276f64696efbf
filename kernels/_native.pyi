Filter = tuple[int, int, int, int, int, int, int] | None  # FilterView of trie_view.h, field by field
Linear = tuple[int, int, int, int]  # in, out, addresses of panels and bias
Norm = tuple[int, int, float]  # addresses of weight and bias, epsilon
Places = tuple[int, int, int, int]  # addresses of embedding, cosine, sine and bias
Wanted = tuple[Linear, Linear, int, int]  # columns, all of the vocabulary, addresses of logits and total

def build_info() -> dict[str, object]: ...
def launch_trie_kernel(
    name: str, arguments: list[int], count: int, device: int, stream: int, /
) -> None: ...  # where build_info()["cuda"]
def lightgcn_propagate(
    vertices: int, graph: tuple[int, int, int], x: int, dim: int, layers: int, out: int, room: int, /
) -> None: ...
def residual_quantize(
    x: int, rows: int, shape: tuple[int, int, int], codebooks: int, codes: int, quantized: int, /
) -> None: ...
def trie_problem(
    code: int, code_bytes: int, first_child: int, rows: int, sizes: tuple[int, int, int], levels: int,
    codebook_size: int, /,
) -> str: ...  # fmt: skip
def wrong_id(ids: int, items: int, /) -> int: ...

class TrieBuilder:
    def __init__(self, codes: int, code_bytes: int, rows: int, levels: int, codebook_size: int) -> None: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def num_inner(self) -> int: ...
    @property
    def duplicates(self) -> list[tuple[int, int]]: ...
    def write(self, code: int, code_bytes: int, first_child: int, rows: int) -> None: ...

class TrieView:
    def __init__(
        self, code: int, code_bytes: int, first_child: int, num_inner: int, num_nodes: int, codebook_size: int
    ) -> None: ...
    def lookup(self, filter: Filter, prefixes: int, length: int, out: int, rows: int, /) -> None: ...
    def advance(self, filter: Filter, nodes: int, codes: int, out: int, rows: int, /) -> None: ...
    def keep(self, filter: Filter, nodes: int, out: int, rows: int, /) -> None: ...
    def children(self, filter: Filter, nodes: int, out_codes: int, out_nodes: int, rows: int, /) -> None: ...
    def mask(self, filter: Filter, nodes: int, out: int, rows: int, /) -> None: ...
    def interval(self, filter: Filter, nodes: int, out: int, rows: int, /) -> None: ...
    def softmax(
        self, filter: Filter, logits: int, logsumexp: int, normalize: int, nodes: int, rows: int,
        out: int, /,
    ) -> None: ...  # fmt: skip
    def beam_step(
        self, filter: Filter, logits: int, logsumexp: int, normalize: int, scores: int, nodes: int,
        shape: tuple[int, int, int], next_scores: int, parents: int, codes: int, next_nodes: int, pruned: int,
        /,
    ) -> None: ...  # fmt: skip

class Transformer:
    def __init__(
        self, sizes: tuple[int, int, int, int], scale: float, embedding: int, vocabulary: int, last: Norm,
        last_scale: float,
    ) -> None: ...  # fmt: skip
    def add_layer(self, norms: list[Norm], linears: list[Linear], activation: int, /) -> None: ...
    def set_code_table(self, table: int, first_code: int, count: int, /) -> None: ...

class BeamSearch:
    def __init__(self, encoder: Transformer | None, decoder: Transformer, threads: int, /) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    def note_laps(self, wanted: bool, /) -> None: ...
    def laps(self) -> list[tuple[str, float]]: ...  # of the last call: what was done, and its end in seconds
    def start(
        self, tokens: int, mask: int, shape: tuple[int, int], places: Places, start_token: int,
        own_places: Places, wanted: Wanted, /,
    ) -> None: ...  # fmt: skip
    def step(
        self, tokens: int, parents: int, asked: int, beams: int, places: Places, wanted: Wanted, /
    ) -> None: ...
    def rewind(self) -> None: ...
    def search(
        self, view: TrieView, filter: Filter, tokens_and_mask: tuple[int, int], shape: tuple[int, int],
        prompt_places: Places, levels: list[tuple[Places, Linear]], all: Linear,
        numbers: tuple[int, int, int, int], out: tuple[int, int, int, int], /,
    ) -> tuple[float, float, float, int]: ...  # fmt: skip  # seconds: prompts, model, selection; rows
