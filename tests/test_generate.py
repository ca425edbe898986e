"""Samples during evaluation: what they show, where, and that a run does not change by them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import LoraConfig
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
from transformers.integrations import CometCallback, MLflowCallback, TensorBoardCallback, WandbCallback

import fastdpo
from fastdpo.batch import pairs_of
from fastdpo.collator import padded_rows
from fastdpo.generate import _report, prompts_of

ADAPTERS = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture
def sampling(quick: dict[str, Any]) -> dict[str, Any]:
    """Options of a run that samples at steps 2 and 4."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3, "max_length": 60}
    return {**quick, **evaluating, "generate_during_eval": True}


def trainer_of(rows: list, tokenizer: Any, options: dict, model: Any = None, **more: Any) -> fastdpo.DPOTrainer:
    more = {"train_dataset": rows[:18], "eval_dataset": rows[18:], "processing_class": tokenizer, **more}
    return fastdpo.DPOTrainer(model or tiny_llama(), args=fastdpo.DPOConfig(**options), **more)


def samples(options: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Heading -> rows of cells, of samples.md."""
    found: dict[str, list[list[str]]] = {}
    for part in (Path(options["output_dir"]) / "samples.md").read_text().split("## ")[1:]:
        heading, _, *lines = part.strip().splitlines()
        found[heading] = [line.strip("| ").split(" | ") for line in lines]
    return found


@pytest.mark.parametrize("more", [{}, {"disable_dropout": False}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["full", "adapters"])
def test_a_run_has_the_same_numbers_with_samples_and_without(adapters, more, rows, tokenizer, sampling) -> None:
    logs = []
    for on in (True, False):
        torch.manual_seed(3)
        options = {**sampling, **more, "generate_during_eval": on}
        model = tiny_llama(attention_dropout=0.3)
        trainer = trainer_of(rows, tokenizer, options, model, peft_config=adapters)
        trainer.train()
        timeless = [
            {k: v for k, v in row.items() if "runtime" not in k and "_per_second" not in k}
            for row in trainer.state.log_history
        ]
        logs.append((timeless, [p.detach().clone() for p in trainer.model.parameters()]))
    assert logs[0][0] == logs[1][0]
    assert all(torch.equal(*both) for both in zip(logs[0][1], logs[1][1], strict=True))


def test_samples_of_both_stand_beside_the_same_prompts_at_each_evaluation(rows, tokenizer, sampling, caplog) -> None:
    with caplog.at_level(logging.INFO, "fastdpo"):
        trainer_of(rows, tokenizer, {**sampling, "eval_on_start": True, "learning_rate": 0.1}).train()
    shown = samples(sampling)
    assert list(shown) == ["eval, step 0", "eval, step 2", "eval, step 4"]
    columns, _, *first = shown["eval, step 0"]
    assert columns == ["prompt", "policy", "reference"] and len(first) == 3
    last = shown["eval, step 4"][2:]
    assert [row[0] for row in first] == [row[0] for row in last]
    assert {row[0] for row in first} <= {row["prompt"] for row in rows[18:]}
    assert all(policy == reference for _, policy, reference in first)  # from one random state
    assert [row[2] for row in last] == [row[2] for row in first]  # the reference stays
    assert [row[1] for row in last] != [row[1] for row in first]
    assert f"samples: eval, step 4\n  prompt: {last[0][0]}\n  policy: " in caplog.text


@pytest.mark.parametrize("kind", ["adapters", "trained adapter", "own model"])
def test_what_the_reference_writes_is_what_its_model_alone_does(kind, rows, tokenizer, sampling) -> None:
    more: dict[str, Any] = {} if kind == "own model" else {"peft_config": ADAPTERS}
    if kind == "own model":
        more["ref_model"] = tiny_llama()
        with torch.no_grad():
            more["ref_model"].lm_head.weight.mul_(3)
    trainer = trainer_of(rows, tokenizer, {**sampling, "learning_rate": 0.1}, **more)
    trainer.train()
    prompts = [[7, 8, 9], [11]]
    policy, reference = trainer.sampler.answers(prompts)
    alone = more.get("ref_model") or tiny_llama()
    ids, mask = torch.tensor([[7, 8, 9], [0, 0, 11]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    torch.manual_seed(trainer.args.seed)
    expected = alone.eval().generate(
        input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=57, pad_token_id=tokenizer.pad_token_id
    )
    assert reference == expected[:, 3:].tolist() != policy


def encoder_decoder() -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 500, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, init_std=0.5, forced_eos_token_id=None))


@pytest.mark.parametrize("model", [tiny_llama, encoder_decoder], ids=["decoder", "encoder-decoder"])
def test_a_prompt_beside_longer_ones_is_continued_as_alone(model, rows, tokenizer, sampling, monkeypatch) -> None:
    """Padding is masked and moves no position: greedy answers do not depend on the batch."""
    trainer = trainer_of(rows, tokenizer, sampling, model())
    generate, greedy = trainer.model.generate, {"do_sample": False, "max_new_tokens": 8, "num_beams": 1}
    monkeypatch.setattr(trainer.model, "generate", lambda **given: generate(**{**given, **greedy}))
    prompts = [[7, 8, 9, 10, 11, 12], [13, 14], [15]]
    together, _ = trainer.sampler.answers(prompts)
    assert together == [trainer.sampler.answers([prompt])[0][0] for prompt in prompts]
    assert len(set(map(tuple, together))) == 3


@pytest.mark.parametrize("why", ["freed", "none"])
def test_without_a_reference_to_run_the_policy_is_shown_alone_and_the_log_says_so(
    why, rows, tokenizer, sampling, caplog, tmp_path
) -> None:
    more: dict[str, Any] = {"reference_free": True}
    if why == "freed":
        more = {"precompute_ref_log_probs": True, "ref_log_probs": str(tmp_path / "ref.safetensors")}
    with caplog.at_level(logging.INFO, "fastdpo"):
        trainer = trainer_of(rows, tokenizer, {**sampling, **more})
        trainer.evaluate()
    told = {"freed": "the reference was freed", "none": "there is no reference"}
    assert f"samples: of the policy alone, {told[why]}" in caplog.text
    assert samples(sampling)["eval, step 0"][0] == ["prompt", "policy"]
    assert trainer.get_batch_samples(trainer.model, next(iter(trainer.get_eval_dataloader())))[1] is None


def test_several_sets_streams_and_cells_with_lines_are_shown(rows, tokenizer, sampling) -> None:
    odd = [{"prompt": "one\ntwo | three", "chosen": " yes", "rejected": " no"}]
    sets = {"odd": odd, "stream": Dataset.from_list(rows[18:]).to_iterable_dataset()}
    trainer_of(rows, tokenizer, sampling, eval_dataset=sets).evaluate()
    shown = samples(sampling)
    assert list(shown) == ["eval_odd, step 0", "eval_stream, step 0"]
    assert shown["eval_odd, step 0"][2][0] == "one<br>two \\| three"
    assert [row[0] for row in shown["eval_stream, step 0"][2:]] == [row["prompt"] for row in rows[18:21]]


def test_get_batch_samples_gives_texts_with_their_prompts_for_batches_and_padded_dicts(
    rows, tokenizer, sampling
) -> None:
    trainer = trainer_of(rows, tokenizer, sampling)
    (batch,) = next(iter(trainer.get_eval_dataloader()))
    policy, reference = trainer.get_batch_samples(trainer.model, batch)
    prompts = tokenizer.batch_decode(prompts_of(batch))
    assert all(
        text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(policy, prompts, strict=True)
    )
    assert policy == reference and trainer.get_batch_samples(None, [batch]) == (policy, reference)
    padded = tokenizer.pad({"input_ids": prompts_of(batch)}, return_tensors="pt", padding_side="left")
    given = {f"prompt_{key}": value for key, value in padded.items()}
    assert trainer.get_batch_samples(trainer.model, given) == (policy, reference)
    with pytest.raises(ValueError, match="give trainer.model, or None"):
        trainer.get_batch_samples(tiny_llama(), batch)
    pairs = padded_rows(pairs_of(batch), trainer.layout.pad_token_id)
    assert trainer.get_batch_samples(trainer.model, pairs) == (policy, reference)
    sides = [{name: values.chunk(2)[place] for name, values in pairs.items()} for place in (0, 1)]
    by_side = {}
    for side, values in zip(("chosen", "rejected"), sides, strict=True):
        labels = values["input_ids"].where(values["completion_mask"] == 1, -100)
        by_side |= {f"{side}_input_ids": values["input_ids"], f"{side}_labels": labels}
        by_side[f"{side}_attention_mask"] = values["attention_mask"]
    assert trainer.get_batch_samples(trainer.model, by_side) == (policy, reference)
    with pytest.raises(ValueError, match="expected a PreferenceBatch, a dict with"):
        trainer.get_batch_samples(trainer.model, 3)
    with pytest.raises(ValueError, match="a padded batch lacks attention_mask, completion_mask"):
        trainer.get_batch_samples(trainer.model, {"input_ids": padded["input_ids"]})


def test_answers_end_where_a_model_has_no_more_positions(rows, tokenizer, sampling) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=70)
    rows = [{**row, "prompt": row["prompt"][-60:]} for row in rows]
    trainer = trainer_of(rows, tokenizer, {**sampling, "max_length": 70}, GPT2LMHeadModel(config))
    trainer.args.max_length = None
    (long,), _ = trainer.sampler.answers([[7] * 64])
    assert len(long) == 6


def test_memory_that_runs_out_costs_the_samples_and_not_the_run(rows, tokenizer, sampling, caplog, monkeypatch) -> None:
    trainer = trainer_of(rows, tokenizer, sampling)

    def full(**options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.model, "generate", full)
    assert trainer.train().global_step == 4
    assert "samples: none at step 2, out of GPU memory: lower per_device_eval_batch_size" in caplog.text


def test_trackers_get_the_table(monkeypatch) -> None:
    calls: list[Any] = []
    note = lambda kind: lambda *given, **named: calls.append((kind, given, named))  # noqa: E731
    wandb = SimpleNamespace(run=object(), Table=lambda columns, data: (columns, data), log=note("wandb"))
    parts = {
        TensorBoardCallback: {"tb_writer": SimpleNamespace(add_text=note("tensorboard"))},
        WandbCallback: {"_wandb": wandb},
        CometCallback: {"_experiment": SimpleNamespace(log_table=note("comet"))},
        MLflowCallback: {"_initialized": True, "_ml_flow": SimpleNamespace(log_text=note("mlflow"), active_run=None)},
    }
    for kind, attributes in parts.items():
        monkeypatch.setattr(kind, "__del__", lambda self: None, raising=False)
        callback = kind.__new__(kind)
        vars(callback).update(attributes)
        _report(callback, "eval", 7, ["prompt", "policy"], [("a", "b")], "| a | b |")
    assert calls == [
        ("tensorboard", ("samples/eval", "| a | b |", 7), {}),
        ("wandb", ({"samples/eval": (["prompt", "policy"], [["a", "b"]]), "train/global_step": 7},), {}),
        ("comet", ("samples-eval-7.csv", [["a", "b"]]), {"headers": ["prompt", "policy"]}),
        ("mlflow", ("| a | b |", "samples/eval-7.md"), {}),
    ]


def test_samples_need_rows_to_evaluate_on(rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match="generate_during_eval needs an eval_dataset, and there is none"):
        trainer_of(rows, tokenizer, {**quick, "generate_during_eval": True}, eval_dataset=None)
