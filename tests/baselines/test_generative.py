"""MMGRec and LlamaRec learn a planted pattern, resume exactly, and do not read test items."""

from __future__ import annotations

import dataclasses
import functools
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cemg.baselines import graph_ids, letter_training, llamarec, loop, train_dense
from cemg.baselines.graph_ids import GraphIdsConfig, quantize
from cemg.baselines.letters import LetterConfig, Prompts, load_model
from cemg.baselines.mmgrec import MMGRec, MMGRecConfig, children_of
from cemg.baselines.registry import Fitted, Job, fit
from cemg.data.dataset import Dataset
from cemg.dense import DenseConfig, DenseRanker
from cemg.errors import UserError
from cemg.evaluation import evaluate
from cemg.features import Features

MMGREC: dict[str, Any] = {
    "dim": 32, "modal_dim": 4, "graph_epochs": 20, "graph_batch": 256, "graph_rate": 0.03, "levels": 2,
    "codes": 8, "latent": 4, "tokenizer_epochs": 20, "layers": 1, "inner": 32, "dropout": 0.0, "beams": 20,
    "frozen": False, "learning_rate": 1e-2, "batch_size": 64, "epochs": 8, "schedule": "constant",
}  # fmt: skip

WORDS = ["good", "bad", *string.ascii_uppercase, "(", ")", "Answer", ":", *(str(i) for i in range(30))]
LLAMAREC: dict[str, Any] = {
    "candidates": 4, "history_items": 3, "title_tokens": 2, "lora_rank": 8, "lora_dropout": 0.0,
    "learning_rate": 1e-2, "batch_size": 4, "dtype": "float32", "valid_users": 40,
}  # fmt: skip


