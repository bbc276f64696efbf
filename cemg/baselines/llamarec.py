"""LlamaRec: a sequence model retrieves candidates, and a language model ranks them.

1. SASRec or BSARec retrieves the 20 best items that are not in the history.
2. A language model reads the titles of the history and of the candidates, and ranks them by the logits of
   their letters. Its LoRA adapters are trained for one epoch, with 19 random items beside the next one.

Below the candidates, a list is that of the retriever, so a target that is not retrieved is a miss at 20.

B users, C candidates, N items.

Source: Yue et al., https://arxiv.org/abs/2311.02089. docs/training.md lists the differences.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cemg.baselines.dense import train_dense
from cemg.baselines.letter_training import Training
from cemg.baselines.letters import LetterConfig, Ranker
from cemg.baselines.loop import LOG
from cemg.baselines.registry import Fitted, Job
from cemg.baselines.samples import Samples
from cemg.data.dataset import Split
from cemg.dense import DENSE_FILES, DenseConfig, DenseRanker
from cemg.errors import UserError
from cemg.evaluation import Sample, metrics_at

RETRIEVERS = ("sasrec", "bsarec")


@dataclass(frozen=True, slots=True)
class LlamaRecConfig(LetterConfig):
    """Settings of LlamaRec; those of the language model are explained at `LetterConfig`.

    Attributes:
        retriever: "sasrec" or "bsarec", trained for at most half of the budget; or the folder of one.
        valid_users: Validation users after the training, a seeded sample. Only those whose target is
            retrieved take time.
    """

    retriever: str = "sasrec"
    valid_users: int = 500

    def __post_init__(self) -> None:
        LetterConfig.__post_init__(self)
        if self.retriever not in RETRIEVERS and not (Path(self.retriever) / DENSE_FILES[0]).is_file():
            fix = f"{' or '.join(RETRIEVERS)}; or the folder of one that python -m cemg.baselines trained"
            raise UserError(f"retriever={self.retriever} is not a retriever", fix=fix)


@dataclass(frozen=True, slots=True)
class LlamaRec:
    """Both stages as a ranker."""

    retriever: DenseRanker
    ranker: Ranker
    config: LlamaRecConfig

    @torch.inference_mode()
    def retrieve(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The candidates [B, C], best first, and the logits [B, N] of the retriever."""
        logits = self.retriever.logits(histories).cpu()
        new = logits.clone()
        for row, history in enumerate(histories):
            new[row, torch.from_numpy(history.astype(np.int64))] = float("-inf")
        return new.topk(min(self.config.candidates, logits.shape[1]), dim=1).indices, logits

    def order(self, histories: Sequence[np.ndarray], candidates: Tensor) -> Tensor:
        """The candidates [B, C] in the order of the language model."""
        pairs = zip(histories, candidates.tolist(), strict=True)
        scores = self.ranker.scores([self.ranker.prompts.prompt(*pair) for pair in pairs])
        best = scores[:, : candidates.shape[1]].argsort(dim=1, descending=True, stable=True)
        return candidates.gather(1, best)

    @torch.inference_mode()
    def __call__(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Return the ``top`` best items of each history, [B, top]: the candidates, then the others."""
        candidates, logits = self.retrieve(histories)
        rest = logits.scatter(1, candidates, float("-inf"))
        count = max(min(top, logits.shape[1]) - candidates.shape[1], 0)
        ordered = self.order(histories, candidates)
        return torch.cat([ordered, rest.topk(count, dim=1).indices], dim=1)[:, :top]

    def validate(self, split: Split) -> dict[str, float]:
        """HR@10 and NDCG@10 of a sample of validation users, and how many targets are retrieved."""
        rows = Sample(self.config.valid_users).rows(len(split.valid_users))
        histories, targets = split.histories("valid"), torch.from_numpy(split.targets("valid")).long()[rows]
        candidates, _ = self.retrieve([histories[row] for row in rows])
        before = (candidates == targets[:, None]).long()  # [T, C]
        found = before.any(1)
        after = before.clone()
        if bool(found.any()):
            chosen = [histories[row] for row in rows[found.numpy()]]
            after[found] = (self.order(chosen, candidates[found]) == targets[found, None]).long()
        shares: dict[str, float] = {}
        for name, hits in (("valid", after), ("retriever_valid", before)):
            ranks = torch.where(found, hits.argmax(1), -1)
            shares |= {f"{name}_{key}": value for key, value in metrics_at(ranks, (10, 20)).items()}
        return shares


def fit(job: Job) -> Fitted:
    """Train the retriever and the language model on the training sequences."""
    config, split = job.config(LlamaRecConfig), job.data.split()
    samples = Samples.prefixes(list(split.train), config.history_items)
    if len(samples.starts) == 0:
        raise UserError(
            f"{job.data.name}: no user has two training items", fix="use data with longer histories"
        )
    ranker = Ranker.load(job.data, config, job.device)  # first, since it may not be installed
    retriever, spent = train_retriever(job, config)
    identity: dict[str, object] = {"config": asdict(config), "split": split.fingerprint}
    training = Training(ranker, samples, config, identity)
    training.run(job.folder, None if job.budget is None else max(job.budget - spent, 0.0))
    model = LlamaRec(retriever, ranker, config)
    about = asdict(config) | {"model": "llamarec", "language_model": config.model} | model.validate(split)
    about |= {"steps": training.step, "train_seconds": round(spent + training.seconds, 1)}
    if training.share < 1:
        about["stopped"] = "the budget of training time was spent within an epoch"
    log = {"steps": training.step, "share": training.share, "losses": [round(x, 4) for x in training.losses]}
    log |= {"tokens_per_second": round(training.tokens / max(training.seconds, 1e-9), 1)}
    return Fitted(model, about, {"training": [log], "retriever_seconds": round(spent, 1)})


def train_retriever(job: Job, config: LlamaRecConfig) -> tuple[DenseRanker, float]:
    """Train the retriever, or load it; returns its seconds of training within this job, too."""
    if config.retriever not in RETRIEVERS:
        ranker = DenseRanker.load(config.retriever)
        ranker.check_data(config.retriever, job.data.split())
        ranker.model.to(job.device)
        return ranker, 0.0
    folder, dense = job.folder / "retriever", DenseConfig(model=config.retriever, seed=config.seed)
    budget = None if job.budget is None else job.budget / 2
    ranker = train_dense(job.data, dense, folder=folder, device=job.device, budget=budget)
    return ranker, sum(row["train_seconds"] for row in json.loads((folder / LOG).read_text("utf-8")))
