"""Both layouts give what the model gives, the layout found is one that it allows, and the model stays as it was.

Which family packs, and why another does not, is the table in tiny_models.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, RAGGED, SIZES, gradient_error, gradients, plain_logps, random_pairs, tiny_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastdpo.layout
from fastdpo import attention
from fastdpo.attention import attention_configs, packed_calls
from fastdpo.attention_backends import Facts, choose
from fastdpo.batch import pack, pad
from fastdpo.config import DPOConfig
from fastdpo.layout import find_layout
from fastdpo.model import Policy, add_adapters, balances_routers, checkpointing, without_dropout

FP32 = 1e-5
CHECKPOINTED = ["llama", "gemma2", "mistral-window", "gpt2", "gpt-oss-sinks"]


def assert_same_logps(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=FP32 * float(expected.detach().abs().max()))


# Families


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_found_is_the_one_that_the_familys_attention_allows(name: str) -> None:
    layout = find_layout(Policy(tiny_model(name)).eval(), pad_token_id=0)
    why_padded = FAMILIES[name].why_padded
    assert layout.packed == (not why_padded), layout.reason
    assert (why_padded or "every attention layer takes packed segments") in layout.reason


@pytest.mark.parametrize("name", FAMILIES)
def test_both_layouts_give_the_models_own_logps_and_gradients(name: str) -> None:
    model = tiny_model(name)
    policy = Policy(model).eval()
    own = plain_logps(model, RAGGED)
    own_gradients = gradients(own, model)
    for layout in (pad,) if FAMILIES[name].why_padded else (pack, pad):
        logps, _ = policy(layout(RAGGED))
        assert_same_logps(logps, own)
        assert gradient_error(gradients(logps, model), own_gradients) < FP32, layout.__name__


@pytest.mark.parametrize("name", [name for name in FAMILIES if not FAMILIES[name].why_padded])
@torch.no_grad()
def test_a_single_wrong_key_would_not_go_unnoticed(name: str) -> None:
    """The tiny models are sensitive enough for the comparisons above to mean something."""
    policy = Policy(tiny_model(name)).eval()
    batch = pack(random_pairs((7, 5, 9)))
    right, _ = policy(batch)
    assert batch.segments is not None and batch.segments.key_index[18] == 6
    batch.segments.key_index[18] = 7  # for the rejected response, a chosen token in place of the last one of the prompt
    difference = (policy(batch)[0] - right).abs()
    # a token that goes to another expert leaves products of fewer rows there, which some CPUs round otherwise
    allowed = 1e-5 if balances_routers(policy.model) else 0.0
    assert difference[:6].max() <= allowed and difference[6:].max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)],
    ids=["fp64", "bf16", "fp16", "autocast"],
)
def test_rounding_of_other_precisions_does_not_hide_that_a_model_packs(
    dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    for name in ("llama", "gemma2", "gpt2"):
        assert find_layout(Policy(tiny_model(name, dtype), autocast).eval()).packed


# What attention the user asked for


def test_eager_attention_is_taken_segment_by_segment_in_packed_batches() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    policy = Policy(model).eval()
    layout = find_layout(policy)
    assert layout.packed and {choose(facts)[0] for facts in layout.attention} == {"products"}
    assert_same_logps(policy(pack(RAGGED))[0], plain_logps(model, RAGGED))


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss-sinks"])
def test_eager_attention_that_nobody_asked_for_is_an_automatic_choice(name: str) -> None:
    """transformers falls back on it for models that its sdpa does not fit."""
    model = tiny_model(name)
    assert model.config._attn_implementation == "eager" and Policy(model).asked_attention is None


def test_an_attention_that_packed_pairs_do_not_know_gets_the_padded_layout_and_itself() -> None:
    model = tiny_model("llama")
    seen: list[str] = []

    def theirs(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("theirs", theirs)
    AttentionMaskInterface.register("theirs", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("theirs")
    layout = find_layout(Policy(model).eval())
    assert not layout.packed and layout.reason == "attn_implementation='theirs' takes padded batches only"
    assert set(seen) == {"theirs"}


def test_the_flash_attention_package_is_refused_by_name_where_it_is_not_there() -> None:
    policy = Policy(tiny_model("llama")).eval()
    policy.asked_attention = "flash_attention_2"  # transformers does not set it without the package
    with pytest.raises(ValueError, match="'flash_attention_2' was asked for, but the package is not installed"):
        find_layout(policy)


def test_a_run_says_what_its_own_dtype_is_computed_by_and_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is in fp32 where the weights are; the run's bf16 goes to another backend here."""
    tried: list[torch.dtype] = []

    def choose_by_dtype(facts: Facts) -> tuple[str, str]:
        tried.append(facts.dtype)
        return ("products" if facts.dtype == torch.bfloat16 else "sdpa"), "a test's choice"

    monkeypatch.setattr(attention, "choose", choose_by_dtype)
    monkeypatch.setattr(fastdpo.layout, "choose", choose_by_dtype)
    layout = find_layout(Policy(tiny_model("llama"), torch.bfloat16).eval())
    assert layout.packed and [facts.dtype for facts in layout.attention] == [torch.bfloat16]
    ran = [dtype for dtype in tried if dtype is torch.bfloat16]
    assert torch.float32 in tried and len(ran) >= 3  # one comparison and two layers

    def wrong_in_bf16(facts: Facts) -> tuple[str, str]:
        return ("broken" if facts.dtype == torch.bfloat16 else "sdpa"), ""

    monkeypatch.setattr(attention, "choose", wrong_in_bf16)
    monkeypatch.setattr(fastdpo.layout, "choose", wrong_in_bf16)
    monkeypatch.setitem(attention.BACKENDS, "broken", lambda q, k, v, *rest: torch.zeros_like(q))
    assert "differ from the model's own" in find_layout(Policy(tiny_model("llama"), torch.bfloat16).eval()).reason


