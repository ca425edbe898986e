"""Which backend a call goes to, and what the ones that need a GPU would be called with.

The variable-length kernels cannot run here. Stand-ins that follow their documentation, in plain torch, take their
place: what comes out shows that the gathered keys, offsets, windows and scales that they are given are right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from dense_attention import dense_attention, projections, segments_of, visible
from tiny_models import RAGGED, gradient_error, gradients, random_pairs, tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface

from fastdpo import attention, attention_backends
from fastdpo.attention import backend_report, prefix_attention
from fastdpo.attention_backends import (
    BACKENDS,
    DESCRIPTIONS,
    Facts,
    Refused,
    Scores,
    check_asked,
    choose,
    flash_width,
    segment_groups,
)
from fastdpo.batch import pack
from fastdpo.model import Policy, checkpointing, without_dropout

# Which backend

H100 = Facts("cuda", (9, 0), torch.bfloat16, 128, 128, flash_built=True)
RTX = replace(H100, capability=(8, 9))
TURING = replace(H100, capability=(7, 5), dtype=torch.float16)
ASKED = replace(H100, asked="flash_attention_2", flash_attn=(2, 8))

CHOICES: dict[str, tuple[Facts, str, str]] = {
    "H100, bf16": (H100, "flash", "bfloat16 on compute capability 9.0"),
    "H100, fp16": (replace(H100, dtype=torch.float16), "flash", "float16"),
    "H100, bf16, window": (replace(H100, window=4096), "flash", "bfloat16"),
    "H100, latent attention": (replace(H100, head_size=192), "flash", "bfloat16"),
    "H100, odd heads": (replace(H100, head_size=100, value_size=100), "flash", "bfloat16"),
    "H100, heads of 256": (replace(H100, head_size=256, value_size=256), "flash", "bfloat16"),
    "H100, heads of 320": (replace(H100, head_size=320), "efficient", "heads of up to 256, not 320"),
    "H100, dropout": (replace(H100, head_size=256, dropout=True), "flash", "bfloat16"),
    "RTX, heads of 256": (replace(RTX, head_size=256), "flash", "bfloat16"),
    "RTX, heads of 256, dropout": (replace(RTX, head_size=256, dropout=True), "efficient", "no gradient for heads"),
    "H100, fp32": (replace(H100, dtype=torch.float32), "efficient", "takes bfloat16 and float16, not float32"),
    "H100, fp32, window": (replace(H100, dtype=torch.float32, window=9), "sdpa", "no gradient for sliding windows"),
    "H100, fp64": (replace(H100, dtype=torch.float64), "sdpa", "efficient attention does not take float64"),
    "H100, softcap": (replace(H100, softcap=True), "products", "no softcap"),
    "H100, sinks": (replace(H100, sinks=True), "products", "no sinks"),
    "no flash in torch": (replace(H100, flash_built=False), "efficient", "built without flash attention"),
    "T4, fp16": (TURING, "efficient", "flash attention needs compute capability 8.0, not compute capability 7.5"),
    "T4, fp16, window": (replace(TURING, window=9), "sdpa", "no gradient for sliding windows"),
    "T4, bf16": (replace(TURING, dtype=torch.bfloat16), "sdpa", "does not take bfloat16"),
    "AMD": (replace(H100, device="hip"), "sdpa", "needs an NVIDIA GPU, not 'hip'"),
    "CPU": (Facts(), "sdpa", "needs an NVIDIA GPU, not 'cpu'"),
    "CPU, window": (Facts(window=9), "sdpa", "'cpu'"),
    "CPU, softcap": (Facts(softcap=True), "products", "no softcap"),
    "CPU, sinks": (Facts(sinks=True, window=9), "products", "no sinks"),
    "eager on a CPU": (Facts(asked="eager"), "products", "'eager'"),
    "eager on a GPU": (replace(H100, asked="eager"), "products", "'eager'"),
    "the package": (ASKED, "flash-attn", "'flash_attention_2'"),
    "the package, softcap and window": (replace(ASKED, softcap=True, window=9), "flash-attn", "'flash_attention_2'"),
    "installed, not asked for": (replace(ASKED, asked=None), "flash", "bfloat16"),
}


@pytest.mark.parametrize(("facts", "backend", "why"), CHOICES.values(), ids=CHOICES)
def test_facts_choose_the_backend_and_say_why(facts: Facts, backend: str, why: str) -> None:
    chosen, reason = choose(facts)
    assert chosen == backend and why in reason, reason
    assert chosen in BACKENDS and chosen in DESCRIPTIONS


REFUSALS: dict[str, tuple[Facts, str]] = {
    "not installed": (replace(ASKED, flash_attn=()), r"not installed \(pip install flash-attn\)"),
    "too old": (replace(ASKED, flash_attn=(2, 0)), "flash-attn 2.0 is too old"),
    "too old for softcaps": (replace(ASKED, flash_attn=(2, 5), softcap=True), "flash-attn 2.5 is too old"),
    "a CPU": (replace(ASKED, device="cpu"), "needs an NVIDIA GPU, not 'cpu'"),
    "a T4": (replace(ASKED, capability=(7, 5)), "needs compute capability 8.0"),
    "fp32": (replace(ASKED, dtype=torch.float32), "takes bfloat16 and float16, not float32"),
    "sinks": (replace(ASKED, sinks=True), "no sinks"),
    "heads of 320": (replace(ASKED, head_size=320), "heads of up to 256, not 320"),
}


@pytest.mark.parametrize(("facts", "why"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_user_asked_for_is_refused_by_name_where_it_cannot_be(facts: Facts, why: str) -> None:
    with pytest.raises(Refused, match=f"'flash_attention_2' was asked for, but .*{why}.*: leave attn_implementation"):
        choose(facts)


def test_asking_for_the_package_on_a_cpu_is_refused_before_a_model_loads() -> None:
    for asked in (None, "sdpa", "eager", "flash_attention_3"):
        check_asked(asked, torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="'flash_attention_2' was asked for, but .*: leave attn_implementation out"):
        check_asked("flash_attention_2", torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="flex_attention' has no gradient on a CPU"):
        check_asked("flex_attention", torch.device("cpu"), torch.bfloat16)


def test_an_attention_that_nobody_knows_is_refused_before_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip was found by transformers, in words of its own, after the dataset had been tokenized."""
    with pytest.raises(
        ValueError, match="'spda' is none that transformers knows: take one of eager, flash_attention_2"
    ):
        check_asked("spda", torch.device("cpu"), torch.bfloat16)
    check_asked("kernels-community/flash-attn3", torch.device("cpu"), torch.bfloat16)
    check_asked("flash_attention_5", torch.device("cpu"), torch.bfloat16)
    monkeypatch.setitem(AttentionInterface._global_mapping, "theirs", lambda: None)
    check_asked("theirs", torch.device("cpu"), torch.bfloat16)


