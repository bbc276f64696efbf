"""RQ-VAE: semantic IDs from fused item features (CEMG paper §3.3, equation 4).

Several processes compute the encoder and the decoder for some rows of a batch each. The losses of the
quantizer depend on the whole batch, so every process computes them for all rows, from the latents of all.

B items, b of them in this process, h fused width, Z latent, M codebooks of K vectors.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cemg.distributed import ALONE, Rows
from cemg.errors import UserError
from cemg.tokenizer.clusters import cluster_loss
from cemg.tokenizer.fusion import MODALITIES, Fusion, ItemFeatures
from cemg_kernels import residual_quantize
from cemg_kernels.trie.arrays import MAX_CODEBOOK_SIZE, MAX_LEVELS

ReconTarget = Literal["modalities", "h"]
FusionKind = Literal["guided", "concat"]
Unique = Literal["assign", "sinkhorn", "suffix"]
DiversityKind = Literal["entropy", "clusters"]
DIVERSITY_ROWS = 1024  # the diversity loss uses at most this many rows, since it needs all distances


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Fusion and RQ-VAE. ``commit`` is the paper's α, ``diversity`` its β (equation 4).

    ``collab_loss`` is the α of LETTER (https://arxiv.org/abs/2405.07314), and ``diversity`` is its β with
    ``diversity_kind`` "clusters". A weight of 0 switches a loss off.
    """

    levels: int = 4
    """Codes of a semantic ID. Short IDs decode faster; codebook_size ** levels must exceed the items."""
    codebook_size: int = 256
    """Codes per level."""
    fusion: FusionKind = "guided"
    """guided, where the collaborative embedding weighs image and text (equations 2 and 3), or concat."""
    dim: int = 128
    """Width of the fused item vector."""
    latent: int = 32
    """Width of the quantized vector."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    commit: float = 1.0
    """Weight of the commitment loss (the paper's α)."""
    diversity: float = 0.01
    """Weight of the diversity loss, which spreads items over the codes (the paper's β)."""
    diversity_kind: DiversityKind = "entropy"
    """Diversity loss: entropy of the codes in use, or clusters: a code is pulled to others of its cluster."""
    clusters: int = 10
    """Clusters of equal size of the codes of a level, for diversity_kind=clusters."""
    collab_loss: float = 0.0
    """Weight of the contrastive loss between quantized vectors and collaborative embeddings (LETTER)."""
    recon_target: ReconTarget = "modalities"
    """modalities, which reconstructs the features of each item, or h, the fused vector."""
    unique: Unique = "assign"
    """How colliding items get unique codes: assign, sinkhorn, or suffix (one more code per ID)."""
    epochs: int = 400
    """Passes over the items."""
    batch_size: int = 1024
    """Items per step."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    warmup_epochs: int = 20
    """Epochs until the learning rate is reached."""
    reseed_every: int = 10
    """Epochs between two replacements of unused codes; 0 never replaces them."""
    seed: int = 0
    """Random seed; the run's seed replaces it."""

    def __post_init__(self) -> None:
        for name in ("levels", "codebook_size", "dim", "latent", "epochs", "batch_size", "clusters"):
            if getattr(self, name) < 1:
                raise UserError(f"tokenizer.{name} must be at least 1, got {getattr(self, name)}")
        if min(self.hidden, default=1) < 1:
            raise UserError(f"tokenizer.hidden must have widths of at least 1, got {list(self.hidden)}")
        for name, most in (("codebook_size", MAX_CODEBOOK_SIZE), ("levels", MAX_LEVELS)):  # limits of a trie
            if getattr(self, name) > most:
                raise UserError(f"tokenizer.{name} must be within 1 … {most}, got {getattr(self, name)}")
        for name in ("commit", "diversity", "collab_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"tokenizer.{name} must not be negative, got {getattr(self, name)}")
        choices_of = {
            "recon_target": ReconTarget, "unique": Unique, "fusion": FusionKind,
            "diversity_kind": DiversityKind,
        }  # fmt: skip
        for name, choices in ((name, get_args(kind)) for name, kind in choices_of.items()):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"tokenizer.{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True, slots=True)
class Collaborative:
    """Frozen collaborative embeddings of B items, for the contrastive loss.

    Attributes:
        values: [B, Z], centred, with components of about 1.
        present: [B] bool; False for an item without training interactions.
    """

    values: Tensor
    present: Tensor

    def rows(self, index: Tensor) -> Collaborative:
        """The embeddings of some of the items."""
        return Collaborative(self.values[index], self.present[index])


@dataclass(frozen=True, slots=True)
class Losses:
    """The terms of equation 4 and their sum, scalars.

    Attributes:
        explained: Share of each modality's variance that the reconstruction explains.
        collab: The contrastive loss with the collaborative embeddings; None if it is not used.
    """

    total: Tensor
    recon: Tensor
    commit: Tensor
    diversity: Tensor
    explained: dict[str, Tensor]
    collab: Tensor | None = None


class RQVAE(nn.Module):
    """Fusion, encoder, residual quantizer, decoder."""

    def __init__(self, widths: dict[str, int], *, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = dict(widths)
        self.fusion = Fusion(widths, dim=config.dim, guided=config.fusion == "guided")
        sizes = (self.fusion.out_dim, *config.hidden, config.latent)
        out = self.fusion.out_dim if config.recon_target == "h" else sum(widths.values())
        self.encoder = _mlp(sizes)
        self.decoder = _mlp((*reversed(sizes[1:]), out))
        codebooks = torch.randn(config.levels, config.codebook_size, config.latent) / config.latent**0.5
        self.codebooks = nn.Parameter(codebooks)  # [M, K, Z]

    def encode(self, items: ItemFeatures) -> Tensor:
        """Latents z [B, Z]."""
        z: Tensor = self.encoder(self.fusion(items)[0])
        return z

    @torch.no_grad()
    def tokenize(self, items: ItemFeatures) -> tuple[Tensor, Tensor]:
        """Codes [B, M] int64 by residual quantization, and latents z [B, Z]."""
        z = self.encode(items)
        codes, _ = residual_quantize(z.contiguous(), self.codebooks.detach())
        return codes.long(), z

    def forward(
        self, items: ItemFeatures, *, collab: Collaborative | None = None, clusters: Tensor | None = None,
        rows: Rows | None = None,
    ) -> tuple[Losses, Tensor]:  # fmt: skip
        """Losses of a batch, and its codes [B, M].

        Args:
            items: The features of b items: those of this process.
            collab: Collaborative embeddings of the B items, for the loss ``collab_loss``.
            clusters: int64 [M, K], the cluster of each code, for ``diversity_kind`` "clusters".
            rows: The rows of the batch that ``items`` are; None if they are all of them.
        """
        rows = rows or Rows(ALONE, len(items))
        h, _ = self.fusion(items)
        z = self.encoder(h)
        with torch.no_grad():
            codes = residual_quantize(z.contiguous(), self.codebooks.detach())[0].long()
        z, codes = rows.gather(z), rows.gather(codes)
        quantized, commit, diversity = self._quantize(z, codes, clusters)
        passed = z + (quantized - z).detach()  # straight-through
        recon, explained = self._reconstruction(self.decoder(rows.own(passed)), h, items, rows)
        total = recon + self.config.commit * commit + self.config.diversity * diversity
        aligned = None
        if collab is not None:
            aligned = contrastive_loss(passed[collab.present], collab.values[collab.present])
            total = total + self.config.collab_loss * aligned
        return Losses(total, recon, commit, diversity, explained, aligned), codes

    def _quantize(
        self, z: Tensor, codes: Tensor, clusters: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ẑ [B, Z], L_commit, L_div. r_{m+1} = r_m − sg[v_m]: the encoder has a gradient per level."""
        residual, quantized = z, torch.zeros_like(z)
        commit, diversity = z.new_zeros(()), z.new_zeros(())
        for level, codebook in enumerate(self.codebooks):
            chosen = F.embedding(codes[:, level], codebook)  # [B, Z]
            to_code = (residual.detach() - chosen).square().sum(1).mean()
            to_residual = (residual - chosen.detach()).square().sum(1).mean()
            commit = commit + to_code + 0.25 * to_residual
            if clusters is None:
                diversity = diversity + negative_entropy(residual[:DIVERSITY_ROWS], codebook)
            else:
                spread = cluster_loss(codes[:, level], codebook, clusters[level])
                diversity = diversity + spread / len(clusters)  # the mean over levels
            residual = residual - chosen.detach()
            quantized = quantized + chosen
        return quantized, commit, diversity

    def _reconstruction(
        self, decoded: Tensor, h: Tensor, items: ItemFeatures, rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.config.recon_target == "h":
            target = h.detach()
            loss = rows.mean((decoded - target).square().sum(1))
            target = rows.gather(target)
            spread = (target - target.mean(0)).square().sum(1).mean()
            return loss, {"h": 1 - loss.detach() / spread.clamp_min(1e-12)}
        parts = dict(zip(MODALITIES, decoded.split([self.widths[k] for k in MODALITIES], dim=1), strict=True))
        errors = torch.stack(
            [(parts[k] - items.values[k]).square().sum(1) for k in MODALITIES], dim=1
        )  # [B, 3]
        present = items.present.to(errors.dtype)
        loss = rows.mean((errors * present).sum(1) / present.sum(1).clamp_min(1))
        spread = torch.stack([items.values[k].square().sum(1) for k in MODALITIES], dim=1)
        sums = torch.stack(((errors * present).sum(0), (spread * present).sum(0), present.sum(0)))
        left, whole, count = rows.world.total(sums)
        share = left / whole.clamp_min(1e-12)
        return loss, {k: 1 - share[i] for i, k in enumerate(MODALITIES) if bool(count[i] > 0)}


def contrastive_loss(quantized: Tensor, collab: Tensor) -> Tensor:
    """The mean of −log softmax_j(⟨ẑ_i, c_j⟩) at j = i, over the n items of a batch, [n, Z] each.

    Source: LETTER, https://arxiv.org/abs/2405.07314, section 3.2, the collaborative regularization.
    """
    if len(quantized) == 0:
        return quantized.new_zeros(())
    return F.cross_entropy(quantized @ collab.t(), torch.arange(len(quantized), device=quantized.device))


def negative_entropy(residual: Tensor, codebook: Tensor) -> Tensor:
    """Σ_k p̄_k log p̄_k; p̄ is the batch mean of softmax(−‖r − v_k‖² / τ), τ the mean smallest distance."""
    distance = torch.cdist(residual, codebook).square()  # [B, K]
    temperature = distance.detach().min(1).values.mean().clamp_min(1e-6)
    mean = F.softmax(-distance / temperature, dim=1).mean(0)  # [K]
    # a very distant code has the share 0 and adds nothing; the gradient of log 0 would be NaN
    return (mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
