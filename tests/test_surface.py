"""What scripts of TRL's trainer call besides `train` means the same here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from torch import Tensor
from trl import DPOTrainer as PeerTrainer

import fastdpo
from fastdpo import surface


def trainer_of(rows: list, tokenizer: Any, quick: dict, **more: Any) -> fastdpo.DPOTrainer:
    more = {"args": fastdpo.DPOConfig(**quick), "train_dataset": rows, "processing_class": tokenizer, **more}
    return fastdpo.DPOTrainer(more.pop("model", None) or tiny_llama(), **more)


def test_the_constructor_takes_arguments_in_the_order_of_trl() -> None:
    import inspect

    ours, theirs = (list(inspect.signature(one.__init__).parameters) for one in (fastdpo.DPOTrainer, PeerTrainer))
    assert ours[: len(theirs)] == theirs


def test_options_of_the_constructor_take_precedence_over_those_of_args(rows, tokenizer, quick) -> None:
    args = fastdpo.DPOConfig(**quick, beta=0.3, loss_type="sigmoid")
    trainer = trainer_of(rows, tokenizer, quick, args=args, beta=0.5, loss_type="ipo", max_length=40)
    assert (trainer.args.beta, trainer.args.loss_type, trainer.args.max_length) == (0.5, ["ipo"], 40)
    assert (args.beta, args.loss_type) == (0.3, ["sigmoid"])
    assert trainer.loss.beta == 0.5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"betta": 0.1}, "unknown option 'betta'.*did you mean 'beta'"),
        ({"beta": -1.0}, "beta"),
        ({"evaluation_strategy": "nope"}, "eval_strategy"),
        ({"generate_during_eval": True}, "generate_during_eval needs an eval_dataset"),
        ({"model_init": tiny_llama}, "both model and model_init"),
        ({"args": 0.1}, "args is a float, expected a DPOConfig.*; 0.11's third argument, beta, is a keyword: beta=0.1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_constructor_cannot_honour_it_names(given, words, rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(rows, tokenizer, quick, **given)


def test_model_init_gives_the_model(rows, tokenizer, quick) -> None:
    made = []
    trainer = fastdpo.DPOTrainer(
        args=fastdpo.DPOConfig(**quick),
        model_init=lambda: made.append(tiny_llama()) or made[0],
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.model is made[0] and len(made) == 1


def test_a_given_optimizer_and_schedule_are_stepped(rows, tokenizer, quick) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = trainer_of(rows, tokenizer, quick, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.optimizer is optimizer and trainer.lr_scheduler is schedule
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == [0.1, 0.05, 0.025, 0.0125]
    alone = trainer_of(rows, tokenizer, quick, args=fastdpo.DPOConfig(**quick | {"optim": "sgd", "learning_rate": 0.1}))
    alone.args.lr_scheduler_type = "constant"
    alone.train()
    ours, other = (one.state.log_history for one in (trainer, alone))
    assert ours[1]["loss"] == other[1]["loss"] and ours[2]["loss"] != other[2]["loss"]  # the second step's rate differs


def test_a_given_optimizer_gets_the_schedule_of_args(rows, tokenizer, quick) -> None:
    model = tiny_llama()
    trainer = trainer_of(
        rows, tokenizer, quick, model=model, optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    )
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_an_optimizer_over_weights_that_adapters_froze_is_refused(rows, tokenizer, quick) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = trainer_of(rows, tokenizer, quick, model=model, peft_config=lora, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="does not have 28 parameters that train, such as .*lora_A.*PeftModel"):
        trainer.train()


def test_metrics_and_state_are_saved_where_scripts_look_for_them(rows, tokenizer, quick, capsys) -> None:
    trainer = trainer_of(rows, tokenizer, quick, eval_dataset=rows[:5])
    output = trainer.train()
    trainer.log_metrics("train", output.metrics)
    assert "***** train metrics *****" in capsys.readouterr().out
    trainer.save_metrics("train", output.metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    directory = Path(quick["output_dir"])
    assert json.loads((directory / "train_results.json").read_text()) == output.metrics
    assert {"train_loss", "eval_loss"} <= set(json.loads((directory / "all_results.json").read_text()))
    assert json.loads((directory / "trainer_state.json").read_text())["global_step"] == 4
    assert trainer.is_world_process_zero() and trainer.is_local_process_zero()


def test_the_numbers_of_a_trainer(rows, tokenizer, quick) -> None:
    trainer = trainer_of(rows, tokenizer, quick)
    assert trainer.get_num_trainable_parameters() == sum(p.numel() for p in trainer.model.parameters())
    with pytest.raises(ValueError, match="before train"):
        trainer.get_learning_rates()
    trainer.train()
    assert trainer.get_learning_rates() == [0.0, 0.0]


def test_loaders_give_every_pair_once(rows, tokenizer, quick) -> None:
    trainer = trainer_of(rows, tokenizer, quick, eval_dataset={"a": rows[:5], "b": rows[5:12]})
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 4 and all(sum(batch.num_pairs for batch in step) == 6 for step in batches)
    for given, count in (("a", 5), ("b", 7), (rows[:3], 3)):
        loader = trainer.get_eval_dataloader(given)
        assert sum(batch.num_pairs for step in loader for batch in step) == count
    with pytest.raises(ValueError, match=r"2 evaluation sets \(a, b\): name one"):
        trainer.get_eval_dataloader()
    with pytest.raises(ValueError, match="2 named sets, and a loader is for one: give one"):
        trainer.get_eval_dataloader({"c": rows[:2], "d": rows[2:4]})


def test_the_reference_can_be_asked(rows, tokenizer, quick) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = trainer_of(rows, tokenizer, quick | {"learning_rate": 0.1}, peft_config=lora)
    (batch, *_), *_ = trainer.get_train_dataloader()
    before = trainer.compute_ref_log_probs(batch)
    trainer.train()
    trainer.reference.memory.__init__()
    after = trainer.compute_reference_log_probs(batch)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    ids = batch.input_ids[:, :5]
    trained = trainer.model(input_ids=ids).logits
    with trainer.null_ref_context():
        assert not torch.allclose(trainer.model(input_ids=ids).logits, trained)
    assert torch.equal(trainer.model(input_ids=ids).logits, trained)


def test_a_reference_that_is_another_model_is_no_state_of_the_policy(rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match="a frozen copy of the policy"):
        trainer_of(rows, tokenizer, quick).null_ref_context()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "apo_zero", "aot_pair", "bco_pair"])
def test_the_loss_on_log_probs_from_elsewhere_is_its_formula(loss: str, rows, tokenizer, quick) -> None:
    trainer = trainer_of(rows, tokenizer, quick, beta=0.2, loss_type=loss)
    values = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    chosen = values[0].clone().requires_grad_()
    losses, chosen_rewards, rejected_rewards = trainer.dpo_loss(chosen, *values[1:])
    a, b = values[0] - values[2], values[1] - values[3]
    torch.testing.assert_close(chosen_rewards, 0.2 * a)
    torch.testing.assert_close(rejected_rewards, 0.2 * b)
    softplus = torch.nn.functional.softplus
    expected = {
        "sigmoid": softplus(-0.2 * (a - b)),
        "ipo": (a - b - 1 / 0.4) ** 2,
        "hinge": torch.relu(1 - 0.2 * (a - b)),
        "apo_zero": 1 - torch.sigmoid(0.2 * a) + torch.sigmoid(0.2 * b),
        "bco_pair": softplus(-0.2 * a) + softplus(0.2 * b),
    }
    if loss == "aot_pair":
        rank = a.argsort().argsort()
        expected["aot_pair"] = softplus(-0.2 * (a - b.sort().values[rank]))
    torch.testing.assert_close(losses.double(), expected[loss], rtol=1e-6, atol=1e-6)
    losses.mean().backward()
    assert chosen.grad is not None and chosen.grad.abs().max() > 0


def test_batch_logps_are_sums_over_labels_that_are_no_padding() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 1, 2, -100, -100]])
    sums, counts = surface.Surface.get_batch_logps(logits, labels)
    logps = logits.log_softmax(-1)

    def at(row: int, *places: int) -> Tensor:
        return torch.stack([logps[row, place - 1, labels[row, place]] for place in places]).sum()

    torch.testing.assert_close(sums, torch.stack([at(0, 2, 3, 4), at(1, 1, 2)]))
    assert counts.tolist() == [3, 2]
    same_place, _ = surface.Surface.get_batch_logps(logits, labels, is_encoder_decoder=True)
    torch.testing.assert_close(same_place[1], logps[1, 1, 1] + logps[1, 2, 2])
    padded_by_7, _ = surface.Surface.get_batch_logps(logits, labels.where(labels != -100, 7), label_pad_token_id=7)
    torch.testing.assert_close(padded_by_7, sums)
    with pytest.raises(ValueError, match=r"logits are \(2, 5, 11\) and labels \(2, 4\)"):
        surface.Surface.get_batch_logps(logits, labels[:, 1:])


@pytest.mark.parametrize("budget", [60, 10_000])
def test_predict_gives_the_rewards_of_each_row_in_order(budget: int, rows, tokenizer, quick) -> None:
    quick |= {"learning_rate": 1e-2, "per_device_eval_batch_size": 7, "max_tokens_per_microbatch": budget}
    trainer = trainer_of(rows, tokenizer, quick)
    trainer.train()
    found = trainer.predict(rows + rows[:3])
    assert found.predictions.shape == (27, 2) and (found.predictions[:3] == found.predictions[24:]).all()
    for index in (0, 5, 23):
        alone = trainer.evaluate([rows[index]])
        expected = [alone["eval_rewards/chosen"], alone["eval_rewards/rejected"]]
        assert found.predictions[index] == pytest.approx(expected, abs=1e-5)
    assert found.metrics["test_rewards/chosen"] == pytest.approx(found.predictions[:, 0].mean(), abs=1e-6)
    with pytest.raises(ValueError, match="one table of rows"):
        trainer.predict({"a": rows, "b": rows})