# Checkpointing


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("layout", [pack, pad])
def test_checkpointing_leaves_logps_and_gradients_bitwise_as_they_are(name: str, layout: Callable[..., Any]) -> None:
    model = tiny_model(name)
    policy = Policy(model).train()
    with without_dropout(model):
        plain, _ = policy(layout(RAGGED))
        expected = gradients(plain, model)
        with checkpointing(policy, None), packed_calls() as calls:
            logps, _ = policy(layout(RAGGED))
            forward_calls = calls.count
            actual = gradients(logps, model)
    assert torch.equal(logps, plain)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)
    layers = model.config.num_hidden_layers if layout is pack else 0
    assert (forward_calls, calls.count) == (layers, 2 * layers)  # the second runs were packed ones


def test_checkpointing_an_adapted_model_gives_the_gradients_of_one_that_is_not() -> None:
    model = lora(tiny_model("qwen2"), target_modules="all-linear")
    policy = Policy(model).train()
    expected = gradients(policy(pack(RAGGED))[0], model)
    with checkpointing(policy, {"use_reentrant": False}):
        actual = gradients(policy(pack(RAGGED))[0], model)
        assert expected and all("lora" in n and torch.equal(actual[n], expected[n]) for n in expected)


# The model stays as it was


def implementations(model: nn.Module) -> list[str]:
    return [config._attn_implementation for config in attention_configs(model)]


@pytest.mark.parametrize(
    ("name", "attention"),  # softcapping and sdpa do not go together
    [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("mistral-window", "sdpa"), ("gpt2", "eager")],
)
def test_attention_and_config_are_as_given_after_a_forward_a_backward_and_an_exception(
    name: str, attention: str
) -> None:
    model = tiny_model(name)
    model.set_attn_implementation(attention)
    before = copy.deepcopy(model.config.to_dict())
    policy = Policy(model).train()
    find_layout(policy)
    assert model.training
    with checkpointing(policy, None):
        logps, _ = policy(pack(RAGGED))
        assert implementations(model) == [attention]
        logps.sum().backward()
        assert implementations(model) == [attention]
        norm = [module for module in model.modules() if "Norm" in type(module).__name__][-1]
        hook = norm.register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
        with pytest.raises(ZeroDivisionError):
            policy(pack(RAGGED))
        hook.remove()
        assert implementations(model) == [attention]
        assert model.config.to_dict() == before


