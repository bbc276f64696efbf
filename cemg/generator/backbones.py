"""The backbones of the generator: ``t5``, ``causal`` (pre-trained, all weights or LoRA) and ``scratch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from cemg.errors import UserError
from cemg.generator.dropout import DropoutEmbedding, DropoutLinear
from cemg.generator.pretrained import add_tokens, load_checkpoint
from cemg.generator.vocabulary import Vocabulary
from cemg.loading import MODELS

PAD, BOS, EOS, FIRST_CODE = 0, 1, 2, 3  # token ids of a vocabulary without text


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """The model, and its shape if it starts from random weights (``scratch``, ``t5`` without ``pretrained``).

    ``pretrained``, ``gguf_file``, ``lora_rank`` and ``instruction`` are rejected for such a model. Dropout
    applies to embeddings and to the outputs of attention and feed-forward layers. TIGER's T5 has layers 4,
    heads 6, ff 1024, dropout 0.1.
    """

    kind: Literal["t5", "causal", "scratch"] = "scratch"
    """scratch (a decoder from random weights), t5, or causal (a pre-trained decoder)."""
    architecture: Literal["gpt2", "llama"] = "gpt2"
    """For scratch: gpt2 (learned positions) or llama (rotary positions, RMSNorm, SwiGLU)."""
    codebook_init: bool = False
    """Whether the code tokens' embeddings start from the tokenizer's codebooks."""
    tied: bool = True
    """Whether the head of a Llama from scratch is its table of embeddings; if not, it starts as a copy."""
    pretrained: str = ""
    """Name of a model on huggingface.co, or a folder; for t5 and causal."""
    gguf_file: str = ""
    """A GGUF file in pretrained."""
    layers: int = 6
    """Number of layers; a t5 has this many in the encoder and in the decoder."""
    dim: int = 128
    """Width of the hidden states."""
    heads: int = 4
    """Attention heads."""
    head_dim: int = 64
    """Width of an attention head; for t5."""
    ff: int = 0
    """Width of the feed-forward layers; 0 is 4 * dim, for llama 8/3 * dim."""
    dropout: float = 0.2
    """Dropout rate of embeddings, attention outputs and feed-forward outputs."""
    lora_rank: int = 0
    """Rank of the LoRA adapters trained on a pre-trained model; 0 trains all weights."""
    lora_alpha: int = 32
    """Scale of the LoRA adapters."""
    instruction: str = ""
    """Text in front of every history, for a pre-trained model."""

    def __post_init__(self) -> None:
        if self.kind == "causal" and not self.pretrained:
            raise UserError(
                "backbone.kind=causal needs a pre-trained model",
                fix="set backbone.pretrained to a hub name or a folder, or use backbone.kind=scratch",
            )
        if not self.pretrained or self.kind == "scratch":
            self._check_unused_settings()
        if not self.tied and (self.kind, self.architecture) != ("scratch", "llama"):
            raise UserError(
                "backbone.tied=false is for a Llama from scratch",
                fix="--set backbone.kind=scratch --set backbone.architecture=llama, or backbone.tied=true",
            )
        for name in ("layers", "dim", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"backbone.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ff", "lora_rank"):
            if getattr(self, name) < 0:
                raise UserError(f"backbone.{name} must not be negative, got {getattr(self, name)}")
        if self.kind == "scratch" and self.dim % self.heads:
            raise UserError(f"backbone.dim {self.dim} is not divisible by backbone.heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"backbone.dropout must be within 0 … 1, got {self.dropout}")

    def _check_unused_settings(self) -> None:
        for name in ("pretrained", "gguf_file", "lora_rank", "instruction"):
            if getattr(self, name):
                raise UserError(
                    f"backbone.{name}={getattr(self, name)} has no effect: the model has random weights",
                    cause=f"backbone.kind={self.kind}, backbone.pretrained={self.pretrained!r}",
                    fix="--set backbone.kind=causal (or t5) --set backbone.pretrained=NAME",
                )


def build_backbone(
    config: BackboneConfig, levels: int, codebook_size: int, *, history_items: int
) -> tuple[PreTrainedModel, Vocabulary]:
    """The model and its vocabulary, extended by the codes. Random weights follow torch's seed."""
    with MODELS:
        if config.kind == "causal":
            return _causal(config, levels, codebook_size)
        if config.kind == "t5" and config.pretrained:
            return _pretrained_t5(config, levels, codebook_size)
        vocabulary = Vocabulary(levels, codebook_size, FIRST_CODE, PAD, BOS, EOS)
        build = _t5 if config.kind == "t5" else _scratch
        return build(config, vocabulary, levels * (history_items + 2) + 2), vocabulary


