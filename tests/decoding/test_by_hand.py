"""Searches of a trie of four items, small enough to check by hand.

The models are made so that the next token depends on the last one alone, by the table below. Tokens: 0 stands
before the first code, 1 2 3 are codes 0 1 2 of the first level, 4 5 6 those of the second, 7 is none.

    first code     0: 1/2    1: 1/4    2: 1/8                       (other tokens 1/8)
    after code 0   0: 1/4    1: 1/8    2: 1/8                       (other tokens 1/2)
    after code 1   0: 1/16   1: 1/16   2: 3/4                       (other tokens 1/8)
    items          A = 0 0   B = 0 1   C = 1 0   D = 1 2            (code 2 leads nowhere)

    product of     vocab                level                 valid
    A              1/2 1/4 = 1/8        4/7 1/2 = 2/7         2/3 2/3 = 4/9
    B              1/2 1/8 = 1/16       4/7 1/4 = 1/7         2/3 1/3 = 2/9
    C              1/4 1/16 = 1/64      2/7 1/14 = 1/49       1/3 1/13 = 1/39
    D              1/4 3/4 = 3/16       2/7 6/7 = 12/49       1/3 12/13 = 4/13
"""

from __future__ import annotations

import math
from fractions import Fraction as F

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from cemg.decoding import Decoder, Recommendations, TransformersDecoder
from cemg.tokenizer import Catalog
from cemg_kernels import RequestFilter

CATALOG = Catalog.from_codes(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 2]]), 3)
A, B, C, D = range(4)
ANY = [F(1, 8)] * 8
NEXT = [  # [last token, next token]
    [F(1, 40), F(1, 2), F(1, 4), F(1, 8), F(1, 40), F(1, 40), F(1, 40), F(1, 40)],
    [F(1, 4), F(1, 16), F(1, 16), F(1, 16), F(1, 4), F(1, 8), F(1, 8), F(1, 16)],
    [F(1, 40), F(1, 40), F(1, 40), F(1, 40), F(1, 16), F(1, 16), F(3, 4), F(1, 40)],
    ANY, ANY, ANY, ANY, ANY,
]  # fmt: skip
SHAPE = {
    "vocab_size": 8, "pad_token_id": 7, "bos_token_id": 7, "eos_token_id": 7, "tie_word_embeddings": False,
}  # fmt: skip


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, decoder_start_token_id=0, **SHAPE)
    )


def llama() -> PreTrainedModel:
    one = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, **one, **SHAPE))


