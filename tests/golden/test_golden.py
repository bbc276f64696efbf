"""Files that version 0.1.0 wrote still load, give the same results and are written with the same bytes.

``make.py`` wrote the files of ``saved/`` and ``saved/expected.json``. Codes, tries and files are compared
exactly: they come from integers, from float32 operations of a fixed order, or from float64 distances that are
never close to a tie. Lists and scores pass through matrix products, whose order of summation depends on the
CPU and on torch, so scores have a tolerance:

TOLERANCE = 1e-4. A score is a sum of 3 log-probabilities, each from logits below 16 in size. A logit is a sum
of up to 64 float32 products. Another order of summation changes it by 64 * 2**-24 * 16 = 6e-5 at most, and by
a tenth of that on average. ``make.py`` chose histories whose neighbouring scores differ by more than 10 times
the tolerance, so the order of the items is exact.
"""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cemg import Recommender
from cemg.artifacts import settings_file
from cemg.config import load_config
from cemg.decoding import Decoder, Recommendations
from cemg.pipeline.dry_run import MISSING, REUSED, plan
from cemg.tokenizer import CONTENT, Catalog, Tokenizer, make_unique, read_items
from cemg_kernels import Trie, residual_quantize, use_fast_kernels

SAVED = Path(__file__).parent / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
TOLERANCE = 1e-4
LATENT_TOLERANCE = 32 * 2**-24 * 16  # sums of 32 float32 products, each below 16 in size


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the saved run."""
    return Path(shutil.copytree(SAVED / "run", tmp_path / "run"))


def same_as_expected(found: Recommendations, expected: dict[str, Any]) -> None:
    """Asserts equal items, codes and proofs, and scores within the tolerance."""
    assert found.items.tolist() == expected["items"]
    assert found.codes.tolist() == expected["codes"]
    assert found.certified.tolist() == expected["certified"]
    assert (found.ids, found.titles) == (expected["ids"], expected["titles"])
    torch.testing.assert_close(found.scores, torch.tensor(expected["scores"]), rtol=0, atol=TOLERANCE)


def content(path: Path) -> tuple[Any, bytes]:
    """The header and the data of a safetensors file; the order of the header's entries is not fixed."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder but hidden ones, such as the lock."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in paths}


def test_the_run_opens_as_it_is_and_gives_the_same_lists(run: Path):
    before = hashes(run)
    histories = EXPECTED["run"]["histories"]
    extra: dict[str, dict[str, Any]] = {"plain": {}, "exclude_history": {"exclude_history": True},
                                        "exact": {"exact": True}}  # fmt: skip
    for normalize in ("vocab", "level", "valid"):
        recommender = Recommender.from_run(run, normalize=normalize)
        for option, arguments in extra.items():
            found = recommender.recommend(histories, top=8, beams=20, **arguments)
            same_as_expected(found, EXPECTED["run"]["lists"][f"{normalize}/{option}"])
    assert hashes(run) == before


def test_a_training_reuses_every_stage_of_the_run_and_adds_those_that_it_did_not_have(run: Path):
    """Settings that the version of the run did not have keep the values that it used."""
    config = load_config(settings_file(run))
    assert config.decoding.validation_history == "earlier"
    planned = plan(run, config)
    assert {name for name, verdict in planned.items() if verdict != REUSED} == {"memory", "gate"}
    assert {planned["memory"], planned["gate"]} == {MISSING}


def test_pytorch_and_reference_backends_give_the_same_lists(run: Path):
    recommender = Recommender.from_run(run)
    expected = EXPECTED["run"]["lists"][f"{recommender.decoder.normalize}/plain"]
    use_fast_kernels(False)
    try:
        slow = Recommender.from_run(run)
        same_as_expected(slow.recommend(EXPECTED["run"]["histories"], top=8, beams=20), expected)
    finally:
        use_fast_kernels(None)


def test_the_scores_of_neighbours_are_further_apart_than_the_tolerance():
    for expected in EXPECTED["run"]["lists"].values():
        assert float(-torch.tensor(expected["scores"]).diff(dim=1).max()) > 2 * TOLERANCE


