"""One cell of the latency grid: model, catalog, and by arithmetic the memory and the time it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from cemg.decoding import Normalize
from cemg.tokenizer import Catalog

MEMORY_LIMIT = 20 * 2**30
MEMINFO = Path("/proc/meminfo")  # Linux
ITEMS = 12_101  # the default catalog size, that of Amazon Beauty
SPECIAL = 3  # special tokens of a model without text


@dataclass(frozen=True, slots=True)
class Cell:
    """``batch`` users with ``history`` items each, ``beams`` beams, ``items`` items of ``levels`` codes."""

    model: str
    batch: int
    beams: int
    history: int = 20
    items: int = ITEMS
    levels: int = 4
    codes: int = 256
    normalize: Normalize = "vocab"
    device: str = "cpu"
    dtype: str = "float32"
    label: str = ""

    @property
    def prompt(self) -> int:
        """Tokens per prompt."""
        return self.history * self.levels

    def name(self) -> str:
        shape = f"{self.label}{self.model} B{self.batch} W{self.beams}"
        extra = [f"H{self.history}"] if self.history != 20 else []
        extra += [f"N{self.items:.0e}"] if self.items != ITEMS else []
        extra += [f"{self.levels}x{self.codes}"] if (self.levels, self.codes) != (4, 256) else []
        return " ".join([shape, *extra])

    @property
    def config(self) -> Any:
        """The model's configuration in ``transformers``."""
        return MODELS[self.model].config(self.levels * self.codes)

    @property
    def itemsize(self) -> int:
        """Bytes per weight."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize


class Skip(Exception):
    """An engine cannot serve a cell; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model with random weights; ``text_tokens`` come before the code tokens."""

    text_tokens: int
    seq2seq: bool
    config: Callable[[int], Any]

    def build(self, codes: int) -> Any:
        """The model with ``codes`` code tokens."""
        family: Any = (
            transformers.AutoModelForSeq2SeqLM if self.seq2seq else transformers.AutoModelForCausalLM
        )
        return family.from_config(self.config(codes))


def t5(dim: int, layers: int, heads: int, ff: int, text: int, head: int = 64) -> Shape:
    def config(codes: int) -> Any:
        return transformers.T5Config(
            vocab_size=text + codes, d_model=dim, d_kv=head, d_ff=ff, num_layers=layers, num_heads=heads,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,  # type: ignore[call-arg]  # by keywords
        )  # fmt: skip

    return Shape(text, True, config)


def decoder(
    family: Any, dim: int, layers: int, heads: int, groups: int, ff: int, text: int, **more: Any
) -> Shape:
    def config(codes: int) -> Any:
        return family(
            vocab_size=text + codes, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=groups, intermediate_size=ff, max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
        )  # fmt: skip

    return Shape(text, False, config)


MODELS = {
    "tiger": t5(128, 4, 6, 1024, SPECIAL + 2000),  # the paper has 2,000 user tokens
    "t5-small": t5(512, 6, 8, 2048, 32_128),
    "t5-base": t5(768, 12, 12, 3072, 32_128),
    "mmgrec": t5(64, 2, 4, 256, SPECIAL, head=16),
    "decoder-4": decoder(transformers.LlamaConfig, 128, 4, 4, 4, 344, SPECIAL),
    "smollm2-135m": decoder(transformers.LlamaConfig, 576, 30, 9, 3, 1536, 49_152),
    "qwen3-0.6b": decoder(
        transformers.Qwen3Config, 1024, 28, 16, 8, 3072, 151_936, head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}  # fmt: skip


def random_codes(items: int, levels: int, codes: int) -> Tensor:
    """``items`` distinct semantic IDs, drawn uniformly with seed 0: [N, levels] int32."""
    generator = torch.Generator().manual_seed(0)
    if codes**levels >= 2**62:
        raise Skip(f"{codes} ** {levels} keys do not fit an int64")
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < items:
        more = torch.randint(0, codes**levels, (items + items // 8 + 8,), generator=generator)
        drawn = torch.unique(torch.cat((drawn, more)))
    drawn = drawn[torch.randperm(drawn.numel(), generator=generator)[:items]]
    table = torch.empty(items, levels, dtype=torch.int32)
    for level in range(levels):
        table[:, level] = drawn // codes ** (levels - 1 - level) % codes
    return table


@lru_cache(maxsize=1)
def random_catalog(items: int, levels: int, codes: int) -> Catalog:
    """The catalog of ``random_codes``."""
    return Catalog.from_codes(random_codes(items, levels, codes), codes)


@dataclass(frozen=True, slots=True)
class Matrices:
    """Widths, and sizes of one layer's matrices in weights. Norms, biases and embeddings are left out."""

    dim: int
    layers: int
    queries: int  # width of the queries of all heads
    keys: int  # width of the keys of all key-value heads
    feed_forward: int

    @property
    def qkv(self) -> int:
        """Weights of the query, key and value projections of self-attention."""
        return self.dim * (self.queries + 2 * self.keys)

    @property
    def output_and_feed_forward(self) -> int:
        """Weights of self-attention's output projection and of the feed-forward block."""
        return self.dim * self.queries + self.feed_forward

    @property
    def kv_per_token(self) -> int:
        """Numbers in the KV cache per token, all layers."""
        return 2 * self.keys * self.layers