def generated(model: Any) -> tuple[Tensor, ...]:
    """Greedy tokens and logits of a batch of two prompts, the shorter one padded on the left."""
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
    mask = (ids != 0).long()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        single = model.generate(input_ids=ids[1:], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return out.sequences, torch.stack(out.logits), single, model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_generation_is_the_untouched_models_before_between_and_after_training_steps(name: str) -> None:
    model = tiny_model(name)
    untouched = generated(copy.deepcopy(model))
    policy = Policy(model).eval()
    with checkpointing(policy, None):
        find_layout(policy)

        def assert_untouched(expected: tuple[Tensor, ...]) -> None:
            assert all(map(torch.equal, generated(model), expected))

        assert_untouched(untouched)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        policy(pack(RAGGED))[0].sum().backward()
        assert_untouched(untouched)  # between the micro-batches of a step
        logps, _ = policy(pack(RAGGED))
        assert_untouched(untouched)  # between a forward and its backward
        logps.sum().backward()
        optimizer.step()
        fresh = tiny_model(name)
        fresh.load_state_dict(model.state_dict())
        trained = generated(fresh)
        assert not torch.equal(trained[1], untouched[1])
        assert_untouched(trained)


# The head


def lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    """The model with adapters whose B is not zero, so that they change something."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return adapted.eval()  # type: ignore[return-value]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "opt", "cohere"])
def test_tied_and_untied_heads_give_the_models_own_gradients(name: str, tied: bool) -> None:
    model = tiny_model(name, tie_word_embeddings=tied)
    shares = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert shares == tied
    own = plain_logps(model, RAGGED)
    own_gradients = gradients(own, model)
    logps, _ = Policy(model).eval()(pack(RAGGED))
    assert_same_logps(logps, own)
    assert gradient_error(gradients(logps, model), own_gradients) < FP32


HEAD_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "lora-on-a-tied-head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "lm_head"], "use_rslora": True}),
    "lora-and-head-bias": ("phi-head-bias", {"target_modules": ["q_proj", "lm_head"]}),
    "lora-and-softcap": ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
    "lora-and-logit-scale": ("granite", {"target_modules": ["q_proj", "lm_head"]}),
    "head-trained-whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", HEAD_ADAPTERS)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_adapted_head_gives_the_models_own_logps_and_gradients_and_turns_off(case: str) -> None:
    family, options = HEAD_ADAPTERS[case]
    base = tiny_model(family, tie_word_embeddings="tied" in case)
    untouched = Policy(copy.deepcopy(base)).eval()
    model = lora(base, **options)
    policy = Policy(model).eval()
    own = plain_logps(model, RAGGED)
    own_gradients = gradients(own, model)
    in_head = [name for name in own_gradients if "lm_head" in name]
    assert len(in_head) == (1 if "modules_to_save" in options else 2)
    assert all(own_gradients[name].abs().max() > 1e-3 for name in in_head)
    for layout in (pack, pad):
        logps, _ = policy(layout(RAGGED))
        assert_same_logps(logps, own)
        assert gradient_error(gradients(logps, model), own_gradients) < FP32
    with torch.no_grad(), model.disable_adapter():
        off, _ = policy(pack(RAGGED))
    expected, _ = untouched(pack(RAGGED))
    assert torch.equal(off, expected) and (off - own).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mixtral"])
@torch.no_grad()
def test_with_adapters_off_packed_logps_are_bitwise_those_of_an_untouched_copy(name: str) -> None:
    base = tiny_model(name)
    expected, _ = Policy(copy.deepcopy(base)).eval()(pack(RAGGED))
    model = lora(base, target_modules="all-linear")
    policy = Policy(model).eval()
    assert (policy(pack(RAGGED))[0] - expected).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(policy(pack(RAGGED))[0], expected)
    assert find_layout(policy).packed


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_head_adapter_that_is_more_than_two_factors_is_refused(options: dict[str, Any]) -> None:
    model = lora(tiny_model("llama"), target_modules=["q_proj", "lm_head"], **options)
    with pytest.raises(ValueError, match="on the LM head .* leave the head out of target_modules"):
        find_layout(Policy(model).eval())


@pytest.mark.parametrize("name", ["phimoe-window", "llama4-chunks", "falcon-rotary"])
@torch.no_grad()
def test_adapters_by_default_are_on_all_linear_layers_but_routers(name: str, tmp_path: Path) -> None:
    """Routers that are linear layers by their class give several tensors, which peft stumbles over."""
    model = tiny_model(name)
    head = model.get_output_embeddings()
    linear = {path for path, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    routers = {path for path in linear if "Router" in type(model.get_submodule(path)).__name__}
    config = DPOConfig(output_dir=str(tmp_path), use_peft=True, use_cpu=True)
    adapted = add_adapters(model, None, config)
    named = {
        path.removeprefix("base_model.model.") for path, part in adapted.named_modules() if hasattr(part, "lora_A")
    }
    assert named == linear - routers and bool(routers) == (name != "falcon-rotary")
    assert adapted(torch.arange(3, 12)[None]).logits.isfinite().all()


# Refusals


@pytest.mark.parametrize(
    ("is_decoder", "message"),
    [(False, "lets a token see later ones"), (True, "its head or padding has a form that is not supported yet")],
    ids=["encoder", "head_with_a_transform"],
)
def test_bert_is_refused_as_an_encoder_and_as_a_decoder_for_its_head(is_decoder: bool, message: str) -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SIZES, is_decoder=is_decoder, initializer_range=0.2))
    with pytest.raises(ValueError, match=message):
        find_layout(Policy(model).eval())


class LouderLlama(LlamaForCausalLM):
    """Its logits are not what its head's weight says."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        output.logits = 1.1 * output.logits
        return output


class NoisierLlama(LlamaForCausalLM):
    """Its backbone is not all of its trunk: something happens before the head."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:  # type: ignore[override]
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden + hidden.roll(1, -1)))


@pytest.mark.parametrize("kind", [LouderLlama, NoisierLlama])
def test_a_head_of_an_unknown_form_is_refused_by_the_difference_that_it_makes(kind: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES, initializer_range=0.2))
    with pytest.raises(ValueError, match=f"{kind.__name__} differ from the model's own by .* its head or padding"):
        find_layout(Policy(model).eval())