def features(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The features of all items and which items have them, by modality."""
    tensors = load_file(run / "features" / "features.safetensors")
    tensors |= load_file(run / "graph" / "graph.safetensors")
    names = (*CONTENT, "collab")
    return {name: tensors[name] for name in names}, {name: tensors[f"{name}_present"] for name in names}


def test_the_tokenizer_gives_the_items_the_same_codes():
    tokenizer = Tokenizer.load(SAVED / "run" / "tokenizer")
    saved = read_items(SAVED / "run" / "tokenizer" / "items.safetensors")
    items = tokenizer.features(*features(SAVED / "run"))
    codes, z = tokenizer.tokenize(items)
    assert torch.equal(items.present, saved["present"])
    torch.testing.assert_close(z, saved["z"], rtol=0, atol=LATENT_TOLERANCE)
    torch.testing.assert_close(tokenizer.attention(items), saved["attention"], rtol=0, atol=LATENT_TOLERANCE)
    codebooks = tokenizer.model.codebooks.detach()
    assert bool((margins(saved["z"], saved["codes"], codebooks) > 1).all())  # so the codes are exact too
    assert torch.equal(codes, saved["codes"])


def margins(z: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """How far each code is from a tie, over the largest effect of an error of LATENT_TOLERANCE, [N, M].

    An error e of z changes the difference of the squared distances to vectors a and b by 2 e.(a - b).
    """
    residual, ratios = z.double(), []
    for level, codebook in enumerate(codebooks.double()):
        chosen = codebook[codes[:, level]]
        distances = (residual[:, None] - codebook).square().sum(2)  # [N, K]
        gap = distances - distances.gather(1, codes[:, level : level + 1])
        effect = 2 * LATENT_TOLERANCE * (codebook - chosen[:, None]).abs().sum(2)
        ratio = (gap / effect).scatter(1, codes[:, level : level + 1], float("inf"))
        ratios.append(ratio.amin(1))
        residual = residual - chosen
    return torch.stack(ratios, dim=1)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_the_saved_latent_vectors_have_the_saved_codes(backend):
    saved = read_items(SAVED / "run" / "tokenizer" / "items.safetensors")
    codebooks = Tokenizer.load(SAVED / "run" / "tokenizer").model.codebooks.detach()
    codes, quantized = residual_quantize(saved["z"], codebooks, backend=backend)
    assert torch.equal(codes, saved["codes"])
    summed = torch.zeros_like(quantized)
    for level, codebook in enumerate(codebooks):
        summed = summed + codebook[codes[:, level]]
    assert torch.equal(quantized, summed)


def test_colliding_items_get_the_codes_of_the_saved_catalog():
    saved = read_items(SAVED / "run" / "tokenizer" / "items.safetensors")
    codebooks = Tokenizer.load(SAVED / "run" / "tokenizer").model.codebooks.detach()
    unique = make_unique(saved["codes"], saved["z"], codebooks)
    assert torch.equal(unique.codes, Catalog.load(SAVED / "run" / "catalog").codes)


@pytest.mark.parametrize("folder", ["run/catalog", "decoder/cemg_catalog"])
def test_a_loaded_catalog_is_saved_with_the_same_bytes(folder, tmp_path):
    Catalog.load(SAVED / folder).save(tmp_path)
    assert (tmp_path / "catalog.json").read_bytes() == (SAVED / folder / "catalog.json").read_bytes()
    assert content(tmp_path / "catalog.safetensors") == content(SAVED / folder / "catalog.safetensors")


@pytest.mark.parametrize("name", EXPECTED["tries"])
def test_a_loaded_trie_has_the_same_items_and_is_saved_with_the_same_bytes(name, tmp_path):
    expected, path = EXPECTED["tries"][name], SAVED / "tries" / f"{name}.safetensors"
    codes = torch.tensor(expected["codes"])
    trie = Trie.load(path)
    assert (trie.nbytes, trie.fingerprint) == (expected["nbytes"], expected["fingerprint"])
    assert trie.items(trie.lookup(codes)).tolist() == (expected["ids"] or list(range(len(codes))))
    trie.save(tmp_path / "again.safetensors")
    assert content(tmp_path / "again.safetensors") == content(path)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", EXPECTED["tries"])
def test_a_rebuilt_trie_is_saved_with_the_same_bytes(name, fast, tmp_path):
    expected = EXPECTED["tries"][name]
    use_fast_kernels(fast)
    try:
        trie = Trie.from_codes(expected["codes"], expected["codebook_size"], item_ids=expected["ids"])
        trie.save(tmp_path / "new.safetensors")
    finally:
        use_fast_kernels(None)
    assert content(tmp_path / "new.safetensors") == content(SAVED / "tries" / f"{name}.safetensors")


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_the_saved_decoder_gives_the_same_list(backend):
    decoder = Decoder.from_pretrained(SAVED / "decoder", backend=backend)
    prompts = EXPECTED["decoder"]["prompts"]
    found = decoder.decode(prompts, torch.ones(2, 5, dtype=torch.int64), 12)
    same_as_expected(found, EXPECTED["decoder"]["list"])