def matrices_of(cell: Cell) -> Matrices:
    config = cell.config
    if MODELS[cell.model].seq2seq:
        inner = config.num_heads * config.d_kv
        return Matrices(config.d_model, config.num_layers, inner, inner, 2 * config.d_model * config.d_ff)
    dim, head = config.hidden_size, config.head_dim
    return Matrices(dim, config.num_hidden_layers, head * config.num_attention_heads,
                    head * config.num_key_value_heads, 3 * dim * config.intermediate_size)  # fmt: skip


def needed_bytes(cell: Cell, generate: bool = False) -> int:
    """The most memory an engine holds, by arithmetic; activations are left out.

    The sum of: the weights twice (as loaded, and packed for the engine); the KV cache of the prompts and of
    the beams' codes; float32 logits of all beams over the vocabulary; the catalog while it is drawn (int64
    keys drawn, joined, sorted, made unique and shuffled, then codes, trie and ids).

    Args:
        cell: The cell.
        generate: Whether the engine is ``generate`` of transformers. It holds a prompt's KV cache per beam
            instead of per user, six copies of the logits, the scores of each level, and for the nested dicts
            up to 512 bytes per item.
    """
    rows, codes = cell.batch * cell.beams, cell.levels * cell.codes
    with torch.device("meta"):
        weights: int = sum(weight.numel() for weight in MODELS[cell.model].build(codes).parameters())
    prompts, copies, dicts = (rows, 6 + cell.levels, 512) if generate else (cell.batch, 1, 0)
    cached = matrices_of(cell).kv_per_token * (prompts * cell.prompt + rows * cell.levels)
    logits = 4 * rows * int(cell.config.vocab_size) * copies
    return cell.itemsize * (2 * weights + cached) + logits + cell.items * (64 + 8 * cell.levels + dicts)


def check_memory(cell: Cell, generate: bool = False) -> None:
    """Raises Skip if the cell needs more than ``MEMORY_LIMIT``, or more than the other engines leave free."""
    needs, free = needed_bytes(cell, generate), free_bytes(cell.device)
    if needs > min(MEMORY_LIMIT, free):
        limit = f"the limit is {MEMORY_LIMIT / 2**30:.0f}, {free / 2**30:.0f} are free"
        raise Skip(f"would need about {needs / 2**30:.1f} GiB; {limit}")


