"""LLM-ESR, MMSRec and MISSRec: what only the features of items reveal, masks, and their own parts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cemg.baselines import llm_esr, missrec, mmsrec
from cemg.baselines.multimodal import CatalogModel, sampled_cross_entropy
from cemg.baselines.registry import MODELS, Job, fit
from cemg.baselines.samples import Samples
from cemg.data.dataset import Dataset
from cemg.dense import linear_cross_entropy
from cemg.errors import UserError
from cemg.features import Features

NAMES = ["llm-esr", "mmsrec", "missrec"]
GROUPS, WARM, COLD = 5, 8, 2  # items of a group: WARM are in training sequences, COLD only in the test
SMALL: dict[str, Any] = {
    "dim": 16, "inner": 32, "heads": 2, "max_length": 8, "batch_size": 16, "epochs": 12, "dropout": 0.1,
    "learning_rate": 5e-3, "schedule": "constant",
}  # fmt: skip


def group_of(items: np.ndarray) -> np.ndarray:
    return items % GROUPS


def data_of_groups(users: int = 160) -> Dataset:
    """A random item of the next group follows each item; the last one, for the test, is a cold one."""
    rng = np.random.default_rng(0)
    count, sequences = GROUPS * (WARM + COLD), []
    for _ in range(users):
        groups = (rng.integers(GROUPS) + np.arange(7)) % GROUPS
        number = np.append(rng.integers(WARM, size=6), WARM + rng.integers(COLD))
        sequences.append((groups + GROUPS * number).astype(np.int32))
    return Dataset(
        name="groups",
        user_ids=[str(u) for u in range(users)],
        item_ids=[str(i) for i in range(count)],
        sequences=sequences,
        titles=[""] * count,
        texts=[None] * count,
        images=[None] * count,
        tie_rule="as written",
    )


def features_of_groups(kinds: str) -> dict[str, Features]:
    """Noisy vectors of the group of each item; with both kinds, no item of the odd rows has a text."""
    generator, items = torch.Generator().manual_seed(0), torch.arange(GROUPS * (WARM + COLD))
    found = {}
    for name in kinds.split("+"):
        centres = torch.randn(GROUPS, 10, generator=generator)
        values = centres[items % GROUPS] + 0.2 * torch.randn(len(items), 10, generator=generator)
        present = items % 2 == 0 if kinds == "text+image" and name == "text" else torch.ones_like(items) > 0
        found[name] = Features(values * present[:, None], present)
    return found


@pytest.mark.parametrize(
    "name, kinds", [*((name, "text") for name in NAMES), ("mmsrec", "text+image"), ("missrec", "image")]
)
def test_items_that_no_user_has_seen_are_recommended_by_their_features(
    name: str, kinds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(MODELS[name].module)
    monkeypatch.setattr(module, "item_features", lambda job: features_of_groups(kinds))
    data, settings = data_of_groups(), SMALL | ({"epochs": 5} if name == "llm-esr" else {"layers": 1})
    if kinds == "text+image":
        settings |= {"batch_size": 8}
    fitted = fit(name, Job(data, tmp_path, seed=1, settings=settings))
    split = data.split()
    ranked = fitted.rank(split.histories("test"), data.num_items).numpy()
    cold = ranked >= GROUPS * WARM
    first = ranked[np.arange(len(ranked)), cold.argmax(1)]  # the best item that is in no training sequence
    assert (group_of(first) == group_of(split.test)).mean() > 0.5  # by chance: 0.2


@pytest.mark.parametrize("name", NAMES)
def test_items_without_texts_and_images_are_refused_with_another_model(
    name: str, ring: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no item has a text or an image") as caught:
        fit(name, Job(ring, tmp_path))
    assert "sasrec" in str(caught.value)


def both_with_missing(missing: float) -> dict[str, Features]:
    """12 items; item 0 has no text, item 1 no image, item 2 neither: there the vectors are ``missing``."""
    found = {}
    for name, without in (("text", [0, 2]), ("image", [1, 2])):
        values = torch.randn(12, 6, generator=torch.Generator().manual_seed(len(name)))
        present = torch.ones(12, dtype=torch.bool)
        present[without], values[without] = False, missing
        found[name] = Features(values, present)
    return found


def small(name: str, features: dict[str, Features]) -> CatalogModel:
    torch.manual_seed(0)
    size = {"dim": 16, "heads": 2, "max_length": 6, "dropout": 0.0}
    makers: dict[str, Callable[[], CatalogModel]] = {
        "llm-esr": lambda: llm_esr.LLMESR(llm_esr.side_by_side(features), llm_esr.LLMESRConfig(**size)),
        "mmsrec": lambda: mmsrec.MMSRec(features, mmsrec.MMSRecConfig(**size)),
        "missrec": lambda: missrec.MISSRec(features, missrec.MISSRecConfig(**size)),
    }
    model = makers[name]()
    for parameter in model.parameters():  # weights that start as zeros would hide what is read
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.eval()
    return model


HISTORIES = [np.array([0, 3, 1]), np.array([2]), np.array([4, 2, 0, 1, 5])]


@pytest.mark.parametrize("name", ["mmsrec", "missrec"])
def test_the_vector_of_a_missing_modality_is_not_read(name: str) -> None:
    one, two = (small(name, both_with_missing(value)).logits(HISTORIES) for value in (0.0, 1e3))
    assert torch.isfinite(one).all() and torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_the_other_histories_of_a_batch(name: str) -> None:
    model = small(name, both_with_missing(0.0))
    together = model.logits(HISTORIES)
    alone = torch.cat([model.logits([history]) for history in HISTORIES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)  # logits of magnitude 20


@pytest.mark.parametrize("name", NAMES)
def test_a_state_at_a_position_does_not_read_later_items(name: str) -> None:
    model: Any = small(name, both_with_missing(0.0))

    def states(items: list[int]) -> Tensor:
        arguments: list[Tensor] = [torch.tensor([items]), torch.tensor([len(items)])]
        if name == "llm-esr":
            model.positions.weight.data[:] = 0  # ages of items differ
            return model.states(model.encode_catalog(), *arguments)[0]  # type: ignore[no-any-return]
        found = model.states(*arguments, newest=False)
        return (found[0] if isinstance(found, tuple) else found)[0]  # type: ignore[no-any-return]

    long, short = states([4, 2, 0, 1, 5]), states([4, 2, 0])
    torch.testing.assert_close(long[:3], short, rtol=0, atol=1e-5)  # float32 of magnitude 1
    assert not torch.allclose(long[2], long[1], atol=1e-3)


def test_a_changed_mode_computes_the_catalog_again() -> None:
    model: Any = small("mmsrec", both_with_missing(0.0))
    before = model.logits(HISTORIES)
    model.mask_token.data += 1
    model.modalities.project[0].weight.data += 1
    model.train()
    model.eval()
    assert not torch.equal(model.catalog, small("mmsrec", both_with_missing(0.0)).catalog)
    assert not torch.equal(before, model.logits(HISTORIES))


def test_the_cross_entropy_over_all_items_is_that_of_the_dense_models() -> None:
    generator = torch.Generator().manual_seed(0)
    states, table = (torch.randn(n, 5, generator=generator) for n in (7, 11))
    targets = torch.arange(7)
    logits, drawn = states @ table.T, torch.arange(11)
    own, same = logits[torch.arange(7), targets], targets[:, None] == drawn
    found = sampled_cross_entropy(own, logits, same=same, num_items=11)
    torch.testing.assert_close(found, linear_cross_entropy(states, table, targets=targets))


def test_similar_users_have_similar_items_and_users_without_features_have_none() -> None:
    histories = [np.array(h) for h in ([0, 1], [0, 1], [4, 5], [5, 4, 4], [8, 9], [2, 2])]
    values = torch.zeros(10, 3)
    values[:2, 0], values[4:6, 1], values[8:, 2] = 1, 1, 1
    features = Features(values, values.any(1))  # items 2 and 3, of the last user, have none
    samples = Samples.positions(histories, 5)
    found = llm_esr.SimilarUsers.find(histories, samples, features, 1)
    assert found.known.tolist() == [True] * 5 + [False]
    assert found.users[:4, 0].tolist() == [1, 0, 3, 2]
    rows, users = found.draw(torch.tensor([5, 2, 0]), 1, torch.Generator().manual_seed(0))
    assert rows.tolist() == [1, 2] and users.tolist() == [[3], [1]]


def test_the_table_of_ids_starts_as_the_principal_components() -> None:
    features = llm_esr.side_by_side(both_with_missing(0.0))
    table = llm_esr.LLMESR(features, llm_esr.LLMESRConfig(dim=2)).ids.weight.detach()
    rows = features.values[features.present]
    centred = rows - rows.mean(0)
    first = torch.linalg.svd(centred).Vh[0]
    cosine = torch.cosine_similarity(table[features.present][:, 0], centred @ first, dim=0)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-4)


def test_an_interest_that_a_user_has_twice_is_read_once() -> None:
    clusters = torch.tensor([[[3, 0], [1, 0], [3, 2], [3, 0]]])
    here = torch.ones_like(clusters, dtype=torch.bool)
    here[0, 0, 1] = False  # the first item lacks the second modality
    found = missrec.repeated(clusters, here)
    assert found[0, :, 0].tolist() == [False, False, True, True]
    assert found[0, :, 1].tolist() == [False, False, False, True]


def test_the_overlap_of_interests_is_their_mean_squared_cosine() -> None:
    memory = torch.tensor([[[2.0, 0], [0, 3], [1, 1], [5, 5]]])
    present = torch.tensor([[True, True, True, False]])
    assert float(missrec.overlap(memory, present)) == pytest.approx((0 + 0.5 + 0.5) / 3)


def test_the_weights_of_modalities_depend_on_the_user() -> None:
    model: Any = small("missrec", both_with_missing(0.0))
    model.fusion.data[()] = 5.0
    cosines = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    present = torch.ones(2, 2, dtype=torch.bool)
    fused = model.fuse(cosines, None, present) * model.config.temperature
    assert (fused > 0.85).all()  # of each user, the modality that fits the better
    only = model.fuse(cosines, None, torch.tensor([True, False])) * model.config.temperature
    torch.testing.assert_close(only, cosines[:, 0])


@pytest.mark.parametrize("kinds", ["text", "text+image"])
def test_the_scores_of_a_catalog_are_those_of_single_items(kinds: str) -> None:
    torch.manual_seed(0)
    config = missrec.MISSRecConfig(dim=16, heads=2)
    model = missrec.MISSRec(features_of_groups(kinds), config)
    states = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
    modal, ids, present = model.encode_catalog()
    own = model.fuse((states[:, None] * modal).sum(-1), (states * ids).sum(-1), present)
    found = model.score(states, (modal, ids, present)).diagonal()
    torch.testing.assert_close(found, own, rtol=0, atol=1e-4)  # float32 of magnitude 10


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_both_losses_of_llm_esr_learn(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_esr, "item_features", lambda job: features_of_groups("text"))
    settings = {**SMALL, "loss": loss, "epochs": 3}
    fitted = fit("llm-esr", Job(data_of_groups(), tmp_path, settings=settings))
    losses = [row["loss"] for row in fitted.further["training"]]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="loss must be"):
        llm_esr.LLMESRConfig(loss="mse")


@pytest.mark.parametrize("name", NAMES)
def test_settings_out_of_range_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed in ({"heads": 3}, {"samples": "all"}, {"dropout": 1.0}, {"max_length": 0}):
        with pytest.raises(UserError):
            fit(name, Job(data_of_groups(9), tmp_path, settings=changed))