def test_a_report_has_a_row_for_each_kind_of_layer() -> None:
    short, wide, full = H100, replace(H100, window=9), replace(H100, dtype=torch.float32, window=9)
    names, paths = zip(*backend_report([short, wide, short, full]), strict=True)
    assert names == ("packed attention",) * 3
    assert paths[0] == "torch's flash attention, one call a layer (bfloat16 on compute capability 9.0)"
    assert paths[1] == f"with windows: {paths[0]}"
    assert "segment by segment (flash attention takes bfloat16 and float16, not float32; efficient" in paths[2]
    assert any("softcap" in path for _, path in backend_report())


def test_autocast_decides_the_dtype_that_a_backend_is_chosen_for_and_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms with fp32 weights give fp32 queries beside bf16 values, and a kernel takes one dtype."""
    seen: list[torch.dtype] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        seen.extend(tensor.dtype for tensor in (query, key, value))
        return attention_backends.sdpa(query, key, value, *rest)

    monkeypatch.setitem(BACKENDS, "sdpa", watched)
    query, key, value = projections(9, (4, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        prefix_attention(nn.Module(), query, key, value.bfloat16(), None, segments=segments_of(PAIRS))
    prefix_attention(nn.Module(), query, key, value, None, segments=segments_of(PAIRS))
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 3


# Groups of segments that one call can take


def test_segments_are_cut_where_the_kernels_buffer_would_pass_int32() -> None:
    heads, width = 32, 128
    for count, length, calls in ((1000, 300, 1), (2000, 300, 2), (4000, 2, 1), (5000, 2, 2), (3, 10**6, 3)):
        lengths = [length] * count
        groups = segment_groups(lengths, heads, width)
        assert len(groups) == calls, (count, length)
        assert [first for first, _ in groups[1:]] == [last for _, last in groups[:-1]]
        assert groups[0][0] == 0 and groups[-1][1] == count
        for first, last in groups:
            elements = (sum(lengths[first:last]) + 128 * (last - first)) * heads * width
            assert elements < 2**31 or last - first == 1


def test_a_head_size_between_two_of_the_kernels_counts_as_the_larger() -> None:
    lengths = [900] * 3000
    assert segment_groups(lengths, 16, 80) == segment_groups(lengths, 16, 128) != segment_groups(lengths, 16, 64)


def test_heads_are_widened_to_what_the_kernels_have_a_gradient_for_everywhere() -> None:
    sizes = {(64, 64): 64, (100, 100): 104, (192, 128): 192, (193, 8): 256, (224, 224): 256, (256, 256): 256}
    assert {given: flash_width(*given) for given in sizes} == sizes


# What the kernels are given


def variable_length_attention(
    query: Tensor,  # (T, Hq, d)
    key: Tensor,  # (K, Hkv, d)
    value: Tensor,  # (K, Hkv, dv)
    cu_queries: Tensor,
    cu_keys: Tensor,
    scale: float,
    left: int,
    softcap: float = 0.0,
) -> Tensor:
    """As FlashAttention-2 documents causal=True: a query at i of Lq sees the keys from i + Lk - Lq - left (all, where
    left is -1) to i + Lk - Lq.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for segment in range(len(cu_queries) - 1):
        q = query[cu_queries[segment] : cu_queries[segment + 1]].transpose(0, 1)
        k, v = (x[cu_keys[segment] : cu_keys[segment + 1]].transpose(0, 1) for x in (key, value))
        last = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        index = torch.arange(k.shape[1])[None]
        seen = (index <= last) & ((index >= last - left) | (left < 0))
        scores = q @ k.mT * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def check_arguments(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, most: tuple) -> None:
    """What the kernels check, or read without checking."""
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert all(tensor.shape[-1] % 8 == 0 for tensor in (query, key, value))
    for cu, tensor, longest in ((cu_q, query, most[0]), (cu_k, key, most[1])):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == tensor.shape[0]
        assert type(longest) is int and longest == int(cu.diff().max())