def free_bytes(device: str) -> float:
    """Free memory of the device in bytes; inf if the system does not report it."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    if not MEMINFO.exists():
        return float("inf")
    return float(MEMINFO.read_text().split("MemAvailable:")[1].split()[0]) * 2**10


def needed_operations(cell: Cell) -> int:
    """Multiplications and additions that no engine can avoid; under "valid" the expected number.

    One prefill per user, one row per user for the first code, and ``decode_rows`` for the following codes.
    The last layer of a decoder-only model runs for the last token of the prompt alone. The head computes K
    columns, or all of them if the softmax runs over the vocabulary. The projections of a code in layer 0 are
    a table, so they do not count.
    """
    m, length, late = matrices_of(cell), cell.prompt, decode_rows(cell)
    attention = m.layers * 2 * length * m.queries  # of one row over the whole prompt
    row = m.layers * (m.qkv + m.output_and_feed_forward) + attention
    if MODELS[cell.model].seq2seq:
        cross = m.layers * 2 * m.dim * m.queries  # queries and outputs of a row; keys and values of a token
        prompt = length * (row + cross)
        codes = (1 + late) * (row + cross) - late * m.qkv
    else:
        causal = length * (m.layers * m.qkv + attention // 2)
        prompt = causal + ((m.layers - 1) * length + 1) * m.output_and_feed_forward
        codes = late * (row - m.qkv)
    return round(2 * cell.batch * (prompt + codes + (1 + late) * m.dim * head_columns(cell)))


def single_item_share(cell: Cell, level: int) -> float:
    """The expected share of prefixes of ``level`` codes with exactly one item, in a random catalog.

    The number of items below a prefix is about Poisson with mean N / K^level, given that it is not 0.
    """
    mean: float = cell.items / cell.codes**level
    return mean * math.exp(-mean) / -math.expm1(-mean)


def decode_rows(cell: Cell) -> float:
    """Beams per user for which the model has to run after the first code, summed over the levels.

    Under "valid", a prefix with one item needs no model: its continuation has log-probability 0. The number
    is then the expected one, for beams that choose uniformly among the existing prefixes.
    """
    prefixes: list[int] = [min(cell.beams, cell.codes**level) for level in range(1, cell.levels)]
    if cell.normalize != "valid":
        return sum(prefixes)
    return sum(rows * (1 - single_item_share(cell, level)) for level, rows in enumerate(prefixes, 1))


def decode_steps(cell: Cell) -> float:
    """Levels after the first at which a beam of the batch needs the model; expected as in ``decode_rows``."""
    if cell.normalize != "valid":
        return cell.levels - 1
    rows: list[int] = [cell.batch * min(cell.beams, cell.codes**level) for level in range(1, cell.levels)]
    return sum(1 - single_item_share(cell, level) ** count for level, count in enumerate(rows, 1))


def read_bytes(cell: Cell, cache: float) -> int:
    """Bytes that a search has to read from memory.

    The weights and the prompt's KV cache once; and at each decode step the part of the decoder's weights and
    of the KV cache that does not fit into a last-level cache of ``cache`` bytes.
    """
    m = matrices_of(cell)
    layers = m.layers * (m.qkv + m.output_and_feed_forward)
    cross = m.layers * 2 * m.dim * m.queries
    seq2seq = MODELS[cell.model].seq2seq
    read_once = layers + cross if seq2seq else m.qkv
    per_step = layers - m.qkv + (cross if seq2seq else 0) + m.dim * head_columns(cell)
    per_step = cell.itemsize * (per_step + cell.batch * cell.prompt * m.kv_per_token)
    not_cached = max(0.0, per_step - cache)
    return round(cell.itemsize * read_once + per_step + decode_steps(cell) * not_cached)


def head_columns(cell: Cell) -> int:
    """Columns of the head that a step has to multiply."""
    return int(cell.config.vocab_size) if cell.normalize == "vocab" else cell.codes


def floor_ms(cell: Cell, flops: float, bandwidth: float, cache: float) -> float:
    """The least time for this cell, in milliseconds.

    The longer of its operations at the measured matrix rate and its bytes at the measured bandwidth.
    """
    return max(needed_operations(cell) / flops, read_bytes(cell, cache) / bandwidth) * 1e3
