"""The trainer end to end on tiny models: what comes out, what is exact, what is left as it was."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

import fastdpo
from fastdpo import losses as declared
from fastdpo.batch import pack
from fastdpo.data import TokenPair
from fastdpo.losses import LOSSES, pairwise_loss
from fastdpo.model import Policy
from fastdpo_kernels.pair_loss import PairLoss, PairwiseLoss, pair_loss, sequence_sums

EVERY_LINEAR = LoraConfig(r=4, target_modules="all-linear")
SAVE_FIGURE = Figure.savefig  # which `quick` replaces


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_train_learns_the_preference_and_returns_model_metrics_and_history(model, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 30, "learning_rate": 3e-3}
    out = fastdpo.train(model, rows[:18], eval_dataset=rows[18:], tokenizer=tokenizer, eval_strategy="epoch", **quick)
    assert out.model is model and not model.training
    assert out.metrics["eval_rewards/accuracies"] == 1.0 and out.metrics["eval_loss"] < 0.3
    losses = [row["loss"] for row in out.history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.3
    expected = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "entropy", "mean_token_accuracy"}
    expected |= {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    assert set(out.history[0]) == expected | {"rewards/accuracies", "rewards/margins"}
    assert {"train_loss", "train_runtime"} <= set(out.history[-1])
    assert out.metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_the_run_leaves_its_log_its_curves_and_a_model_that_transformers_loads(
    model, rows, tokenizer, quick, monkeypatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", SAVE_FIGURE)
    out = fastdpo.train(model, rows, processing_class=tokenizer, **quick)
    directory = Path(quick["output_dir"])
    assert [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()] == out.history
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    for name, value in state(out.model).items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_adapters_are_saved_alone_and_peft_loads_them_onto_the_base(rows, tokenizer, quick) -> None:
    out = fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, peft_config=EVERY_LINEAR, **quick)
    loaded = PeftModel.from_pretrained(tiny_llama(), quick["output_dir"]).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, out.model(ids).logits)
    assert not torch.equal(tiny_llama().eval()(ids).logits, out.model(ids).logits)


def test_a_model_by_path_with_lora_fields_trains(model, rows, tokenizer, quick, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = fastdpo.train(str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"), use_peft=True, lora_r=2, **quick)
    assert out.model.peft_config["default"].r == 2
    assert out.trainer.args.learning_rate == quick["learning_rate"]


@pytest.mark.parametrize(("adapters", "expected"), [(False, 1e-6), (True, 2e-5)], ids=["full", "adapters"])
def test_an_unset_learning_rate_depends_on_what_trains(adapters, expected, model, rows, tokenizer, quick) -> None:
    del quick["learning_rate"]
    quick["use_peft"] = adapters
    trainer = fastdpo.DPOTrainer(model, args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer)
    assert trainer.args.learning_rate == expected


def test_the_trainer_has_the_methods_and_results_that_scripts_use(model, rows, tokenizer, quick, tmp_path) -> None:
    trainer = fastdpo.DPOTrainer(
        model=model,
        args=fastdpo.DPOConfig(**quick),
        train_dataset=DatasetDict(train=Dataset.from_list(rows)),
        eval_dataset=rows[:4],
        processing_class=tokenizer,
    )
    result = trainer.train()
    assert result.global_step == 4 and result.training_loss == result.metrics["train_loss"]
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] < math.log(2) and trainer.state.log_history[-1]["eval_loss"] == evaluated["eval_loss"]
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere").num_parameters() == model.num_parameters()


def _adapted(init: Any, trained: bool = False) -> PeftModel:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    adapted = get_peft_model(tiny_llama(), config)
    if trained:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return adapted


STARTS = {
    "full": lambda: (tiny_llama(), {}),
    "lora": lambda: (tiny_llama(), {"peft_config": EVERY_LINEAR}),
    "checkpointing": lambda: (tiny_llama(), {"gradient_checkpointing": True, "peft_config": EVERY_LINEAR}),
    "pissa": lambda: (
        tiny_llama(),
        {"peft_config": LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear")},
    ),
    "trained adapter": lambda: (_adapted(True, trained=True), {}),
    "ld_alpha": lambda: (tiny_llama(), {"ld_alpha": 0.5}),
    "bfloat16 full": lambda: (tiny_llama().bfloat16(), {"bf16": True, "use_cpu": True}),
    "bfloat16 lora": lambda: (tiny_llama().bfloat16(), {"bf16": True, "use_cpu": True, "peft_config": EVERY_LINEAR}),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_before_the_first_update_every_margin_is_bitwise_zero(start, rows, tokenizer, quick) -> None:
    model, options = start()
    peft_config = options.pop("peft_config", None)
    quick |= {"max_steps": 1, **options}
    out = fastdpo.train(model, rows, processing_class=tokenizer, peft_config=peft_config, **quick)
    first = out.history[0]
    assert first["rewards/margins"] == 0 and first["rewards/chosen"] == 0 and first["rewards/accuracies"] == 0
    assert abs(first["loss"] - math.log(2)) <= 1e-6 and first["grad_norm"] > 0


def test_a_reference_that_is_not_the_policy_stops_the_run_at_the_first_step(rows, tokenizer, quick) -> None:
    """Remembers the reference run with its adapters on, whose loss is right and whose reward is that of nothing."""
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    with torch.no_grad():
        next(trainer.reference.policy.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="must be 0"):
        trainer.train()


def _step_gradients(rows: list, tokenizer: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step, before the update."""
    seen: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    fastdpo.train(
        tiny_llama(),
        rows,
        processing_class=tokenizer,
        callbacks=[Keep()],
        train_sampling_strategy="sequential",
        **options,
    )
    return seen


