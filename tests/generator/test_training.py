"""Training learns, resumes exactly, keeps the best weights, and says what went wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from cemg.decoding import Decoder
from cemg.errors import UserError
from cemg.generator import (
    BackboneConfig,
    GeneratorConfig,
    Prompter,
    build_backbone,
    load_weights,
    weights_of,
)
from cemg.generator.samples import Samples
from cemg.generator.training import learning_rate_share, train_generator
from cemg.tokenizer import Catalog

pytestmark = pytest.mark.medium

ITEMS, LEVELS, SIZE = 16, 2, 4
CATALOG = Catalog.from_codes(torch.cartesian_prod(torch.arange(4), torch.arange(4)), SIZE)
NEXT = np.random.default_rng(0).permutation(ITEMS)  # the planted rule: after item i comes NEXT[i]
SCRATCH = BackboneConfig(kind="scratch", layers=1, dim=32, heads=2, dropout=0.1)
LLAMA = BackboneConfig(kind="scratch", architecture="llama", layers=1, dim=32, heads=2)
T5 = BackboneConfig(kind="t5", layers=1, dim=32, heads=2, head_dim=16, dropout=0.1)


def histories(users: int, length: int = 7) -> list[np.ndarray]:
    rows = [np.random.default_rng(1).integers(0, ITEMS, users)]
    for _ in range(length - 1):
        rows.append(NEXT[rows[-1]])
    return list(np.stack(rows, axis=1).astype(np.int32))


def settings(**values: object) -> GeneratorConfig:
    base = {"history_items": 6, "epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "validate_every": 1,
            "checkpoint_seconds": 10_000}  # fmt: skip
    return GeneratorConfig(**(base | values))  # type: ignore[arg-type]


class Trial:
    """A training in ``folder`` whose losses are kept, and which can be made to die at a step."""

    def __init__(self, folder: Path, backbone: BackboneConfig = SCRATCH, **values: object) -> None:
        torch.manual_seed(0)
        self.config, self.folder = settings(**values), folder
        self.model, self.vocabulary = build_backbone(backbone, LEVELS, SIZE, history_items=6)
        seq2seq = self.model.config.is_encoder_decoder
        self.prompter = Prompter(self.vocabulary, CATALOG.codes, history_items=6, seq2seq=seq2seq)
        self.losses: dict[int, float] = {}
        self.die_at = -1

    def log(self, step: int, values: dict[str, float]) -> None:
        if "generator/loss" not in values:
            return
        if step == self.die_at:
            raise KeyboardInterrupt
        self.losses[step] = values["generator/loss"]

    def run(self, validate: Callable[[PreTrainedModel], float], users: int = 26):
        return train_generator(
            self.model, self.vocabulary, self.prompter, histories(users), CATALOG.trie, validate=validate,
            config=self.config, folder=self.folder, log=self.log,
        )  # fmt: skip

    def hits(self, model: PreTrainedModel) -> float:
        """Share of items after which, in a history of three, the planted next one comes first."""
        model.eval()
        decoder = Decoder(model, CATALOG, self.vocabulary.code_token_start, normalize=self.config.loss)
        last = NEXT[NEXT]  # of the history (i, NEXT[i], NEXT[NEXT[i]]), by i
        known = list(np.stack((np.arange(ITEMS), NEXT, last), axis=1))
        found = decoder.decode(*self.prompter.batch(known), 3)
        return float((found.items[:, 0] == torch.from_numpy(NEXT[last])).float().mean())


@pytest.mark.parametrize(
    "backbone",
    [pytest.param(SCRATCH, id="scratch"), pytest.param(T5, id="t5", marks=pytest.mark.slow)],
)
def test_a_tiny_model_learns_the_planted_rule(tmp_path, backbone):
    backbone = replace(backbone, dropout=0.0)
    trial = Trial(tmp_path, backbone, epochs=20, batch_size=8, learning_rate=5e-3, validate_every=5)
    before = trial.hits(trial.model)
    progress = trial.run(trial.hits, users=64)
    assert before < 0.3 and progress.best == trial.hits(trial.model) >= 15 / 16


def noisy(model: PreTrainedModel) -> float:
    """A validation that decodes nothing, prefers later weights and draws from torch's random numbers."""
    torch.rand(3)
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


