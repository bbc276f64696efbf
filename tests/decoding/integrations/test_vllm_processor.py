"""The processor on batches as vLLM describes them; runs without vLLM."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cemg.decoding import TrieLogitsProcessor
from cemg.decoding.integrations.vllm_processor import PROMPT, SETTINGS, TrieProcessor
from cemg_kernels import Trie

START, LEVELS, SIZE, VOCABULARY = 3, 3, 6, 24
TRIE = Trie.from_codes(torch.tensor([[0, 1, 2], [0, 1, 5], [4, 0, 0]]), SIZE)
SWAP, ONE_WAY = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")


@pytest.fixture
def make(tmp_path):
    def made(normalize="vocab", start=START, vocabulary=VOCABULARY, trie=TRIE):
        trie.save(tmp_path / "trie.safetensors")
        settings = {"trie": str(tmp_path / "trie.safetensors"), "code_token_start": start}
        config = SimpleNamespace(
            additional_config={SETTINGS: settings | {"normalize": normalize}},
            model_config=SimpleNamespace(get_vocab_size=lambda: vocabulary),
        )
        return TrieProcessor(config, torch.device("cpu"), False)

    return made


def params(prompt):
    return SimpleNamespace(extra_args=None if prompt is None else {PROMPT: prompt})


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(batch_size=0, removed=removed, added=added, moved=moved)


def token(level, code):
    return START + level * SIZE + code


def allowed(processor, rows):
    """The tokens that each of the first rows of the batch may continue with."""
    logits = processor.apply(torch.zeros(rows, VOCABULARY))
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_rows_of_all_levels_are_constrained_and_other_requests_are_unchanged(make):
    processor = make()
    grown = [7, 7, token(0, 0), token(1, 1)]
    processor.update_state(update(added=[
        (0, params(2), [7, 7], []), (1, params(2), [7, 7], [token(0, 4)]), (2, params(2), grown, []),
        (3, params(None), [7], []), (4, params(1), [7], [token(0, 2)]),
        (5, params(0), grown[2:], [token(2, 5)]),
    ]))  # fmt: skip
    everything = list(range(VOCABULARY))
    assert allowed(processor, 6) == [
        [token(0, 0), token(0, 4)], [token(1, 0)], [token(2, 2), token(2, 5)],
        everything,  # an unconstrained request
        [token(1, 0)],  # not a prefix of any item: code 0 keeps a softmax finite
        everything,  # has all its codes
    ]  # fmt: skip


def test_tokens_that_the_engine_appends_are_seen_without_an_update(make):
    processor = make()
    output: list[int] = []
    processor.update_state(update(added=[(0, params(1), [7], output)]))
    for expected in ([token(0, 0), token(0, 4)], [token(1, 1)], [token(2, 2), token(2, 5)]):
        assert allowed(processor, 1) == [expected]
        output.append(expected[0])
        processor.update_state(None)


def test_removed_replaced_moved_and_swapped_requests_keep_their_own_codes(make):
    processor = make()
    first, second = (params(1), [7], [token(0, 0)]), (params(1), [7], [token(0, 4)])
    after_first, after_second, everything = [token(1, 1)], [token(1, 0)], list(range(VOCABULARY))
    processor.update_state(update(added=[(0, *first), (1, *second), (2, params(None), [7], [])]))
    processor.update_state(update(moved=[(0, 1, SWAP)]))
    assert allowed(processor, 3) == [after_second, after_first, everything]
    processor.update_state(update(moved=[(1, 2, SWAP)]))  # with an unconstrained request
    assert allowed(processor, 3) == [after_second, everything, after_first]
    processor.update_state(update(removed=[0], moved=[(2, 0, ONE_WAY)]))
    assert allowed(processor, 3) == [after_first, everything, everything]
    processor.update_state(update(added=[(0, params(None), [7], [])]))
    assert allowed(processor, 1) == [everything]


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
def test_log_probabilities_are_normalized_over_the_vocabulary_the_level_or_the_valid_codes(make, normalize):
    processor = make(normalize)
    processor.update_state(update(added=[(1, params(1), [7], [token(0, 0), token(1, 1)])]))
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    own = logits[1, token(2, 0) : token(2, SIZE)]
    over = {"vocab": logits[1], "level": own, "valid": own[[2, 5]]}[normalize]
    expected = own[[2, 5]] - over.logsumexp(0)
    found = processor.apply(logits.clone())
    assert torch.equal(found[0], logits[0])  # the row of an unconstrained request
    # two roundings of numbers below 8, and the rounding of a sum of 24 terms
    torch.testing.assert_close(found[1, [token(2, 2), token(2, 5)]], expected, rtol=0, atol=26 * 2**-21)
    assert int(found[1].isfinite().sum()) == 2


def test_it_allows_the_same_tokens_as_the_processor_for_generate(make):
    processor, other = make(), TrieLogitsProcessor(TRIE, START)
    logits = torch.zeros(3, VOCABULARY)
    other(torch.full((3, 1), 7), logits)
    outputs = [[token(0, 0)], [token(0, 4)], [token(0, 2)]]
    expected = other(torch.tensor([[7, *own] for own in outputs]), logits).isfinite()
    processor.update_state(update(added=[(row, params(1), [7], own) for row, own in enumerate(outputs)]))
    assert torch.equal(processor.apply(logits).isfinite(), expected)


@pytest.mark.parametrize("normalize", ["vocab", "level", "valid"])
def test_a_token_table_in_any_order_is_applied(make, normalize):
    """Level 0 has no token for code 0, so rows without items must keep another one."""
    table = [[-1, 9, 2, 21, 5, 7], [4, 13, 0, 22, 8, 6], [11, 1, 23, 3, 12, 10]]
    trie = Trie.from_codes(torch.tensor([[1, 1, 2], [1, 1, 5], [4, 0, 0]]), SIZE)
    processor = make(normalize, start=table, trie=trie)
    outputs: list[list[int]] = [[], [9], [5, 4], [9, 13], [2]]
    processor.update_state(update(added=[(row, params(1), [7], own) for row, own in enumerate(outputs)]))
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    found = processor.apply(logits.clone())
    finite = [row.isfinite().nonzero().flatten().tolist() for row in found]
    assert finite == [
        [5, 9],
        [13],
        [11],
        [10, 23],
        [4],
    ]  # the last is not a prefix of any item: the first code of its level
    over = {
        "vocab": logits[0], "level": logits[0, [t for t in table[0] if t >= 0]], "valid": logits[0, [5, 9]],
    }[normalize]  # fmt: skip
    expected = logits[0, [5, 9]] - over.logsumexp(0)
    torch.testing.assert_close(found[0, [5, 9]], expected, rtol=0, atol=26 * 2**-21)
    other = TrieLogitsProcessor(trie, table)
    other(torch.full((1, 1), 7), logits[:1])
    assert other(torch.tensor([[7, 9]]), logits[:1]).isfinite().nonzero()[:, 1].tolist() == [13]


def test_a_vocabulary_without_the_codes_is_refused(make):
    with pytest.raises(ValueError, match="the codes are tokens 3 … 20, the model has 20"):
        make(vocabulary=20)


@pytest.mark.parametrize("prompt", [-1, "3", 1.5])
def test_an_invalid_prompt_length_is_refused(prompt):
    with pytest.raises(ValueError, match=PROMPT):
        TrieProcessor.validate_params(params(prompt))
    TrieProcessor.validate_params(params(None))


def test_it_is_not_argmax_invariant(make):
    assert make().is_argmax_invariant() is False


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins for the base classes of both model runners of vLLM 0.32; the plugin is imported anew."""
    kinds = []
    for name in ("vllm.v1.sample", "vllm.v1.worker.gpu.sample"):
        kinds.append(type("LogitsProcessor", (), {}))
        parts = f"{name}.logits_processor".split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        sys.modules[module].LogitsProcessor = kinds[-1]
    for module in ("cemg.decoding.integrations.vllm_plugin", "cemg.decoding.vllm_plugin"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield kinds
    for module in ("cemg.decoding.integrations.vllm_plugin", "cemg.decoding.vllm_plugin"):
        sys.modules.pop(module, None)


def test_the_plugin_names_the_fix_under_the_second_model_runner(stand_ins):
    plugin = importlib.import_module("cemg.decoding.integrations.vllm_plugin").VllmTrieProcessor
    assert all(issubclass(plugin, kind) for kind in stand_ins)  # so that vLLM creates it and it can raise
    with pytest.raises(ValueError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        plugin(SimpleNamespace(), SimpleNamespace())


def test_the_path_of_version_0_1_is_an_alias_that_warns(stand_ins):
    with pytest.warns(
        DeprecationWarning, match=r"cemg\.decoding\.integrations\.vllm_plugin:VllmTrieProcessor"
    ):
        alias = importlib.import_module("cemg.decoding.vllm_plugin")
    plugin = importlib.import_module("cemg.decoding.integrations.vllm_plugin")
    assert alias.VllmTrieProcessor is plugin.VllmTrieProcessor
