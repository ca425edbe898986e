"""token_logps gives the log-probs of the model's own logits, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import FAMILIES, gradient_error, gradients, tiny_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import fastdpo
from fastdpo import logps as module
from fastdpo import patch, token_logps

FP32 = 1e-5
IDS = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 12:] = 0


def plain(model: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=FP32 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_logits(name: str) -> None:
    model = tiny_model(name)
    expected = plain(model)
    wanted = gradients(expected, model)
    for _ in range(2):
        actual = token_logps(model, IDS)
        assert actual.dtype == torch.float32 and actual.shape == (2, 16)
        assert_same(actual, expected)
        assert gradient_error(gradients(actual, model), wanted) < FP32
        patch(model)


def test_masked_tokens_and_those_after_them_are_zero() -> None:
    model = tiny_model("llama")
    for mask in (MASK, MASK.flip(1)):
        scored = (mask[:, 1:] * mask[:, :-1]).bool()
        actual, expected = token_logps(model, IDS, mask), plain(model, IDS, mask)
        assert_same(actual, expected.where(scored, 0.0))
        assert gradient_error(gradients(actual, model), gradients(expected.where(scored, 0.0), model)) < FP32


def test_only_labels_are_scored_and_only_their_rows_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2")
    labels = IDS.clone()
    labels[0, :7], labels[1, :3], labels[1, 12:] = -100, -100, -100
    expected = plain(model, IDS, MASK).where(labels[:, 1:] != -100, 0.0)
    rows, head = [], module.linear_logps
    monkeypatch.setattr(module, "linear_logps", lambda h, *a, **k: (rows.append(len(h)), head(h, *a, **k))[1])
    actual = token_logps(model, IDS, MASK, labels)
    assert_same(actual, expected)
    assert rows[-1] == 10 + 9
    assert gradient_error(gradients(actual, model), gradients(expected, model)) < FP32
    assert torch.equal(token_logps(model, IDS.int(), MASK, labels), actual)
    nothing = token_logps(model, IDS, MASK, torch.full_like(IDS, -100))
    nothing.sum().backward()
    assert not nothing.any() and nothing.shape == (2, 16)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
def test_adapters_and_saved_modules_on_the_head_count_as_they_are_switched(targets: list[str]) -> None:
    saved = None if "lm_head" in targets else ["lm_head"]
    config = LoraConfig(target_modules=targets, modules_to_save=saved, init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model("llama"), config)
    if saved:
        model.get_output_embeddings().modules_to_save["default"].weight.data.mul_(1.5)
    on = plain(model)
    assert_same(token_logps(model, IDS), on)
    with torch.no_grad(), model.disable_adapter():
        off = plain(model)
        assert_same(token_logps(model, IDS), off)
    assert float((on - off).abs().max()) > 0.1


def test_autocast_and_dropout_are_the_callers() -> None:
    model = tiny_model("gpt2", embd_pdrop=0.5).train()
    torch.manual_seed(0)
    first = token_logps(model, IDS)
    assert model.training and model.transformer.drop.training
    torch.manual_seed(0)
    assert torch.equal(token_logps(model, IDS), first)
    assert not torch.equal(token_logps(model, IDS), first)
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        half = token_logps(model, IDS)
    assert half.dtype == torch.float32 and 1e-4 < float((half - token_logps(model, IDS)).abs().max()) < 1


def test_the_first_call_finds_a_head_of_another_form_and_draws_no_random_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama").train()
    state = torch.get_rng_state()
    token_logps(model, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    wrong = tiny_model("cohere")
    monkeypatch.setattr(type(wrong.config), "logit_scale", 1.0)
    monkeypatch.setattr(wrong.config, "logit_scale", 1.0)
    with pytest.raises(RuntimeError, match="CohereForCausalLM's hidden states and head differ"):
        token_logps(wrong, IDS)


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite"])
def test_the_first_call_finds_a_scale_or_cap_of_a_tenth_more_or_less_in_bf16(name: str) -> None:
    """Of logits in bf16 the largest may be 8% off by rounding."""
    token_logps(tiny_model(name, torch.bfloat16), IDS)
    model: Any = tiny_model(name, torch.bfloat16)
    output_head = module.output_head

    def misread(base: Any) -> Any:
        head = output_head(base)
        return (
            replace(head, softcap=1.1 * head.softcap)
            if head.softcap
            else replace(head, logit_scale=1.1 * head.logit_scale)
        )

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(module, "output_head", misread)
        with pytest.raises(RuntimeError, match="hidden states and head differ"):
            token_logps(model, IDS)


@pytest.mark.parametrize("labelled", [False, True], ids=["mask", "labels"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3", "falcon-alibi", "bloom", "llama4-chunks"])
def test_a_row_padded_on_the_left_has_the_log_probs_that_it_has_alone(name: str, labelled: bool) -> None:
    """GPT-2's learned positions would otherwise count the padding."""
    model, ids, mask = tiny_model(name), IDS.clone(), torch.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 0, 0
    labels = ids.where(mask == 1, -100) if labelled else None
    actual = token_logps(model, ids, mask, labels)
    assert_same(actual[1, 5:], token_logps(model, ids[1:, 5:])[0])
    assert_same(actual[0], token_logps(model, ids[:1])[0])


