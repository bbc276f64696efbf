"""Training of fusion and RQ-VAE together, and the frozen tokenizer that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor

from cemg import files
from cemg.artifacts import STRICT, Shape, read_json, read_tensors
from cemg.errors import DamagedError, UserError
from cemg.progress import Log, track
from cemg.tokenizer.fusion import MODALITIES, ItemFeatures, Scaling
from cemg.tokenizer.rqvae import RQVAE, Losses, TokenizerConfig

Modality = Literal["image", "text", "collab"]
INIT_ROWS = 8192  # items that the k-means initialisation of a codebook looks at


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A trained RQ-VAE and the scaling of its inputs. Frozen: the same item gives the same codes for good."""

    FILES: ClassVar[tuple[str, ...]] = ("tokenizer.json", "tokenizer.safetensors")

    model: RQVAE
    scaling: dict[str, Scaling]
    without: tuple[str, ...] = ()

    def features(self, values: dict[str, Tensor], present: dict[str, Tensor]) -> ItemFeatures:
        """Scale raw features (e_v, e_t, e_c by name, [N, D_k]) as the tokenizer was trained on them."""
        return ItemFeatures.scaled(values, present, self.scaling, self.without)

    @torch.no_grad()
    def tokenize(self, items: ItemFeatures) -> tuple[Tensor, Tensor]:
        """Codes [N, M] int64, before collisions are resolved, and z [N, Z]."""
        return self.model.tokenize(items)

    @torch.no_grad()
    def attention(self, items: ItemFeatures) -> Tensor:
        """α [N, 2] of every item over (image, text)."""
        return self.model.fusion.attention(items)

    def save(self, folder: Path) -> None:
        """``tokenizer.safetensors`` and ``tokenizer.json``."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"mean.{k}": s.mean for k, s in self.scaling.items()}
        files.save_tensors(tensors, folder / "tokenizer.safetensors")
        about = {
            "config": asdict(self.model.config),
            "widths": self.model.widths,
            "rms": {k: s.rms for k, s in self.scaling.items()},
            "without": list(self.without),
        }
        files.write_json(folder / "tokenizer.json", about)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what ``save`` wrote; UserError where it is missing or damaged."""
        fix = "train it again: cemg-train --run RUN"
        if not (folder / "tokenizer.json").exists():
            raise DamagedError(f"{folder} holds no tokenizer", fix=fix)
        try:
            about = read_json(folder / "tokenizer.json", _About, fix=fix)
            tensors = read_tensors(folder / "tokenizer.safetensors", fix=fix)
            return cls._restored(about, tensors)
        except DamagedError as error:
            cause = f"{error.message}: {error.cause}" if error.cause else error.message
            raise DamagedError(f"{folder} holds no readable tokenizer", cause=cause, fix=fix) from error
        except (KeyError, RuntimeError, UserError) as error:  # of a model of another shape
            cause = str(error).splitlines()[0]
            raise DamagedError(f"{folder} holds no readable tokenizer", cause=cause, fix=fix) from error

    @classmethod
    def _restored(cls, about: _About, tensors: dict[str, Tensor]) -> Tokenizer:
        if {*about.widths} != {*MODALITIES} or {*about.rms} != {*MODALITIES}:
            raise UserError(f"its modalities are {', '.join(about.widths)}, not {', '.join(MODALITIES)}")
        model = RQVAE(about.widths, config=about.config)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict(weights)
        scaling = {k: Scaling(tensors[f"mean.{k}"], rms) for k, rms in about.rms.items()}
        for name, width in about.widths.items():
            if scaling[name].mean.shape != (width,):
                raise UserError(f"mean.{name} has the shape {list(scaling[name].mean.shape)}, not [{width}]")
        return cls(model.eval(), scaling, about.without)


@dataclass(frozen=True, slots=True)
class _About:
    """``tokenizer.json``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    config: TokenizerConfig
    widths: dict[str, PositiveInt]
    rms: dict[str, PositiveFloat]
    without: tuple[Modality, ...]


ITEMS: dict[str, tuple[torch.dtype, Shape]] = {
    "codes": (torch.int64, ("N", "M")), "z": (torch.float32, ("N", "Z")),
    "attention": (torch.float32, ("N", 2)), "present": (torch.bool, ("N", len(MODALITIES))),
}  # fmt: skip


def read_items(path: Path) -> dict[str, Tensor]:
    """``items.safetensors`` of a tokenizer's folder: codes, z, attention and presence of every item."""
    return read_tensors(path, ITEMS)


def train_tokenizer(
    values: dict[str, Tensor],
    present: dict[str, Tensor],
    *,
    config: TokenizerConfig,
    without: Sequence[str] = (),
    device: str = "cpu",
    log: Log | None = None,
) -> Tokenizer:
    """Fit fusion and RQ-VAE to N items' features (``values[k]`` [N, D_k], ``present[k]`` [N]).

    Logs every term of equation 4, explained variance a modality, perplexity and dead codes a level.
    Raises UserError where every modality is absent.
    """
    scaling = {k: Scaling.of(values[k], present[k]) for k in MODALITIES}
    items = ItemFeatures.scaled(values, present, scaling, without)
    if not bool(items.present.any()):
        raise UserError("no item has any modality left", cause=f"without: {', '.join(without) or 'nothing'}")
    torch.manual_seed(config.seed)
    model = RQVAE(items.widths(), config=config).to(device)
    _fit(model, items.to(device), config=config, log=log)
    return Tokenizer(model.cpu().eval(), scaling, tuple(without))


