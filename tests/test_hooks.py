"""What scripts hand to the trainer or call on it, by the numbers that TRL's trainer gives for the same."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import praise_and_scolding, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers_for_tests import byte_level
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback
from trl import DPOConfig as PeerConfig
from trl import DPOTrainer as PeerTrainer

import fastdpo
from fastdpo.batch import pairs_of
from fastdpo.collator import padded_rows
from fastdpo.data import TokenPair
from fastdpo.model import noise_of
from fastdpo.surface import NOT_CALLED

CLOCK = ("runtime", "per_second")
EVALUATION = {"per_device_eval_batch_size": 4, "include_for_metrics": ["inputs", "loss"], "beta": 0.3}


def trainer_of(rows: Any, quick: dict, trainer: type = fastdpo.DPOTrainer, hooks: Any = None, **more: Any) -> Any:
    args = fastdpo.DPOConfig(**{**quick, **more})
    return trainer(
        tiny_llama(),
        ref_model=tiny_llama(initializer_range=0.2),
        args=args,
        train_dataset=rows,
        processing_class=byte_level(),
        **{"eval_dataset": rows[:10], **(hooks or {})},
    )


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.endswith(CLOCK)}


class Seen:
    """A compute_metrics that keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[EvalPrediction] = []

    def __call__(self, given: EvalPrediction) -> dict[str, Any]:
        self.given.append(given)
        first = given.predictions[0] if isinstance(given.predictions, (tuple, list)) else given.predictions
        return {"largest": np.abs(first).max(), "rows": len(given.label_ids)}


def best_and_logp(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A preprocess_logits_for_metrics that keeps little: the best token and the label's log-prob of each place."""
    return logits.argmax(-1), logits.log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]


@pytest.fixture(scope="module")
def peer_and_ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same evaluation of 12 rows by TRL's trainer and by ours: what compute_metrics saw, what they returned."""
    rows, found = praise_and_scolding()[:12], {}
    options = {"output_dir": str(tmp_path_factory.mktemp("out")), "report_to": "none", "disable_tqdm": True}
    options |= {"use_cpu": True, "bf16": False, **EVALUATION}
    for name, trainer, config in (
        ("peer", PeerTrainer, PeerConfig(**options, gradient_checkpointing=False)),
        ("ours", fastdpo.DPOTrainer, fastdpo.DPOConfig(**options)),
    ):
        seen, given = Seen(), {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows)}
        models = tiny_llama(), tiny_llama(initializer_range=0.2)
        metrics = trainer(*models, args=config, processing_class=byte_level(), compute_metrics=seen, **given).evaluate()
        found[name] = seen.given[0], {key: float(value) for key, value in metrics.items()}
    return found


def test_compute_metrics_sees_what_it_sees_in_trl(peer_and_ours: dict[str, Any]) -> None:
    (theirs, their_metrics), (ours, our_metrics) = peer_and_ours["peer"], peer_and_ours["ours"]
    assert ours.predictions.shape == (24, 42, 500)
    np.testing.assert_allclose(ours.predictions, theirs.predictions, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.label_ids, theirs.label_ids)
    np.testing.assert_array_equal(ours.inputs, theirs.inputs)
    for name in ("eval_largest", "eval_rows"):
        assert our_metrics[name] == pytest.approx(their_metrics[name], rel=1e-5)


