"""Unpaired rows: which of them stand together, what is scored of them, and that the loss is that of the rows alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from tiny_models import VOCABULARY, gradient_error, gradients, random_pairs, tiny_model

import fastdpo
from fastdpo.batch import pack, pad, pairs_of
from fastdpo.data import TokenPair, pair_of, row_key
from fastdpo.model import Policy
from fastdpo.unpaired import matches


def rows_of(count_liked: int, count_disliked: int) -> list[dict[str, Any]]:
    liked = [
        {"prompt": f"Human: question {n}? Assistant:", "completion": " thank you" + " much" * (n % 3), "label": True}
        for n in range(count_liked)
    ]
    disliked = [
        {"prompt": f"Human: number {n}, and more? Assistant:", "completion": " no" + " never" * (n % 4), "label": False}
        for n in range(count_disliked)
    ]
    return (
        [row for both in zip(liked, disliked, strict=False) for row in both]
        + liked[len(disliked) :]
        + disliked[len(liked) :]
    )


def trainer_of(rows: Any, tokenizer: Any, quick: dict[str, Any], **options: Any) -> fastdpo.DPOTrainer:
    args = fastdpo.DPOConfig(**{**quick, "loss_type": "aot_unpaired", **options})
    return fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer)


def own_logps(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The summed log-prob of a completion, by the model's own logits, in fp64."""
    tokens = torch.tensor([prompt + completion])
    logps = model(input_ids=tokens, use_cache=False).logits[0].double().log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None]).sum()


def test_rows_of_one_prompt_stand_together_and_the_scarcer_kind_goes_round() -> None:
    assert matches([b"x", b"y", b"y", b"x"], [True, False, True, False]) == [(0, 3), (2, 1)]
    assert matches([b"a", b"b", b"c"], [True, False, True]) == [(0, 1), (2, 1)]
    likes = [False, True, False, False, False, True]
    pairs = matches([b"%d" % n for n in range(6)], likes)
    assert pairs == [(1, 0), (1, 3), (5, 2), (5, 4)]
    assert all(likes[chosen] and not likes[rejected] for chosen, rejected in pairs)


@pytest.mark.parametrize("layout", [pack, pad])
def test_what_is_scored_of_a_pair_of_two_prompts_is_its_completions(layout) -> None:
    shared, ours, theirs = [5, 6], [7, 8, 9], [10, 16]
    good, bad = [11, 12], [13, 14, 15]
    split = [TokenPair(shared, ours + good, theirs + bad, chosen_from=len(ours), rejected_from=len(theirs))]
    split += [
        TokenPair([], ours + good, theirs + bad, chosen_from=len(ours), rejected_from=len(theirs)),
        TokenPair([3], good, bad),
    ]
    batch = layout(split)
    assert batch.targets.tolist() == (good + bad) * 3
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7, 10, 12, 15] and batch.num_chosen_tokens == 6
    assert [TokenPair(**pair._asdict()) for pair in pairs_of(batch)] == split
    model = tiny_model("llama").double()
    expected = torch.stack(
        [own_logps(model, shared + ours, good), own_logps(model, shared + theirs, bad)]
        + [own_logps(model, ours, good), own_logps(model, theirs, bad), own_logps(model, [3], good)]
    )
    found = torch.segment_reduce(Policy(model)(batch)[0], "sum", offsets=batch.cu_seqlens.long())
    assert torch.allclose(found[:5].double(), expected, atol=1e-5)


def test_both_layouts_have_the_same_gradient_for_pairs_of_two_prompts() -> None:
    model = tiny_model("llama")
    pairs = [
        TokenPair(pair.prompt, pair.chosen, pair.rejected, chosen_from=2, rejected_from=4)
        for pair in random_pairs((3, 6, 9), (0, 5, 7), (1, 8, 5))
    ]
    packed, padded = (gradients(Policy(model)(layout(pairs))[0], model) for layout in (pack, pad))
    assert gradient_error(packed, padded) < 1e-4 and VOCABULARY


def test_a_row_that_scores_less_of_the_same_tokens_has_another_name() -> None:
    assert row_key(TokenPair([1], [2, 3], [4, 5])) != row_key(TokenPair([1], [2, 3], [4, 5], chosen_from=1))