SPLITS = [(12, 1, 10**6), (4, 3, None), (12, 1, 60), (1, 12, None), (12, 1, 200)]  # pairs, batches of them, tokens
# The others see nothing of the optimizer batch but their own pair.
SPLIT_CASES: list[tuple[Any, int]] = [("sigmoid", 5), ("ipo", 5), ("hinge", 5), (["sigmoid", "sft"], 3), ("orpo", 2)]
SPLIT_CASES += [("aot", 3), ("aot_pair", 3), ("bco_pair", 3)]


@pytest.mark.parametrize(("loss", "count"), SPLIT_CASES, ids=str)
def test_gradients_do_not_depend_on_how_the_optimizer_batch_is_split(loss, count, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 1, "loss_type": loss}
    splits = SPLITS[:count]
    whole, *others = [
        _step_gradients(
            rows,
            tokenizer,
            **quick
            | {
                "per_device_train_batch_size": pairs,
                "gradient_accumulation_steps": count,
                "max_tokens_per_microbatch": tokens,
            },
        )
        for pairs, count, tokens in splits
    ]
    for split in others:
        for name, gradient in whole.items():
            assert (split[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_the_last_smaller_optimizer_batch_is_a_mean_over_its_own_pairs(rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 10}
    whole = _step_gradients(rows[:6], tokenizer, **quick)
    expected = _step_gradients(
        rows[:6], tokenizer, **quick | {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
    )
    for name, gradient in expected.items():
        assert (whole[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_twenty_adamw_steps_at_1e_6_move_nearly_every_entry_of_a_bfloat16_model(rows, tokenizer, quick) -> None:
    model = tiny_llama().bfloat16()
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    quick |= {"max_steps": 20, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    out = fastdpo.train(model, rows, processing_class=tokenizer, **quick)
    seen = {token for row in rows for text in row.values() for token in tokenizer(text).input_ids}
    moved = total = 0
    for name, parameter in out.model.named_parameters():
        assert parameter.dtype == torch.float32
        changed = parameter != before[name]
        changed = changed[sorted(seen)] if "embed_tokens" in name else changed  # the other rows get no gradient
        moved, total = moved + int(changed.sum()), total + changed.numel()
    assert moved > 0.99 * total


def test_trained_adapters_of_a_bfloat16_model_are_fp32_and_its_base_stays(rows, tokenizer, quick) -> None:
    quick |= {"bf16": True, "use_cpu": True}
    out = fastdpo.train(tiny_llama().bfloat16(), rows, processing_class=tokenizer, peft_config=EVERY_LINEAR, **quick)
    assert {p.dtype for p in out.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in out.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_same_seed_gives_bitwise_the_same_run_and_workers_change_nothing(rows, tokenizer, quick) -> None:
    runs = []
    loading = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}
    for more in ({}, {}, loading):
        out = fastdpo.train(
            tiny_llama(),
            rows,
            processing_class=tokenizer,
            **quick | {"max_steps": 6} | more,
        )
        runs.append(
            (state(out.model), [{k: v for k, v in row.items() if "runtime" not in k} for row in out.history[:-1]])
        )
    for other, history in runs[1:]:
        assert history == runs[0][1]
        assert all(torch.equal(value, other[name]) for name, value in runs[0][0].items())


def test_rows_that_begin_alike_train_as_if_each_were_alone_in_fewer_tokens(rows, tokenizer, quick, monkeypatch) -> None:
    rows = [
        {
            "prompt": "Answer as a friend would, in one sentence or two. Ask back where you do not understand. "
            + row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["chosen"] + row["rejected"],
        }
        for row in rows
    ]
    runs, tokens, passes = [], [], Policy.forward

    def noted(self: Policy, batch: Any, *more: Any, **options: Any) -> Any:
        tokens.append(0 if batch is None else batch.input_ids.numel())
        return passes(self, batch, *more, **options)

    monkeypatch.setattr(Policy, "forward", noted)
    for more in ({}, {"disable_dropout": False}):  # dropout, of which this model has none, is each pair's own
        tokens.clear()
        out = fastdpo.train(
            tiny_llama(),
            rows,
            processing_class=tokenizer,
            **quick | {"max_tokens_per_microbatch": 2000, "logging_steps": 1} | more,
        )
        runs.append(([line["loss"] for line in out.history[:-1]], state(out.model), sum(tokens)))
    (losses, weights, fewer), (expected, other, all_of_them) = runs
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] != pytest.approx(losses[0], rel=1e-3)
    assert all(torch.allclose(value, other[name], rtol=1e-3, atol=1e-6) for name, value in weights.items())
    assert fewer < 0.6 * all_of_them


def test_a_metric_that_no_evaluation_gives_is_refused_before_a_model_loads(rows, tokenizer, quick, monkeypatch) -> None:
    monkeypatch.setattr("fastdpo.build.build_policy", None)
    config = fastdpo.DPOConfig(**quick | {"eval_strategy": "steps", "metric_for_best_model": "rewards/margin"})
    with pytest.raises(ValueError, match="'rewards/margin' is not what evaluation gives: one of loss, rewards/chosen"):
        fastdpo.DPOTrainer(tiny_llama(), args=config, eval_dataset=rows[:4], processing_class=tokenizer)


def test_options_of_the_loader_reach_it_and_need_workers(rows, tokenizer, quick) -> None:
    options = {"dataloader_in_order": False, "dataloader_num_workers": 1}
    config = fastdpo.DPOConfig(**quick | options)
    trainer = fastdpo.DPOTrainer(tiny_llama(), args=config, train_dataset=rows, processing_class=tokenizer)
    assert trainer.get_train_dataloader().in_order is False
    with pytest.raises(ValueError, match="no effect without dataloader_num_workers"):
        fastdpo.DPOConfig(**quick, dataloader_in_order=False)


def test_two_trainers_of_different_precision_live_in_one_process(rows, tokenizer, quick) -> None:
    def build(**options: Any) -> fastdpo.DPOTrainer:
        config = fastdpo.DPOConfig(**quick | options)
        return fastdpo.DPOTrainer(tiny_llama(), args=config, train_dataset=rows, processing_class=tokenizer)

    alone = build().train().training_loss
    plain, half = build(), build(bf16=True, use_cpu=True)
    half_loss, plain_loss = half.train().training_loss, plain.train().training_loss
    assert plain_loss == alone and half_loss != alone and half_loss == pytest.approx(alone, abs=0.02)
    assert plain.evaluate(rows[:3])["eval_loss"] < math.log(2)


def test_no_prompt_row_reaches_the_head_and_each_reference_row_is_computed_once(tokenizer, quick) -> None:
    """The FLOPs of a whole run of three epochs within 5% of the count by formula."""
    V, D, I, layers, rank, epochs = 2000, 64, 128, 2, 4, 3  # noqa: N806, E741 (legend: vocabulary, hidden, MLP)
    lengths = [(40, 9, 5), (60, 3, 8), (25, 12, 12), (33, 1, 7)]
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(3, 500, (count,), generator=generator).tolist()  # noqa: E731
    rows = [{"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in lengths]
    model = tiny_llama(V, hidden_size=D, intermediate_size=I, num_hidden_layers=layers)
    quick |= {
        "max_steps": -1,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 2,
        "use_peft": True,
        "lora_r": rank,
    }
    trainer = fastdpo.DPOTrainer(model, args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer)
    with FlopCounterMode(display=False) as counter:
        trainer.train()

    attention_in = D * D + 2 * D * D // 2  # q, k, v with half as many key heads
    trunk = layers * (attention_in + D * D + 3 * D * I)
    low_rank_in = rank * (3 * D + 2 * D)  # A and B of q, k, v
    low_rank = layers * (low_rank_in + rank * 2 * D + 3 * rank * (D + I))
    tokens, scored = sum(map(sum, lengths)), sum(c + r for _, c, r in lengths)
    # nothing below the first layer's q, k, v trains, so their inputs need no gradient
    policy = 2 * tokens * (2 * trunk - attention_in + 3 * low_rank - rank * 3 * D)
    unread = tokens - scored + len(lengths)  # by the last MLP: prompts but for their last token, ends of responses
    policy -= 2 * unread * (2 * 3 * D * I + 3 * 3 * rank * (D + I))
    head = 2 * scored * V * D
    expected = epochs * (policy + 2 * head) + (2 * tokens * trunk - 2 * unread * 3 * D * I + head)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
    prompt_rows = (2 * epochs + 1) * 2 * (tokens - scored) * V * D
    again = (epochs - 1) * (2 * tokens * trunk + head)
    assert prompt_rows > 0.5 * expected and again > 0.2 * expected  # either mistake would show


def test_a_step_reads_nothing_back_to_the_host(rows, tokenizer, quick, monkeypatch) -> None:
    """Every way from a tensor to a Python number raises inside of the optimizer step, after the first one's check."""
    for check in ("linear_logps._check_targets", "pair_loss._check_bounds"):  # on a CPU they cost no sync
        monkeypatch.setattr(f"fastdpo_kernels.{check}", lambda *_: None)
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    step, seen = trainer._optimizer_step, []

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a host sync inside of the step")

    def watched(batches: list) -> None:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
                if seen:
                    patch.setattr(torch.Tensor, name, refuse)
            step(batches)
        seen.append(len(batches))

    trainer._optimizer_step = watched
    trainer.train()
    assert len(seen) == 4


def test_evaluations_after_the_first_run_no_reference(rows, tokenizer, quick) -> None:
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    calls = []
    compute = trainer.reference.compute
    trainer.reference.compute = lambda batch: calls.append(batch.num_pairs) or compute(batch)
    first = trainer.evaluate()
    assert sum(calls) == len(rows)
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and first["eval_rewards/margins"] == 0
    trainer.train()
    trainer.evaluate()
    assert sum(calls) == len(rows)


def test_generation_inside_callbacks_and_afterwards_is_the_models_own(rows, tokenizer, quick) -> None:
    texts = ["Human: what is the answer?", "Human: tell me more about the dog Assistant:"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    seen = []

    def sample(model: Any) -> torch.Tensor:
        mode = model.training
        tokens = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        model.train(mode)
        return tokens

    class Sampling(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            untouched = tiny_llama()
            untouched.load_state_dict(model.state_dict())
            seen.append(torch.equal(sample(model), sample(untouched)))

    model = tiny_llama()
    attention = model.config._attn_implementation
    out = fastdpo.train(model, rows, processing_class=tokenizer, callbacks=[Sampling()], **quick)
    untouched = tiny_llama()
    untouched.load_state_dict(out.model.state_dict())
    assert seen == [True] * 4 and torch.equal(sample(out.model), sample(untouched))
    assert out.model.config._attn_implementation == attention == "sdpa"


def test_dropout_is_off_while_training_and_back_afterwards(rows, tokenizer, quick) -> None:
    model = tiny_llama(attention_dropout=0.3)
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.2)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            layer = model.base_model.model.model.layers[0].self_attn
            seen.append((layer.attention_dropout, layer.q_proj.lora_dropout["default"].p))

    out = fastdpo.train(model, rows, processing_class=tokenizer, peft_config=config, callbacks=[Look()], **quick)
    layer = out.model.base_model.model.model.layers[0].self_attn
    assert set(seen) == {(0.0, 0.0)}
    assert (layer.attention_dropout, layer.q_proj.lora_dropout["default"].p) == (0.3, 0.2)


def test_a_frozen_copy_of_a_trained_adapter_does_not_stay_in_the_model(rows, tokenizer, quick) -> None:
    out = fastdpo.train(_adapted(True, trained=True), rows, processing_class=tokenizer, **quick)
    assert list(out.model.peft_config) == ["default"]
    assert not any("reference" in name for name in out.model.state_dict())
    assert sorted(p.name for p in Path(quick["output_dir"]).iterdir() if p.is_dir()) == []


def test_transformers_state_decides_when_to_log_evaluate_and_save(rows, tokenizer, quick) -> None:
    quick |= {"logging_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 2}
    out = fastdpo.train(
        tiny_llama(),
        rows,
        {"a": rows[:4], "b": rows[4:9]},
        processing_class=tokenizer,
        eval_strategy="steps",
        eval_steps=3,
        **quick,
    )
    assert [row["step"] for row in out.history if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in out.history if "eval_a_loss" in row and "eval_b_loss" in row] == [3, 6]
    kept = sorted(p.name for p in Path(quick["output_dir"]).glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]
    AutoModelForCausalLM.from_pretrained(Path(quick["output_dir"]) / "checkpoint-6")


def test_early_stopping_stops_and_the_best_model_comes_back(rows, tokenizer, quick) -> None:
    swapped = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    quick |= {"max_steps": 20, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    out = fastdpo.train(
        tiny_llama(),
        rows,
        swapped,  # gets worse with every step
        processing_class=tokenizer,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **quick,
    )
    assert out.trainer.state.global_step == 3
    best = AutoModelForCausalLM.from_pretrained(Path(quick["output_dir"]) / "checkpoint-1").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in out.model.state_dict().items())


def test_a_stream_trains_for_max_steps_and_shows_each_row_in_order(rows, tokenizer, quick) -> None:
    stream = Dataset.from_list(rows).to_iterable_dataset()
    streamed = fastdpo.train(tiny_llama(), stream, processing_class=tokenizer, **quick)
    listed = fastdpo.train(
        tiny_llama(), rows, processing_class=tokenizer, train_sampling_strategy="sequential", **quick
    )
    for ours, theirs in zip(streamed.history[:-1], listed.history[:-1], strict=True):
        assert ours["loss"] == theirs["loss"] and ours["logps/chosen"] == theirs["logps/chosen"]


def test_the_run_says_what_it_resolved_to(rows, tokenizer, quick, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, **quick)
    for part in (
        "layout: packed",
        "reference: a frozen copy",
        "loss: 1 sigmoid",
        "all exactly 0",
        "linear_logps: torch",
    ):
        assert part in caplog.text, part


def test_the_run_says_which_batches_an_attention_that_was_asked_for_governs(
    rows, tokenizer, quick, tmp_path, caplog
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    where = {"eager": "attention of packed batches and generation", "sdpa": "attention of what is not packed, such as"}
    for asked, words in where.items():
        args = fastdpo.DPOConfig(**quick, attn_implementation=asked)
        with caplog.at_level(logging.INFO, logger="fastdpo"):
            fastdpo.DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=rows, processing_class=tokenizer)
        assert words in caplog.text and f"generation: {asked}, as asked for" in caplog.text
        caplog.clear()
    with pytest.raises(ValueError, match="'eagre' is none that transformers knows"):  # before rows are looked at
        fastdpo.DPOTrainer(
            str(tmp_path / "model"), args=fastdpo.DPOConfig(**quick, attn_implementation="eagre"), train_dataset=7
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_model": "same"}, "same object as model"),
        ({"train_dataset": [{"chosen": "a", "rejected": 3}]}, "rejected"),
        ({"train_dataset": []}, "empty"),
        ({"eval_strategy": "steps"}, "eval_dataset"),
        ({"model": "bare"}, "no language-model head"),
        ({"model": 7}, "expected a name, a path"),
        ({"dtype": "bfloat16"}, "already loaded"),
        ({"use_peft": True, "model": "adapted"}, "already has adapters"),
        ({"model": "small vocabulary"}, "embedding has 60 rows"),
        ({"args": fastdpo.DPOConfig(report_to="none")}, "put them all into args"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_gets_one_clear_error(change, message, model, rows, tokenizer, quick) -> None:
    models = {"bare": model.model, "adapted": _adapted(True), "small vocabulary": tiny_llama(60)}
    chosen = change.get("model", model)
    arguments: dict[str, Any] = {"model": models.get(chosen, chosen) if isinstance(chosen, str) else chosen}
    arguments |= {"train_dataset": rows, "processing_class": tokenizer, **quick}
    arguments |= {name: value for name, value in change.items() if name != "model"}
    if change.get("ref_model"):
        arguments["ref_model"] = arguments["model"]
    with pytest.raises(ValueError, match=message):
        fastdpo.train(**arguments)


def test_learned_positions_bound_max_length(rows, tokenizer, quick) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="learned positions for 64"):
        fastdpo.train(gpt2, rows, processing_class=tokenizer, max_length=128, **quick)


def test_lengths_beyond_the_rotary_range_are_warned_of(rows, tokenizer, quick, caplog) -> None:
    fastdpo.train(tiny_llama(max_position_embeddings=16), rows, processing_class=tokenizer, **quick)
    assert "trained on 16" in caplog.text


def test_pairs_of_one_batch_pack_into_one_row_without_padding() -> None:
    batch = pack([TokenPair([1, 2, 3], [4, 5], [6]), TokenPair([], [7, 8], [9, 9, 9])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]]
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 9] and batch.cu_seqlens.tolist() == [0, 2, 3, 4, 6]
    assert batch.logit_rows.tolist() == [2, 3, 2, 6, 8, 9]


def test_generation_inside_callbacks_is_right_with_checkpointing_on(rows, tokenizer, quick) -> None:
    """Remembers that transformers drops the key-value cache of a checkpointing model in training mode."""
    inputs = tokenizer(["Human: what is the answer?"], return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    seen = []

    class Sampling(TrainerCallback):
        def sample(self, model: Any) -> None:
            untouched = tiny_llama()
            untouched.load_state_dict(model.state_dict())
            expected = untouched.generate(**inputs, **options)
            seen.append(torch.equal(model.generate(**inputs, **options), expected))  # in whatever mode it is

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.sample(model)

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.sample(model)

    quick |= {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2}
    fastdpo.train(tiny_llama(), rows, rows[:3], processing_class=tokenizer, callbacks=[Sampling()], **quick)
    assert seen == [True] * 6


def test_a_model_that_checkpoints_already_trains_alike_and_keeps_its_setting(rows, tokenizer, quick) -> None:
    plain = fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, **quick)
    model = tiny_llama()
    model._set_gradient_checkpointing(True)
    function = model.model.layers[0]._gradient_checkpointing_func
    out = fastdpo.train(model, rows, processing_class=tokenizer, **quick)
    assert all(torch.equal(value, out.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    assert model.model.layers[0].gradient_checkpointing
    assert model.model.layers[0]._gradient_checkpointing_func is function


def test_a_config_is_left_as_it_was_given(rows, tokenizer, quick) -> None:
    """Remembers a learning rate for adapters that went on into full training of another trainer."""
    del quick["learning_rate"]
    config = fastdpo.DPOConfig(**quick)
    for peft_config, expected in ((EVERY_LINEAR, 2e-5), (None, 1e-6)):
        trainer = fastdpo.DPOTrainer(
            tiny_llama(), args=config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
        )
        assert trainer.args.learning_rate == expected and config.learning_rate is None


def test_a_wrong_reference_is_found_in_bfloat16_too(rows, tokenizer, quick) -> None:
    quick |= {"bf16": True, "use_cpu": True}
    trainer = fastdpo.DPOTrainer(
        tiny_llama(),
        args=fastdpo.DPOConfig(**quick),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=EVERY_LINEAR,
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    with pytest.raises(RuntimeError, match="must be 0"):
        trainer.train()


def test_an_added_pad_token_without_an_embedding_row_does_not_matter(rows, quick) -> None:
    import tokenizers_for_tests

    tokenizer = tokenizers_for_tests.byte_level(pad_token=None)
    model = tiny_llama(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == model.config.vocab_size
    out = fastdpo.train(model, rows, processing_class=tokenizer, **quick)
    assert out.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_trained_adapter_goes_through_several_trainers_with_the_name_reference_taken(rows, tokenizer, quick) -> None:
    model = _adapted(True, trained=True)
    model.add_adapter("reference", EVERY_LINEAR)
    for _ in "ab":
        trainer = fastdpo.DPOTrainer(
            model, args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_what_the_user_froze_inside_of_an_adapter_stays_frozen(rows, tokenizer, quick) -> None:
    for trained in (False, True):  # adapters off, and a frozen copy, as reference
        model = _adapted(True, trained=trained)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        before = state(model)
        out = fastdpo.train(model, rows, processing_class=tokenizer, **quick)
        for name, value in out.model.state_dict().items():
            assert torch.equal(value, before[name]) == ("lora_B" not in name), name


def test_the_best_of_a_named_adapter_comes_back(rows, tokenizer, quick) -> None:
    model = get_peft_model(tiny_llama(), EVERY_LINEAR, adapter_name="policy")
    quick |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    out = fastdpo.train(model, rows, rows[:4], tokenizer=tokenizer, load_best_model_at_end=True, **quick)
    loaded = PeftModel.from_pretrained(tiny_llama(), Path(quick["output_dir"]) / "policy")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.eval()(ids).logits, out.model(ids).logits)


def test_an_eval_dataset_without_a_strategy_is_evaluated_at_the_end(rows, tokenizer, quick) -> None:
    out = fastdpo.train(tiny_llama(), rows, rows[:4], processing_class=tokenizer, **quick)
    assert out.metrics["eval_loss"] < math.log(2) and out.history[-2]["eval_loss"] == out.metrics["eval_loss"]
    assert "train_loss" in out.history[-1]


def test_a_reference_remembered_from_other_batches_starts_within_rounding(rows, tokenizer, quick, caplog) -> None:
    quick |= {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 100, "per_device_eval_batch_size": 5}
    out = fastdpo.train(tiny_llama(), rows, rows, processing_class=tokenizer, **quick)
    first = next(row for row in out.history if "loss" in row)
    assert abs(first["rewards/margins"]) < 1e-6 and abs(first["loss"] - math.log(2)) < 1e-6
    assert "all exactly 0" in caplog.text or "rounding of other batches" in caplog.text


def test_evaluate_takes_several_sets_and_checks_their_rows(rows, tokenizer, quick) -> None:
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer
    )
    metrics = trainer.evaluate({"a": rows[:2], "b": rows[2:5]})
    assert metrics["eval_a_loss"] == metrics["eval_b_loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="embedding has 500 rows"):
        trainer.evaluate([{"prompt_ids": [600], "chosen_ids": [1, 2], "rejected_ids": [3]}])


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy", "cosine"])
def test_schedules_that_look_at_the_evaluation_run(schedule, rows, tokenizer, quick) -> None:
    quick |= {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1}
    out = fastdpo.train(tiny_llama(), rows, rows[:3], processing_class=tokenizer, **quick)
    assert all(row["learning_rate"] > 0 for row in out.history if "learning_rate" in row)


def test_only_the_trainers_own_sets_under_their_own_name_step_the_schedule(rows, tokenizer, quick) -> None:
    """It remembers the KeyError that another prefix ended in."""
    quick |= {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    trainer = fastdpo.train(tiny_llama(), rows, rows[:3], processing_class=tokenizer, **quick).trainer
    steps, best = trainer.lr_scheduler.last_epoch, trainer.state.best_metric
    assert "test_loss" in trainer.evaluate(rows[:2], metric_key_prefix="test")
    trainer.evaluate(rows[:2])
    assert (trainer.lr_scheduler.last_epoch, trainer.state.best_metric) == (steps, best)
    trainer.evaluate()
    assert trainer.lr_scheduler.last_epoch == steps + 1


def test_metrics_of_the_trainers_own_sets_take_the_prefix(rows, tokenizer, quick) -> None:
    sets, config = {"a": rows[:2], "b": rows[2:5]}, fastdpo.DPOConfig(**quick)
    trainer = fastdpo.DPOTrainer(tiny_llama(), args=config, eval_dataset=sets, processing_class=tokenizer)
    names = {name.replace("eval_", "final_", 1) for name in trainer.evaluate()}
    assert trainer.evaluate(metric_key_prefix="final").keys() == names and "final_a_loss" in names


def test_evaluation_rows_are_remembered_while_a_stream_trains(rows, tokenizer, quick) -> None:
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = fastdpo.DPOTrainer(
        tiny_llama(),
        args=fastdpo.DPOConfig(**quick),
        train_dataset=stream,
        eval_dataset=rows[:4],
        processing_class=tokenizer,
    )
    calls: list[int] = []
    compute = trainer.reference.compute
    trainer.reference.compute = lambda batch: calls.append(batch.num_pairs) or compute(batch)
    for _ in "abc":
        trainer.evaluate()
    assert sum(calls) == 4


@pytest.mark.parametrize(
    ("scaling", "message"),
    [({"factor": 4.0}, "needs a rope_type"), ({"rope_type": "nope"}, "needs a rope_type")],
    ids=["no type", "unknown type"],
)
def test_rope_scaling_that_would_have_no_effect_is_refused(scaling, message, rows, tokenizer, quick, tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        fastdpo.train(str(tmp_path / "model"), rows, processing_class=tokenizer, rope_scaling=scaling, **quick)


def test_rope_scaling_reaches_the_rotary_embedding_and_quiets_the_warning(
    rows, tokenizer, quick, tmp_path, caplog
) -> None:
    short = tiny_llama(max_position_embeddings=16)
    short.save_pretrained(tmp_path / "model")
    scaling = {"type": "linear", "factor": 8.0}  # the older spelling of rope_type
    path = str(tmp_path / "model")
    out = fastdpo.train(path, rows, processing_class=tokenizer, rope_scaling=scaling, **quick)
    frequencies = (m.model.rotary_emb.inv_freq for m in (short, out.model))
    torch.testing.assert_close(next(frequencies), 8 * next(frequencies))
    assert "trained on 16" not in caplog.text


def test_a_model_that_is_nowhere_is_named_in_the_error(rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match="'./nowhere' is neither a directory with a model"):
        fastdpo.train("./nowhere", rows, processing_class=tokenizer, **quick)


def test_weights_without_a_head_are_refused_and_not_made_up(rows, tokenizer, quick, tmp_path) -> None:
    tiny_llama().model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="lacks 1 of its model's tensors, such as lm_head.weight"):
        fastdpo.train(str(tmp_path / "bare"), rows, processing_class=tokenizer, **quick)


def test_adapters_that_packed_pairs_have_no_place_for_are_refused(rows, tokenizer, quick) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for model, peft_config in ((tiny_llama(), config), (get_peft_model(tiny_llama(), config), None)):
        with pytest.raises(ValueError, match="virtual tokens"):
            fastdpo.train(model, rows, processing_class=tokenizer, peft_config=peft_config, **quick)


def test_adapters_that_only_peft_models_own_forward_turns_on_are_refused(rows, tokenizer, quick) -> None:
    """The backbone is called on its own: aLoRA trained nothing, at a loss of 0.6931."""
    from peft import PveraConfig, XLoraConfig

    invoked = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", alora_invocation_tokens=[3, 4])
    routed = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={})
    drawn = PveraConfig(target_modules=["q_proj"])
    refused = {r"alora_invocation_tokens \(aLoRA\)": invoked, "XLoraConfig needs calls": routed}
    for said, config in (refused | {"PveraConfig draws other weights at each pass": drawn}).items():
        with pytest.raises(ValueError, match=said):
            fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, peft_config=config, **quick)
    with pytest.raises(ValueError, match=r"\(aLoRA\)"):
        fastdpo.token_logps(get_peft_model(tiny_llama(), invoked), torch.arange(3, 9)[None])


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {}], ids=str)
def test_fp32_weights_amid_16_bit_ones_need_autocast(beside: dict[str, Any], rows, tokenizer, quick) -> None:
    """It ended in an error of torch's about m1 and m2."""
    config = LoraConfig(r=4, target_modules=["q_proj"], **beside)
    model: Any = get_peft_model(tiny_llama(attention_bias=True).bfloat16(), config)
    if not beside:
        model.get_base_model().model.norm.weight.requires_grad_(True)
    quick |= {"use_cpu": True, "max_steps": 1}
    with pytest.raises(ValueError, match=r"trains beside its adapters, in fp32.* Set bf16=True, or load .*float32"):
        fastdpo.train(model, rows, processing_class=tokenizer, **quick)
    assert fastdpo.train(model, rows, processing_class=tokenizer, bf16=True, **quick).metrics["train_loss"] > 0


def test_what_trains_outside_of_adapters_is_saved_beside_them_and_comes_back_with_the_best_model(
    rows, tokenizer, quick, tmp_path, caplog
) -> None:
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    worse = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:6]]
    quick |= {"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    quick |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_only_model": True}
    with caplog.at_level("WARNING", "fastdpo"):
        out = fastdpo.train(model, rows, worse, tokenizer=tokenizer, **quick)
    assert "list their modules in modules_to_save" in caplog.text
    found = [row["eval_loss"] for row in out.history if "eval_loss" in row]
    assert found.index(min(found)) == 0 and out.trainer.evaluate()["eval_loss"] == min(found)
    saved = PeftModel.from_pretrained(tiny_llama(), quick["output_dir"])
    saved.load_state_dict(load_file(f"{quick['output_dir']}/outside_adapters.safetensors"), strict=False)
    assert torch.equal(saved.get_base_model().model.norm.weight, norm)  # type: ignore[union-attr]
    ids = torch.arange(3, 15)[None]
    assert torch.equal(saved.eval()(ids).logits, out.model(ids).logits)


def test_merged_adapters_are_refused_as_they_would_not_train(rows, tokenizer, quick) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters .default.* call unmerge_adapter"):
        fastdpo.train(model, rows, processing_class=tokenizer, **quick)


def test_a_gradient_of_exactly_zero_is_told_of_once(rows, tokenizer, quick, caplog) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.zero_()  # as B is: neither has a gradient
    fastdpo.train(model, rows, processing_class=tokenizer, **quick)
    assert caplog.text.count("the gradient norm is exactly 0") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_target_modules": ["nowhere"]}, "nowhere"),
        ({"lora_target_modules": ["q_proj", "lm_head"], "use_dora": True}, "on the LM head .* leave the head out"),
        (
            {"lora_target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.1, "disable_dropout": False},
            "on the LM head .* leave the head out",
        ),
    ],
    ids=["no such module", "DoRA on the head", "dropout on the head"],
)
def test_lora_that_a_model_cannot_have_is_refused_before_its_weights_load(
    options, said, rows, tokenizer, quick, tmp_path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=said):
        fastdpo.train(str(tmp_path / "model"), rows, processing_class=tokenizer, use_peft=True, **options, **quick)


def test_dropout_of_adapters_that_is_off_is_named_with_what_turns_it_on(rows, tokenizer, quick, caplog) -> None:
    with caplog.at_level(logging.INFO, "fastdpo"):
        config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.3)
        fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, peft_config=config, **quick)
    assert "dropout off, lora_dropout=0.3 of the adapters included (disable_dropout=False turns it on)" in caplog.text


# Every loss through the trainer


def other_model() -> Any:
    """A reference that the policy does not start from."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def plain_token_logps(model: Any, table: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens and log sum_v p_v^2, from the model's own logits, sequence by sequence."""
    logps, sum_sq = [], []
    for row in table:
        for response in (row["chosen_ids"], row["rejected_ids"]):
            logits = model(torch.tensor([[*row["prompt_ids"], *response]])).logits[0, -len(response) - 1 : -1]
            log_probs = logits.log_softmax(-1)
            logps.append(log_probs.gather(1, torch.tensor(response)[:, None])[:, 0])
            sum_sq.append((2 * log_probs).logsumexp(-1))
    return torch.cat(logps), torch.cat(sum_sq).detach()


def plain_result(loss: PairwiseLoss, model: Any, ref_model: Any, table: Any) -> PairLoss:
    """The loss of all pairs of a table at once, without anything of the trainer's."""
    lengths = [len(row[side]) for row in table for side in ("chosen_ids", "rejected_ids")]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    token_logps, sum_sq = plain_token_logps(model, table)
    ref_logps = None
    if ref_model is not None:
        with torch.no_grad():
            ref_logps = sequence_sums(plain_token_logps(ref_model, table)[0], cu_seqlens, loss.ld_alpha).view(-1, 2)
    sums = sequence_sums(token_logps.detach(), cu_seqlens, loss.ld_alpha).view(-1, 2)
    mean_reward = loss.beta * (sums if ref_logps is None else sums - ref_logps).mean()
    return pair_loss(token_logps, cu_seqlens, ref_logps, loss, log_sum_sq_probs=sum_sq, mean_reward=mean_reward)


OF_THE_POLICY_ALONE = ("sft", "simpo", "orpo", "cpo")
OPTION_CASES: dict[str, dict[str, Any]] = {name: {"loss_type": name} for name in LOSSES} | {
    "smoothed": {"loss_type": ["sigmoid", "robust", "aot", "cpo"], "label_smoothing": 0.2},
    "weighted list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "rpo_alpha": {"rpo_alpha": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["ipo", "hinge"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "discopop_tau": {"loss_type": "discopop", "discopop_tau": 0.5},
    "ld_alpha": {"ld_alpha": 0.3, "loss_type": ["sigmoid", "aot", "sft"]},
    "use_weighting": {"use_weighting": True, "loss_type": ["sigmoid", "sft"]},
    "reference_free": {"reference_free": True, "loss_type": ["sigmoid", "aot_pair", "bco_pair"]},
}


@pytest.mark.parametrize("options", OPTION_CASES.values(), ids=OPTION_CASES)
def test_the_first_step_has_the_loss_and_gradient_of_the_plain_logits(options, rows, tokenizer, quick) -> None:
    """The optimizer batch comes in several micro-batches, and everything is computed at once here."""
    quick |= {"max_steps": 2, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    quick |= {"max_tokens_per_microbatch": 100, **options}
    without = options.get("reference_free") or options.get("loss_type") in OF_THE_POLICY_ALONE
    ref_model = None if without else other_model()
    gradients: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    out = fastdpo.train(tiny_llama(), rows, None, ref_model, tokenizer, callbacks=[Keep()], **quick)
    table, model, loss = out.trainer.train_dataset.select(range(6)), tiny_llama(), pairwise_loss(out.trainer.args)
    result = plain_result(loss, model, ref_model, table)
    result.losses.mean().backward()
    first = out.history[0]
    assert first["loss"] == pytest.approx(float(result.losses.detach().mean()), rel=2e-6)
    assert first["rewards/chosen"] == pytest.approx(float(result.rewards[:, 0].mean()), rel=2e-5)
    for name, parameter in model.named_parameters():
        gradient = gradients[0][name]
        assert (gradient - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name
    assert all(math.isfinite(value) for row in out.history for value in row.values())


def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fills with one entry a forward pass of any policy: whether it was one with gradients."""
    seen: list[bool] = []
    forward = Policy.forward

    def watched(policy: Policy, *args: Any, **more: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return forward(policy, *args, **more)

    monkeypatch.setattr(Policy, "forward", watched)
    return seen


@pytest.mark.parametrize("options", [{"loss_type": "simpo"}, {"reference_free": True}], ids=str)
def test_a_run_that_sees_no_reference_computes_none(options, rows, tokenizer, quick, monkeypatch) -> None:
    args = fastdpo.DPOConfig(**quick | {"max_steps": 3, "max_tokens_per_microbatch": 10**6, **options})
    trainer = fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer)
    seen = passes(monkeypatch)
    trainer.train()
    assert seen == [True] * 3 and trainer.ref_model is None
    for row in trainer.state.log_history[:-1]:
        for side in ("chosen", "rejected"):
            assert row[f"rewards/{side}"] == pytest.approx(0.1 * row[f"logps/{side}"], rel=1e-6)


@pytest.mark.parametrize("loss", ["aot", "bco_pair", "sigmoid"])
def test_a_second_pass_comes_only_with_coupled_pairs_in_several_micro_batches(
    loss, rows, tokenizer, quick, monkeypatch
) -> None:
    seen = passes(monkeypatch)
    monkeypatch.setattr("fastdpo.loader.CPU_TOKENS", None)
    for accumulation in (1, 2):
        options = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulation}
        args = fastdpo.DPOConfig(**quick | options, loss_type=loss)
        trainer = fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer)
        seen.clear()
        trainer.train()
        ahead = accumulation if accumulation > 1 and loss != "sigmoid" else 0
        assert seen.count(True) == accumulation  # the policy's
        assert seen.count(False) == accumulation + ahead  # the reference's, and the policy's ahead


def test_bco_pair_s_mean_reward_is_that_of_all_pairs_trained_on_and_evaluation_leaves_it(
    rows, tokenizer, quick
) -> None:
    quick |= {"loss_type": "bco_pair", "max_tokens_per_microbatch": 100, "max_steps": 5}
    args = fastdpo.DPOConfig(**quick)
    trainer = fastdpo.DPOTrainer(
        tiny_llama(), args=args, train_dataset=rows[:9], eval_dataset=rows, processing_class=tokenizer
    )
    before = trainer.evaluate()
    assert float(trainer.mean_reward.value) == 0 and before["eval_loss"] == pytest.approx(2 * math.log(2), rel=1e-6)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    pairs = [6, 3, 6, 3, 6]
    rewards = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in steps]
    mean = sum(count * reward for count, reward in zip(pairs, rewards, strict=True)) / sum(pairs)
    assert mean != 0 and float(trainer.mean_reward.value) == pytest.approx(mean, rel=1e-5)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert float(trainer.mean_reward.value) == pytest.approx(mean, rel=1e-5)
    assert first["eval_loss"] == second["eval_loss"]
    without = fastdpo.train(tiny_llama(), rows, processing_class=tokenizer, bco_running_mean=False, **quick)
    assert without.trainer.mean_reward is None


def test_evaluation_of_matched_pairs_does_not_depend_on_micro_batches(rows, tokenizer, quick) -> None:
    quick |= {"loss_type": ["aot", "sft"], "per_device_eval_batch_size": 12}
    metrics = []
    for tokens in (10**6, 60):
        args = fastdpo.DPOConfig(**quick, max_tokens_per_microbatch=tokens)
        trainer = fastdpo.DPOTrainer(
            tiny_llama(), other_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
        metrics.append(trainer.evaluate()["eval_loss"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


def test_a_reference_that_nothing_looks_at_is_refused(rows, tokenizer, quick) -> None:
    for options in ({"loss_type": ["simpo", "sft"]}, {"reference_free": True}):
        with pytest.raises(ValueError, match="ref_model is given, but with .* it would never be looked at"):
            fastdpo.train(tiny_llama(), rows, None, tiny_llama(), tokenizer, **quick, **options)


def test_the_examples_in_the_docs_run(model, rows, tokenizer, quick, tmp_path, monkeypatch) -> None:
    page = (Path(__file__).parent.parent / "docs/losses.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    train, less = fastdpo.train, quick | {"processing_class": tokenizer, "max_steps": 2}
    monkeypatch.setattr(fastdpo, "train", lambda *args, **options: train(*args, **less | options))
    monkeypatch.setattr(declared, "LOSSES", dict(LOSSES))
    monkeypatch.chdir(tmp_path)
    for example in examples:
        scope: dict[str, Any] = {"model": model, "rows": rows}
        exec(example, scope)
        losses = [row["loss"] for row in scope["out"].history if "loss" in row]
        assert len(losses) == 2 and losses[1] < losses[0]
        assert (tmp_path / "better/metrics.jsonl").exists()