def test_losses_are_those_of_pairs_and_their_batch_means_those_of_trl(peer_and_ours: dict[str, Any]) -> None:
    (theirs, _), (ours, metrics) = peer_and_ours["peer"], peer_and_ours["ours"]
    np.testing.assert_allclose(ours.losses.reshape(3, 4).mean(1), theirs.losses.reshape(3, 4)[:, 0], rtol=1e-4)
    assert ours.losses.mean() == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_logits_are_there_for_each_row_of_a_ragged_last_batch(rows, quick) -> None:
    seen = Seen()
    trainer = trainer_of(rows, quick, hooks={"compute_metrics": seen}, per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_rows"] == 20
    pairs = [trainer.tokenize_row(row) for row in rows[:10]]
    order = [
        (side, place) for first in (0, 4, 8) for side in ("chosen", "rejected") for place in range(first, first + 4)
    ]
    order = [(side, place) for side, place in order if place < 10]
    (given,) = seen.given
    for row, (side, place) in enumerate(order):
        ids = torch.tensor([pairs[place][f"{side}_input_ids"]])
        with torch.no_grad():
            alone = trainer.model(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(given.predictions[row, : ids.shape[1]], alone, rtol=1e-4, atol=1e-5)
        assert given.label_ids[row, : ids.shape[1]].tolist() == ids[0].tolist()


@pytest.mark.parametrize("batches", [None, 2])
def test_what_preprocess_makes_of_logits_is_what_compute_metrics_sees(batches: int | None, rows, quick) -> None:
    whole, small = Seen(), Seen()
    more = {"per_device_eval_batch_size": 4}
    trainer_of(rows, quick, hooks={"compute_metrics": whole}, **more).evaluate()
    hooks = {"compute_metrics": small, "preprocess_logits_for_metrics": best_and_logp}
    trainer_of(rows, quick, hooks=hooks, **more, eval_accumulation_steps=batches).evaluate()
    best, logps = small.given[0].predictions
    logits, labels = torch.tensor(whole.given[0].predictions), torch.tensor(whole.given[0].label_ids)
    there = best != -100
    assert there.sum() == (labels != -100).sum()
    np.testing.assert_array_equal(best[there], logits.argmax(-1).numpy()[there])
    expected = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0].numpy()
    np.testing.assert_allclose(logps[there], expected[there], rtol=1e-5, atol=1e-5)


def test_batches_stay_apart_where_they_are_not_to_be_concatenated(rows, quick) -> None:
    whole, apart = Seen(), Seen()
    more = {"per_device_eval_batch_size": 4}
    trainer_of(rows, quick, hooks={"compute_metrics": whole}, **more).evaluate()
    trainer_of(rows, quick, hooks={"compute_metrics": apart}, **more, eval_do_concat_batches=False).evaluate()
    assert [len(batch) for batch in apart.given[0].predictions] == [8, 8, 4]
    parts = np.split(whole.given[0].predictions, [8, 16])
    for ours, expected in zip(apart.given[0].predictions, parts, strict=True):
        np.testing.assert_array_equal(ours, expected[:, : ours.shape[1]])


def test_batch_eval_metrics_gives_one_batch_at_a_time_and_says_which_is_the_last(rows, quick) -> None:
    calls, tokens = [], []

    def compute(given: EvalPrediction, compute_result: bool) -> dict[str, float]:
        calls.append((tuple(given.predictions.shape[:1]), len(given.losses), compute_result))
        tokens.append(int(given.inputs["completion_mask"].sum()))
        return {"tokens": sum(tokens)} if compute_result else {}

    more = {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 4}
    trainer = trainer_of(rows, quick, hooks={"compute_metrics": compute}, **more)
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.eval_dataset)
    assert trainer.evaluate()["eval_tokens"] == scored
    assert calls == [((8,), 4, False), ((8,), 4, False), ((4,), 2, True)]


