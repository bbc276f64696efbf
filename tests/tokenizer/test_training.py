"""Training of the tokenizer: initialization, dead codes, logs and saved files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from cemg.errors import UserError
from cemg.storage.checkpoint import Checkpoint
from cemg.storage.files import save_tensors
from cemg.storage.read import read_tensors
from cemg.tokenizer import (
    MODALITIES,
    RQVAE,
    ItemFeatures,
    Scaling,
    Tokenizer,
    TokenizerConfig,
    fusion,
    training,
)
from cemg.tokenizer.training import codebook_use, initialise_codebooks, reseed_dead_codes, train_tokenizer

WIDTHS = {"image": 4, "text": 3, "collab": 2}
QUICK = TokenizerConfig(
    levels=2, codebook_size=8, dim=4, latent=3, hidden=(16,), epochs=6, batch_size=32, warmup_epochs=2, seed=7
)
TERMS = {"loss", "recon", "commit", "diversity"} | {f"explained_{k}" for k in MODALITIES}


def features(items: int = 80) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random features; every tenth item has no image."""
    generator = torch.Generator().manual_seed(11)
    values = {k: torch.randn(items, w, generator=generator) for k, w in WIDTHS.items()}
    present = {k: torch.ones(items, dtype=torch.bool) for k in WIDTHS}
    present["image"][::10] = False
    return values, present


def untrained() -> tuple[RQVAE, ItemFeatures]:
    values, present = features()
    torch.manual_seed(0)
    items = ItemFeatures(values, torch.stack([present[k] for k in MODALITIES], dim=1))
    return RQVAE(WIDTHS, config=QUICK), items


def started(seed: int) -> torch.Tensor:
    model, items = untrained()
    initialise_codebooks(model, items, generator=torch.Generator().manual_seed(seed))
    return model.codebooks.detach().clone()


def test_the_kmeans_start_repeats_with_its_seed_and_moves_the_codebooks():
    before = untrained()[0].codebooks.detach()
    assert torch.equal(started(1), started(1))
    assert not torch.isclose(started(1), before).any(2).all()


def test_the_kmeans_start_uses_every_code_of_every_level():
    model, items = untrained()
    initialise_codebooks(model, items, generator=torch.Generator().manual_seed(1))
    codes, z = model.tokenize(items)
    assert codes[:, 0].bincount(minlength=8).min() > 0
    assert codes[:, 1].bincount(minlength=8).min() > 0
    centres = torch.stack([z[codes[:, 0] == k].mean(0) for k in range(8)])  # a k-means centre is its mean
    torch.testing.assert_close(model.codebooks[0].detach(), centres, rtol=1e-3, atol=1e-4)  # 25 iterations


def test_the_kmeans_start_with_fewer_items_than_codes_puts_a_code_on_each_item():
    model, items = untrained()
    few = items.rows(slice(0, 3))
    before = model.codebooks.detach().clone()
    initialise_codebooks(model, few, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.codebooks[:, 3:], before[:, 3:])
    least = torch.cdist(model.encode(few), model.codebooks[0, :3]).min(1).values
    assert least.max() < 1e-5


def test_reseeding_moves_the_dead_codes_alone_and_onto_residuals_of_items():
    model, items = untrained()
    before = model.codebooks.detach().clone()
    used = torch.ones(2, 8)
    used[0, 3] = used[1, 0] = used[1, 6] = 0
    codes, z = model.tokenize(items)
    moved = reseed_dead_codes(model, items, used=used, generator=torch.Generator().manual_seed(2))
    after = model.codebooks.detach()
    changed = (after != before).any(2)
    assert moved == 3 and torch.equal(changed, used == 0)
    assert (z == after[0, 3]).all(1).any()
    left = z - before[0][codes[:, 0]]
    assert all(bool((left == after[1, k]).all(1).any()) for k in (0, 6))


def test_reseeding_moves_no_code_if_all_are_used():
    model, items = untrained()
    before = model.codebooks.detach().clone()
    used = torch.ones(2, 8)
    assert reseed_dead_codes(model, items, used=used, generator=torch.Generator().manual_seed(2)) == 0
    assert torch.equal(model.codebooks, before)