def of_the_table(model: PreTrainedModel) -> PreTrainedModel:
    """Layers add nothing. A token's embedding is a unit vector, by which the head selects its row.

    The norm before the head makes 1000 e_t into sqrt(8) e_t, its epsilon apart.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.get_input_embeddings().weight.copy_(1000 * torch.eye(8))
        table = torch.tensor([[math.log(p) for p in row] for row in NEXT])  # [last, next]
        head = torch.nn.Parameter(
            table.t() / math.sqrt(8)
        )  # a new one, since a T5's is tied to the embedding
        model.get_output_embeddings().weight = head
    return model.eval()


PROMPT = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
CLOSE = {"abs": 1e-5}  # two float32 logs and log-sum-exps of size < 4: 16 * 2**-24 = 1e-6, ten times over
MODELS = {"t5": of_the_table(t5()), "llama": of_the_table(llama())}
every_path = pytest.mark.parametrize(
    ("family", "backend"), [(f, b) for f in MODELS for b in ("native", "torch", "reference")]
)


def logs(products: list[F | int]) -> list[float]:
    return [math.log(p) if p else float("-inf") for p in products]


def test_the_rows_of_the_table_are_probabilities():
    assert [sum(row) for row in NEXT] == [1] * 8


@every_path
@pytest.mark.parametrize(
    ("normalize", "beams", "items", "products", "pruned", "certified"),
    [
        # code 1 is pruned with 1/4, more than A's score: D, the best, is lost, and nothing is certified
        ("vocab", 1, [A], [F(1, 8)], F(1, 4), 0),
        ("vocab", 2, [D, A], [F(3, 16), F(1, 8)], F(1, 16), 2),  # B is pruned
        ("vocab", 3, [D, A, B], [F(3, 16), F(1, 8), F(1, 16)], F(1, 64), 3),  # C is pruned
        ("vocab", 5, [D, A, B, C, -1], [F(3, 16), F(1, 8), F(1, 16), F(1, 64), 0], 0, 4),  # nothing is pruned
        ("level", 1, [A], [F(2, 7)], F(2, 7), 0),  # A is the best, but code 1 was pruned with the same score
        ("level", 2, [A, D], [F(2, 7), F(12, 49)], F(1, 7), 2),
        ("level", 3, [A, D, B], [F(2, 7), F(12, 49), F(1, 7)], F(1, 49), 3),
        ("valid", 1, [A], [F(4, 9)], F(1, 3), 1),  # code 1 scores less than A
        ("valid", 2, [A, D], [F(4, 9), F(4, 13)], F(2, 9), 2),
        ("valid", 3, [A, D, B], [F(4, 9), F(4, 13), F(2, 9)], F(1, 39), 3),
    ],
)
def test_items_scores_pruned_scores_and_certificates_are_as_computed_by_hand(
    family, backend, normalize, beams, items, products, pruned, certified, monkeypatch
):
    cut, of_leaves = [], Recommendations.of_leaves
    monkeypatch.setattr(Recommendations, "of_leaves", lambda *of: cut.append(of[-1]) or of_leaves(*of))
    found = Decoder(MODELS[family], CATALOG, 1, normalize, backend=backend).decode(*PROMPT, beams)
    assert found.items.tolist() == [items]
    assert found.codes.tolist() == [[CATALOG.codes[i].tolist() if i >= 0 else [-1, -1] for i in items]]
    assert found.scores[0].tolist() == pytest.approx(logs(products), **CLOSE)
    assert cut[0].tolist() == pytest.approx(logs([pruned]), **CLOSE)
    assert found.certified.tolist() == [certified]


@every_path
@pytest.mark.parametrize(
    ("normalize", "best", "product"),
    [("vocab", D, F(3, 16)), ("level", A, F(2, 7)), ("valid", A, F(4, 9))],
)
def test_an_exact_search_proves_the_best_item_that_one_beam_misses(family, backend, normalize, best, product):
    found = Decoder(MODELS[family], CATALOG, 1, normalize, backend=backend).decode_exact(*PROMPT, 1, 1)
    assert found.items.tolist() == [[best]] and found.certified.tolist() == [1]
    assert found.scores[0].tolist() == pytest.approx(logs([product]), **CLOSE)


@every_path
@pytest.mark.parametrize(
    ("normalize", "items", "products"),
    [
        ("vocab", [A, B], [F(1, 8), F(1, 16)]),
        ("level", [A, B], [F(2, 7), F(1, 7)]),
        ("valid", [A, C], [F(4, 9), F(1, 3)]),  # after code 1 only C is left, with probability 1
    ],
)
def test_the_item_of_the_history_is_excluded(family, backend, normalize, items, products):
    decoder = Decoder(MODELS[family], CATALOG, 1, normalize, backend=backend)
    found = decoder.decode(*PROMPT, 2, filter=RequestFilter.excluding(decoder.trie, [[D]]))
    assert found.items.tolist() == [items]
    assert found.scores[0].tolist() == pytest.approx(logs(products), **CLOSE)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    ("normalize", "items", "products"),
    [
        ("vocab", [D, A, B], [F(3, 16), F(1, 8), F(1, 16)]),
        ("level", [A, D, B], [F(2, 7), F(12, 49), F(1, 7)]),
        ("valid", [A, D, B], [F(4, 9), F(4, 13), F(2, 9)]),
    ],
)
def test_the_reference_engine_agrees(family, normalize, items, products):
    found = TransformersDecoder(MODELS[family], CATALOG, 1, normalize).decode(*PROMPT, 3)
    assert found.items.tolist() == [items]
    assert found.scores[0].tolist() == pytest.approx(logs(products), **CLOSE)
