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


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_reference_that_follows_says_so(lora, rows, tokenizer, quick) -> None:
    synced = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 3}
    said = trainer_of(with_adapters(1) if lora else tiny_llama(), rows, tokenizer, quick | synced).reference.description
    assert "it follows the policy, by 0.25 every 3 steps" in said and ("factors mixed" in said) == lora


def test_a_given_reference_model_follows_as_well(rows, tokenizer, quick) -> None:
    quick |= {"max_steps": 2, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    other = tiny_llama(initializer_range=0.2)
    trainer = trainer_of(tiny_llama(), rows, tokenizer, quick, ref_model=other)
    trainer.train()
    assert torch.equal(logps(other), logps(trainer.model))
    with pytest.raises(ValueError, match="ref_model has no .*lora_A.* of that shape"):
        trainer_of(tiny_llama(), rows, tokenizer, quick, ref_model=tiny_llama(), peft_config=LORA)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, r"q_proj.lora_A.ADAPTER.weight is \(4, 32\) in the policy and \(8, 32\) in the reference"),
        ({"lora_alpha": 32}, "q_proj.scaling.ADAPTER is 2.0 in the policy and 8.0 in the reference"),
        ({"target_modules": ["q_proj"]}, r"k_proj.lora_A.ADAPTER.weight is \(4, 32\) in the policy and missing"),
        ({"use_dora": True}, "lora_magnitude_vector.ADAPTER.weight is missing in the policy"),
    ],
    ids=["rank", "scale", "fewer modules", "DoRA"],
)
@pytest.mark.parametrize("second", ["adapter", "model"])
def test_a_reference_follows_adapters_of_its_own_kind_alone(second, changes, words, rows, tokenizer, quick) -> None:
    """Mixed with a share of 1 it was another model than the policy."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes})
    model, given = with_adapters(1), {}
    if second == "adapter":
        model.add_adapter("other", config)
        given = {"ref_adapter_name": "other"}
    else:
        given = {"ref_model": get_peft_model(tiny_llama(), config, adapter_name="a")}
    with pytest.raises(ValueError, match=f"sync_ref_model mixes .*({words}|ref_model has no .* of that shape)"):
        trainer_of(model, rows, tokenizer, quick, sync_ref_model=True, **given)


def test_a_reference_that_becomes_the_policy_takes_what_the_user_froze_of_it_too(rows, tokenizer, quick) -> None:
    model = with_adapters(1, 2)
    for name, parameter in model.named_parameters():
        if ".lora_A.a." in name:
            parameter.requires_grad_(False)
    quick |= {"max_steps": 1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = trainer_of(model, rows, tokenizer, quick, ref_adapter_name="b")
    trainer.train()
    assert torch.equal(reference_logps(trainer), logps(model))


def test_a_reference_whose_frozen_adapter_a_later_trainer_replaced_says_so(rows, tokenizer, quick) -> None:
    """It gave the log-probs of the later one."""
    model = with_adapters(1)
    first = trainer_of(model, rows, tokenizer, quick)
    first.train()
    second = trainer_of(model, rows, tokenizer, quick)
    started = logps(model)
    with pytest.raises(RuntimeError, match="a later DPOTrainer on this model put its own there"):
        first.reference.compute(pack([PAIR]))
    first.reference.release()
    second.train()
    assert torch.equal(reference_logps(second), started)


def test_a_frozen_copy_replicates_no_layers_again(rows, tokenizer, quick) -> None:
    """The model given had other layers once a trainer was built on it."""
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=4, layer_replication=[[0, 2], [1, 2]]))
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if "lora_B" in name else 0
    before = logps(model)
    trainer = trainer_of(model, rows, tokenizer, quick)
    assert torch.equal(logps(model), before) and torch.equal(reference_logps(trainer), before)


@pytest.mark.parametrize("lora", [{"trainable_token_indices": [7]}, {"modules_to_save": ["embed_tokens"]}], ids=list)
def test_an_adapter_that_changes_a_token_which_no_probe_has_is_kept_as_the_reference(
    lora, rows, tokenizer, quick
) -> None:
    """With the adapters off the reference was the base, and the first margins were not 0."""
    model: Any = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], **lora))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data[7] += 1
        elif "trainable_tokens_delta" in name:
            parameter.data += 1
    before = logps(model)  # PAIR has the token 7
    trainer = trainer_of(model, rows, tokenizer, quick)
    assert torch.equal(reference_logps(trainer), before)


def test_a_reference_model_may_have_its_adapters_merged(rows, tokenizer, quick) -> None:
    ref_model = with_adapters(1)
    ref_model.merge_adapter()
    expected = logps(ref_model)
    assert torch.equal(reference_logps(trainer_of(tiny_llama(), rows, tokenizer, quick, ref_model=ref_model)), expected)
    with pytest.raises(ValueError, match="ref_model has merged adapters"):
        trainer_of(with_adapters(1), rows, tokenizer, quick, ref_model=ref_model, sync_ref_model=True)


@pytest.mark.parametrize("adapters", [False, True], ids=["of the model", "of an adapter"])
def test_a_reference_has_no_dropout_before_training_either(adapters, rows, tokenizer, quick) -> None:
    """Dropout was off within train() alone, so that a resumed run did not know its reference again."""
    model = tiny_llama(attention_dropout=0.5)
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=not adapters)
    trainer = trainer_of(get_peft_model(model, lora), rows, tokenizer, quick)
    assert trainer.policy.training
    batch = pack([PAIR])
    assert torch.equal(trainer.reference.compute(batch), trainer.reference.compute(batch))


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


def test_the_adapter_loaded_first_may_be_the_reference_of_the_active_one(rows, tokenizer, quick) -> None:
    model = with_adapters(1, 2)
    expected = logps(model)
    model.set_adapter("b")
    trainer = trainer_of(model, rows, tokenizer, quick | {"ref_adapter_name": "a"})
    assert torch.equal(reference_logps(trainer), expected) and trainer.model.active_adapters == ["b"]


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
