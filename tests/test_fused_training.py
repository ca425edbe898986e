"""Training on fused kernels: the run is the same, and the model comes back as it was given."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model

import fastdpo
from fastdpo.config import DPOConfig
from fastdpo.patching import is_patched

EVERY_LINEAR = LoraConfig(r=4, target_modules="all-linear")


def runs(rows: Any, tokenizer: Any, quick: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A run on the model's own blocks, and one on fused kernels."""
    out = []
    for fused in (False, True):
        torch.manual_seed(1)
        more = {name: value() if callable(value) else value for name, value in options.items()}
        out.append(
            fastdpo.train(
                tiny_llama(), rows[:18], rows[18:], processing_class=tokenizer, fused_kernels=fused, **more, **quick
            )
        )
    return out[0], out[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"peft_config": EVERY_LINEAR},
        {"peft_config": EVERY_LINEAR, "gradient_checkpointing": True},
        {"peft_config": EVERY_LINEAR, "bf16": True},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), "loss_type": ["sigmoid", "bco_pair"]},
        {"ref_model": lambda: tiny_llama(initializer_range=0.05)},
        {"peft_config": EVERY_LINEAR, "precompute_ref_log_probs": True},
    ],
    ids=["full", "lora", "checkpointing", "bf16", "head and coupled", "ref_model", "precomputed"],
)
def test_every_log_line_is_that_of_a_run_on_the_models_own_blocks(
    rows, tokenizer, quick, options, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    plain, fused = runs(rows, tokenizer, quick, **options)
    assert fused.history[0]["rewards/margins"] == 0.0 or "ref_model" in options
    close = 2e-2 if options.get("bf16") else 1e-5  # Adam's first steps turn the rounding of small gradients into signs
    for ours, theirs in zip(fused.history, plain.history, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=close, abs=close), name


def test_the_model_comes_back_as_it_was_given(rows, tokenizer, quick) -> None:
    model, ref_model = tiny_llama(), tiny_llama()
    model.add_model_tags(["mine"])  # to which a trainer adds its own
    before = [dict(vars(module)) for module in model.modules()]
    out = fastdpo.train(model, rows, ref_model=ref_model, processing_class=tokenizer, fused_kernels=True, **quick)
    assert [vars(module).keys() for module in model.modules()] == [one.keys() for one in before]
    assert not is_patched(out.model) and not is_patched(ref_model)


def test_a_model_that_came_patched_stays_patched(rows, tokenizer, quick) -> None:
    model = tiny_llama()
    fastdpo.patch(model)
    fastdpo.train(model, rows, processing_class=tokenizer, fused_kernels=True, **quick)
    assert is_patched(model)


def test_an_error_on_the_way_leaves_the_model_unpatched(rows, tokenizer, quick) -> None:
    model = tiny_llama()
    seen: list[bool] = []

    def failing(m: Any, chosen: Any, rejected: Any) -> Any:
        seen.append(is_patched(model))
        raise ZeroDivisionError

    model.model.layers[1].register_forward_hook(lambda *_: failing(None, None, None))
    with pytest.raises(ZeroDivisionError):
        fastdpo.train(model, rows, processing_class=tokenizer, fused_kernels=True, **quick)
    assert seen == [True] and not is_patched(model)


def test_the_run_says_which_blocks_it_runs_on(rows, tokenizer, quick, caplog) -> None:
    with caplog.at_level(logging.INFO, "fastdpo"):
        runs(rows, tokenizer, quick, peft_config=lambda: copy.copy(EVERY_LINEAR))
    assert "fused kernels: off, blocks run as transformers has them" in caplog.text
    assert "fused kernels: patched: llama: rms_norm 5, glu 2, rope 2, lora_qkv 2, lora_mlp 2, lora 2" in caplog.text


def test_a_model_that_has_adapters_and_came_with_a_frozen_copy_trains_fused(rows, tokenizer, quick) -> None:
    """A trained adapter is its own reference, under a second name on the same layers."""
    model = get_peft_model(tiny_llama(), EVERY_LINEAR)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    out = fastdpo.train(model, rows, processing_class=tokenizer, fused_kernels=True, **quick)
    assert out.history[0]["rewards/margins"] == 0.0 and out.history[-2]["loss"] < 0.69


def test_the_compiler_and_fused_kernels_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        DPOConfig(fused_kernels=True, torch_compile=True)
