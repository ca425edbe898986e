"""Switching a model's adapters for the reference: what peft's own switches do, at a fraction of their time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fastdpo
from fastdpo.reference import FROZEN_ADAPTER, active_adapter, adapter_switch

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, Any] = {
    "LoRA": LoraConfig(**LORA),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "modules_to_save": LoraConfig(r=4, **PROJECTIONS, modules_to_save=["lm_head", "embed_tokens"]),
    "trainable tokens": LoraConfig(r=4, **PROJECTIONS, trainable_token_indices=[3, 5, 8]),
    "LoHa": peft.LoHaConfig(r=4, **PROJECTIONS),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=8, **PROJECTIONS),
    "VeRA": peft.VeraConfig(r=4, **PROJECTIONS),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
}


def adapted(kind: str) -> Any:
    """A model whose adapter does something, some of it frozen by the user."""
    model = get_peft_model(tiny_llama(), copy.deepcopy(KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(2, 14)[None]).logits


def state(model: nn.Module) -> list[Any]:
    """Everything that a switch may touch: flags of modules, their children, and what trains."""
    flags = [
        (name, {key: value for key, value in vars(module).items() if isinstance(value, (bool, str, list))})
        for name, module in model.named_modules()
    ]
    return [flags, [parameter.requires_grad for parameter in model.parameters()]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_adapters_are_off_as_peft_has_them_off_and_afterwards_all_is_as_before(kind: str) -> None:
    model = adapted(kind)
    with_adapters = logits(model)
    with model.disable_adapter():
        expected = logits(model)
    trained = state(model := adapted(kind))[1]
    off = adapter_switch(model, model.disable_adapter)
    before = state(model)  # after peft's own switch, which writes the name of an adapter as a list of one
    assert before[1] == trained
    for _ in range(2):
        with off():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), with_adapters) and state(model) == before
    with pytest.raises(KeyboardInterrupt), off():
        raise KeyboardInterrupt
    assert torch.equal(logits(model), with_adapters) and state(model) == before


@pytest.mark.parametrize("start", ["fresh", "trained before"])
def test_biases_that_train_beside_adapters_are_in_the_reference_as_they_were(
    start: str, rows, tokenizer, quick
) -> None:
    """No switch of peft's turns them off."""
    model: Any = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(**LORA, bias="all"))
    if start == "trained before":
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.rand_like(parameter) if parameter.requires_grad else 0
    trainer = fastdpo.DPOTrainer(model, args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer)
    pair = fastdpo.data.TokenPair([3, 4, 5], [6, 7, 8], [9, 10])
    batch, reference = trainer.layout.collate([pair]), trainer.reference
    bias = next(value for name, value in model.named_parameters() if name.endswith("q_proj.base_layer.bias"))
    before, started = reference.compute(batch), bias.detach().clone()
    trainer.train()
    trained = bias.detach().clone()
    assert not torch.equal(trained, started)
    assert torch.equal(reference.compute(batch), before) and torch.equal(bias, trained)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("VeRA", "LN tuning", "adaption prompt")])
@pytest.mark.filterwarnings("ignore")
def test_another_adapter_takes_part_as_peft_has_it_and_afterwards_all_is_as_before(kind: str) -> None:
    def two() -> Any:
        model = adapted(kind)
        model.add_adapter("other", copy.deepcopy(KINDS[kind]))
        model.set_adapter("default")
        return model

    model = two()
    with_first = logits(model)
    with active_adapter(model, "other"):
        expected = logits(model)
    assert not torch.equal(expected, with_first)
    before = state(model := two())
    other = adapter_switch(model, lambda: active_adapter(model, "other"))
    for _ in range(2):
        with other():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), with_first) and state(model) == before
    with pytest.raises(KeyboardInterrupt), other():
        raise KeyboardInterrupt
    assert torch.equal(logits(model), with_first) and state(model) == before


def watched(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Notes each walk over modules or parameters, and each call of peft's switches."""

    def noting(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs))

    for name in ("get_model_status", "get_layer_status", "set_adapter", "disable_adapter"):
        noting(PeftModel, name)
    for name in ("named_modules", "named_parameters"):
        noting(nn.Module, name)


@pytest.mark.parametrize("trained", [False, True], ids=["adapters off", "frozen copy"])
def test_the_reference_of_a_step_walks_no_module(trained: bool, rows, tokenizer, quick, monkeypatch) -> None:
    """peft's own switch asks every module for its status: 69 ms a micro-batch for a model of 32 blocks."""
    model: Any = get_peft_model(tiny_llama(), KINDS["LoRA"])
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    trainer = fastdpo.DPOTrainer(model, args=fastdpo.DPOConfig(**quick), train_dataset=rows, processing_class=tokenizer)
    assert trained == (FROZEN_ADAPTER in model.peft_config)
    batch = trainer.layout.collate(
        [fastdpo.data.TokenPair(*row.values()) for row in trainer.train_dataset.select(range(3))]  # type: ignore[attr-defined]
    )
    calls: list[str] = []
    with monkeypatch.context() as patch:
        watched(patch, calls)
        model.get_layer_status()
        assert calls.pop(0) == "get_layer_status" and "named_modules" in calls  # it does take note
        calls.clear()
        trainer.reference.compute(batch)
    assert not calls