def stand_in_for_flash(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any, **kw: Any
) -> tuple[Tensor]:
    dropout, causal, debug = rest
    assert (dropout, causal, debug) == (0.0, True, False) and kw.keys() == {
        "scale",
        "window_size_left",
        "window_size_right",
    }
    assert key.shape == value.shape and query.shape[-1] == key.shape[-1] <= 256
    check_arguments(query, key, value, cu_q, cu_k, (max_q, max_k))
    left, right = kw["window_size_left"], kw["window_size_right"]
    assert (left is None) == (right is None) and right in (None, 0)
    return (variable_length_attention(query, key, value, cu_q, cu_k, kw["scale"], -1 if left is None else left),)


def stand_in_for_efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: None, cu_q: Tensor, cu_k: Tensor, *rest: Any, scale: float
) -> tuple[Tensor]:
    max_q, max_k, dropout, mask_type, with_logsumexp = rest
    assert bias is None and (dropout, mask_type, with_logsumexp) == (0.0, 2, True)  # 2: causal, bottom right
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2] == value.shape[2]
    check_arguments(query[0], key[0], value[0], cu_q, cu_k, (max_q, max_k))
    return (variable_length_attention(query[0], key[0], value[0], cu_q, cu_k, scale, -1)[None],)


def stand_in_for_the_package(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **kw: Any
) -> Tensor:
    check_arguments(query, key, value, cu_q, cu_k, (max_q, max_k))
    assert key.shape == value.shape and kw["causal"] is True and kw["dropout_p"] == 0.0 and not kw["deterministic"]
    left, right = kw["window_size"]
    assert right == (-1 if left < 0 else 0)
    return variable_length_attention(query, key, value, cu_q, cu_k, kw["softmax_scale"], left, kw.get("softcap", 0.0))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("flash_attn")
    package.flash_attn_varlen_func = stand_in_for_the_package
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in_for_flash)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", stand_in_for_efficient)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sends every call to one backend."""
    return lambda backend: monkeypatch.setattr(attention, "choose", lambda facts: (backend, "a test's choice"))


