"""The last MLP computes what the head reads and nothing else, and nobody can tell."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import RAGGED, gradient_error, gradients, random_pairs, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fastdpo
from fastdpo.batch import PreferenceBatch, pack, pad
from fastdpo.last_block import is_on, scored_rows_alone
from fastdpo.layout import find_layout
from fastdpo.model import Policy, base_model, checkpointing

PAIRS = [*RAGGED, *random_pairs((20, 3, 4), (0, 2, 1))]
FAMILIES = ["llama", "gemma2", "gpt2", "cohere", "gpt-neox", "phi-head-bias", "granite"]


def rows_of_last_mlp(policy: Policy, batch: PreferenceBatch) -> tuple[torch.Tensor, list[int]]:
    """-> log-probs, and how many rows each block's MLP computed."""
    seen: list[int] = []
    mlps = [module for name, module in policy.named_modules() if name.endswith(".mlp")]

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.append(inputs[0].shape[0] * inputs[0].shape[1])

    hooks = [mlp.register_forward_hook(count, prepend=True) for mlp in mlps]
    logps, _ = policy(batch)
    for hook in hooks:
        hook.remove()
    return logps, seen


@pytest.mark.parametrize("shared", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_all_rows(family: str, shared: int | None) -> None:
    policy = Policy(tiny_model(family)).eval()
    batch = pack(PAIRS, least_shared=shared)
    expected = policy(batch)[0]
    expected_gradients = gradients(expected, policy.model)
    with scored_rows_alone([policy]):
        actual, rows = rows_of_last_mlp(policy, batch)
        found = gradients(actual, policy.model)
    scored = len(batch.logit_rows.unique())
    assert rows == [batch.input_ids.numel(), scored] and scored < 0.6 * batch.input_ids.numel()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert gradient_error(found, expected_gradients) < 1e-5


@pytest.mark.parametrize("kwargs", [{}, {"offload": True}], ids=["checkpointing", "offload"])
def test_a_second_forward_sees_the_rows_of_its_own_batch(kwargs: dict[str, Any]) -> None:
    policy = Policy(tiny_model("llama").train())
    first, second = pack(PAIRS[:3]), pack(PAIRS[3:])
    expected = gradients(policy(first)[0], policy.model)
    with scored_rows_alone([policy]), checkpointing(policy, kwargs):
        logps, rows = rows_of_last_mlp(policy, first)
        policy(second)
        assert rows[1] < rows[0]
        found = gradients(logps, policy.model)
    assert gradient_error(found, expected) < 1e-5


def test_padded_batches_and_generation_compute_every_row_and_nothing_stays_behind() -> None:
    policy = Policy(tiny_model("llama")).eval()
    batch = pad(PAIRS)
    expected = policy(batch)[0]
    ids = torch.tensor([[5, 6, 7, 8]])
    text = policy.model.generate(ids, max_new_tokens=4, do_sample=False)
    with scored_rows_alone([policy]), scored_rows_alone([policy]):
        policy(pack(PAIRS))
        actual, rows = rows_of_last_mlp(policy, batch)
        assert torch.equal(policy.model.generate(ids, max_new_tokens=4, do_sample=False), text)
    assert torch.equal(actual, expected) and rows == [batch.input_ids.numel()] * 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())


def test_routers_of_experts_see_every_token() -> None:
    policy, batch = Policy(tiny_model("mixtral")).eval(), pack(PAIRS)
    with scored_rows_alone([policy]):
        assert rows_of_last_mlp(policy, batch)[1] == [batch.input_ids.numel()] * 2
        assert not is_on(policy)


def test_a_mlp_that_is_more_than_linear_layers_is_left_alone() -> None:
    """It may give more than one tensor."""
    policy = Policy(tiny_model("llama"))
    mlp = policy.model.model.layers[-1].mlp
    with scored_rows_alone([policy]):
        assert is_on(policy)
    mlp.router = nn.Embedding(2, 2)
    with scored_rows_alone([policy]):
        assert not is_on(policy)


def test_a_mlp_that_fails_leaves_nothing_for_the_next_call() -> None:
    policy, batch = Policy(tiny_model("llama")).eval(), pack(PAIRS)
    mlp = policy.model.model.layers[-1].mlp
    x = torch.randn(1, 3, 32)
    with scored_rows_alone([policy]):
        expected, alone = policy(batch)[0], mlp(x)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(mlp, "forward", lambda: None)
            policy(batch)
        assert torch.equal(mlp(x), alone) and torch.equal(policy(batch)[0], expected)


def test_a_model_may_be_freed_within_it() -> None:
    policy = Policy(tiny_model("llama"))
    alive = weakref.ref(policy.model.model.layers[-1].mlp.up_proj)
    with scored_rows_alone(one for one in [policy]):
        del policy
        assert alive() is None


@pytest.mark.parametrize("off", [{}, {"fused_kernels": False}], ids=["as it comes", "switched off"])
def test_training_leaves_the_last_blocks_prompt_rows_out_and_starts_at_margin_zero(off, rows, tokenizer, quick) -> None:
    model = get_peft_model(tiny_model("llama", vocab_size=500), LoraConfig(r=2, target_modules="all-linear"))
    seen: list[tuple[int, int]] = []
    blocks = base_model(model).model.layers
    blocks[0].mlp.register_forward_hook(lambda m, x, y: seen.append((0, y.shape[1])), prepend=True)
    blocks[1].mlp.down_proj.register_forward_hook(lambda m, x, y: seen.append((1, y.shape[1])))
    out = fastdpo.train(model, rows, processing_class=tokenizer, **quick | off | {"max_length": 60, "max_steps": 2})
    assert out.history[0]["rewards/margins"] == 0
    first, last = (sum(count for block, count in seen if block == which) for which in (0, 1))
    assert last == first if off else last < 0.8 * first


def test_an_error_before_the_mlp_leaves_nothing_for_the_next_call() -> None:
    policy, batch = Policy(tiny_model("llama")).eval(), pack(PAIRS)
    block, x = policy.model.model.layers[-1], torch.randn(1, 3, 32)
    with scored_rows_alone([policy]):
        alone = block.mlp(x)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(block.post_attention_layernorm, "forward", lambda: None)
            policy(batch)
        assert torch.equal(block.mlp(x), alone)


def test_a_block_that_runs_twice_in_a_forward_is_not_packed_with_it() -> None:
    """Its second run would see zeros where the first left rows out: bf16's rounding hid how far off that is."""
    model = tiny_model("llama")
    model.model.layers[0] = model.model.layers[1]
    policy = Policy(model, torch.bfloat16)
    assert find_layout(policy).packed
    with scored_rows_alone([policy]):
        layout = find_layout(policy)
    assert (
        not layout.packed and layout.reason == "its last block runs twice in a forward: fused_kernels=False may pack it"
    )


def test_a_tower_beside_the_text_is_left_alone() -> None:
    """transformers' multimodal models may have one behind the text's blocks; here it is longer."""
    model = tiny_model("llama")
    model.model.tower = nn.ModuleList([LlamaDecoderLayer(model.config, 0) for _ in range(3)])
    policy = Policy(model).eval()
    with scored_rows_alone([policy]):
        assert not any(module._forward_hooks for module in model.model.tower.modules())
        assert is_on(policy) and model.model.layers[-1].mlp._forward_hooks


def test_blocks_that_are_no_list_of_the_configs_length_are_left_alone() -> None:
    """Whether they run one after the other, and once, is then unknown."""
    model = tiny_model("llama")
    model.config.num_hidden_layers = 3
    with scored_rows_alone([policy := Policy(model)]):
        assert not is_on(policy)
