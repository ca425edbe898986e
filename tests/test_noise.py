"""Noise on embeddings: how much, where, and that neither the reference nor an evaluation sees any."""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from tiny_models import random_pairs, tiny_model
from transformers import T5Config, T5ForConditionalGeneration

import fastdpo
from fastdpo.batch import pack, pad
from fastdpo.data import row_key
from fastdpo.model import Policy
from fastdpo.noise import EmbeddingNoise, noisy_embeddings

PAIRS = random_pairs((7, 5, 9), (3, 11, 2), (20, 4, 8))
KEYS = [row_key(pair) for pair in PAIRS]


def noise_of(batch: Any, size: int = 64, **changes: Any) -> torch.Tensor:
    """(R, T, D) of an embedding of zeros."""
    noise = EmbeddingNoise(**{"alpha": 5.0, "seed": 0, "step": lambda: 3, **changes})
    return noise(batch, torch.zeros(*batch.input_ids.shape, size, device=batch.input_ids.device))


def bounds(size: int = 64) -> list[float]:
    longer = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in PAIRS]
    return [5.0 / math.sqrt(length * size) for length in longer]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packed_noise_is_uniform_within_a_bound_by_the_pairs_own_longer_sequence(device: str) -> None:
    parts = noise_of(pack(PAIRS, KEYS).to(torch.device(device)))[0].cpu().split([pair.length for pair in PAIRS])
    for part, bound in zip(parts, bounds(), strict=True):
        assert 0.98 * bound < part.abs().max() <= bound
        assert abs(part.mean()) < 0.05 * bound and part.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_padded_noise_has_the_same_bounds_where_tokens_are() -> None:
    batch = pad(PAIRS, KEYS)
    rows = noise_of(batch).abs().amax((1, 2))
    assert torch.allclose(rows, torch.tensor(bounds()).repeat_interleave(2), rtol=0.02)


def test_the_bound_of_one_pair_is_the_one_that_transformers_takes_for_its_two_padded_rows() -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    batch = pad(PAIRS[:1], KEYS[:1])
    embedding = torch.nn.Embedding(10, 64).train()
    embedding.neftune_noise_alpha = 5.0
    theirs = neftune_post_forward_hook(embedding, (), torch.zeros(*batch.input_ids.shape, 64)).abs().max()
    assert noise_of(batch).abs().max() == pytest.approx(float(theirs), rel=0.02)


def test_packed_noise_of_a_pair_does_not_depend_on_its_batch_and_changes_with_step_and_seed() -> None:
    whole = noise_of(pack(PAIRS, KEYS))[0].split([pair.length for pair in PAIRS])
    for pair, key, part in zip(PAIRS, KEYS, whole, strict=True):
        assert torch.equal(noise_of(pack([pair], [key]))[0], part)
    for changes in ({"step": lambda: 4}, {"seed": 1}):
        assert not torch.equal(noise_of(pack(PAIRS, KEYS), **changes)[0], torch.cat(whole))
    assert noise_of(pack(PAIRS)).shape == noise_of(pack(PAIRS, KEYS)).shape  # of a stream, without keys


def test_pairs_that_share_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="is a pair's own"):
        noise_of(pack([PAIRS[0], PAIRS[0]], least_shared=1))


@pytest.mark.parametrize("layout", [pack, pad])
def test_only_passes_in_training_mode_are_noisy_and_nothing_stays_behind(layout) -> None:
    policy = Policy(tiny_model("llama"))
    batch = layout(PAIRS, KEYS)
    plain, _ = policy(batch)
    with noisy_embeddings(policy, 5.0, 0, lambda: 1):
        policy.train()
        noisy, _ = policy(batch)
        assert torch.equal(noisy, policy(batch)[0])  # both passes of a loss that couples pairs
        policy.eval()
        assert torch.equal(plain, policy(batch)[0])
    policy.train()
    assert torch.equal(plain, policy(batch)[0])
    assert (noisy - plain).abs().max() > 1e-2


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=4, target_modules="all-linear")], ids=["full", "adapters"])
def test_the_reference_remembers_log_probs_without_noise_and_evaluations_have_none(
    adapters, rows, tokenizer, quick
) -> None:
    options = {**quick, "learning_rate": 1e-12, "max_steps": 2, "neftune_noise_alpha": 20.0}
    args = fastdpo.DPOConfig(**options)
    trainer = fastdpo.DPOTrainer(
        tiny_llama(),
        args=args,
        train_dataset=rows[:6],
        eval_dataset=rows[:6],
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert abs(first - math.log(2)) > 1e-4 and abs(first - second) > 1e-5  # other noise at each step
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluated["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", ["aot", "bco_pair"])
def test_losses_that_couple_pairs_do_not_depend_on_the_split_under_noise(loss, rows, tokenizer, quick) -> None:
    logs = []
    for budget in (40, 10_000):
        options = {**quick, "neftune_noise_alpha": 20.0, "loss_type": loss, "max_tokens_per_microbatch": budget}
        args = fastdpo.DPOConfig(**options)
        trainer = fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        logs.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_what_noise_cannot_be_scaled_for_is_refused(rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match="neftune_noise_alpha must be above 0"):
        fastdpo.DPOConfig(**quick, neftune_noise_alpha=0.0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 500}
    with pytest.raises(ValueError, match="neftune_noise_alpha is for models of one sequence"):
        fastdpo.train(
            T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)),
            rows,
            processing_class=tokenizer,
            **quick,
            neftune_noise_alpha=5.0,
        )


def test_rows_of_a_stream_which_have_no_names_are_refused(model: Any, rows: list, tokenizer: Any, quick: dict) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="the rows of a stream have no names"):
        fastdpo.train(model, stream, processing_class=tokenizer, **quick, neftune_noise_alpha=5.0)


@pytest.mark.parametrize("later", [{"neftune_noise_alpha": 5.0}, {"disable_dropout": False}], ids=str)
def test_what_is_a_pairs_own_is_refused_once_pairs_share_tokens(later, rows, tokenizer, quick) -> None:
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    vars(trainer.args).update(later)
    with pytest.raises(ValueError, match="was changed after the trainer was made, .*: set it in the config"):
        trainer.train()