PAIRS = random_pairs((3, 2, 4))
ONE_CALL: dict[str, tuple[str, dict[str, Any]]] = {
    "flash": ("flash", {}),
    "flash, window": ("flash", {"sliding_window": 4}),
    "flash, window of one": ("flash", {"sliding_window": 1}),
    "efficient": ("efficient", {}),
    "flash-attn": ("flash-attn", {}),
    "flash-attn, window": ("flash-attn", {"sliding_window": 4}),
    "flash-attn, softcap": ("flash-attn", {"softcap": 2.0}),
}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("backend", "options"), ONE_CALL.values(), ids=ONE_CALL)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 12), (12, 20)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_one_call_for_all_segments_is_dense_attention_under_the_explicit_mask(
    backend: str, options: dict[str, Any], sizes: tuple[int, int], heads: tuple[int, int], forced: Callable[[str], None]
) -> None:
    forced(backend)
    mask = visible(RAGGED, options.get("sliding_window"))
    inputs = projections(mask.shape[0], heads, torch.float64, *sizes)
    expected = dense_attention(*inputs, mask, 0.3, options.get("softcap"))
    actual, _ = prefix_attention(nn.Module(), *inputs, None, 0.3, segments=segments_of(RAGGED), **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("backend", ["flash", "flash-attn"])
def test_segments_cut_into_several_calls_give_the_same(
    backend: str, forced: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(backend)
    segments = segments_of(RAGGED)
    inputs = projections(sum(segments.query_lengths), (4, 2), torch.float64)
    whole, _ = prefix_attention(nn.Module(), *inputs, None, segments=segments)
    monkeypatch.setattr(attention_backends, "segment_groups", lambda *_: [(0, 1), (1, 4), (4, 5), (5, 12)])
    cut, _ = prefix_attention(nn.Module(), *inputs, None, segments=segments)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-13)


def test_gradients_of_a_whole_row_are_not_copied_into_zeros() -> None:
    segments = segments_of(RAGGED)
    inputs = projections(sum(segments.query_lengths), (4, 2), torch.float32, 16, 16)
    result = attention_backends._by_flash_kernels(*inputs, segments, lambda query, key, value, call: query)
    names, node = [], result.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    assert names[-1] == "torch::autograd::AccumulateGrad"
    assert not any("Slice" in name or "Select" in name or "Index" in name for name in names)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "flash"),
        ("llama", "efficient"),
        ("mistral-window", "flash"),
        ("gemma3", "flash"),
        ("deepseek-v3-mla", "flash"),
        ("deepseek-v3-mla", "efficient"),
        ("gpt2", "efficient"),
        ("gemma2", "flash-attn"),
    ],
)
def test_a_whole_model_gives_the_same_by_one_call_a_layer(
    name: str, backend: str, checkpointed: bool, forced: Callable[[str], None]
) -> None:
    model = tiny_model(name)
    policy = Policy(model).eval()
    expected, _ = policy(pack(RAGGED))
    own = gradients(expected, model)
    forced(backend)
    with without_dropout(model), checkpointing(policy.train(), None) if checkpointed else nullcontext():
        logps, _ = policy(pack(RAGGED))
        assert gradient_error(gradients(logps, model), own) < 1e-5
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


# Torch's own ops take these calls


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cuts", [False, True], ids=["one_call", "several_calls"])
def test_torchs_flash_op_takes_the_call_and_its_gradient_reaches_every_input(
    heads: tuple[int, int], window: int | None, cuts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors: the op's own check of its arguments and the shapes of its derivative, without a GPU."""
    if cuts:
        monkeypatch.setattr(attention_backends, "segment_groups", lambda *_: [(0, 5), (5, 12)])
    segments = segments_of(RAGGED)._map(lambda tensor: tensor.to("meta"))
    inputs = on_meta(segments.query_lengths, segments.key_lengths, heads)
    output = BACKENDS["flash"](*inputs, segments, Scores(0.3, window))
    assert output.shape == (1, heads[0], sum(segments.query_lengths), 12) and output.dtype == torch.bfloat16
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
        assert gradient.shape == tensor.shape


def test_torchs_efficient_op_takes_the_call_and_has_a_derivative() -> None:
    segments = segments_of(RAGGED)._map(lambda tensor: tensor.to("meta"))
    output = BACKENDS["efficient"](
        *on_meta(segments.query_lengths, segments.key_lengths, (4, 2)), segments, Scores(0.3)
    )
    assert output.shape == (1, 4, sum(segments.query_lengths), 12)
    nodes, names = [output.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.append(type(node).__name__)
            nodes += [following for following, _ in node.next_functions]
    assert "EfficientAttentionBackward0" in names and names.count("AccumulateGrad") == 3


def on_meta(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], heads: tuple[int, int]) -> list[Tensor]:
    shapes = (heads[0], sum(query_lengths), 16), (heads[1], sum(key_lengths), 16), (heads[1], sum(key_lengths), 12)
    return [torch.empty(1, *shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def test_whatever_a_model_hands_over_goes_to_some_backend_on_every_card() -> None:
    """Nothing is refused but what the user asked for."""
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for extra in ({}, {"window": 9}, {"softcap": True}, {"sinks": True, "window": 9}, {"head_size": 512}):
                assert choose(replace(H100, capability=capability, dtype=dtype, **extra))[0] in BACKENDS