@pytest.fixture
def features(ring: Dataset, monkeypatch: pytest.MonkeyPatch) -> dict[str, Features]:
    """Texts of all items but two, images of a few."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, missing in (("text", 2), ("image", 20)):
        present = torch.arange(ring.num_items) >= missing
        values = torch.randn(ring.num_items, 12, generator=generator) * present[:, None]
        found[name] = Features(values, present)
    monkeypatch.setattr(graph_ids, "item_features", lambda job: found)
    return found


def trained(name: str, data: Dataset, folder: Path, **changes: Any) -> Fitted:
    settings = {"mmgrec": MMGREC, "llamarec": LLAMAREC}[name] | changes
    budget = settings.pop("budget", None)
    return fit(name, Job(data, folder, seed=1, budget=budget, settings=settings))


def with_other_test_items(data: Dataset) -> Dataset:
    changed = [np.append(s[:-1], (s[-1] + 7) % data.num_items) for s in data.sequences]
    return dataclasses.replace(data, sequences=[s.astype(np.int32) for s in changed])


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    model: Any = fitted.rank
    return dict(model.state_dict() if isinstance(model, MMGRec) else model.ranker.model.state_dict())


def same(one: Fitted, other: Fitted) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_mmgrec_learns_what_follows_the_items_of_a_set(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    fitted = trained("mmgrec", ring, tmp_path)
    found = evaluate(fitted.rank, ring.split(), progress=False)
    assert found.metrics_history_removed["HR@5"] > 0.7  # 0.2 at random
    lists = fitted.rank(ring.split().histories("test")[:7], 50)
    assert lists.shape == (7, 20)
    assert all(len({*row}) == 20 and min(row) >= 0 for row in lists.tolist())  # the trie has only items
    free = trained("mmgrec", ring, tmp_path / "free", trie=False, epochs=2)
    assert evaluate(free.rank, ring.split(), progress=False).short_lists > 0  # some beams are no items


def test_the_order_of_a_set_does_not_matter(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    fitted = trained("mmgrec", ring, tmp_path, epochs=1)
    model: Any = fitted.rank
    one, other = model.logits([np.array([3, 8, 5])]), model.logits([np.array([5, 3, 8])])
    found = one > -1e5
    assert torch.equal(found, other > -1e5) and torch.allclose(one[found], other[found], atol=1e-4)


def test_an_interrupted_mmgrec_gives_the_same_weights(
    ring: Dataset, features: dict[str, Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained("mmgrec", ring, tmp_path / "whole", epochs=3, dropout=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_print_epoch", lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained("mmgrec", ring, tmp_path / "parts", epochs=3, dropout=0.1)
    torch.rand(7)
    monkeypatch.setattr(graph_ids, "train_graph", None)  # the graph and the IDs are not trained again
    assert same(whole, trained("mmgrec", ring, tmp_path / "parts", epochs=3, dropout=0.1))
    with pytest.raises(UserError, match="belongs to another run"):
        trained("mmgrec", ring, tmp_path / "parts", epochs=3, graph_layers=1)


def test_mmgrec_does_not_read_the_test_items(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    one, two = (trained("mmgrec", data, tmp_path / name, epochs=1) for name, data in
                (("one", ring), ("two", with_other_test_items(ring))))  # fmt: skip
    assert same(one, two)


def test_the_budget_of_mmgrec_is_also_that_of_its_graph(
    ring: Dataset, features: dict[str, Features], tmp_path: Path
) -> None:
    fitted = trained("mmgrec", ring, tmp_path, budget=1e-6)
    assert "budget" in fitted.config["stopped"] and fitted.config["epochs_run"] == 1


def test_items_with_the_same_codes_are_told_apart_the_most_popular_first() -> None:
    vectors = torch.randn(6, 64).repeat_interleave(4, dim=0)  # four items each with the same vector
    counts = np.tile([5, 9, 1, 7], 6)
    codes = quantize(vectors, counts, GraphIdsConfig(codes=8, tokenizer_epochs=2), device="cpu")
    assert len(codes.unique(dim=0)) == 24
    assert codes[:, -1].view(6, 4)[0].argsort().tolist() == [1, 3, 0, 2]
    (first, *_, last) = children_of(codes)
    assert first.shape[0] == 2 and (last[:-1] >= 0).sum() == 24  # each leaf is an item


def test_the_cached_keys_of_a_search_give_the_states_of_a_whole_pass() -> None:
    torch.manual_seed(0)
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(3))
    config = MMGRecConfig(dim=8, modal_dim=2, heads=2, layers=2, levels=2)
    model = MMGRec(torch.randn(27, 8), codes, config).eval()
    memory, mask = model.encode(torch.tensor([[4, 7, 0], [1, 2, 9]]), torch.tensor([2, 3]))
    tokens = torch.tensor([[[9, 1, 4]], [[9, 0, 5]]])  # BOS and two codes
    whole, _ = model.states(tokens, memory, mask)
    past, parts = None, []
    for at in range(3):
        part, past = model.states(tokens[:, :, at : at + 1], memory, mask, past)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beams": 10}, "beams must be 20 or more"),
        ({"heads": 5}, "not divisible by heads"),
        ({"modal_dim": 40}, "must be more than 2"),
        ({"levels": 0}, "levels must be 1 or more"),
    ],
)
def test_wrong_settings_of_mmgrec(
    changes: dict[str, int], message: str, ring: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trained("mmgrec", ring, tmp_path, **changes)


def test_mmgrec_needs_texts_or_images(ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no item has a text or an image"):
        trained("mmgrec", ring, tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers, and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("llama")
    words = tokenizers.Tokenizer(WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Sequence([WhitespaceSplit(), Punctuation()])  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def titled(ring: Dataset) -> Dataset:
    """Users choose the items 0 … 4, which are good; the others are bad."""
    sequences = [s % 5 for s in ring.sequences]
    titles = [f"{'good' if item < 5 else 'bad'} {item}" for item in range(ring.num_items)]
    return dataclasses.replace(ring, sequences=sequences, titles=titles)


@pytest.fixture(scope="module")
def retriever(titled: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("retriever")
    train_dense(titled, DenseConfig(dim=16, inner=16, blocks=1, epochs=2), folder=folder, progress=False)
    return str(folder)


def test_llamarec_learns_to_point_at_the_letter_of_a_candidate(
    titled: Dataset, llama: str, retriever: str, tmp_path: Path
) -> None:
    fitted = trained("llamarec", titled, tmp_path, model=llama, retriever=retriever, title_tokens=1)
    ranker = fitted.rank.ranker  # type: ignore[attr-defined]
    rng = np.random.default_rng(5)
    places = rng.integers(4, size=100)
    prompts = []
    for place in places:
        others = rng.permutation(np.arange(5, 30))[:3]
        prompts.append(
            ranker.prompts.prompt(np.arange(3), np.insert(others, place, rng.integers(5)).tolist())
        )
    assert float((ranker.scores(prompts).argmax(1).numpy() == places).mean()) > 0.9  # 0.25 at random


def test_the_candidates_are_those_of_the_retriever_and_so_is_hr_at_their_number(
    titled: Dataset, llama: str, retriever: str, tmp_path: Path
) -> None:
    fitted = trained("llamarec", titled, tmp_path, model=llama, retriever=retriever, budget=1e-6)
    assert "stopped" in fitted.config and fitted.config["steps"] == 1
    alone = DenseRanker.load(retriever)
    one, other = (
        evaluate(rank, titled.split(), cutoffs=(4, 10), progress=False) for rank in (fitted.rank, alone)
    )
    assert one.metrics_history_removed["HR@4"] == other.metrics_history_removed["HR@4"]
    assert torch.equal(one.ranks_history_removed >= 4, other.ranks_history_removed >= 4)
    late = one.ranks_history_removed >= 4
    assert torch.equal(one.ranks_history_removed[late], other.ranks_history_removed[late])
    assert one.metrics_history_removed["NDCG@4"] != other.metrics_history_removed["NDCG@4"]


@pytest.mark.parametrize("rank", [0, 2])
def test_an_interrupted_llamarec_gives_the_same_weights(
    rank: int, titled: Dataset, llama: str, retriever: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "model": llama,
        "retriever": retriever,
        "lora_rank": rank,
        "batch_size": 256,
        "lora_dropout": 0.1,
    }
    whole = trained("llamarec", titled, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(letter_training, "EVERY", 0.0)
        patch.setattr(letter_training, "report", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained("llamarec", titled, tmp_path / "parts", **changes)
    torch.rand(7)
    assert same(whole, trained("llamarec", titled, tmp_path / "parts", **changes))
    with pytest.raises(UserError, match="belongs to another run"):
        trained("llamarec", titled, tmp_path / "parts", **changes | {"title_tokens": 1})


def test_llamarec_does_not_read_the_test_items(
    titled: Dataset, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamarec, "DenseConfig", functools.partial(DenseConfig, dim=8, epochs=1))
    changes = {"model": llama, "lora_rank": 2, "batch_size": 512}
    one, two = (trained("llamarec", data, tmp_path / name, **changes) for name, data in
                (("one", titled), ("two", with_other_test_items(titled))))  # fmt: skip
    assert same(one, two)
    first, second = (fitted.rank.retriever.model.state_dict() for fitted in (one, two))  # type: ignore[attr-defined]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_prompt_has_the_newest_titles_cut_and_the_letters_of_the_candidates(
    titled: Dataset, llama: str
) -> None:
    _, tokenizer = load_model(llama)
    prompts = Prompts(
        tokenizer, titled, LetterConfig(model=llama, candidates=2, history_items=2, title_tokens=1)
    )
    text = tokenizer.decode(prompts.prompt(np.array([1, 12, 3]), [15, 4]))
    assert text.count("bad") == 2 and text.count("good") == 2 and "12" not in text
    assert "( A ) bad" in text and "( B ) good" in text and text.endswith("Answer :")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"candidates": 27}, "candidates must be 2 … 26"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float32"),
        ({"retriever": "gru4rec"}, "is not a retriever"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"valid_users": 0}, "valid_users must be 1 or more"),
        ({"model": "no/where/at-all"}, "model=no/where/at-all cannot be loaded as a language model"),
    ],
)
def test_wrong_settings_of_llamarec(
    changes: dict[str, Any], message: str, titled: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        trained("llamarec", titled, tmp_path, **changes)


def test_llamarec_needs_titles(ring: Dataset, llama: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no item has a title or a text"):
        trained("llamarec", ring, tmp_path, model=llama)