def test_hooks_leave_the_other_metrics_and_training_as_they_are(rows, quick) -> None:
    more = {**quick, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    plain = trainer_of(rows, more)
    hooked = trainer_of(rows, more, hooks={"compute_metrics": lambda _: {"mine": 1.5, "eval_yours": np.float64(2)}})
    for trainer in (plain, hooked):
        trainer.train()
    for ours, other in zip(hooked.state.log_history, plain.state.log_history, strict=True):
        extra = {"eval_mine": 1.5, "eval_yours": 2.0} if "eval_loss" in ours else {}
        assert timeless(ours) == timeless(other) | extra


def test_the_best_model_may_go_by_what_compute_metrics_gives(rows, quick) -> None:
    values = iter([1.0, 3.0, 2.0])
    more = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "mine", "max_steps": 3}
    trainer = trainer_of(rows, quick, hooks={"compute_metrics": lambda _: {"mine": next(values)}}, **more)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (3.0, 2)
    trainer = trainer_of(rows, quick, hooks={"compute_metrics": lambda _: {"other": 1.0}}, **more)
    with pytest.raises(ValueError, match="metric_for_best_model='mine' is neither what evaluation nor .* one of other"):
        trainer.train()


def test_each_evaluation_set_and_predict_have_their_metrics(rows, quick) -> None:
    hooks = {"compute_metrics": Seen(), "eval_dataset": {"a": rows[:3], "b": rows[3:8]}}
    trainer = trainer_of(rows, quick, hooks=hooks)
    metrics = trainer.evaluate()
    assert (metrics["eval_a_rows"], metrics["eval_b_rows"]) == (6, 10)
    assert trainer.evaluate("b").keys() == {name for name in metrics if name.startswith("eval_b_")}
    assert trainer.predict(rows[:4]).metrics["test_rows"] == 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"preprocess_logits_for_metrics": best_and_logp},
            "preprocess_logits_for_metrics is for what",
        ),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches is for what compute_metrics is given"),
        ({"include_inputs_for_metrics": True}, "include_for_metrics is for what compute_metrics is given"),
        ({"compute_metrics": Seen(), "include_for_metrics": ["losses"]}, "'losses': expected 'inputs' and 'loss'"),
        ({"compute_metrics": Seen(), "batch_eval_metrics": True}, "give it the argument compute_result"),
        ({"compute_metrics": 3}, "compute_metrics is a int, expected a function"),
        ({"bf16_full_eval": True}, r"bf16_full_eval=True is not supported: it rounds .* trainer.model.bfloat16\(\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_hooks_that_nothing_would_come_of_are_refused(given, words, rows, quick) -> None:
    hooks = {name: given[name] for name in given if name.startswith(("compute", "preprocess"))}
    with pytest.raises(ValueError, match=words):
        trainer_of(rows, quick, hooks=hooks, **{name: value for name, value in given.items() if name not in hooks})


def test_a_model_that_a_script_rounds_is_evaluated_as_it_then_is(rows, quick) -> None:
    trainer = trainer_of(rows, quick)
    whole = trainer.evaluate()
    trainer.model.bfloat16()
    rounded = trainer.evaluate()
    assert rounded["eval_logps/chosen"] != whole["eval_logps/chosen"]
    assert rounded["eval_logps/chosen"] == pytest.approx(whole["eval_logps/chosen"], rel=2e-2)


def forms_of(trainer: Any) -> dict[str, Any]:
    """One batch of six pairs as loaders give it and as padded dicts."""
    batches = next(iter(trainer.get_train_dataloader()))
    pairs = [TokenPair(**pair._asdict()) for batch in batches for pair in pairs_of(batch)]
    rows = padded_rows(pairs, 0)
    padded = trainer.concatenated_inputs(rows)
    both: dict[str, Tensor] = {}
    for place, side in enumerate(("chosen", "rejected")):
        both |= {name.replace("concatenated", side): value.chunk(2)[place] for name, value in padded.items()}
    return {"list": batches, "one": trainer.layout.collate(pairs), "1.16": rows, "0.11": both}


@pytest.mark.parametrize("form", ["list", "one", "1.16", "0.11"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "aot_pair"])
def test_compute_loss_is_the_loss_and_gradient_of_a_step(loss: str, form: str, rows, quick) -> None:
    more = {"loss_type": loss, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "max_tokens_per_microbatch": 100}
    trainer = trainer_of(rows, {**quick, "train_sampling_strategy": "sequential", "warmup_ratio": 0.0}, **more)
    before = copy.deepcopy(trainer.model.state_dict())
    value = trainer.compute_loss(trainer.model, forms_of(trainer)[form])
    value.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer.train()
    assert value.item() == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        step = before[name] - parameter.detach()
        torch.testing.assert_close(step, 1e-3 * gradients[name], rtol=1e-3, atol=1e-6)


def test_a_batch_by_hand_has_the_metrics_and_logits_of_an_evaluation(rows, quick) -> None:
    trainer = trainer_of(rows[:6], quick, hooks={"eval_dataset": rows[:6]}, train_sampling_strategy="sequential")
    expected, forms = trainer.evaluate(), forms_of(trainer)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, forms["1.16"], train_eval="eval")
    assert loss.item() == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert metrics.keys() == {name for name in timeless(expected) if name not in ("eval_loss", "epoch")}
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    _, outputs = trainer.compute_loss(trainer.model, forms["0.11"], return_outputs=True)
    assert outputs["rewards/chosen"].item() == metrics["eval_rewards/chosen"].item()
    alone, logits, labels = trainer.prediction_step(trainer.model, forms["list"], prediction_loss_only=False)
    assert not alone.requires_grad and alone.item() == pytest.approx(loss.item(), rel=1e-6)
    assert outputs.logits.shape == logits.shape == (*labels.shape, 500)
    assert trainer.prediction_step(trainer.model, forms["one"], True)[1:] == (None, None)
    of_reference, _ = trainer.get_batch_loss_metrics(trainer.ref_model, forms["one"])
    assert of_reference.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_log_probs_of_a_forward_by_hand_give_the_loss(loss: str, rows, quick) -> None:
    trainer = trainer_of(rows, quick, loss_type=loss)
    batch = forms_of(trainer)["0.11"]
    policy = trainer.concatenated_forward(trainer.model, batch)
    with torch.no_grad():
        reference = trainer.concatenated_forward(trainer.ref_model, batch)
    losses, *_ = trainer.dpo_loss(*policy[:2], *reference[:2])
    value = trainer.compute_loss(trainer.model, batch)
    assert losses.mean().item() == pytest.approx(value.item(), rel=1e-5)
    labels = trainer.concatenated_inputs(batch)["concatenated_labels"][:6]
    logps, counts = trainer.get_batch_logps(policy[2], labels)
    assert policy[4].item() == pytest.approx(float(-logps.sum() / counts.sum()), rel=1e-5)
    chosen, _ = trainer.compute_ref_log_probs(batch)
    expected = reference[0] * counts if loss == "ipo" else reference[0]
    torch.testing.assert_close(chosen, expected.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("own_reference", [True, False], ids=["a copy", "adapters off"])
def test_a_batch_by_hand_has_no_dropout_before_and_after_training(own_reference: bool, rows, quick) -> None:
    model = tiny_llama(attention_dropout=0.5)
    if not own_reference:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    trainer = fastdpo.DPOTrainer(
        model, args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=byte_level()
    )
    batch = forms_of(trainer)["1.16"]
    before = trainer.compute_ref_log_probs(batch)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), rel=1e-6)
    trainer.train()
    trainer.reference.memory.__init__()
    assert all(torch.equal(*both) for both in zip(before, trainer.compute_ref_log_probs(batch), strict=True))
    for call in (
        trainer.compute_loss,
        trainer.concatenated_forward,
        lambda *given: trainer.prediction_step(*given, False),
    ):
        once, again = call(trainer.model, batch), call(trainer.model, batch)
        for one, other in zip(*((once, again) if isinstance(once, tuple) else ([once], [again])), strict=True):
            assert torch.equal(one, other)
    assert trainer.model.training
    assert noise_of(trainer.model)