def _scratch(config: BackboneConfig, vocabulary: Vocabulary, positions: int) -> PreTrainedModel:
    """A Transformer decoder with tied embeddings: the paper's *w/o LLM*.

    Attention weights have no dropout, which would disable torch's fused attention (1.3× slower on two CPU
    cores).
    """
    if config.architecture == "llama":
        return _llama(config, vocabulary, positions)
    shape = GPT2Config(
        vocab_size=vocabulary.size, n_positions=positions, n_embd=config.dim, n_layer=config.layers,
        n_head=config.heads, n_inner=config.ff or None, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
        attn_pdrop=0.0, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return GPT2LMHeadModel(shape)


def _llama(config: BackboneConfig, vocabulary: Vocabulary, positions: int) -> PreTrainedModel:
    shape = LlamaConfig(
        vocab_size=vocabulary.size, max_position_embeddings=positions, hidden_size=config.dim,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
        intermediate_size=config.ff or config.dim * 8 // 3 // 8 * 8, tie_word_embeddings=config.tied,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    if not config.tied:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        cast(Any, model.lm_head).is_embedding = True  # its weight does not decay
    if config.dropout:  # transformers' Llama has dropout only in its attention weights
        body = model.model
        body.embed_tokens = DropoutEmbedding(body.embed_tokens, config.dropout)
        for block in body.layers:
            block.self_attn.o_proj = DropoutLinear(block.self_attn.o_proj, config.dropout)
            block.mlp.down_proj = DropoutLinear(block.mlp.down_proj, config.dropout)
    return model


@torch.no_grad()
def start_from_codebooks(model: PreTrainedModel, vocabulary: Vocabulary, codebooks: Tensor) -> None:
    """Add each code's vector, rotated into the model's width, to its token's embedding.

    Codes that are close in the codebook then start close. Each level is scaled to the standard deviation of
    the embeddings. The rotation is drawn from torch's generator.

    Args:
        model: Its input embeddings change, and so does a head that is a copy of them.
        vocabulary: The tokens of the codes.
        codebooks: [levels, K, d].
    """
    weight = cast(Tensor, model.get_input_embeddings().weight)  # [V, dim]
    rotation = torch.nn.init.orthogonal_(torch.empty(weight.shape[1], codebooks.shape[2]))  # [dim, d]
    vectors = codebooks.float().cpu() @ rotation.T  # [levels, K, dim]
    head = cast(Tensor, cast(Any, model.get_output_embeddings()).weight)
    follows = head is not weight and torch.equal(head, weight)
    codes = weight[vocabulary.code_token_start : vocabulary.item_token_start]
    scale = codes.std() / vectors.std(dim=(1, 2), keepdim=True).clamp_min(1e-8)
    codes += (vectors * scale).flatten(0, 1).to(codes)
    if follows:
        head.copy_(weight)


def _t5(config: BackboneConfig, vocabulary: Vocabulary, positions: int) -> PreTrainedModel:
    shape = T5Config(
        vocab_size=vocabulary.size, d_model=config.dim, d_kv=config.head_dim, num_heads=config.heads,
        d_ff=config.ff or 4 * config.dim, num_layers=config.layers, num_decoder_layers=config.layers,
        dropout_rate=config.dropout, feed_forward_proj="relu", pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=PAD,  # type: ignore[call-arg]  # passed through **kwargs
    )  # fmt: skip
    return T5ForConditionalGeneration(shape)


def _pretrained_t5(
    config: BackboneConfig, levels: int, codebook_size: int
) -> tuple[PreTrainedModel, Vocabulary]:
    model = load_checkpoint("t5", config.pretrained, config.gguf_file)
    start = cast(int, model.get_input_embeddings().num_embeddings)
    eos = _first(model.config.eos_token_id, 0)
    pad = _first(model.config.pad_token_id, eos)
    vocabulary = Vocabulary(levels, codebook_size, start, pad, pad, eos)
    add_tokens(model, vocabulary.size)
    return _with_lora(model, config, "SEQ_2_SEQ_LM"), vocabulary


def _causal(config: BackboneConfig, levels: int, codebook_size: int) -> tuple[PreTrainedModel, Vocabulary]:
    model = load_checkpoint("causal", config.pretrained, config.gguf_file)
    instruction: tuple[int, ...] = ()
    if config.instruction:
        gguf = {"gguf_file": config.gguf_file} if config.gguf_file else {}
        tokenizer = AutoTokenizer.from_pretrained(config.pretrained, trust_remote_code=False, **gguf)
        instruction = tuple(tokenizer(config.instruction, add_special_tokens=False)["input_ids"])
    start = cast(int, model.get_input_embeddings().num_embeddings)
    eos = _first(model.config.eos_token_id, 0)
    bos = _first(model.config.bos_token_id, eos)
    pad = _first(model.config.pad_token_id, eos)
    vocabulary = Vocabulary(levels, codebook_size, start, pad, bos, eos, instruction)
    add_tokens(model, vocabulary.size)
    return _with_lora(model, config, "CAUSAL_LM"), vocabulary


def _first(token: int | list[int] | None, default: int) -> int:
    if token is None:
        return default
    return token[0] if isinstance(token, list) else token


def _with_lora(model: PreTrainedModel, config: BackboneConfig, task: str) -> PreTrainedModel:
    """LoRA on the linear layers. Embeddings and head, which have the new tokens, train all weights."""
    if config.lora_rank == 0:
        return model
    from peft import LoraConfig, get_peft_model  # a slow import that only LoRA needs

    lora = LoraConfig(
        task_type=task, r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.dropout,
        target_modules="all-linear",
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        cast(Tensor, layer.weight).requires_grad_(True)  # the base weight, even if layers share it
    return cast(PreTrainedModel, adapted)  # it forwards unknown attributes to the model
