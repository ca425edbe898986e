"""A patched model computes what the unpatched one does, keeps less for the backward, and leaves no trace.

Which kernels serve which family is the table in architectures.py; here it is run on tiny models of every row.
"""

from __future__ import annotations

import copy
import io
import logging
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_errs_at_most_twice
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import EXPERTS, FAMILIES, SIZES, Family, gradient_error, tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

import fastdpo
from fastdpo import architectures, first_use, patching, projections
from fastdpo.model import without_dropout
from fastdpo.patching import PatchReport, is_patched, patch, unpatch
from fastdpo.quantized import misread_layers
from fastdpo_kernels.nf4 import Packed, dequantize

FP32 = 1e-5
IDS = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(15, 17), 0)
UNKNOWN = "mpt"

# Rows whose families have no layout test.
MORE: dict[str, Family] = {
    name: Family(name, config)
    for name, config in {
        "ministral": {"head_dim": 8, "layer_types": ["full_attention"] * 2},
        "ministral3": {"head_dim": 8},
        "olmo": {},
        "olmo3": {"layer_types": ["full_attention"] * 2},
        "glm": {"head_dim": 8},
        "exaone4": {"layer_types": ["full_attention"] * 2},
        "ernie4_5": {},
        "seed_oss": {"head_dim": 8},
        "hunyuan_v1_dense": {"head_dim": 8},
        "arcee": {},
    }.items()
} | {"qwen3-moe-dense-layer": Family("qwen3_moe", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]})}
ALL = {**FAMILIES, **MORE}
KNOWN = [name for name in ALL if name != UNKNOWN]
DENSE = ["llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "cohere", "glm4", "stablelm", "gpt2", "gpt-neox"]


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    if any(name.endswith("router") for name, _ in model.named_modules()):
        options.setdefault("exclude_modules", ".*router")  # which gives a tuple
    usual = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**usual, "task_type": "CAUSAL_LM", **options}))  # type: ignore[return-value]


def logps(model: nn.Module) -> Tensor:
    ids, mask = (tensor.to(next(model.parameters()).device) for tensor in (IDS, MASK))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[:, :14, 0]