def test_a_first_call_that_has_nothing_to_compare_leaves_that_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert token_logps(model, IDS[:, :1]).shape == (2, 0)
    monkeypatch.setattr(module, "linear_logps", lambda h, w, t, *_, **__: (h.sum(-1), None))
    with pytest.raises(RuntimeError, match="hidden states and head differ"):
        token_logps(model, IDS)


def test_weights_that_are_not_finite_are_called_that() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="own logits are not finite"):
        token_logps(model, IDS)


def tiny_bart() -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1, **heads)
    )


def prompt_tuned() -> Any:
    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: "llama", "str, expected a PreTrainedModel"),
        (lambda: nn.DataParallel(tiny_model("llama")), "DataParallel, expected .* the model inside"),
        (lambda: torch.compile(tiny_model("llama")), "OptimizedModule, expected .* model._orig_mod"),
        (lambda: tiny_model("llama").model, "no language-model head"),
        (tiny_bart, "encoder-decoder"),
        (prompt_tuned, "virtual tokens"),
    ],
    ids=["name", "wrapped", "compiled", "no head", "encoder-decoder", "virtual tokens"],
)
def test_models_that_have_no_such_log_probs_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        token_logps(make(), IDS)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"input_ids is \(17,\)"):
        token_logps(model, IDS[0])
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 16\), input_ids is \(2, 17\)"):
        token_logps(model, IDS, MASK[:, 1:])
    with pytest.raises(ValueError, match="labels is"):
        token_logps(model, IDS, None, IDS[:1])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input_ids": IDS.tolist()}, r"input_ids is a list, expected a \(B, T\) tensor"),
        ({"input_ids": None}, "input_ids is a NoneType"),
        ({"input_ids": IDS.float()}, r"input_ids is \(2, 17\) torch.float32, expected tokens as int64"),
        ({"input_ids": IDS[:0]}, r"input_ids is \(0, 17\), expected \(B, T\), B and T above 0"),
        ({"input_ids": IDS.to("meta")}, "input_ids is on meta, expected it on cpu, where the model is"),
        ({"attention_mask": MASK.tolist()}, "attention_mask is a list"),
        ({"attention_mask": MASK.to("meta")}, "attention_mask is on meta"),
        ({"labels": IDS.tolist()}, "labels is a list"),
        ({"labels": IDS.float()}, r"labels is \(2, 17\) torch.float32, expected tokens"),
        ({"labels": IDS > 9}, r"labels is \(2, 17\) torch.bool, expected tokens"),
        ({"input_ids": IDS.index_fill(1, torch.tensor(3), -100)}, r"input_ids\[0, 3\] is -100, .* \[0, 97\)$"),
        ({"input_ids": IDS.index_fill(1, torch.tensor(16), 97)}, r"input_ids\[0, 16\] is 97"),
        ({"labels": IDS.index_fill(1, torch.tensor(5), 97)}, r"labels\[0, 5\] is 97, expected .*, or -100 where"),
        ({"labels": IDS.index_fill(1, torch.tensor(5), -1)}, r"labels\[0, 5\] is -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused_by_name_and_place(given: dict[str, Any], match: str) -> None:
    model = tiny_model("llama")
    token_logps(model, IDS, MASK, IDS.index_fill(1, torch.tensor(0), -1))  # nothing comes before the first
    with pytest.raises(ValueError, match=match):
        token_logps(model, **{"input_ids": IDS, **given})


def test_public_names_are_the_functions() -> None:
    assert fastdpo.token_logps is token_logps and fastdpo.patch is patch and callable(fastdpo.unpatch)