def test_with_dropout_asked_for_a_prediction_has_none_and_leaves_each_modules_mode(rows, quick) -> None:
    trainer = fastdpo.DPOTrainer(
        tiny_llama(attention_dropout=0.5),
        args=fastdpo.DPOConfig(**quick, disable_dropout=False),
        train_dataset=rows,
        processing_class=byte_level(),
    )
    batch = forms_of(trainer)["1.16"]
    assert trainer.prediction_step(trainer.model, batch, True)[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert trainer.model.training
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(math.log(2), rel=1e-4)
    trainer.model.eval()
    trainer.reference.memory.__init__()
    trainer.compute_ref_log_probs(batch)
    assert not trainer.model.training


@pytest.mark.parametrize("options", [{"rpo_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"]}], ids=["rpo", "sft"])
def test_the_cross_entropy_of_the_chosen_tokens_is_logged_where_it_is_learned(options, rows, quick) -> None:
    trainer = trainer_of(rows[:6], quick, hooks={"eval_dataset": rows[:6]}, **options)
    batch = forms_of(trainer)["1.16"]
    with torch.no_grad():
        expected = trainer.concatenated_forward(trainer.model, batch)[4].item() if "rpo_alpha" in options else None
    assert "nll_loss" not in trainer_of(rows, quick, hooks={"eval_dataset": rows[:6]}).evaluate()
    found = trainer.evaluate()["eval_nll_loss"]
    ids, scored = batch["input_ids"][:6], batch["completion_mask"][:6, 1:]
    logits = trainer.model(input_ids=ids, attention_mask=batch["attention_mask"][:6]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    assert found == pytest.approx(float((-(logps * scored).sum() / scored.sum()).detach()), rel=1e-5)
    assert expected is None or found == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert all("nll_loss" in row for row in trainer.state.log_history if "loss" in row)


def test_a_batch_by_hand_changes_nothing_of_a_run(rows, quick) -> None:
    class ByHand(TrainerCallback):
        trainer: Any

        def on_step_end(self, *_: Any, **__: Any) -> None:
            batch = forms_of(self.trainer)["1.16"]
            self.trainer.compute_loss(self.trainer.model, batch)

    options = {**quick, "loss_type": "bco_pair", "train_sampling_strategy": "sequential"}
    plain, watched = trainer_of(rows, options), trainer_of(rows, options)
    callback = ByHand()
    callback.trainer = watched
    watched.add_callback(callback)
    for trainer in (plain, watched):
        trainer.train()
    assert [timeless(row) for row in watched.state.log_history] == [timeless(row) for row in plain.state.log_history]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, b: t.compute_loss(tiny_llama(), b), "model is no LlamaForCausalLM of this trainer"),
        (lambda t, b: t.compute_loss(t.model, 3), "a batch is a int: expected what get_train_dataloader gives"),
        (lambda t, b: t.evaluation_loop([b], "Evaluation"), "takes a loader of this trainer"),
        (lambda t, b: t.tokenize_row({"prompt": "a", "chosen": "b", "rejected": "b"}), "nothing to learn from"),
    ],
    ids=["model", "batch", "loader", "row"],
)
def test_what_is_none_of_this_trainer_is_named(call, words, rows, quick) -> None:
    trainer = trainer_of(rows, quick)
    with pytest.raises(ValueError, match=words):
        call(trainer, next(iter(trainer.get_train_dataloader())))