def _fit(model: RQVAE, items: ItemFeatures, *, config: TokenizerConfig, log: Log | None) -> None:
    steps = -(-len(items) // config.batch_size)
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_then_linear(step / steps, config)
    )
    generator = torch.Generator().manual_seed(config.seed)
    initialise_codebooks(model, items, generator=generator)
    for epoch in track(range(config.epochs), "RQ-VAE"):
        seen = []
        used = torch.zeros(config.levels, config.codebook_size)
        for rows in torch.randperm(len(items), generator=generator).split(config.batch_size):
            losses, codes = model(items.rows(rows.to(items.present.device)))
            if not bool(losses.total.isfinite()):
                raise UserError(
                    f"the tokenizer's loss is {float(losses.total.detach())} in epoch {epoch + 1}",
                    fix="lower tokenizer.learning_rate, or look for extreme values in the features",
                )
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            schedule.step()
            seen.append(_figures(losses))
            used += torch.stack([torch.bincount(c, minlength=config.codebook_size) for c in codes.cpu().T])
        if log is not None:
            log(epoch, _mean(seen) | codebook_use(used))
        if (
            config.reseed_every
            and epoch % config.reseed_every == config.reseed_every - 1
            and epoch < config.epochs // 2
        ):
            reseed_dead_codes(model, items, used=used, generator=generator)


def _groups(model: RQVAE, weight_decay: float) -> list[dict[str, object]]:
    """Codebooks are positions, not weights: they do not decay."""
    weights = [p for name, p in model.named_parameters() if name != "codebooks"]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": [model.codebooks], "weight_decay": 0.0},
    ]


def _warm_then_linear(epoch: float, config: TokenizerConfig) -> float:
    warm = min(1.0, (epoch + 1) / max(config.warmup_epochs, 1))
    return min(warm, max(0.0, (config.epochs - epoch) / max(config.epochs - config.warmup_epochs, 1)))


def _figures(losses: Losses) -> dict[str, float]:
    terms = {
        "loss": losses.total,
        "recon": losses.recon,
        "commit": losses.commit,
        "diversity": losses.diversity,
    }
    explained = {f"explained_{k}": v for k, v in losses.explained.items()}
    return {f"rqvae/{k}": float(v.detach()) for k, v in (terms | explained).items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    keys = {k for row in rows for k in row}
    return {k: sum(row[k] for row in rows if k in row) / sum(k in row for row in rows) for k in sorted(keys)}


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Perplexity and dead codes of each level, from how often each code was used, ``counts`` [M, K]."""
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    perplexity = torch.exp(-torch.xlogy(share, share).sum(1))  # [M]
    dead = (counts == 0).sum(1)
    use = {f"rqvae/perplexity_{m}": float(p) for m, p in enumerate(perplexity)}
    return use | {f"rqvae/dead_{m}": float(d) for m, d in enumerate(dead)}


@torch.no_grad()
def initialise_codebooks(model: RQVAE, items: ItemFeatures, *, generator: torch.Generator) -> None:
    """k-means on the residuals of INIT_ROWS items, level after level; if fewer than K differ, some stay."""
    from sklearn.cluster import KMeans  # late: a recommendation does not need it

    rows = torch.randperm(len(items), generator=generator)[:INIT_ROWS].to(items.present.device)
    residual = model.encode(items.rows(rows)).cpu()
    for level in range(len(model.codebooks)):
        clusters = min(model.config.codebook_size, len(residual.unique(dim=0)))
        seed = model.config.seed + level
        means = KMeans(clusters, n_init=1, max_iter=25, random_state=seed).fit(residual.numpy())
        centers = torch.from_numpy(means.cluster_centers_).to(model.codebooks)
        model.codebooks[level, :clusters] = centers
        residual = residual - centers.cpu()[torch.from_numpy(means.labels_).long()]


@torch.no_grad()
def reseed_dead_codes(model: RQVAE, items: ItemFeatures, *, used: Tensor, generator: torch.Generator) -> int:
    """Put each code that no item used (``used`` [M, K]) on a random item's residual; how many were moved."""
    moved = 0
    codes, residual = model.tokenize(items)
    for level, codebook in enumerate(model.codebooks):
        dead = torch.nonzero(used[level] == 0).flatten().to(codebook.device)
        rows = torch.randint(len(items), (len(dead),), generator=generator).to(codebook.device)
        chosen = codebook[codes[:, level]].clone()
        model.codebooks[level, dead] = residual[rows]
        residual = residual - chosen
        moved += len(dead)
    return moved
