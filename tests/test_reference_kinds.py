"""Every way to have a reference: what it gives, when it moves, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import fastdpo
from fastdpo.batch import pack
from fastdpo.data import TokenPair
from fastdpo.model import Policy
from fastdpo.reference import FROZEN_ADAPTER

LORA = LoraConfig(r=4, target_modules="all-linear")
PAIR = TokenPair([5, 6, 7], [8, 9, 10], [11, 12])


def trainer_of(model: Any, rows: list, tokenizer: Any, quick: dict, **more: Any) -> fastdpo.DPOTrainer:
    arguments = {name: more.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in more}
    return fastdpo.DPOTrainer(
        model,
        args=fastdpo.DPOConfig(**quick | more),
        train_dataset=rows,
        processing_class=tokenizer,
        **arguments,
    )


def with_adapters(*seeds: int) -> PeftModel:
    """A tiny model whose adapters, named a, b, ..., do something, each drawn from its seed."""
    model: Any = tiny_llama()
    for name, seed in zip("abc", seeds, strict=False):
        model = model if isinstance(model, PeftModel) else get_peft_model(model, LORA, adapter_name=name)
        if name not in model.peft_config:
            model.add_adapter(name, LORA)
        torch.manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if f".{name}." in path:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    model.set_adapter("a")
    return model


@torch.no_grad()
def logps(model: Any) -> Tensor:
    return Policy(model, None)(pack([PAIR]))[0].clone()


def reference_logps(trainer: fastdpo.DPOTrainer) -> Tensor:
    reference = trainer.reference
    with reference.without_policy():
        return logps(reference.policy.model)


def losses(trainer: fastdpo.DPOTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_reference_that_becomes_the_policy_starts_each_time_from_ln_2(lora, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 6, "learning_rate": 1e-2, "eval_strategy": "steps"}
    synced = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2, "eval_steps": 2}
    more = {"peft_config": LORA} if lora else {}
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | synced, eval_dataset=rows[:5], **more)
    trainer.train()
    found = losses(trainer)
    for step, loss in enumerate(found):
        assert (loss == pytest.approx(math.log(2), abs=1e-7)) == (step % 2 == 0)
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluated == pytest.approx([math.log(2)] * 3, abs=1e-7)  # no log-prob of the old reference is remembered
    assert torch.equal(reference_logps(trainer), logps(trainer.model))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_reference_moves_by_its_share_towards_the_policy(lora, fused, rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 3, "learning_rate": 1e-2, "fused_kernels": fused}
    synced = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 3}
    model = with_adapters(1) if lora else tiny_llama()
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer = trainer_of(model, rows, tokenizer, quick | synced)
    trainer.train()
    theirs = dict(trainer.reference.policy.model.named_parameters())
    for name, start in before.items():
        now = dict(trainer.model.named_parameters())[name].detach()
        expected = 0.75 * start + 0.25 * now
        assert not torch.equal(start, now)
        torch.testing.assert_close(theirs[name.replace(".a.", f".{FROZEN_ADAPTER}.")], expected, rtol=1e-6, atol=1e-7)


def test_a_given_reference_model_follows_as_well(rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 2, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    other = tiny_llama(initializer_range=0.2)
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick, ref_model=other)
    trainer.train()
    assert torch.equal(logps(other), logps(trainer.model))
    with pytest.raises(ValueError, match="ref_model has no .*lora_A.* of that shape"):
        trainer_of(tiny_llama(), rows, tokenizer, quick, ref_model=tiny_llama(), peft_config=LORA)


def test_two_adapters_of_one_base_train_and_refer(rows, tokenizer, quick) -> None:
    model = with_adapters(1, 2)
    one, two = logps(model), None
    model.set_adapter("b")
    two = logps(model)
    model.set_adapter("a")
    frozen = {name: value.clone() for name, value in model.named_parameters() if ".b." in name}
    quick |= {"model_adapter_name": "a", "ref_adapter_name": "b"}
    trainer = trainer_of(model, rows, tokenizer, quick)
    assert torch.equal(reference_logps(trainer), two) and torch.equal(logps(model), one)
    assert not trainer.reference.equals_policy
    trainer.train()
    assert torch.equal(reference_logps(trainer), two) and not torch.allclose(logps(model), one)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())
    assert trainer.model.active_adapters == ["a"]


def test_the_same_adapter_loaded_twice_starts_from_margins_of_0(tmp_path: Path, rows, tokenizer, quick) -> None:
    with_adapters(1).save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sft/a", adapter_name="policy", is_trainable=True)
    model.load_adapter(tmp_path / "sft/a", adapter_name="reference")
    trainer = trainer_of(model, rows, tokenizer, quick | {"ref_adapter_name": "reference"})
    assert trainer.reference.equals_policy
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-7)
    implicit = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sft/a", is_trainable=True)
    copied = trainer_of(implicit, rows, tokenizer, quick)  # the trainer's own frozen copy is the same reference
    copied.train()
    assert losses(copied) == losses(trainer)


def test_model_adapter_name_says_which_of_several_adapters_trains(rows, tokenizer, quick) -> None:
    model = with_adapters(1, 2)
    trainer = trainer_of(model, rows, tokenizer, quick | {"model_adapter_name": "b"})
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert moved and all(".b." in name for name in moved)


def test_a_reference_model_loads_with_arguments_of_its_own(tmp_path: Path, rows, tokenizer, quick) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    options = {"ref_model_init_kwargs": {"dtype": torch.float64}, "force_use_ref_model": True}
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick | options, ref_model=str(tmp_path / "model"))
    assert trainer.ref_model.dtype == torch.float64 and trainer.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"model_adapter_name": "z"},
            r"model_adapter_name='z', and model is a PeftModel with the adapters \['a', 'b'\]",
        ),
        ({"ref_adapter_name": "a"}, "ref_adapter_name='a' is the adapter that trains"),
        ({"ref_adapter_name": "b", "model_adapter_name": "b"}, "ref_adapter_name='b' is the adapter that trains"),
        ({"ref_adapter_name": "b", "ref_model": True}, "two references"),
        ({"force_use_ref_model": True}, "there is no ref_model"),
        ({"ref_model_init_kwargs": {"dtype": "float32"}, "ref_model": True}, "give ref_model by name or path"),
        ({"sync_ref_model": True, "reference_free": True}, "there is none"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "cannot be known ahead"),
        ({"ref_model_sync_steps": 3}, "no effect without sync_ref_model"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "above 0 and at most 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_references_that_cannot_be_are_refused(options, words, rows, tokenizer, quick) -> None:
    model = tiny_llama() if {"ref_model", "force_use_ref_model"} & set(options) == {"force_use_ref_model"} else None
    given = {**options, "ref_model": tiny_llama()} if options.pop("ref_model", False) else options
    with pytest.raises(ValueError, match=words):
        trainer_of(model or with_adapters(1, 2), rows, tokenizer, quick, **given)


def test_adapter_names_need_a_model_with_adapters(rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match="model is no PeftModel"):
        trainer_of(tiny_llama(), rows, tokenizer, quick, ref_adapter_name="b", use_peft=True)