def test_an_evaluation_loop_gives_metrics_and_predictions_without_logging(rows, quick) -> None:
    trainer = trainer_of(rows, quick)
    expected = timeless(trainer.evaluate())
    lines = len(trainer.state.log_history)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", metric_key_prefix="eval")
    assert timeless(output.metrics) == {name: value for name, value in expected.items() if name != "epoch"}
    assert output.num_samples == 10 and len(trainer.state.log_history) == lines
    assert output.predictions.shape[0] == output.label_ids.shape[0] == 20
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "", True).predictions is None


def test_a_row_is_tokenized_under_the_names_of_the_older_trl(rows, quick) -> None:
    trainer = trainer_of(rows, quick, label_pad_token_id=-7)
    row = trainer.tokenize_row(rows[0])
    ours = trainer.train_dataset[0]
    assert row["chosen_input_ids"] == ours["prompt_ids"] + ours["chosen_ids"]
    assert row["rejected_labels"] == [-7] * len(ours["prompt_ids"]) + ours["rejected_ids"]
    assert row["prompt_attention_mask"] == [1] * len(ours["prompt_ids"])
    assert len(row) == 8


def test_stored_metrics_join_the_next_line_of_their_kind_as_means(rows, quick) -> None:
    class Stores(TrainerCallback):
        trainer: Any

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.trainer.store_metrics({"mine": torch.tensor(float(state.global_step))})
            self.trainer.store_metrics({"eval_mine": 10.0 * state.global_step}, train_eval="eval")

    trainer = trainer_of(rows, quick, logging_steps=2, eval_strategy="steps", eval_steps=4)
    callback = Stores()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    assert [row["mine"] for row in trainer.state.log_history if "loss" in row] == [1.5, 3.5]
    assert [row["eval_mine"] for row in trainer.state.log_history if "eval_loss" in row] == [25.0]
    assert "mine" not in trainer.state.log_history[-1] and "eval_mine" not in trainer.evaluate()


