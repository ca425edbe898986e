"""The LM head under adapters: what is small is not rounded away, and what peft does without is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import RAGGED, tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastdpo
from fastdpo.batch import pack
from fastdpo.model import Policy

ON_HEAD = ["q_proj", "lm_head"]
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def lora(model: Any, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ON_HEAD, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**options)).eval()  # type: ignore[return-value]


def own_logps(model: Any) -> Tensor:
    """By the model's own logits."""
    logits = model(input_ids=IDS, use_cache=False).logits
    return logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]


@torch.no_grad()
def test_a_small_update_of_a_bf16_head_is_not_rounded_away() -> None:
    """Added to the weight, 70% of the log-ratio was left at this size, and the error was as much."""
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1)).bfloat16()
    adapted = lora(model, r=16, target_modules=["lm_head"])
    layer: Any = adapted.get_output_embeddings()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight.normal_(0, 3e-4)
    policy, batch = Policy(adapted, torch.bfloat16).eval(), pack(RAGGED)
    ratio = policy(batch)[0]
    with adapted.disable_adapter():
        ratio = (ratio - policy(batch)[0]).double()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = policy.hidden_rows(batch).double()

    def truth(weight: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]

    whole = layer.base_layer.weight.double()
    expected = truth(whole + layer.scaling["default"] * up.double() @ down.double()) - truth(whole)
    assert (ratio - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rank", [1, 4, 7])
@torch.no_grad()
def test_an_adapter_of_the_head_that_is_off_gives_the_bits_of_one_that_is_zero(rank: int, autocast: Any) -> None:
    model = lora(tiny_model("llama"), r=rank, init_lora_weights=True)
    policy = Policy(model, autocast).eval()
    on, _ = policy(pack(RAGGED))
    with model.disable_adapter():
        assert torch.equal(policy(pack(RAGGED))[0], on)


@torch.no_grad()
def test_an_adapter_that_is_merged_into_the_head_counts_once() -> None:
    model = lora(tiny_model("llama"))
    expected = own_logps(model)
    model.merge_adapter()
    torch.testing.assert_close(fastdpo.token_logps(model, IDS), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"\['default'\] merged .* apply now are \[\]"):
        fastdpo.token_logps(model, IDS)


def test_another_adapter_that_is_merged_into_the_head_is_refused() -> None:
    model = lora(tiny_model("llama"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=ON_HEAD))
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"\['other'\] merged .* apply now are \['default'\]"):
        fastdpo.token_logps(model, IDS)


@pytest.mark.parametrize("source", ["loaded", "by path"])
def test_dropout_of_an_adapter_of_the_head_is_refused_only_where_it_is_on(
    source: str, rows, tokenizer, quick, tmp_path
) -> None:
    config = LoraConfig(r=4, target_modules=ON_HEAD, lora_dropout=0.5)
    tiny_llama().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model") if source == "by path" else tiny_llama()
    data = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": config}
    with pytest.raises(ValueError, match="on the LM head .* is not a plain LoRA without dropout"):
        fastdpo.DPOTrainer(model, args=fastdpo.DPOConfig(**quick, disable_dropout=False), **data)
    model = model if source == "by path" else tiny_llama()
    trainer = fastdpo.DPOTrainer(model, args=fastdpo.DPOConfig(**quick), **data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=["lora", "trained whole"]
)
@torch.no_grad()
def test_a_head_that_another_adapter_changes_is_itself_under_one_that_does_not(options: dict[str, Any]) -> None:
    model = lora(tiny_model("llama"), **options)
    if options:
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)  # type: ignore[union-attr]
    changed = fastdpo.token_logps(model, IDS)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    logps = fastdpo.token_logps(model, IDS)
    torch.testing.assert_close(logps, own_logps(model), rtol=1e-5, atol=1e-5)
    assert (logps - changed).abs().max() > 1e-2