@pytest.mark.parametrize(
    "backbone, users, die_at",  # of 7 steps an epoch, 9 for T5
    [
        (SCRATCH, 26, 2),
        (SCRATCH, 26, 7),
        (SCRATCH, 26, 12),
        (SCRATCH, 26, 17),
        (LLAMA, 26, 12),
        (T5, 6, 3),
        (T5, 6, 21),
    ],
)
def test_a_training_that_died_resumes_with_the_losses_and_weights_of_one_that_did_not(
    tmp_path, backbone, users, die_at
):
    whole = Trial(tmp_path / "whole", backbone)
    expected = whole.run(noisy, users)
    torn = Trial(tmp_path / "torn", backbone, checkpoint_seconds=0)
    torn.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
        torn.run(noisy, users)
    resumed = Trial(tmp_path / "torn", backbone, checkpoint_seconds=0)
    found = resumed.run(noisy, users)
    assert min(resumed.losses) == die_at  # goes on where it was, and does not start again
    assert torn.losses | resumed.losses == whole.losses
    assert (found.best, found.best_epoch, found.step) == (expected.best, expected.best_epoch, expected.step)
    assert_equal_weights(resumed.model, whole.model)


def test_a_training_that_died_between_checkpoints_repeats_the_steps_since(tmp_path):
    whole = Trial(tmp_path / "whole")
    whole.run(noisy)
    torn = Trial(tmp_path / "torn")  # checkpoints at the end of each epoch only
    torn.die_at = 12
    with pytest.raises(KeyboardInterrupt):
        torn.run(noisy)
    resumed = Trial(tmp_path / "torn")
    resumed.run(noisy)
    assert min(resumed.losses) == 7 and torn.losses | resumed.losses == whole.losses
    assert_equal_weights(resumed.model, whole.model)


def test_a_finished_training_called_again_gives_the_same_weights_at_once(tmp_path):
    first = Trial(tmp_path)
    first.run(noisy)
    again = Trial(tmp_path)
    again.run(noisy)
    assert again.losses == {}
    assert_equal_weights(again.model, first.model)


def test_batches_differ_between_the_epochs(tmp_path):
    trial = Trial(tmp_path, epochs=2, learning_rate=1e-30)
    seen: list[int] = []
    original = Samples.batch

    def spy(self, indices):
        seen.extend(indices)
        return original(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "batch", spy)
        trial.run(noisy)
    assert len(seen) == 52 and sorted(seen[:26]) == sorted(seen[26:]) and seen[:26] != seen[26:]


def assert_equal_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_weights_of_the_best_validation_are_restored(tmp_path):
    trial, scores, kept = Trial(tmp_path, epochs=4, patience=0), iter([0.1, 0.4, 0.3, 0.4]), []

    def validate(model: PreTrainedModel) -> float:
        kept.append({name: tensor.clone() for name, tensor in weights_of(model).items()})
        return next(scores)

    progress = trial.run(validate)
    assert (progress.best, progress.best_epoch, progress.epoch) == (0.4, 2, 4)
    for name, tensor in weights_of(trial.model).items():
        assert torch.equal(tensor, kept[1][name])
    assert not torch.equal(kept[1]["transformer.wte.weight"], kept[3]["transformer.wte.weight"])


def test_patience_ends_a_training_that_no_longer_improves(tmp_path):
    scores = iter([0.1, 0.4, 0.3, 0.4, 0.9])
    progress = Trial(tmp_path, epochs=5, patience=2).run(lambda _: next(scores))
    assert (progress.epoch, progress.best_epoch) == (4, 2)