@pytest.mark.parametrize("counts", [(6, 6), (5, 3)], ids=["as many of both", "more liked"])
def test_the_loss_of_a_batch_is_that_of_its_sorted_log_ratios_by_plain_log_probs(counts, tokenizer, quick) -> None:
    trainer = trainer_of(rows_of(*counts), tokenizer, {**quick, "max_steps": 1}, beta=0.3, label_smoothing=0.1)
    rows = list(trainer.train_dataset)
    with torch.no_grad():  # so that the policy is not its reference
        for parameter in trainer.reference.policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    trainer.reference.equals_policy = False
    ratios = []
    for row in rows:
        pair = pair_of(row)
        for side, first in ((pair.chosen, pair.chosen_from), (pair.rejected, pair.rejected_from)):
            prompt, completion = [*pair.prompt, *side[:first]], side[first:]
            with torch.no_grad():
                both = [own_logps(m.double(), prompt, completion) for m in (trainer.model, trainer.ref_model)]
            ratios.append(both[0] - both[1])
    for model in (trainer.model, trainer.ref_model):
        model.float()
    chosen, rejected = torch.stack(ratios).view(-1, 2).sort(0).values.unbind(1)
    margins = 0.3 * (chosen - rejected)
    expected = -(0.9 * margins.sigmoid().log() + 0.1 * (-margins).sigmoid().log()).mean()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.state.log_history[0]["loss"] != pytest.approx(0.6931, abs=1e-3)


def test_the_tokens_are_those_of_each_row_alone_and_the_log_counts_them(tokenizer, quick, caplog) -> None:
    rows = rows_of(4, 2) + [{"prompt": "Human: question 3? Assistant:", "completion": " no", "label": False}]
    with caplog.at_level(logging.INFO, "fastdpo"):
        table = trainer_of(rows, tokenizer, quick).train_dataset
    assert (
        "7 unpaired rows, 4 liked and 3 disliked: 4 pairs, 1 of them of one prompt; a row is in up to 2" in caplog.text
    )
    whole = {tuple(pair.prompt + side) for pair in map(pair_of, table) for side in (pair.chosen, pair.rejected)}
    assert whole == {
        tuple(tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]) for row in rows
    }
    same = [pair for pair in map(pair_of, table) if pair.chosen_from == pair.rejected_from == 0]
    assert len(same) == 1 and tokenizer.decode(same[0].prompt) == "Human: question 3? Assistant:"


def test_evaluation_and_precomputed_references_take_them_too(tokenizer, quick, tmp_path) -> None:
    rows = rows_of(6, 5)
    runs = [trainer_of(rows, tokenizer, quick), trainer_of(rows, tokenizer, quick, precompute_ref_log_probs=True)]
    runs[1].args.max_tokens_per_microbatch = 40
    for run in runs:
        run.train()
    online, ahead = ([row["loss"] for row in run.state.log_history if "loss" in row] for run in runs)
    assert online == pytest.approx(ahead, rel=1e-5)
    assert runs[0].evaluate(rows)["eval_loss"] < 0.69


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"loss_type": "sigmoid"}, r"loss_type=\['sigmoid'\] compares two answers to one prompt: pair them first"),
        (
            {},
            {"loss_type": ["aot_unpaired", "sft"]},
            r"aot_unpaired trains alone, and loss_type has \['sft'\] beside it",
        ),
        ({}, {"ld_alpha": 0.5}, "do not go with ld_alpha"),
        ({"label": True}, {}, "All completions of the train dataset are liked"),
        ({"label": "yes"}, {}, "row 0: column 'label' is 'yes', expected true"),
    ],
    ids=["a loss of pairs", "one of several", "ld_alpha", "one kind", "no truth value"],
)
def test_what_unpaired_rows_cannot_train_is_refused(change, options, words, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of([row | change for row in rows_of(2, 2)], tokenizer, quick, **options)
    stream = Dataset.from_list(rows_of(2, 2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream of unpaired rows"):
        trainer_of(stream, tokenizer, quick)
