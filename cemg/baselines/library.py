"""Models of the library cornac, on the data and splits of CEMG: a check of our own implementations.

N items, B histories. Install it with ``pip install -e '.[cornac]'``. It has no checkpoints: an interrupted
training starts again.

Source: Salah et al., Cornac, https://jmlr.org/papers/v21/19-805.html.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cemg.baselines.features import item_features
from cemg.baselines.registry import Fitted, Job
from cemg.errors import UserError


@dataclass(frozen=True, slots=True)
class GRU4RecConfig:
    """Settings of cornac's GRU4Rec; the defaults are the library's but for width, dropout and epochs."""

    layers: int = 128
    loss: str = "cross-entropy"
    batch_size: int = 256
    dropout_p_embed: float = 0.3
    dropout_p_hidden: float = 0.0
    learning_rate: float = 0.05
    n_sample: int = 2048
    n_epochs: int = 20
    val_eval_every: int = 5
    val_metric: str = "ndcg"
    val_k: int = 10
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SASRecConfig:
    """Settings of cornac's SASRec; the defaults are the library's but for width, dropout and epochs."""

    embedding_dim: int = 128
    loss: str = "ce"
    batch_size: int = 256
    learning_rate: float = 1e-3
    n_sample: int = 2048
    n_epochs: int = 30
    max_len: int = 50
    dropout: float = 0.5
    val_eval_every: int = 5
    val_metric: str = "ndcg"
    val_k: int = 10
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TIGERConfig:
    """Settings of cornac's TIGER; the defaults are those of its recipe for Beauty, with 50 beams."""

    rqvae_n_epochs: int = 8000
    rqvae_batch_size: int = 2048
    rqvae_weight_decay: float = 0.1
    num_enc_layers: int = 6
    num_dec_layers: int = 6
    dropout: float = 0.2
    learning_rate: float = 3e-4
    lr_schedule: str = "cosine"
    warmup_steps: int = 10_000
    weight_decay: float = 0.035
    batch_size: int = 64
    n_beams: int = 50
    n_epochs: int = 100
    val_eval_every: int = 5
    val_metric: str = "ndcg"
    val_k: int = 10
    seed: int = 0


def fit_cornac_gru4rec(job: Job) -> Fitted:
    """Train cornac's GRU4Rec."""
    config = job.config(GRU4RecConfig)
    return _fit(job, "GRU4Rec", config, asdict(config) | {"layers": [config.layers]})


def fit_cornac_sasrec(job: Job) -> Fitted:
    """Train cornac's SASRec."""
    config = job.config(SASRecConfig)
    return _fit(job, "SASRec", config, asdict(config))


def fit_cornac_tiger(job: Job) -> Fitted:
    """Train cornac's TIGER on our vectors of texts."""
    config = job.config(TIGERConfig)
    return _fit(job, "TIGER", config, asdict(config), needs_texts=True)


def _fit(job: Job, kind: str, config: Any, settings: dict[str, Any], *, needs_texts: bool = False) -> Fitted:
    if job.budget is not None:
        raise UserError(
            f"cornac's {kind} cannot stop at a budget", fix="leave out --budget, or --set n_epochs=5"
        )
    models: Any = _cornac("models")
    data: Any = _cornac("data")
    split, items = job.data.split(), job.data.num_items
    maps: tuple[Any, ...] = (OrderedDict(), OrderedDict(), OrderedDict((n, n) for n in range(items)))
    train = _sessions(data, [s for s in split.train if len(s) > 1], maps)
    pairs = zip(split.histories("valid"), split.targets("valid"), strict=True)
    valid = _sessions(data, [np.append(h, target) for h, target in pairs], maps)
    if needs_texts:
        features = item_features(job)
        if "text" not in features:
            raise UserError(f"{job.data.name}: no item has a text", fix="cornac-sasrec")
        train.item_feature = data.FeatureModality(
            features=features["text"].values.numpy(), ids=[*range(items)]
        )
    model = getattr(models, kind)(**settings, device=job.device, model_selection="best", verbose=True)
    torch.manual_seed(job.seed)
    started = time.perf_counter()
    model.fit(train, valid)
    about = {"model": f"cornac-{kind.lower()}", "cornac": _cornac("").__version__, **asdict(config)}
    return Fitted(_Ranker(model, items), about | {"train_seconds": round(time.perf_counter() - started, 1)})


def _cornac(module: str) -> Any:
    """Import a module of cornac. Raises UserError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"cornac.{module}".rstrip("."))
    except ImportError as error:
        fix = "pip install -e '.[cornac]'"
        raise UserError("cornac is not installed", cause=str(error), fix=fix) from error


def _sessions(data: Any, sequences: Sequence[np.ndarray], maps: tuple[Any, ...]) -> Any:
    """A data set of cornac with one session per sequence, in which item n is the row n."""
    number = itertools.count(len(maps[1]))
    rows = [
        (user, session, int(item), place)
        for user, (session, items) in enumerate(zip(number, sequences, strict=False))
        for place, item in enumerate(items)
    ]
    users, sessions, items = maps
    return data.SequentialDataset.build(
        rows, fmt="USIT", global_uid_map=users, global_sid_map=sessions, global_iid_map=items
    )


@dataclass(frozen=True, slots=True)
class _Ranker:
    """Ranks the catalog, one history after the other."""

    model: Any
    items: int

    def __call__(self, histories: Sequence[np.ndarray], top: int) -> Tensor:
        """Return the ``top`` best items of each history, [B, top]."""
        scores = [np.asarray(self.model.score(0, history.tolist()))[: self.items] for history in histories]
        return torch.from_numpy(np.stack(scores)).topk(min(top, self.items), dim=1).indices