def gradients(values: Tensor, model: nn.Module) -> dict[str, Tensor]:
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    model.zero_grad(set_to_none=True)
    (values * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Log-probs, gradients, and the bytes that wait for the backward, parameters left out; dropout from one seed."""
    torch.manual_seed(5)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held, so that no other one comes to its address
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = logps(model)
    return values.detach(), gradients(values, model), sum(storage.nbytes() for storage in kept.values())


def assert_same(actual: Any, expected: Any, tolerance: float = FP32) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=tolerance * float(expected[0].abs().max()))
    assert gradient_error(actual[1], expected[1]) < tolerance


def attributes(model: nn.Module) -> list[list[tuple[str, int]]]:
    """The names in each module's __dict__, in their order, and which objects they name."""
    return [[(name, id(value)) for name, value in vars(module).items()] for module in model.modules()]


def patched(model: Any) -> Any:
    patch(model)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often patched modules call each of the kernels."""
    counts = dict.fromkeys(("rms_norm", "glu", "rope", "lora_qkv", "lora_mlp", "lora_linear"), 0)

    def counting(name: str, kernel: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(patching, name, counting(name, getattr(patching, name)))
    return counts


# Families


@pytest.mark.parametrize("adapt", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_patched_model_computes_what_the_unpatched_one_does(name: str, adapt: bool) -> None:
    model: Any = tiny_model(ALL[name]).train()
    model = adapted(model) if adapt else model
    before = attributes(model)
    with without_dropout(model):
        expected = outcome(model)
        report = patch(model)
        outcome(model)  # the first use compares, and keeps nothing of that
        actual = outcome(model)
    assert_same(actual, expected)
    kinds = {kind for kind, count in report.counts.items() if count}
    assert bool(kinds & {"lora_qkv", "lora_mlp", "lora"}) == adapt
    if not adapt:
        assert actual[2] < expected[2] if kinds & {"rms_norm", "glu"} else actual[2] <= expected[2]
    unpatch(model)
    assert attributes(model) == before


@pytest.mark.parametrize("name", KNOWN)
def test_a_patched_model_keeps_less_for_the_backward(name: str) -> None:
    """bf16 weights and fp32 adapters, as they are trained."""
    model: Any = adapted(tiny_model(ALL[name], torch.bfloat16)).train()
    with without_dropout(model):
        plain = outcome(model)[2]
        report = patch(model)
        outcome(model)
        ratio = outcome(model)[2] / plain
    print(f"{name}: keeps {ratio:.2f} of the bytes; {report}")
    assert ratio < 1


@pytest.mark.parametrize("name", DENSE)
def test_bf16_errs_at_most_twice_as_much_as_the_unpatched_model(name: str) -> None:
    model: Any = adapted(tiny_model(name, torch.bfloat16)).train()
    with without_dropout(model):
        truth = outcome(copy.deepcopy(model).double())
        torchs = outcome(model)
        ours = outcome(patched(model))
    assert_errs_at_most_twice("log-probs", ours[0], torchs[0], truth[0].double())
    flat = [torch.cat([g.flatten().double() for g in one[1].values()]) for one in (ours, torchs, truth)]
    error, allowed = ((one - flat[2]).square().mean().sqrt() for one in flat[:2])
    print(f"{name}: gradients err {float(error / allowed):.2f} times as much as the unpatched model's")
    assert error <= 2 * allowed
    for key, gradient in truth[1].items():
        mine, theirs = ((one[1][key].double() - gradient.double()).norm() for one in (ours, torchs))
        assert mine <= 2 * theirs + 0.01 * gradient.norm(), key


def test_an_attention_function_is_given_what_looks_and_keeps_like_the_module() -> None:
    seen = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        assert module.q_proj.in_features == module.o_proj.in_features == 32
        module.last_heads = args[0].shape[1]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("remembering", attend)
    model = patched(adapted(tiny_model("llama")))
    model.set_attn_implementation("remembering")
    logps(model)
    assert isinstance(seen[0], type(model.get_base_model().model.layers[0].self_attn))
    assert isinstance(seen[0], nn.Module) and seen[0].layer_idx == 0
    assert model.get_base_model().model.layers[1].self_attn.last_heads == 4


def test_the_report_counts_modules_by_kind_and_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(tiny_model("qwen3"))
    with caplog.at_level(logging.INFO, "fastdpo"):
        report = patch(model)
    line = "patched: qwen3: rms_norm 9, glu 2, rope 2, lora_qkv 2, lora_mlp 2, lora 2"
    assert str(report) == line == caplog.messages[-1]
    assert report.families == ("qwen3",) and report.left_alone == {} and report.bound == 13


def test_patching_twice_changes_nothing_and_says_so() -> None:
    model = adapted(tiny_model("llama"))
    first = patch(model)
    before = attributes(model)
    second = patch(model)
    assert attributes(model) == before and second.counts == first.counts and second.bound == 0
    assert str(second).startswith("patched already, nothing changed: llama: rms_norm 5")


def test_experts_and_training_weights_are_left_alone_and_the_report_says_so() -> None:
    left = patch(tiny_model("mixtral").requires_grad_(True)).left_alone
    assert [len(names) for names in left.values()] == [2, 8]
    assert (
        "3-D" in next(iter(left))
        and "model.layers.0.self_attn.q_proj" in left["weights that train: fused once frozen under adapters"]
    )


def test_an_unknown_family_stays_as_it_is_and_the_report_says_so() -> None:
    model = tiny_model(UNKNOWN)
    before = attributes(model)
    report = patch(model)
    assert attributes(model) == before and report.bound == 0 and report.families == ()
    assert str(report) == "nothing patched: mpt has no row in fastdpo.architectures: it trains unpatched"
    unpatch(model)


@pytest.mark.parametrize(
    ("piece", "missing"),
    [
        ({"LlamaMLP": architectures.Gated(("gate", "up_proj", "down_proj"))}, "LlamaMLP.gate"),
        ({"LlamaGone": architectures.LLAMA_NORM}, "LlamaGone"),
        ({"LlamaAttention": architectures.Block(architectures.Rotary(function="rotate"))}, "calling rotate"),
    ],
)
def test_a_broken_promise_raises_and_names_what_is_missing(
    piece: dict[str, Any], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = architectures.FAMILIES["llama"]
    monkeypatch.setitem(architectures.FAMILIES, "llama", architectures.Family({**row.classes, **piece}))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=missing):
        patch(model)
    assert not is_patched(model)


class OwnAttention(LlamaAttention):
    pass


def test_a_class_made_from_a_known_one_runs_its_own_forward_and_the_report_names_it() -> None:
    model = tiny_model("llama")
    expected = outcome(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    report = patch(model)
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert report.left_alone["OwnAttention computes in its own way, not as LlamaAttention"] == names
    assert report.counts["rms_norm"] == 5 and report.counts["glu"] == 2 and report.counts["rope"] == 0
    assert_same(outcome(model), expected)


def test_a_module_in_place_of_a_known_one_is_left_alone_and_the_report_says_so() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    report = patch(model)
    assert "no LlamaMLP: what stands in its place computes in its own way" in report.left_alone
    assert report.counts["rms_norm"] == 5 and report.counts["glu"] == 0


def test_a_model_of_another_family_with_modules_of_a_known_one_trains_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), LlamaRMSNorm(8))
    x = torch.randn(3, 8)
    expected = model(x)
    report = patch(model)
    assert report.left_alone == {
        "Sequential has no row in fastdpo.architectures: patched is what it has of llama": [""]
    }
    assert report.families == ("llama",) and report.counts["rms_norm"] == 1
    torch.testing.assert_close(model(x), expected)


def test_an_activation_without_kernel_leaves_the_mlp_alone() -> None:
    report = patch(tiny_model("llama", hidden_act="relu"))
    assert report.counts["glu"] == 0 and len(report.left_alone["ReLU has no kernel"]) == 2


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="str"):
        patch("llama")  # type: ignore[arg-type]


# Before and after: adapters, copies, files


def test_adapters_may_come_after_patching(calls: dict[str, int]) -> None:
    expected = outcome(adapted(tiny_model("qwen2")))
    model = adapted(patched(tiny_model("qwen2")))
    assert_same(outcome(model), expected)
    assert patch(model).counts == {"rms_norm": 5, "glu": 2, "rope": 2, "lora_qkv": 2, "lora_mlp": 2, "lora": 2}
    assert calls["lora_qkv"] and calls["lora_mlp"] and calls["lora_linear"]
    unpatch(model)
    assert not is_patched(model)


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    model = patched(adapted(tiny_model("llama")))
    expected = logps(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logps(twin), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(logps(model), expected, rtol=0, atol=0)
    assert float((logps(twin) + torch.tensor(97.0).log()).abs().max()) < 1e-5
    unpatch(twin)
    assert is_patched(model) and not is_patched(twin)


def test_pickled_models_and_state_dicts_come_back(tmp_path: Path) -> None:
    model = patched(adapted(tiny_model("llama")))
    expected = logps(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)
    assert not is_patched(back)
    torch.testing.assert_close(logps(back), expected, rtol=0, atol=1e-5)
    assert patch(back).bound == 9
    torch.testing.assert_close(logps(back), expected, rtol=0, atol=0)
    assert model.state_dict().keys() == adapted(tiny_model("llama")).state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logps(loaded), expected, rtol=0, atol=1e-5)


def test_merging_and_unloading_leaves_a_patched_model_that_computes_the_same() -> None:
    model = patched(adapted(tiny_model("llama")))
    expected = logps(model)
    whole = model.merge_and_unload()
    assert is_patched(whole)
    torch.testing.assert_close(logps(whole), expected, rtol=0, atol=1e-4)
    unpatch(whole)
    torch.testing.assert_close(logps(whole), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4", "gpt2", "falcon-rotary"])
def test_generation_with_a_cache_is_the_same(name: str) -> None:
    model = adapted(tiny_model(name)).eval()
    generate = lambda: model.generate(input_ids=IDS[:, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)  # noqa: E731
    expected = generate()
    patch(model)
    assert torch.equal(generate(), expected)


def test_hidden_states_and_attentions_are_still_given() -> None:
    model = tiny_model("llama", attn_implementation="eager")
    expected = model(IDS, output_hidden_states=True, output_attentions=True)
    actual = patched(model)(IDS, output_hidden_states=True, output_attentions=True)
    for one, other in zip(
        actual.hidden_states + actual.attentions, expected.hidden_states + expected.attentions, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model: Any = adapted(tiny_model("llama")).train()
    expected = outcome(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    patch(model)  # the first use, with its comparison, is inside of a checkpoint
    assert_same(outcome(model), expected)


def test_torch_compile_makes_one_graph_of_a_patched_model() -> None:
    model = patched(adapted(tiny_model("llama", num_hidden_layers=1)))
    expected = logps(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logps(compiled), expected, rtol=0, atol=1e-4)  # type: ignore[arg-type]
    torch.testing.assert_close(logps(model), expected, rtol=0, atol=0)


def test_autocast_computes_in_its_dtype(calls: dict[str, int]) -> None:
    model = adapted(tiny_model("llama"))
    truth = logps(model).detach().double()
    with torch.autocast("cpu", torch.bfloat16):
        torchs = logps(model).detach()
        ours = logps(patched(model)).detach()
    assert calls["lora_qkv"] and calls["lora_mlp"]
    assert_errs_at_most_twice("log-probs", ours, torchs, truth)


# The state of adapters decides at each call


def test_adapters_switched_off_and_others_switched_on_are_followed() -> None:
    models = [adapted(tiny_model("llama")) for _ in range(2)]
    patch(models[1])
    for model in models:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        q.data.copy_(p.data)
    results: list[list[Any]] = [[], []]
    for model, seen in zip(models, results, strict=True):
        seen.append(outcome(model))
        with torch.no_grad(), model.disable_adapter():
            seen.append((logps(model), {}))
        model.set_adapter("other")
        seen.append(outcome(model))
        model.base_model.set_adapter(["default", "other"])
        seen.append(outcome(model))
        model.set_adapter("default")
        model.merge_adapter()
        seen.append((logps(model).detach(), {}))
        model.unmerge_adapter()
        seen.append((logps(model).detach(), {}))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=FP32 * float(theirs[0].abs().max()))
        if theirs[1]:
            assert gradient_error(ours[1], theirs[1]) < FP32
    assert float((results[0][0][0] - results[0][3][0]).abs().max()) > 1e-2


def test_a_new_adapter_gives_bitwise_what_the_adapter_switched_off_gives() -> None:
    model = patched(adapted(tiny_model("qwen2"), init_lora_weights=True))
    values = logps(model)
    with torch.no_grad():
        assert torch.equal(logps(model), values)
        with model.disable_adapter():
            assert torch.equal(logps(model), values)


def test_an_adapters_class_of_a_script_takes_its_own_forward(calls: dict[str, int]) -> None:
    model: Any = adapted(tiny_model("qwen2"), target_modules=["q_proj"])
    for layer in model.base_model.model.model.layers:
        cls = type(layer.self_attn.q_proj)
        layer.self_attn.q_proj.__class__ = type("Own", (cls,), {"__module__": "__main__"})
    assert len(patch(model).left_alone["Own of __main__ is not plain LoRA"]) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "a variant of LoRA such as DoRA"),
        ({"lora_bias": True}, "LoRA with a bias"),
        ({"bias": "all"}, "weights that train"),
        ({"lora_dropout": 0.5}, "LoRA dropout while training"),
    ],
)
def test_what_the_fused_path_does_not_cover_takes_pefts_own(
    options: dict[str, Any], why: str, calls: dict[str, int]
) -> None:
    model: Any = adapted(tiny_model("qwen2", mlp_bias=True), target_modules=["q_proj", "k_proj", "v_proj"], **options)
    model.train()
    expected = outcome(model)
    report = patch(model)
    assert len(report.left_alone[why]) == 6 and report.counts["lora_qkv"] == 0
    outcome(model)
    assert_same(outcome(model), expected)
    assert calls["lora_qkv"] == calls["lora_linear"] == 0
    if "lora_dropout" in options:
        logps(model.eval())
        assert calls["lora_qkv"]


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"modules_to_save": ["gate_proj"]}, {"target_modules": "mlp.+"}]
)
def test_other_adapters_compute_the_same(options: dict[str, Any]) -> None:
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}
    if "target_modules" in options:
        options, targets = {}, {"target_modules": ["gate_proj", "down_proj", "v_proj", "lm_head"]}
    model = adapted(tiny_model("llama"), **targets, **options)
    expected = outcome(model)
    assert_same(outcome(patched(model)), expected)


def test_frozen_weights_without_memory_take_the_fused_path() -> None:
    with FakeTensorMode():
        x, layer = torch.empty(3, 8, requires_grad=True), nn.Linear(8, 4).requires_grad_(False)
        now = projections.projection(layer, x)
        assert now is not None
        patching.lora_linear(x, now).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_hooks_on_a_projection_still_run(calls: dict[str, int]) -> None:
    model = patched(adapted(tiny_model("llama")))
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            module.register_forward_hook(lambda *_: seen.append(1))
    expected = logps(model)  # the first use, whose comparison no hook sees
    assert len(seen) == 4 and calls["lora_qkv"] == calls["lora_mlp"] == 0
    unpatch(model)
    torch.testing.assert_close(logps(model), expected, rtol=0, atol=1e-4)


def test_forwards_that_others_have_bound_are_left_and_unpatch_refuses_to_lose_a_hook() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_model("llama")
    add_hook_to_module(model.model.norm, ModelHook())
    report = patch(model)
    assert report.left_alone["a forward bound by others"] == ["model.norm"] and report.counts["rms_norm"] == 4
    layer = model.model.layers[0].input_layernorm
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(ValueError, match=r"model.layers.0.input_layernorm .* remove that first"):
        unpatch(model)
    assert is_patched(model)
    remove_hook_from_module(layer)
    unpatch(model)
    assert not is_patched(model)


def test_unpatch_refuses_to_leave_our_forward_running_inside_of_another() -> None:
    model: Any = patched(tiny_model("llama"))
    mlp = model.model.layers[0].mlp
    ours = mlp.forward
    mlp.forward = lambda x: ours(x)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp \(LlamaMLP\) was given another forward after patch"):
        unpatch(model)
    assert is_patched(model)
    mlp.forward = ours
    unpatch(model)
    assert not is_patched(model)
    mlp.forward = lambda x: x
    unpatch(model)  # which was not patched


@pytest.mark.parametrize("first", [True, False], ids=["first use", "later"])
def test_a_batch_that_mixes_adapters_is_pefts_own(first: bool, calls: dict[str, int]) -> None:
    model: Any = adapted(tiny_model("llama")).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    names = ["other", "__base__"]
    expected = model(IDS, adapter_names=names).logits
    patch(model)
    if not first:
        logps(model)
        calls.update(lora_qkv=0)
    torch.testing.assert_close(model(IDS, adapter_names=names).logits, expected, rtol=0, atol=1e-4)
    assert not calls["lora_qkv"]
    logps(model)
    assert calls["lora_qkv"]


@pytest.mark.parametrize("when", ["before patch", "before the first use", "after it"])
@pytest.mark.parametrize("change", ["hook", "another"])
def test_an_activation_that_was_hooked_or_replaced_is_the_models_own(change: str, when: str) -> None:
    def alter(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        if change == "another":
            mlp.act_fn = nn.ReLU()
        else:
            mlp.act_fn.register_forward_hook(lambda module, given, result: result * 0.5)

    plain, model = tiny_model("llama"), tiny_model("llama")
    alter(plain)
    if when == "before patch":
        alter(model)
    report = patch(model)
    assert report.counts["glu"] == 2 - (when == "before patch")
    if when == "after it":
        logps(model)
    if when != "before patch":
        alter(model)
    torch.testing.assert_close(logps(model), logps(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_switching_adapters_off_does_not_change_which_path_a_layer_takes(
    options: dict[str, Any], calls: dict[str, int]
) -> None:
    """A reference of adapters switched off is then bitwise the policy it starts from, on 4-bit weights as well."""
    model: Any = adapted(tiny_model("qwen2", mlp_bias=True), init_lora_weights=True, **options).train()
    patch(model)
    logps(model)
    assert calls["lora_qkv"] == calls["lora_mlp"] == calls["lora_linear"] == 0
    with torch.no_grad(), model.disable_adapter():
        logps(model)
    assert calls["lora_qkv"] == calls["lora_mlp"] == calls["lora_linear"] == 0


def test_models_are_unpatched_and_a_runs_own_exception_comes_out_whatever_unpatch_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    for failure, expected in ((KeyError("the run's own"), KeyError), (None, ValueError)):
        hooked, other = tiny_model("llama"), tiny_model("llama")
        caplog.clear()
        with pytest.raises(expected, match="the run's own" if failure else "remove that first"):  # noqa: SIM117
            with patching.patched([hooked, other]):
                add_hook_to_module(hooked.model.norm, ModelHook())
                if failure is not None:
                    raise failure
        assert is_patched(hooked) and not is_patched(other)
        assert ("remove that first" in caplog.text) == (failure is not None)


# First use


def test_the_bound_of_fp32_products_is_tf32s_where_that_was_switched_on_the_newer_way() -> None:
    """As transformers' tf32=True does; torch.get_float32_matmul_precision() raises after that."""
    matmul: Any = torch.backends.cuda.matmul
    backends: Any = torch.backends
    before = backends.fp32_precision, matmul.fp32_precision
    fp32 = {torch.float32}
    try:
        backends.fp32_precision = matmul.fp32_precision = "tf32"
        assert first_use.rounding("cuda", fp32) == first_use.TF32_BOUND > first_use.rounding("cpu", fp32)
    finally:
        backends.fp32_precision, matmul.fp32_precision = before
    assert first_use.rounding("cuda", fp32) == first_use.rounding("cpu", fp32) == first_use.BOUNDS[torch.float32]
    torch.get_float32_matmul_precision()


def test_the_comparison_changes_nothing_that_another_thread_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(adapted(tiny_model("llama"), init_lora_weights=True))
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    pointers, compared, kernel = [p.data_ptr() for p in factors], [], patching.lora_mlp

    def looking(x: Tensor, *given: Any) -> Tensor:
        compared.append(all(bool(p.adapter.b.any()) for p in given[:3]))
        assert not any(bool(p.any()) for p in factors) and [p.data_ptr() for p in factors] == pointers
        return kernel(x, *given)

    monkeypatch.setattr(patching, "lora_mlp", looking)
    logps(model)
    assert compared == [True, False, False]


WRONG: dict[str, Any] = {
    "rms_norm": lambda x, weight, eps, **_: x,
    "glu": lambda gate, up, _: gate * up,
    "rope": lambda q, k, *_, **__: (q, k),
    "lora_qkv": lambda x, *three: tuple(patching.lora_linear(x, p) * 1.1 for p in three),
    "lora_mlp": lambda x, *_: x,
    "lora_linear": lambda x, projection: nn.functional.linear(x, projection.weight, projection.bias),
}


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_found_at_its_first_use(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = adapted(tiny_model("llama"), init_lora_weights=True)  # B is zero, and a lost adapter is noticed
    if kernel == "glu":
        model = model.unload().requires_grad_(True)
    monkeypatch.setattr(patching, kernel, WRONG[kernel])
    patch(model)
    with pytest.raises(RuntimeError, match=rf"\({kernel.removesuffix('_linear')}\).*differs|gives .* the unpatched"):
        logps(model)


def test_every_class_of_a_kind_is_compared_at_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-4 has a norm with weights, and one without that another version of transformers may compute otherwise."""
    forward = Llama4TextL2Norm.forward
    monkeypatch.setattr(Llama4TextL2Norm, "forward", lambda self, x: 3 * forward(self, x))
    model = patched(tiny_model("llama4-chunks"))
    with pytest.raises(RuntimeError, match=r"patched Llama4TextL2Norm \(rms_norm\) differs"):
        logps(model)


def test_narrow_adapters_on_a_wide_base_are_compared_in_the_bases_dtype_and_err_less_than_pefts() -> None:
    """TRL casts the adapters of 4-bit models to bf16: peft then multiplies in bf16 what is multiplied in fp32 here."""
    model = adapted(tiny_model("llama"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    truth, theirs = outcome(copy.deepcopy(model).double()), outcome(model)
    ours = outcome(patched(model))
    errors = [float((one[0].double() - truth[0].double()).abs().max()) for one in (ours, theirs)]
    assert errors[0] < 0.01 * errors[1]
    wrong = [gradient_error({n: g.double() for n, g in one[1].items()}, truth[1]) for one in (ours, theirs)]
    assert wrong[0] < wrong[1]
    print(f"log-probs err {errors[0] / errors[1]:.4f}, gradients {wrong[0] / wrong[1]:.2f} times as much as peft's")


def test_the_first_use_draws_no_random_number_and_comes_once_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = first_use.Checks.compare
    monkeypatch.setattr(first_use.Checks, "compare", lambda s, kind, *a: (compared.append(kind), compare(s, kind, *a)))
    model: Any = adapted(tiny_model("llama"), lora_dropout=0.3).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    patch(model)
    state = torch.get_rng_state()
    factors = {n: p.clone() for n, p in model.named_parameters()}
    logps(model)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    logps(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    logps(model.eval())
    assert sorted(compared) == ["glu", "lora", "lora_mlp", "lora_qkv", "rms_norm", "rope"]
    assert all(not p.grad.any() and torch.equal(p, factors[n]) for n, p in model.named_parameters())
    logps(copy.deepcopy(model))
    assert len(compared) == 6


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", DENSE)
def test_kernels_err_at_most_twice_as_much_as_the_unpatched_model(name: str) -> None:
    model: Any = adapted(tiny_model(name, torch.bfloat16)).train()
    with without_dropout(model):
        truth = outcome(copy.deepcopy(model).double())
        model.cuda()
        torchs = outcome(model)
        ours = outcome(patched(model))
    assert ours[2] < torchs[2]
    flat = [torch.cat([g.cpu().flatten().double() for g in one[1].values()]) for one in (ours, torchs, truth)]
    error, allowed = ((one - flat[2]).square().mean().sqrt() for one in flat[:2])
    assert error <= 2 * allowed
    assert_errs_at_most_twice("log-probs", ours[0].cpu(), torchs[0].cpu(), truth[0].double())


# 4-bit base weights, by bitsandbytes itself


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    pytest.importorskip("bitsandbytes")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **shape, "attention_bias": True, "initializer_range": 0.2})  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder)

    def load(compute: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> Any:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
        quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
        where = {"quantization_config": quantization, "device_map": {"": "cpu"}, "dtype": dtype}
        model = AutoModelForCausalLM.from_pretrained(folder, **where)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return load


def test_4_bit_gives_bitsandbytes_log_probs_and_gradients(four_bit: Callable[..., Any], calls: dict[str, int]) -> None:
    model = adapted(four_bit())
    expected = outcome(model)
    report = patch(model)
    assert report.counts == {"rms_norm": 5, "glu": 2, "rope": 2, "lora_qkv": 2, "lora_mlp": 2, "lora": 2}
    outcome(model)
    actual = outcome(model)
    assert_same(actual, expected)
    print(f"4-bit LoRA: keeps {actual[2] / expected[2]:.2f} of the bytes")
    assert actual[2] < expected[2] and calls["lora_mlp"] and calls["lora_qkv"] and calls["lora_linear"]


def test_4_bit_without_adapters_is_fused_too_and_dequantises_when_no_gradient_is_asked_for(
    four_bit: Callable[..., Any], calls: dict[str, int]
) -> None:
    model = four_bit().requires_grad_(False)
    expected = logps(model)
    patch(model)
    with torch.no_grad():
        torch.testing.assert_close(logps(model), expected, rtol=0, atol=1e-4)
    assert calls["lora_mlp"] and calls["lora_qkv"] and calls["lora_linear"]


@pytest.mark.parametrize("width", [32, 96])
def test_4_bit_rows_that_end_amid_a_block_are_read_right_whatever_bitsandbytes_makes_of_them(
    width: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bitsandbytes 0.50 reads them wrongly on CPUs with AVX512, so there is nothing to compare with."""
    tiny_model("llama", hidden_size=width, intermediate_size=2 * width).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    where = {"quantization_config": quantization, "device_map": {"": "cpu"}, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **where)
    dense: Any = tiny_model("llama", hidden_size=width, intermediate_size=2 * width)
    for name, module in model.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            dense.get_submodule(name).weight.data = dequantize(Packed.of(module.weight.data, state), torch.float32)
    expected = outcome(adapted(dense))
    with caplog.at_level(logging.WARNING, "fastdpo"):
        patch(model)
    assert ("bitsandbytes reads" in caplog.text) == bool(misread_layers(model))
    assert_same(outcome(adapted(model)), expected)


def test_the_first_use_does_not_let_bitsandbytes_pack_weights(four_bit: Callable[..., Any]) -> None:
    model = adapted(four_bit(torch.bfloat16, torch.bfloat16)).eval()
    quantised = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for module in quantised:
        module.support_avx512bf16_for_cpu = True
    patch(model)
    before = [module.weight.data.clone() for module in quantised]
    with torch.no_grad():
        logps(model)
    for module, data in zip(quantised, before, strict=True):
        assert not module.support_avx512bf16_for_cpu and torch.equal(module.weight.data, data)


def test_4_bit_dora_has_the_same_gradients_after_an_evaluation(four_bit: Callable[..., Any]) -> None:
    """peft's own path: bitsandbytes packed its weights in the evaluation, where the CPU has AVX512-bf16 products."""
    model = adapted(four_bit(torch.bfloat16, torch.bfloat16), use_dora=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    patch(model)
    before = outcome(model)[1]
    with torch.no_grad():
        logps(model.eval())
    after = outcome(model)[1]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("compute", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_4_bit_products_in_another_dtype_than_their_input_are_bitsandbytes_own(
    compute: torch.dtype, dtype: torch.dtype, four_bit: Callable[..., Any], calls: dict[str, int]
) -> None:
    model = adapted(four_bit(compute, dtype))
    expected = outcome(model)
    report = patch(model)
    assert not any(report.counts[kind] for kind in ("lora_qkv", "lora_mlp", "lora"))
    why = f"4-bit products in {compute}, unless under autocast in it (set bnb_4bit_compute_dtype={dtype})"
    assert len(report.left_alone[why]) == 14
    assert_same(outcome(model), expected, 0.1)
    assert calls["lora_qkv"] == calls["lora_mlp"] == calls["lora_linear"] == 0
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        logps(model)
    assert bool(calls["lora_qkv"] and calls["lora_mlp"] and calls["lora_linear"]) == (compute != torch.float32)


# Examples

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["plain_loop", "patch_in_trl"])
def test_an_example_trains_as_the_unpatched_model_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "patch_in_trl":
        pytest.importorskip("trl")
    reports: list[PatchReport] = []
    monkeypatch.setattr(fastdpo, "patch", lambda model: reports.append(patch(model)))
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    losses = main()
    monkeypatch.setattr(fastdpo, "patch", lambda model: None)
    assert losses == pytest.approx(main(), rel=2e-4)
    assert losses[-1] < 0.6 < losses[0] and reports[0].bound
