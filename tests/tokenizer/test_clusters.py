"""The loss terms of LETTER by hand, balanced clusters, and what their gradients reach."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cemg.config import RunConfig, keyed, load_config
from cemg.errors import UserError
from cemg.tokenizer import RQVAE, ItemFeatures, TokenizerConfig
from cemg.tokenizer.clusters import balanced_clusters, cluster_loss
from cemg.tokenizer.rqvae import Collaborative, contrastive_loss
from cemg.tokenizer.training import train_tokenizer

WIDTHS = {"image": 4, "text": 3, "collab": 2}
LETTER = TokenizerConfig(
    levels=2, codebook_size=6, dim=4, latent=2, hidden=(8,), diversity=0.1, diversity_kind="clusters",
    clusters=2, collab_loss=0.1, epochs=3, batch_size=16, warmup_epochs=1,
)  # fmt: skip


def features(rows: int = 40) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.randn(rows, width, generator=draw) for name, width in WIDTHS.items()}
    present = {name: torch.ones(rows, dtype=torch.bool) for name in WIDTHS}
    return values, present


def test_the_contrastive_loss_by_hand():
    quantized, collab = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # inner products: [[1, 0], [2, 2]]
    wanted = -(math.log(math.e / (math.e + 1)) + math.log(0.5)) / 2
    assert contrastive_loss(quantized, collab).item() == pytest.approx(wanted, abs=1e-6)
    assert contrastive_loss(quantized[:0], collab[:0]).item() == 0


def test_the_cluster_loss_by_hand():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    clusters = torch.tensor([0, 1, 0])
    # code 0 has one partner, code 2: products with the codes 1 and 2 are 0 and 2; code 1 is alone
    found = cluster_loss(torch.tensor([0, 1]), codebook, clusters)
    assert found.item() == pytest.approx(-math.log(math.e**2 / (1 + math.e**2)), abs=1e-6)


def test_a_code_that_is_alone_in_its_cluster_adds_nothing():
    codebook = torch.randn(3, 2, requires_grad=True)
    assert cluster_loss(torch.tensor([0, 1, 2]), codebook, torch.arange(3)).item() == 0
    one = TokenizerConfig(**(dataclasses.asdict(LETTER) | {"codebook_size": 1, "levels": 1}))
    train_tokenizer(*features(), config=one)


def test_partners_are_other_codes_of_the_same_cluster():
    codebook = torch.eye(6) * 50  # the product with any other code is 0: only the choice of a partner differs
    torch.manual_seed(0)
    clusters = torch.tensor([0, 0, 0, 1, 1, 1])
    losses = {round(cluster_loss(torch.tensor([0]), codebook, clusters).item(), 4) for _ in range(20)}
    assert losses == {round(math.log(5), 4)}
    biased = codebook.clone()
    biased[1, 0] = 1.0  # code 1 is now closer to code 0 than the others
    drawn = {round(cluster_loss(torch.tensor([0]), biased, clusters).item(), 1) for _ in range(20)}
    assert len(drawn) == 2  # code 1 and code 2 were both drawn


@pytest.mark.parametrize("codes, clusters", [(256, 10), (7, 3), (4, 10), (1, 1)])
def test_balanced_clusters_differ_in_size_by_at_most_one(codes, clusters):
    draw = torch.Generator().manual_seed(1)
    skewed = torch.cat([torch.randn(codes - codes // 4, 3, generator=draw) * 0.01,
                        torch.randn(codes // 4, 3, generator=draw) * 9])  # fmt: skip
    sizes = balanced_clusters(skewed, clusters, seed=0).bincount()
    assert len(sizes) == min(codes, clusters) and int(sizes.max() - sizes.min()) <= 1


def test_clusters_of_separate_groups_are_the_groups():
    groups = torch.arange(12) % 3
    points = torch.eye(3)[groups] * 10 + torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    found = balanced_clusters(points, 3, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(groups, found, strict=True)}) == 3


def test_gradients_of_the_contrastive_loss_reach_the_encoder_and_nothing_frozen():
    values, present = features()
    torch.manual_seed(0)
    model = RQVAE(WIDTHS, config=dataclasses.replace(LETTER, collab_loss=1.0, diversity=0.0))
    items = ItemFeatures(values, torch.stack(list(present.values()), 1))
    frozen = torch.randn(40, 2, requires_grad=True)
    known = torch.arange(40) != 3
    losses, _ = model(items, collab=Collaborative(frozen.detach(), known))
    assert losses.collab is not None
    losses.collab.backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0
    assert model.codebooks.grad is None and all(p.grad is None for p in model.decoder.parameters())
    assert frozen.grad is None
    changed = frozen.detach().clone()
    changed[3] = 99.0  # an item without training interactions
    again, _ = model(items, collab=Collaborative(changed, known))
    torch.testing.assert_close(again.collab, losses.collab)


def test_the_cluster_loss_moves_the_codebooks_alone():
    values, present = features()
    torch.manual_seed(0)
    model = RQVAE(WIDTHS, config=LETTER)
    items = ItemFeatures(values, torch.stack(list(present.values()), 1))
    clusters = torch.stack([balanced_clusters(book, 2, seed=0) for book in model.codebooks])
    losses, _ = model(items, clusters=clusters)
    losses.diversity.backward()
    assert model.codebooks.grad.abs().sum() > 0 and model.encoder[0].weight.grad is None


def test_both_losses_fall_where_they_have_a_weight():
    values, present = features(200)
    text = values["text"]
    values["collab"] = text[:, :2] + 0.1 * values["collab"]  # neighbours in both
    rows: dict[str, list[dict[str, float]]] = {}
    for name, changes in (("on", {"collab_loss": 1.0}), ("off", {"collab_loss": 1e-9})):
        config = dataclasses.replace(LETTER, epochs=60, learning_rate=5e-3, codebook_size=16, **changes)
        rows[name] = []
        train_tokenizer(
            values, present, config=config, without=("collab", "image"),
            log=lambda _, row, name=name: rows[name].append(row),
        )  # fmt: skip
    assert rows["on"][-1]["rqvae/collab"] < rows["on"][0]["rqvae/collab"] - 0.3
    assert rows["on"][-1]["rqvae/collab"] < rows["off"][-1]["rqvae/collab"] - 0.3


def test_a_weight_of_zero_switches_a_loss_off_and_leaves_the_training_as_it_was():
    base = dataclasses.replace(LETTER, collab_loss=0.0, diversity=0.0, diversity_kind="entropy")
    off = dataclasses.replace(base, diversity_kind="clusters", clusters=3)
    logs: list[list[dict[str, float]]] = [[], []]
    for config, log in zip((base, off), logs, strict=True):
        train_tokenizer(*features(), config=config, log=lambda _, row, log=log: log.append(row))
    assert [row["rqvae/loss"] for row in logs[0]] == [row["rqvae/loss"] for row in logs[1]]
    assert "rqvae/collab" not in logs[0][0]


def test_the_settings_leave_the_keys_of_earlier_runs_alone():
    new = {"collab_loss", "diversity_kind", "clusters"}
    assert new.isdisjoint(keyed(RunConfig(), "tokenizer"))
    assert {"temperature", "budget_hours"}.isdisjoint(keyed(RunConfig(), "generator"))
    changed = load_config(None, ["tokenizer.collab_loss=0.1", "graph.dim=32", "generator.budget_hours=1"])
    assert "collab_loss" in keyed(changed, "tokenizer") and "budget_hours" in keyed(changed, "generator")


def test_embeddings_of_another_width_than_the_quantized_vector_are_refused():
    with pytest.raises(UserError, match="collab_loss needs") as error:
        load_config(None, ["tokenizer.collab_loss=0.1", "graph.dim=64"])
    assert "graph.dim=32" in str(error.value.fix)


@pytest.mark.parametrize("setting", ["clusters=0", "collab_loss=-1", "diversity_kind=other"])
def test_a_setting_out_of_range_is_refused_by_its_name(setting):
    with pytest.raises(UserError, match=f"tokenizer.{setting.partition('=')[0]}"):
        load_config(None, [f"tokenizer.{setting}"])