@pytest.mark.parametrize("name", [name for names in NOT_CALLED.values() for name in names.split()])
def test_a_method_that_training_never_calls_is_not_overridden_silently(name: str, rows, quick) -> None:
    class Mixin:
        pass

    setattr(Mixin, name, lambda *_, **__: None)
    own = type("Own", (fastdpo.DPOTrainer,), {name: lambda *_, **__: None})
    mixed = type("Mixed", (Mixin, fastdpo.DPOTrainer), {})
    for trainer, who in ((own, "Own"), (type("Below", (own,), {}), "Own"), (mixed, "Mixin")):
        with pytest.raises(ValueError, match=f"{who} overrides {name}, which training here never calls: "):
            trainer_of(rows, quick, trainer=trainer)


def test_a_subclass_may_override_what_training_calls_and_add_what_it_wants(rows, quick) -> None:
    class Own(fastdpo.DPOTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "twice": self.twice(logs.get("loss", 0.0))}, start_time)

        def twice(self, value: float) -> float:
            return 2 * value

    trainer = trainer_of(rows, quick, trainer=Own)
    trainer.train()
    assert all(row["twice"] == 2 * row["loss"] for row in trainer.state.log_history if "loss" in row)


def test_attributes_are_those_that_scripts_read(rows, tokenizer, quick) -> None:
    trainer = trainer_of(rows, quick, hooks={"eval_dataset": None})
    assert trainer.eval_dataset is None and trainer.optimizer is None and trainer.lr_scheduler is None
    assert len(trainer.train_dataset) == len(rows) and trainer.state.global_step == 0
    assert trainer.tokenizer is trainer.processing_class
    assert trainer.ref_model is trainer.reference.policy.model and trainer.model is trainer.policy.model
    trainer.train()
    assert trainer.state.global_step == 4 and len(trainer.state.log_history) == 5
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0] == 0.0
    assert trainer.accelerator.num_processes == 1
    one = trainer_of(rows, quick).eval_dataset
    assert isinstance(one, Dataset) and len(one) == 10
    several = trainer_of(rows, quick, hooks={"eval_dataset": {"a": rows[:3]}}).eval_dataset
    assert list(several) == ["a"] and len(several["a"]) == 3
    lora = fastdpo.DPOTrainer(
        tiny_llama(),
        args=fastdpo.DPOConfig(**quick),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    assert lora.ref_model is None


def test_that_logits_cost_another_pass_is_said(rows, quick, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        trainer_of(rows, quick, hooks={"compute_metrics": Seen()})
    assert sum("another pass of the model's own forward" in record.message for record in caplog.records) == 1
