"""Training of fusion and RQ-VAE together."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from cemg.distributed import ALONE, Rows, World
from cemg.errors import UserError
from cemg.progress import Log, console, track
from cemg.storage.checkpoint import Checkpoint, broadcast_slots, load_slots, slot_tensors, slots_of
from cemg.tokenizer.clusters import balanced_clusters
from cemg.tokenizer.fusion import BLOCK, MODALITIES, FeatureTable, ItemFeatures, Scaling
from cemg.tokenizer.rqvae import RQVAE, Collaborative, Losses, TokenizerConfig
from cemg.tokenizer.tokenizer import Tokenizer

INIT_ROWS = 8192  # items that k-means initializes a codebook from
CLUSTER_EPOCHS = 10  # epochs between two clusterings of the codes
Items = FeatureTable | ItemFeatures


def train_tokenizer(
    values: dict[str, Tensor],
    present: dict[str, Tensor],
    *,
    config: TokenizerConfig,
    without: Sequence[str] = (),
    device: str = "cpu",
    log: Log | None = None,
    checkpoint: Checkpoint | None = None,
    world: World = ALONE,
) -> Tokenizer:
    """Train fusion and RQ-VAE on the features of N items.

    The log has every term of the loss (paper equation 4), the explained variance per modality, and the
    perplexity and number of dead codes per level.

    Args:
        values: [N, D_k] per modality. On a CPU, tensors of a file by memory map are not copied.
        present: [N] bool per modality.
        config: Settings of the tokenizer.
        without: Modalities that are masked for every item (the ablations). The contrastive loss reads the
            collaborative embeddings also if they are masked.
        device: "cpu" or a CUDA device.
        log: Receives the metrics of every epoch.
        checkpoint: Of the main process, written between two epochs: an interrupted training continues there,
            with the same result.
        world: The processes that divide each batch. All of them return the same tokenizer.

    Raises:
        UserError: No item has any modality, or the loss is not finite.
    """
    scaling = {k: Scaling.of(values[k], present[k]) for k in MODALITIES}
    items = FeatureTable.of(values, present, scaling, without)
    if not bool(items.present.any()):
        raise UserError("no item has any modality left", cause=f"without: {', '.join(without) or 'nothing'}")
    torch.manual_seed(config.seed)
    model = RQVAE(items.widths(), config=config).to(device)
    collab = None
    if config.collab_loss:
        centred = scaling["collab"](values["collab"]) * values["collab"].shape[1] ** 0.5
        collab = Collaborative(centred.to(device), present["collab"].to(device))
    _fit(model, items.to(device), collab, config=config, log=log, checkpoint=checkpoint, world=world)
    return Tokenizer(model.cpu().eval(), scaling, tuple(without))


def _fit(
    model: RQVAE, items: Items, collab: Collaborative | None, *, config: TokenizerConfig,
    log: Log | None, checkpoint: Checkpoint | None, world: World,
) -> None:  # fmt: skip
    steps = -(-len(items) // config.batch_size)
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    state = _State(model, optimizer, generator, checkpoint, world)
    if not state.resume():
        initialise_codebooks(model, items, generator=generator)
        for parameter in model.parameters():
            world.broadcast(parameter)
    divided = [p for p in model.parameters() if p is not model.codebooks]
    for epoch in track(range(state.epoch, config.epochs), "RQ-VAE", done=state.epoch):
        batches = []
        used = torch.zeros(config.levels, config.codebook_size)
        if config.diversity and config.diversity_kind == "clusters" and epoch % CLUSTER_EPOCHS == 0:
            state.clusters = torch.stack(
                [balanced_clusters(book, config.clusters, seed=config.seed) for book in model.codebooks]
            )
        order = torch.randperm(len(items), generator=generator)
        for step, batch in enumerate(order.split(config.batch_size), epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _warm_then_linear(step / steps, config)
            index, rows = batch.to(items.present.device), Rows(world, len(batch))
            losses, codes = model(
                items.rows(rows.own(index)), collab=None if collab is None else collab.rows(index),
                clusters=state.clusters, rows=rows,
            )  # fmt: skip
            if not bool(losses.total.isfinite()):
                raise UserError(
                    f"the tokenizer's loss is {float(losses.total.detach())} in epoch {epoch + 1}",
                    fix="lower tokenizer.learning_rate, or look for extreme values in the features",
                )
            optimizer.zero_grad()
            losses.total.backward()
            world.sum_gradients(divided)
            if model.codebooks.grad is not None:
                world.broadcast(model.codebooks.grad)  # of all rows in every process
            optimizer.step()
            batches.append(_metrics(losses))
            used += torch.stack([torch.bincount(c, minlength=config.codebook_size) for c in codes.cpu().T])
        if log is not None:
            log(epoch, _mean(batches) | codebook_use(used))
        if (
            config.reseed_every
            and epoch % config.reseed_every == config.reseed_every - 1
            and epoch < config.epochs // 2
        ):
            reseed_dead_codes(model, items, used=used, generator=generator)
            world.broadcast(model.codebooks)
        state.close_epoch()


class _State:
    """The state of a training between two epochs. A checkpoint does not depend on the number of processes.

    Attributes:
        epoch: The next epoch, from 0.
        clusters: int64 [M, K], the cluster of each code; None if the loss does not use them.
    """

    def __init__(
        self, model: RQVAE, optimizer: torch.optim.Optimizer, generator: torch.Generator,
        checkpoint: Checkpoint | None, world: World,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.checkpoint, self.world = checkpoint, world
        self.device = model.codebooks.device
        self.epoch = 0
        self.clusters: Tensor | None = None

    def resume(self) -> bool:
        """Continue at the checkpoint, in all processes. Returns whether there is one."""
        randoms = self._randoms()

        def restore(tensors: dict[str, Tensor], state: dict[str, int]) -> None:
            self.model.load_state_dict(_part(tensors, "model."))
            load_slots(self.optimizer, slots_of(tensors))
            randoms.update(_part(tensors, "random."))
            self.epoch = state["epoch"]
            if "clusters" in tensors:
                self.clusters = tensors["clusters"].to(self.device)

        resumed = self.checkpoint is not None and self.checkpoint.resume(dict[str, int], restore)
        if resumed:
            console.print(f"tokenizer: resumed after {self.epoch} epochs", highlight=False)
        if not self.world.agree(resumed):
            return False
        if self.world.size > 1:
            self.epoch, self.clusters = self.world.agree((self.epoch, self.clusters))
            for tensor in (*self.model.parameters(), *randoms.values()):
                self.world.broadcast(tensor)
            load_slots(self.optimizer, broadcast_slots(self.optimizer, self.world))
        self.generator.set_state(randoms["generator"])
        torch.set_rng_state(randoms["cpu"])
        if "cuda" in randoms:
            torch.cuda.set_rng_state(randoms["cuda"], self.device)
        return True

    def close_epoch(self) -> None:
        """Go on to the next epoch. Writes a checkpoint if it is due, in the main process."""
        self.epoch += 1
        if self.checkpoint is None or not self.checkpoint.due():
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= slot_tensors(self.optimizer.state_dict()["state"])
        tensors |= {f"random.{k}": v for k, v in self._randoms().items()}
        if self.clusters is not None:
            tensors["clusters"] = self.clusters
        self.checkpoint.save(tensors, json.dumps({"epoch": self.epoch}))

    def _randoms(self) -> dict[str, Tensor]:
        """The states of the random generators: batches and replaced codes, and torch's, for cluster_loss."""
        states = {"generator": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _groups(model: RQVAE, weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; codebooks, which are positions, do not."""
    weights = [p for name, p in model.named_parameters() if name != "codebooks"]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": [model.codebooks], "weight_decay": 0.0},
    ]


def _warm_then_linear(epoch: float, config: TokenizerConfig) -> float:
    warm = min(1.0, (epoch + 1) / max(config.warmup_epochs, 1))
    return min(warm, max(0.0, (config.epochs - epoch) / max(config.epochs - config.warmup_epochs, 1)))


def _metrics(losses: Losses) -> dict[str, float]:
    terms = {
        "loss": losses.total,
        "recon": losses.recon,
        "commit": losses.commit,
        "diversity": losses.diversity,
    }
    if losses.collab is not None:
        terms["collab"] = losses.collab
    explained = {f"explained_{k}": v for k, v in losses.explained.items()}
    return {f"rqvae/{k}": float(v.detach()) for k, v in (terms | explained).items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    keys = {k for row in rows for k in row}
    return {k: sum(row[k] for row in rows if k in row) / sum(k in row for row in rows) for k in sorted(keys)}


def codebook_use(counts: Tensor) -> dict[str, float]:
    """Perplexity and number of dead codes per level, from the use of each code, ``counts`` [M, K]."""
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    perplexity = torch.exp(-torch.xlogy(share, share).sum(1))  # [M]
    dead = (counts == 0).sum(1)
    use = {f"rqvae/perplexity_{m}": float(p) for m, p in enumerate(perplexity)}
    return use | {f"rqvae/dead_{m}": float(d) for m, d in enumerate(dead)}


@torch.no_grad()
def initialise_codebooks(model: RQVAE, items: Items, *, generator: torch.Generator) -> None:
    """Set the codebooks, level by level, to the k-means centers of the residuals of INIT_ROWS items.

    If fewer than K residuals differ, the remaining codes keep their random start.
    """
    from sklearn.cluster import KMeans  # not needed at inference

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
def reseed_dead_codes(model: RQVAE, items: Items, *, used: Tensor, generator: torch.Generator) -> int:
    """Move each code that no item used (``used`` [M, K]) to the residual of a random item.

    Returns the number of moved codes.
    """
    dead = [torch.nonzero(level == 0).flatten() for level in used]
    drawn = torch.cat([torch.randint(len(items), (len(codes),), generator=generator) for codes in dead])
    if not len(drawn):
        return 0
    drawn = drawn.to(items.present.device)
    if len(items) > BLOCK:
        codes, residual = model.tokenize(items.rows(drawn))
    else:  # the bits of a product may depend on the number of rows: those of all, as in earlier versions
        codes, residual = (part[drawn] for part in model.tokenize(items.rows(slice(None))))
    start = 0
    for level, codebook in enumerate(model.codebooks):
        stop = start + len(dead[level])
        chosen = codebook[codes[:, level]].clone()
        model.codebooks[level, dead[level].to(codebook.device)] = residual[start:stop]
        residual = residual - chosen
        start = stop
    return len(drawn)