def test_every_epoch_logs_each_term_and_the_use_of_each_codebook():
    logged: dict[int, dict[str, float]] = {}
    values, present = features()
    train_tokenizer(values, present, config=QUICK, log=lambda step, figures: logged.update({step: figures}))
    wanted = TERMS | {f"{name}_{level}" for name in ("perplexity", "dead") for level in range(QUICK.levels)}
    assert sorted(logged) == list(range(QUICK.epochs))
    for figures in logged.values():
        assert set(figures) == {f"rqvae/{name}" for name in wanted}
        assert all(math.isfinite(figure) for figure in figures.values())


def test_the_logged_loss_is_the_weighted_sum_of_the_logged_terms():
    logged: list[dict[str, float]] = []
    config = dataclasses.replace(QUICK, epochs=2, commit=0.5, diversity=0.2)
    train_tokenizer(*features(), config=config, log=lambda step, figures: logged.append(figures))
    for row in logged:
        total = row["rqvae/recon"] + 0.5 * row["rqvae/commit"] + 0.2 * row["rqvae/diversity"]
        assert row["rqvae/loss"] == pytest.approx(total, rel=1e-5)


def test_training_explains_more_of_every_modality_than_its_first_epoch():
    logged: list[dict[str, float]] = []
    config = dataclasses.replace(QUICK, epochs=60, learning_rate=5e-3)
    train_tokenizer(*features(), config=config, log=lambda step, figures: logged.append(figures))
    for name in MODALITIES:
        assert logged[-1][f"rqvae/explained_{name}"] > logged[0][f"rqvae/explained_{name}"] + 0.1


def test_perplexity_is_the_number_of_equally_used_codes_and_dead_codes_are_counted():
    use = codebook_use(torch.tensor([[5.0, 5.0, 5.0, 5.0], [7.0, 0.0, 7.0, 0.0], [9.0, 0.0, 0.0, 0.0]]))
    assert [use[f"rqvae/perplexity_{m}"] for m in range(3)] == pytest.approx([4.0, 2.0, 1.0])
    assert [use[f"rqvae/dead_{m}"] for m in range(3)] == [0, 2, 3]


def test_the_same_seed_trains_the_same_tokenizer_and_another_seed_another():
    values, present = features()
    one, again = (train_tokenizer(values, present, config=QUICK) for _ in range(2))
    other = train_tokenizer(values, present, config=dataclasses.replace(QUICK, seed=8))
    assert torch.equal(one.model.codebooks, again.model.codebooks)
    assert not torch.equal(one.model.codebooks, other.model.codebooks)


class Dying:
    """A training with a checkpoint after each epoch, or after ``seconds``, that dies in an epoch."""

    def __init__(self, folder: Path, *, die_at: int = -1, seconds: float = 0.0, **values: object) -> None:
        self.checkpoint = Checkpoint(folder, stage="tokenizer", identity="", seconds=seconds)
        self.config = dataclasses.replace(QUICK, epochs=12, reseed_every=3, **values)
        self.die_at, self.logged = die_at, dict[int, dict[str, float]]()

    def log(self, epoch: int, values: dict[str, float]) -> None:
        if epoch == self.die_at:
            raise KeyboardInterrupt
        self.logged[epoch] = values

    def run(self) -> Tokenizer:
        return train_tokenizer(*features(), config=self.config, log=self.log, checkpoint=self.checkpoint)


LETTER = {"collab_loss": 0.1, "diversity": 0.1, "diversity_kind": "clusters", "clusters": 3, "latent": 2}


