"""One place of the latency grid: the model's shape, the catalog, and by arithmetic memory and floor."""

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

from cemg.tokenizer import Catalog

MEMORY_LIMIT = 20 * 2**30
MEMINFO = Path("/proc/meminfo")  # Linux
ITEMS = 12_101  # of a catalog where nothing else is said: Beauty's
SPECIAL = 3  # tokens before the text of a model that has none


@dataclass(frozen=True, slots=True)
class Cell:
    """B users of ``history`` items each, W beams, N items of ``levels`` codes."""

    model: str
    batch: int
    beams: int
    history: int = 20
    items: int = ITEMS
    levels: int = 4
    codes: int = 256
    normalize: str = "vocab"
    device: str = "cpu"
    dtype: str = "float32"
    label: str = ""

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return self.history * self.levels

    def name(self) -> str:
        shape = f"{self.label}{self.model} B{self.batch} W{self.beams}"
        extra = [f"H{self.history}"] if self.history != 20 else []
        extra += [f"N{self.items:.0e}"] if self.items != ITEMS else []
        extra += [f"{self.levels}x{self.codes}"] if (self.levels, self.codes) != (4, 256) else []
        return " ".join([shape, *extra])

    @property
    def config(self) -> Any:
        """The model's, of ``transformers``."""
        return MODELS[self.model].config(self.levels * self.codes)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.dtype).itemsize


class Skip(Exception):
    """This engine cannot serve this cell, for this reason."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model with random weights: how many tokens come before the codes, its family, its configuration."""

    text: int
    seq2seq: bool
    config: Callable[[int], Any]

    def build(self, codes: int) -> Any:
        """The model, with ``codes`` tokens after its text."""
        family = transformers.AutoModelForSeq2SeqLM if self.seq2seq else transformers.AutoModelForCausalLM
        return family.from_config(self.config(codes))


