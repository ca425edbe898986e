"""The auxiliary loss that keeps a mixture of experts balanced: transformers' own, whatever the layout."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from tiny_models import RAGGED, gradient_error, tiny_model
from transformers import MixtralConfig, MixtralForCausalLM

import fastdpo
from fastdpo.batch import pack, pad
from fastdpo.model import Policy, balances_routers, checkpointing

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe")


def own_loss(model: Any) -> torch.Tensor:
    """Of the model's own forward on the padded batch."""
    batch = pad(RAGGED)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_router_logits": True}
    return model(**inputs).aux_loss


def gradients(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("layout", [pack, pad], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MIXTURES)
def test_it_is_that_of_the_padded_batch(name: str, layout: Any, checkpointed: bool) -> None:
    model = tiny_model(name)
    policy = Policy(model)
    policy.router_coef = 1.0
    expected = own_loss(model)
    of_model = gradients(expected, model)
    with checkpointing(policy, {}) if checkpointed else nullcontext():
        _, stats = policy.train()(layout(RAGGED), ("entropy",))
        torch.testing.assert_close(stats["router_loss"], expected, rtol=1e-5, atol=1e-6)
        found = gradients(stats["router_loss"], model)
    assert any("gate" in key or "router" in key for key in found)
    assert gradient_error(found, {key: of_model[key] for key in found}) < 1e-4


def test_passes_without_statistics_compute_none_of_it() -> None:
    policy = Policy(tiny_model("mixtral"))
    policy.router_coef = 1.0
    assert policy(pack(RAGGED))[1] == {}


def mixtral(**changes: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.1}
    return MixtralForCausalLM(MixtralConfig(**shape, **heads, **changes))


def trained(model: Any, rows: list, tokenizer: Any, quick: dict, **more: Any) -> fastdpo.TrainResult:
    return fastdpo.train(model, rows, rows[:5], processing_class=tokenizer, **quick | more)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_it_is_added_and_logged_in_training_and_evaluation(lora: bool, rows, tokenizer, quick) -> None:
    more: Any = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if lora else {}
    with_it = trained(mixtral(), rows, tokenizer, quick, router_aux_loss_coef=0.5, **more)
    first = with_it.history[0]
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["aux_loss"], rel=1e-6)
    assert with_it.metrics["eval_aux_loss"] > 0.9
    without = trained(mixtral(), rows, tokenizer, quick, **more)
    assert "aux_loss" not in without.history[0] and without.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_models_config_decides_where_the_option_is_unset(rows, tokenizer, quick, caplog) -> None:
    asked = mixtral(output_router_logits=True, router_aux_loss_coef=0.25)
    first = trained(asked, rows, tokenizer, quick).history[0]
    assert first["loss"] == pytest.approx(math.log(2) + 0.25 * first["aux_loss"], rel=1e-6)
    off = trained(mixtral(output_router_logits=True), rows, tokenizer, quick, router_aux_loss_coef=0.0)
    assert "aux_loss" not in off.history[0]
    with caplog.at_level("INFO", "fastdpo"):
        trained(mixtral(), rows, tokenizer, quick)
    assert "routers: no auxiliary loss; TRL 1.16 adds 0.001 times it" in caplog.text


def test_a_model_without_routers_is_refused(rows, tokenizer, quick) -> None:
    assert not balances_routers(tiny_llama())
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1, and LlamaForCausalLM has no auxiliary loss"):
        trained(tiny_llama(), rows, tokenizer, quick, router_aux_loss_coef=0.1)


def test_adapters_on_the_experts_own_weights_train_as_without_our_blocks(rows, tokenizer, quick) -> None:
    options = {"use_peft": True, "lora_target_modules": ["q_proj"], "lora_r": 4}
    options |= {"lora_target_parameters": ["mlp.experts.gate_up_proj"]}
    runs = [trained(mixtral(), rows, tokenizer, quick, fused_kernels=on, **options) for on in (False, True)]
    moved = [name for name, value in runs[0].model.named_parameters() if "experts.lora_B" in name and value.abs().sum()]
    assert len(moved) == 2  # one a layer
    one, other = ([row["loss"] for row in run.history if "grad_norm" in row] for run in runs)
    assert one[0] == pytest.approx(math.log(2), abs=1e-6) and one[-1] < one[0]
    assert one == pytest.approx(other, abs=1e-4)