class Clock:
    """``time.monotonic`` that advances by a second per call, so two calls around a step are one second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("cemg.generator.training.time", made)
    return made


def test_a_budget_stops_within_an_epoch_and_validates_there(tmp_path, clock):
    trial = Trial(tmp_path, validate_every=5, budget_hours=10 / 3600)  # 7 steps an epoch, a second each
    validated: list[int] = []
    progress = trial.run(lambda model: validated.append(len(trial.losses)) or 0.5)
    assert (progress.step, progress.stopped, validated, progress.best) == (10, True, [10], 0.5)
    assert progress.train_seconds == 10 and progress.best_epoch == 2
    again = Trial(tmp_path, validate_every=5, budget_hours=10 / 3600)
    assert again.run(noisy).stopped and again.losses == {}
    assert_equal_weights(again.model, trial.model)


def test_time_before_an_interruption_counts_against_the_budget(tmp_path, clock):
    whole = Trial(tmp_path / "whole", checkpoint_seconds=0, budget_hours=10 / 3600)
    expected = whole.run(noisy)
    torn = Trial(tmp_path / "torn", checkpoint_seconds=0, budget_hours=10 / 3600)
    torn.die_at = 8
    with pytest.raises(KeyboardInterrupt):
        torn.run(noisy)
    resumed = Trial(tmp_path / "torn", checkpoint_seconds=0, budget_hours=10 / 3600)
    found = resumed.run(noisy)
    assert (min(resumed.losses), found.step, found.train_seconds) == (8, 10, 10)
    assert found.stopped and found.best == expected.best
    assert_equal_weights(resumed.model, whole.model)


def test_the_best_weights_are_kept_if_the_budget_ends_after_a_worse_validation(tmp_path, clock):
    scores = iter([0.4, 0.1])
    progress = Trial(tmp_path, budget_hours=10 / 3600).run(lambda _: next(scores))
    assert (progress.best, progress.best_epoch, progress.epoch, progress.stopped) == (0.4, 1, 2, True)


def test_a_budget_that_is_not_spent_changes_nothing(tmp_path):
    one, other = Trial(tmp_path / "one"), Trial(tmp_path / "other", budget_hours=9.0)
    assert not other.run(noisy).stopped and one.run(noisy).best_epoch == 3
    assert_equal_weights(one.model, other.model)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step(tmp_path):
    trial = Trial(tmp_path)
    with torch.no_grad():
        trial.model.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(UserError, match="the loss is nan at step 0") as error:
        trial.run(noisy)
    assert error.value.fix == "reduce generator.learning_rate"


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(SCRATCH, id="scratch"),
        pytest.param(T5, id="t5", marks=pytest.mark.slow),
        pytest.param(LLAMA, id="llama"),
    ],
)
def test_a_loss_over_valid_codes_learns_the_planted_rule_too(tmp_path, backbone):
    backbone = replace(backbone, dropout=0.0)
    trial = Trial(
        tmp_path, backbone, epochs=20, batch_size=8, learning_rate=5e-3, validate_every=5, loss="valid"
    )
    before = trial.hits(trial.model)
    trial.run(trial.hits, users=64)
    assert before < 0.3 and trial.hits(trial.model) >= 12 / 16


@pytest.mark.parametrize("backbone", [SCRATCH, LLAMA], ids=["gpt2", "llama"])
def test_gradient_checkpointing_computes_activations_again_and_changes_no_loss(tmp_path, backbone):
    def run(name: str, checkpointed: bool) -> tuple[Trial, int]:
        hooks = torch.autograd.graph.saved_tensors_hooks
        with pytest.MonkeyPatch.context() as patch:
            entered = Mock(side_effect=hooks.__enter__, autospec=True)
            patch.setattr(hooks, "__enter__", lambda self: entered(self))
            trial = Trial(tmp_path / name, backbone, epochs=1, gradient_checkpointing=checkpointed)
            trial.run(noisy)
        return trial, entered.call_count

    (kept, none), (again, some) = run("kept", False), run("again", True)
    assert none == 0 < some and again.losses == kept.losses
    assert_equal_weights(again.model, kept.model)


@pytest.mark.parametrize("backbone", [SCRATCH, T5], ids=["gpt2", "t5"])
def test_a_batch_in_parts_has_the_losses_of_the_whole_without_dropout(tmp_path, backbone):
    backbone, users = replace(backbone, dropout=0.0), 26 if backbone is SCRATCH else 6
    whole = Trial(tmp_path / "whole", backbone)
    whole.run(noisy, users)
    parts = Trial(tmp_path / "parts", backbone, accumulation_steps=4)  # the last batch of an epoch has 2
    parts.run(noisy, users)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5, rel=0)  # sums in another order


def test_a_training_that_resumes_with_other_parts_says_so(tmp_path, capsys):
    torn = Trial(tmp_path)
    torn.die_at = 9
    with pytest.raises(KeyboardInterrupt):
        torn.run(noisy)
    resumed = Trial(tmp_path, accumulation_steps=2)
    resumed.run(noisy)
    assert min(resumed.losses) == 7
    assert "a batch has 2 parts now and had 1" in capsys.readouterr().err


def test_training_without_a_sample_is_refused(tmp_path):
    trial = Trial(tmp_path)
    with pytest.raises(UserError, match="no training sample"):
        train_generator(
            trial.model, trial.vocabulary, trial.prompter, [np.array([], dtype=np.int32)],
            CATALOG.trie, validate=noisy, config=trial.config, folder=tmp_path,
        )  # fmt: skip


def test_an_out_of_memory_error_suggests_a_smaller_batch_size(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And so on")

    trial = Trial(tmp_path)
    monkeypatch.setattr(trial.model, "forward", full)
    with pytest.raises(UserError) as error:
        trial.run(noisy)
    assert error.value.lines() == [
        "cpu ran out of memory with batches of 4",
        "  cause: CUDA out of memory",
        "  fix:   --set generator.batch_size=2, or --dtype bfloat16",
    ]


def test_two_trainings_of_one_process_may_differ_in_precision(tmp_path, monkeypatch):
    monkeypatch.setattr("cemg.precision.has_native_bfloat16", lambda kind: True)
    for number, (backbone, dtype) in enumerate(
        itertools.product((SCRATCH, LLAMA), ("float32", "bfloat16", "float32"))
    ):
        trial = Trial(tmp_path / str(number), backbone, epochs=1)
        progress = train_generator(
            trial.model, trial.vocabulary, trial.prompter, histories(8), CATALOG.trie, validate=noisy,
            config=trial.config, folder=trial.folder, dtype=dtype,
        )  # fmt: skip
        assert progress.epoch == 1
        decoder = Decoder(trial.model, CATALOG, trial.vocabulary.code_token_start)
        assert decoder.path.startswith("fast")  # training leaves the model's forward as it was


@pytest.mark.parametrize("change", ["name", "shape"])
def test_weights_of_another_model_are_refused_with_what_differs(tmp_path, change):
    from safetensors.torch import save_file

    model = Trial(tmp_path).model
    weights = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    name = next(iter(weights))
    if change == "name":
        weights["other"] = weights.pop(name)
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"weights\.safetensors has") as error:
        load_weights(model, tmp_path / "weights.safetensors")
    causes = {
        "name": f"2 names differ, such as {min(name, 'other')}",
        "shape": f"{name} is {list(weights[name].shape) if change == 'shape' else []} in the file and "
        f"{list(dict(model.named_parameters())[name].shape)} in the model",
    }
    assert error.value.cause == causes[change]
    (tmp_path / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"weights\.safetensors is not a valid safetensors file"):
        load_weights(model, tmp_path / "weights.safetensors")


def test_a_checkpoint_holds_tensors_and_json_alone(tmp_path):
    from safetensors import safe_open

    Trial(tmp_path, epochs=1).run(noisy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", "checkpoint.safetensors"]
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["state"])["epoch"] == 1


def test_the_learning_rate_warms_up_then_falls_to_zero_or_by_the_inverse_root():
    cosine, root = settings(warmup_share=0.1), settings(warmup_share=0.1, schedule="inverse-sqrt")
    shares = [learning_rate_share(step, 100, cosine) for step in range(100)]
    assert shares[:10] == [pytest.approx((s + 1) / 10) for s in range(10)]
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.5) and shares[99] < 0.001
    assert learning_rate_share(39, 100, root) == pytest.approx(0.5)  # sqrt(10 / 40)


@pytest.mark.parametrize(
    "values",
    [
        *({"history_items": 0}, {"epochs": 0}, {"batch_size": 0}, {"label_smoothing": 1.0}),
        *({"temperature": 0}, {"budget_hours": -1}, {"accumulation_steps": 0}),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(values):
    with pytest.raises(UserError, match=f"generator.{next(iter(values))}"):
        settings(**values)