def t5(dim: int, layers: int, heads: int, ff: int, text: int, head: int = 64) -> Shape:
    def config(codes: int) -> Any:
        return transformers.T5Config(
            vocab_size=text + codes, d_model=dim, d_kv=head, d_ff=ff, num_layers=layers, num_heads=heads,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
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
    "tiger": t5(128, 4, 6, 1024, SPECIAL + 2000),  # its paper: 2,000 user tokens
    "t5-small": t5(512, 6, 8, 2048, 32_128),
    "t5-base": t5(768, 12, 12, 3072, 32_128),
    "mmgrec": t5(64, 2, 4, 256, SPECIAL, head=16),
    "decoder-4": decoder(transformers.LlamaConfig, 128, 4, 4, 4, 344, SPECIAL),
    "smollm2-135m": decoder(transformers.LlamaConfig, 576, 30, 9, 3, 1536, 49_152),
    "qwen3-0.6b": decoder(
        transformers.Qwen3Config,
        1024,
        28,
        16,
        8,
        3072,
        151_936,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}


def random_codes(items: int, levels: int, codes: int) -> Tensor:
    """``items`` different semantic IDs drawn from all of them, with seed 0: [N, levels] int32."""
    generator = torch.Generator().manual_seed(0)
    if codes**levels >= 2**62:
        raise Skip(f"{codes} ** {levels} keys do not fit an int64")
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < items:
        more = torch.randint(0, codes**levels, (items + items // 8 + 8,), generator=generator)
        drawn = torch.unique(torch.cat((drawn, more)))
    drawn = drawn[torch.randperm(drawn.numel(), generator=generator)[:items]]
    found = torch.empty(items, levels, dtype=torch.int32)
    for level in range(levels):
        found[:, level] = drawn // codes ** (levels - 1 - level) % codes
    return found


@lru_cache(maxsize=1)
def random_catalog(items: int, levels: int, codes: int) -> Catalog:
    """The catalog of ``random_codes``."""
    return Catalog.from_codes(random_codes(items, levels, codes), codes)


@dataclass(frozen=True, slots=True)
class Matrices:
    """Weights of one layer's matrices, by use, and widths. Norms, biases and embeddings are left out."""

    dim: int
    layers: int
    queries: int  # width of a token's queries, all heads
    keys: int  # and of its keys, in groups fewer
    feed_forward: int

    @property
    def projections(self) -> int:
        """Of self-attention: queries, keys and values."""
        return self.dim * (self.queries + 2 * self.keys)

    @property
    def rest(self) -> int:
        """Of self-attention's output and the feed-forward block."""
        return self.dim * self.queries + self.feed_forward

    @property
    def cache(self) -> int:
        """Keys and values of a token, all layers."""
        return 2 * self.keys * self.layers


def matrices_of(cell: Cell) -> Matrices:
    config = cell.config
    if MODELS[cell.model].seq2seq:
        inner = config.num_heads * config.d_kv
        return Matrices(config.d_model, config.num_layers, inner, inner, 2 * config.d_model * config.d_ff)
    d, head = config.hidden_size, config.head_dim
    return Matrices(d, config.num_hidden_layers, head * config.num_attention_heads,
                    head * config.num_key_value_heads, 3 * d * config.intermediate_size)  # fmt: skip


def needed_bytes(cell: Cell, generate: bool = False) -> int:
    """What an engine holds at most, by arithmetic; ``check_memory`` asks it before the engine is built.

    Weights twice (as loaded, and as packed for the engine); keys and values of the prompt and of each beam's
    own codes; float32 logits of all beams over the vocabulary; the catalog while it is drawn: int64 keys
    drawn, joined, sorted, made unique and shuffled, then codes, trie and ids. ``generate``, that of
    transformers, holds the prompt's keys and values a beam, not a user, six copies of the logits and the
    scores of each level, and up to 512 bytes an item in nested dicts. Activations are left out.
    """
    rows, codes = cell.batch * cell.beams, cell.levels * cell.codes
    with torch.device("meta"):
        loaded = sum(weight.numel() for weight in MODELS[cell.model].build(codes).parameters())
    prompts, copies, dicts = (rows, 6 + cell.levels, 512) if generate else (cell.batch, 1, 0)
    cached = matrices_of(cell).cache * (prompts * cell.prompt + rows * cell.levels)
    logits = 4 * rows * cell.config.vocab_size * copies
    return cell.itemsize * (2 * loaded + cached) + logits + cell.items * (64 + 8 * cell.levels + dicts)


def check_memory(cell: Cell, generate: bool = False) -> None:
    """Skip where the cell would need more than ``MEMORY_LIMIT``, or than is free beside the other engines."""
    needs, free = needed_bytes(cell, generate), free_bytes(cell.device)
    if needs > min(MEMORY_LIMIT, free):
        limit = f"the limit is {MEMORY_LIMIT / 2**30:.0f}, {free / 2**30:.0f} are free"
        raise Skip(f"would need about {needs / 2**30:.1f} GiB; {limit}")


def free_bytes(device: str) -> float:
    """Of the device's memory; inf where the system does not say."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    if not MEMINFO.exists():
        return float("inf")
    return float(MEMINFO.read_text().split("MemAvailable:")[1].split()[0]) * 2**10


def needed_operations(cell: Cell) -> int:
    """Multiplications and additions that cannot be saved, under "valid" as many as are expected.

    The prompt once a user, one row a user for the first code, ``late_rows`` for the further ones; of a
    decoder's last layer, the prompt's last place alone; the head's K columns, or all where it normalises
    over the vocabulary. Layer 0 of a code is a table, its projections are not counted.
    """
    m, s, late = matrices_of(cell), cell.prompt, late_rows(cell)
    attention = m.layers * 2 * s * m.queries  # of one row to the whole prompt
    row = m.layers * (m.projections + m.rest) + attention
    if MODELS[cell.model].seq2seq:
        across = m.layers * 2 * m.dim * m.queries  # queries and outputs of a row; keys and values of a token
        prompt = s * (row + across)
        codes = (1 + late) * (row + across) - late * m.projections
    else:
        causal = s * (m.layers * m.projections + attention // 2)
        prompt = causal + ((m.layers - 1) * s + 1) * m.rest
        codes = late * (row - m.projections)
    return round(2 * cell.batch * (prompt + codes + (1 + late) * m.dim * head_columns(cell)))


def sole(cell: Cell, level: int) -> float:
    """The share of prefixes of ``level`` codes with one item below them, expected of a random catalog.

    The items below a prefix are about Poisson with mean N / K^level, given that there is one.
    """
    mean = cell.items / cell.codes**level
    return mean * math.exp(-mean) / -math.expm1(-mean)


def late_rows(cell: Cell) -> float:
    """Beams of a user, all levels after the first together, for which the model has to run.

    All of them; under "valid", where what follows a prefix of one item is certain, as many as are expected
    of beams near uniform, which choose among the prefixes that there are.
    """
    prefixes = [min(cell.beams, cell.codes**level) for level in range(1, cell.levels)]
    if cell.normalize != "valid":
        return sum(prefixes)
    return sum(rows * (1 - sole(cell, level)) for level, rows in enumerate(prefixes, 1))


def late_passes(cell: Cell) -> float:
    """Levels after the first at which any beam of the batch needs the model, expected as in ``late_rows``."""
    if cell.normalize != "valid":
        return cell.levels - 1
    rows = [cell.batch * min(cell.beams, cell.codes**level) for level in range(1, cell.levels)]
    return sum(1 - sole(cell, level) ** count for level, count in enumerate(rows, 1))


def read_bytes(cell: Cell, cache: float) -> int:
    """Bytes a search has to read: the weights and the prompt's keys and values once, and by each pass after
    the first what of the decoder's does not fit a last cache of ``cache`` bytes."""
    m = matrices_of(cell)
    layers = m.layers * (m.projections + m.rest)
    across = m.layers * 2 * m.dim * m.queries
    seq2seq = MODELS[cell.model].seq2seq
    once = layers + across if seq2seq else m.projections
    again = layers - m.projections + (across if seq2seq else 0) + m.dim * head_columns(cell)
    again = cell.itemsize * (again + cell.batch * cell.prompt * m.cache)
    beyond = max(0.0, again - cache)
    return round(cell.itemsize * once + again + late_passes(cell) * beyond)


def head_columns(cell: Cell) -> int:
    """Columns of the head that a step has to multiply."""
    return cell.config.vocab_size if cell.normalize == "vocab" else cell.codes


def floor_ms(cell: Cell, flops: float, bandwidth: float, cache: float) -> float:
    """The least time for this cell: its operations at the measured matrix rate or its bytes at the measured
    bandwidth, whichever takes longer."""
    return max(needed_operations(cell) / flops, read_bytes(cell, cache) / bandwidth) * 1e3