@pytest.mark.parametrize("die_at", [1, 3, 6, 11])
@pytest.mark.parametrize("values", [{}, LETTER], ids=["entropy", "letter"])
def test_a_training_that_died_ends_with_the_weights_and_losses_of_one_that_did_not(tmp_path, die_at, values):
    """Dead codes are replaced after epochs 3 and 6, and the loss of LETTER draws random codes."""
    whole = Dying(tmp_path / "whole", seconds=1e9, **values)
    expected = whole.run()
    assert not whole.checkpoint.exists()
    torn = Dying(tmp_path / "torn", die_at=die_at, **values)
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    torch.rand(7)  # a new process has another state of torch's random generator
    resumed = Dying(tmp_path / "torn", **values)
    found = resumed.run()
    assert min(resumed.logged) == die_at and torn.logged | resumed.logged == whole.logged
    wanted, weights = expected.model.state_dict(), found.model.state_dict()
    assert wanted.keys() == weights.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_damaged_checkpoint_is_not_resumed(tmp_path, capsys):
    expected = Dying(tmp_path / "whole", seconds=1e9).run()
    torn = Dying(tmp_path / "torn", die_at=5)
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    torn.checkpoint.path.write_bytes(torn.checkpoint.path.read_bytes()[:-9])
    again = Dying(tmp_path / "torn", seconds=1e9)
    found = again.run()
    assert torch.equal(found.model.codebooks, expected.model.codebooks) and min(again.logged) == 0
    assert "is not a valid safetensors file" in capsys.readouterr().err


def test_an_item_gets_the_same_codes_alone_as_among_others():
    values, present = features()
    made = train_tokenizer(values, present, config=QUICK)
    items = made.features(values, present)
    codes, _ = made.tokenize(items)
    alone = torch.cat([made.tokenize(items.rows(slice(i, i + 1)))[0] for i in range(len(items))])
    assert torch.equal(alone, codes)


def test_features_of_a_file_give_the_same_tokenizer_and_the_same_codes(tmp_path: Path):
    values, present = features()
    config = dataclasses.replace(QUICK, epochs=12, reseed_every=3, codebook_size=40)  # has dead codes
    save_tensors(values, tmp_path / "values.safetensors")
    mapped = read_tensors(tmp_path / "values.safetensors")
    made, again = (train_tokenizer(each, present, config=config) for each in (values, mapped))
    for name, weight in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)
    items, found = made.features(values, present), again.encode(mapped, present)
    codes, z = made.tokenize(items)
    for name, wanted in (
        ("codes", codes), ("z", z), ("attention", made.attention(items)), ("present", items.present),
    ):  # fmt: skip
        assert torch.equal(found[name], wanted)


def test_no_more_than_a_block_of_features_is_scaled_at_once(monkeypatch: pytest.MonkeyPatch):
    values, present = features(300)
    sizes = []

    def counted(self: Scaling, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return (rows - self.mean) / self.rms

    monkeypatch.setattr(Scaling, "__call__", counted)
    monkeypatch.setattr(training, "INIT_ROWS", 40)
    monkeypatch.setattr(training, "BLOCK", 50)
    monkeypatch.setattr(fusion, "BLOCK", 50)
    config = dataclasses.replace(QUICK, reseed_every=1, codebook_size=40)
    made = train_tokenizer(values, present, config=config)
    found = made.encode(values, present)
    assert max(sizes) == 50 and found["codes"].shape == (300, QUICK.levels)
    assert torch.equal(
        found["z"][50:100], made.tokenize(made.features(values, present).rows(slice(50, 100)))[1]
    )


def test_a_saved_tokenizer_gives_the_same_codes_after_loading(tmp_path: Path):
    values, present = features()
    made = train_tokenizer(values, present, config=QUICK, without=["text"])
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.model.config == QUICK and again.without == ("text",)
    assert not again.features(values, present).present[:, 1].any()
    wanted = made.tokenize(made.features(values, present))
    for one, other in zip(again.tokenize(again.features(values, present)), wanted, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(
        again.attention(again.features(values, present)), made.attention(made.features(values, present))
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_a_truncated_tokenizer_is_refused_with_its_folder(tmp_path: Path, name: str, keep: float):
    train_tokenizer(*features(), config=QUICK).save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match="has no readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)


def test_training_without_any_modality_is_refused():
    with pytest.raises(UserError, match="no item has any modality left"):
        train_tokenizer(*features(), config=QUICK, without=MODALITIES)


def test_training_without_a_modality_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="unknown modality 'pictures'"):
        train_tokenizer(*features(), config=QUICK, without=["pictures"])


def test_a_loss_that_is_not_finite_ends_the_training_with_the_epoch():
    values, present = features()
    config = dataclasses.replace(QUICK, learning_rate=1e30)
    with pytest.raises(UserError, match=r"the tokenizer's loss is (nan|inf) in epoch \d"):
        train_tokenizer(values, present, config=config)
