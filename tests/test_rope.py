"""rope: bit for bit transformers' rotations, the kernels against fp64 truth, and what holds of any operation.

Legend: B sequences, T tokens, H heads of q, G heads of k, E numbers of a head, R of them rotated.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from op_contract import (
    Given,
    assert_accurate,
    assert_checkpoints_alike,
    assert_compiles_alike,
    assert_each_gradient_alone_is_the_one_among_all,
    assert_every_element_is_written,
    assert_inputs_stay,
    assert_same,
    assert_saved_tensors_may_come_back_with_other_strides,
    exactly,
    run,
    saved_beside,
)
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.rope import method_report, rope

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo (detected|does not know):UserWarning")

TRITON = pytest.param("triton", marks=pytest.mark.kernels)
METHODS = ["torch", TRITON]
CASES = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(pytest.param("triton", dtype, marks=pytest.mark.kernels, id=f"triton-{dtype}") for dtype in KERNEL_DTYPES),
]
LEAVES = ("q", "k")
B, T, H, G, E = 2, 5, 7, 3, 24
LAYOUTS = {
    f"{'interleaved' if interleaved else 'half'}{' by pair' if by_pair else ''}{' upcast' if upcast else ''}": {
        "interleaved": interleaved,
        "by_pair": by_pair,
        "upcast": upcast,
    }
    for interleaved, by_pair, upcast in itertools.product((False, True), repeat=3)
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
rotated_numbers = pytest.mark.parametrize("rotated", [E, 10], ids=["all", "partial"])


def device_of(method: str) -> str:
    return "cpu" if method == "torch" else KERNEL_DEVICE


def heads(
    dtype: torch.dtype = torch.float32, method: str = "torch", shape: tuple[int, ...] = (B, T, H, G, E)
) -> dict[str, Tensor]:
    """As attention has them: (B, heads, T, E), transposed views of (B, T, heads, E)."""
    (batch, tokens, of_q, of_k, size), generator = shape, torch.Generator().manual_seed(0)
    made = (torch.randn(batch, tokens, n, size, generator=generator, dtype=torch.float64) for n in (of_q, of_k))
    return {name: x.to(device_of(method), dtype).transpose(1, 2) for name, x in zip(LEAVES, made, strict=True)}


def angles(rotated: int, batch: int = B, tokens: int = T) -> Tensor:
    """(batch, T, R / 2) fp32 as rotary modules compute them, each sequence from another position on."""
    frequencies = 1e4 ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    positions = torch.arange(tokens)[None] + 100 * torch.arange(batch)[:, None]
    return positions[..., None].float() * frequencies


def factors(
    rotated: int, dtype: torch.dtype, method: str = "torch", by_pair: bool = False, batch: int = B, **_: bool
) -> dict[str, Tensor]:
    """Columns without any symmetry, so that none stands for another."""
    generator = torch.Generator().manual_seed(1)
    columns = rotated // 2 if by_pair else rotated
    made = (torch.randn(batch, T, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    return {name: x.to(device_of(method), dtype) for name, x in zip(("cos", "sin"), made, strict=True)}


def ours(method: str, **layout: bool) -> Any:
    return lambda q, k, cos, sin: rope(q, k, cos, sin, **layout, method=method)


def inputs(rotated: int, dtype: torch.dtype, method: str, layout: dict[str, bool], batch: int = B) -> Given:
    return {**heads(dtype, method), **factors(rotated, dtype, method, **layout, batch=batch)}


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, by_pair: bool, upcast: bool) -> Any:
    """x * cos + (x with the numbers of each pair exchanged) * sin, in torch's own words: autograd does its backward."""
    if by_pair:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if upcast and x.dtype != torch.float64:
            turned = turned.float()
        if interleaved:
            partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
        else:
            half = turned.shape[-1] // 2
            partner = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        turned = turned * cos[:, None] + partner * sin[:, None]
        return torch.cat([turned.to(x.dtype) if upcast else turned, passed], -1)

    return rotate(q), rotate(k)


# ---- transformers' families

UPCAST = {"upcast": True}
COHERE = {"interleaved": True, "upcast": True}
GLM = {"interleaved": True, "by_pair": True}
GPT_OSS = {"by_pair": True}
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
    "smollm3": {},
    "olmo2": UPCAST,
    "granite": {},
    "cohere": COHERE,
    "cohere2": COHERE,
    "glm": GLM,
    "glm4": GLM,
    "stablelm": {},
    "falcon": {},
    "gpt_neox": {},
    "gpt_oss": GPT_OSS,
}
PARTIAL = ("phi3", "glm", "glm4", "gpt_neox")  # whose functions leave the rest of a head alone; StableLM slices before


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def family_factors(family: str, rotated: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin with the columns that the family's rotary module gives."""
    of_pairs = angles(rotated)
    if family == "gpt_oss":
        columns = of_pairs
    elif family.startswith("cohere"):
        columns = of_pairs.repeat_interleave(2, -1)
    else:
        columns = torch.cat([of_pairs, of_pairs], -1)
    dtype = torch.float32 if family == "olmo2" else dtype
    return columns.cos().to(dtype), columns.sin().to(dtype)


def with_ours(family: str, method: str = "torch") -> Any:
    def compute(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if family in ("glm", "glm4"):
            cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
        return rope(q, k, cos, sin, **FAMILIES[family], method=method)

    return compute


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@rotated_numbers
def test_a_familys_rotation_is_this_bit_for_bit_and_gradients_are_as_accurate(
    family: str, dtype: torch.dtype, rotated: int
) -> None:
    if rotated < E and family not in PARTIAL:
        pytest.skip("this family's function rotates all numbers of a head")
    cos, sin = family_factors(family, rotated, dtype)
    given = {**heads(dtype), "cos": cos, "sin": sin}
    found, expected = run(with_ours(family), given, LEAVES), run(modeling(family).apply_rotary_pos_emb, given, LEAVES)
    for name in ("result 0", "result 1"):
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
    assert_accurate(found, expected, run(with_ours(family), exactly(given), LEAVES))


@pytest.mark.kernels
@pytest.mark.parametrize("family", ["llama", "olmo2", "cohere", "glm4", "gpt_neox", "gpt_oss"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_computes_what_the_families_do(family: str, dtype: torch.dtype) -> None:
    """The forward's roundings are transformers' own, so its values are, too."""
    cos, sin = family_factors(family, 10 if family in PARTIAL else E, dtype)
    given = {**heads(dtype, "triton"), "cos": cos.to(KERNEL_DEVICE), "sin": sin.to(KERNEL_DEVICE)}
    found = run(with_ours(family, "triton"), given, LEAVES)
    expected = run(modeling(family).apply_rotary_pos_emb, given, LEAVES)
    assert_same({n: found[n] for n in ("result 0", "result 1")}, {n: expected[n] for n in ("result 0", "result 1")})
    assert_accurate(found, expected, run(with_ours(family), exactly(given), LEAVES))


@pytest.mark.parametrize(
    ("family", "name", "more"),
    [
        ("llama", "LlamaRotaryEmbedding", {}),
        ("olmo2", "Olmo2RotaryEmbedding", {}),
        ("cohere", "CohereRotaryEmbedding", {}),
        ("glm4", "Glm4RotaryEmbedding", {"head_dim": 12, "pad_token_id": 0}),
        ("gpt_oss", "GptOssRotaryEmbedding", {"head_dim": 12}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rotary_modules_give_the_columns_that_these_tests_assume(family: str, name: str, more: dict[str, Any]) -> None:
    config_name = name.replace("RotaryEmbedding", "Config")
    config = getattr(importlib.import_module(f"transformers.models.{family}"), config_name)
    small = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, **more}
    module = getattr(modeling(family), name)(config(**small))
    cos, sin = module(torch.zeros(1, T, 24, dtype=torch.bfloat16), torch.arange(T)[None])
    assert cos.dtype == sin.dtype == (torch.float32 if family == "olmo2" else torch.bfloat16)
    half = cos.shape[-1] // 2
    if family == "gpt_oss":
        assert cos.shape[-1] == 6
    elif family == "cohere":
        assert torch.equal(cos[..., 0::2], cos[..., 1::2]) and not torch.equal(cos[..., :half], cos[..., half:])
    else:
        assert torch.equal(cos[..., :half], cos[..., half:])
        assert cos.shape[-1] == (6 if family == "glm4" else 12)


@pytest.mark.parametrize("method", METHODS)
def test_llama_4s_complex_rotation_is_this_by_pair(method: str) -> None:
    """Its q and k are (B, T, heads, E), its angles complex numbers."""
    complex_factors = torch.polar(torch.ones(B, T, E // 2), angles(E)).to(device_of(method))

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return modeling("llama4").apply_rotary_emb(q, k, complex_factors)

    def with_ours(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (part.to(q.dtype) if q.dtype == torch.float64 else part for part in parts)
        flags = {"interleaved": True, "by_pair": True, "upcast": True}
        turned = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, **flags, method=chosen)
        return tuple(x.transpose(1, 2) for x in turned)

    parts, chosen = (complex_factors.real, complex_factors.imag), method
    given = {name: x.transpose(1, 2) for name, x in heads(torch.float16, method).items()}
    found, expected = run(with_ours, given, LEAVES), run(theirs, given, LEAVES)
    chosen = "torch"
    assert_accurate(found, expected, run(with_ours, exactly(given), LEAVES))


# ---- the numbers


@pytest.mark.parametrize(("method", "dtype"), CASES)
@layouts
@rotated_numbers
def test_values_and_gradients_err_at_most_twice_as_torchs(
    method: str, dtype: torch.dtype, layout: dict[str, bool], rotated: int
) -> None:
    """And where cos and sin have no symmetry, the forward's is still plain torch's bit for bit."""
    given = inputs(rotated, dtype, method, layout)

    def torchs(**leaves: Tensor) -> Any:
        return plain(**leaves, **layout)

    found, expected = run(ours(method, **layout), given, LEAVES), run(torchs, given, LEAVES)
    assert_accurate(found, expected, run(torchs, exactly(given), LEAVES))
    assert torch.equal(found["result 0"], expected["result 0"]) and torch.equal(found["result 1"], expected["result 1"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("upcast", [False, True], ids=["", "upcast"])
def test_mixed_dtypes_give_what_transformers_gives(method: str, dtypes: tuple[torch.dtype, ...], upcast: bool) -> None:
    """Under autocast cos and sin are fp32 beside q and k of 16 bits, and without upcast the result is fp32."""
    layout = {"interleaved": False, "by_pair": False, "upcast": upcast}
    given = {**heads(dtypes[0], method), **factors(E, dtypes[1], method)}
    with torch.autocast(device_of(method), torch.float16):
        found = run(ours(method, **layout), given, LEAVES)
        expected = run(lambda **leaves: plain(**leaves, **layout), given, LEAVES)
    assert found["result 0"].dtype == (dtypes[0] if upcast else torch.float32)
    assert torch.equal(found["result 0"], expected["result 0"])
    assert_accurate(found, expected, run(lambda **leaves: plain(**leaves, **layout), exactly(given), LEAVES))


@pytest.mark.kernels
def test_q_and_k_may_have_dtypes_of_their_own() -> None:
    given = {**heads(torch.float16, "triton"), **factors(E, torch.float16, "triton")}
    given["k"] = given["k"].float()
    assert_same(run(ours("triton"), given, LEAVES), run(ours("torch"), given, LEAVES))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("shape", "rotated"),
    [
        ((1, 1, 1, 1, 2), 2),
        ((1, 3, 40, 1, 64), 64),
        ((2, 2, 5, 6, 96), 96),
        ((1, 2, 3, 2, 80), 20),
        ((3, 1, 2, 1, 9), 4),
    ],
    ids=str,
)
@layouts
def test_any_shape_will_do(shape: tuple[int, ...], rotated: int, layout: dict[str, bool]) -> None:
    """From one pair to more heads than go at a time."""
    columns = rotated // 2 if layout["by_pair"] else rotated
    cos, sin = torch.randn(2, 1, shape[1], columns, device=KERNEL_DEVICE)
    given = {**heads(method="triton", shape=shape), "cos": cos, "sin": sin}
    assert_same(run(ours("triton", **layout), given, LEAVES), run(ours("torch", **layout), given, LEAVES))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3, 2, 1, 8), (2, 0, 2, 1, 8), (2, 3, 0, 1, 8), (2, 3, 2, 0, 8)], ids=str)
def test_nothing_gives_nothing(method: str, shape: tuple[int, ...]) -> None:
    cos = torch.ones(1, shape[1], 8, device=device_of(method))
    given = {**heads(method=method, shape=shape), "cos": cos, "sin": cos}
    found = run(ours(method), given, LEAVES)
    assert all(found[f"result {place}"].shape == given[name].shape for place, name in enumerate(LEAVES))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("view", ["contiguous", "slices of one product", "part of a head", "columns apart", "expanded"])
@layouts
def test_views_are_read_as_they_lie_and_results_lie_as_they_do(method: str, view: str, layout: dict[str, bool]) -> None:
    given = inputs(E, torch.float32, method, layout)
    product = torch.randn(B, T, (H + G) * E, device=device_of(method))
    of_q, of_k = product.split([H * E, G * E], -1)
    q, k = {
        "contiguous": (given["q"].contiguous(), given["k"].contiguous()),
        "slices of one product": tuple(x.unflatten(-1, (-1, E)).transpose(1, 2) for x in (of_q, of_k)),
        "part of a head": tuple(torch.cat([given[name]] * 2, -1)[..., 5 : 5 + E] for name in LEAVES),
        "columns apart": tuple(given[name].transpose(1, 3).contiguous().transpose(1, 3) for name in LEAVES),
        "expanded": (given["q"][:, :1].expand_as(given["q"]), given["k"]),
    }[view]
    found = run(ours(method, **layout), {**given, "q": q, "k": k}, LEAVES)
    dense = {**given, "q": q.contiguous(), "k": k.contiguous()}
    assert_same(found, run(ours(method, **layout), dense, LEAVES))
    if view == "slices of one product":
        assert (
            found["result 0"].transpose(1, 2).is_contiguous() and found["gradient of k"].transpose(1, 2).is_contiguous()
        )
    if view == "contiguous":
        assert all(value.is_contiguous() for value in found.values())


@pytest.mark.parametrize("method", METHODS)
@layouts
def test_cos_and_sin_may_be_of_one_sequence_or_views(method: str, layout: dict[str, bool]) -> None:
    given = inputs(E, torch.float32, method, layout, batch=1)
    repeated = {name: given[name].expand(B, -1, -1).contiguous() for name in ("cos", "sin")}
    strided = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("cos", "sin")}
    found = run(ours(method, **layout), given, LEAVES)
    assert_same(found, run(ours(method, **layout), {**given, **repeated}, LEAVES))
    assert_same(found, run(ours(method, **layout), {**given, **strided}, LEAVES))


@pytest.mark.parametrize("method", METHODS)
@layouts
def test_a_rotation_back_undoes_a_rotation(method: str, layout: dict[str, bool]) -> None:
    columns = angles(E).to(device_of(method))
    if not layout["by_pair"]:
        columns = columns.repeat_interleave(2, -1) if layout["interleaved"] else torch.cat([columns] * 2, -1)
    given, cos, sin = heads(method=method), columns.cos(), columns.sin()
    there = rope(*given.values(), cos, sin, **layout, method=method)
    for x, back in zip(given.values(), rope(*there, cos, -sin, **layout, method=method), strict=True):
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@layouts
@rotated_numbers
def test_gradcheck_in_fp64(layout: dict[str, bool], rotated: int) -> None:
    given = {
        **heads(torch.float64, shape=(1, T, 2, 1, E)),
        **factors(rotated, torch.float64, by_pair=layout["by_pair"], batch=1),
    }
    leaves = [given[name].requires_grad_() for name in LEAVES]
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, given["cos"], given["sin"], **layout), leaves)


# ---- what must not change them


@pytest.mark.parametrize(("method", "dtype"), CASES)
@layouts
def test_each_gradient_alone_is_the_one_among_all(method: str, dtype: torch.dtype, layout: dict[str, bool]) -> None:
    assert_each_gradient_alone_is_the_one_among_all(ours(method, **layout), inputs(10, dtype, method, layout), LEAVES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1], ids=LEAVES)
def test_a_result_that_nobody_uses_gives_no_gradient(method: str, place: int) -> None:
    given = {**heads(method=method), **factors(E, torch.float32, method)}
    leaves = [given[name].requires_grad_() for name in LEAVES]
    every = torch.autograd.grad(tuple(x.sum() for x in ours(method)(**given)), leaves)
    found = torch.autograd.grad(ours(method)(**given)[place].sum(), leaves, allow_unused=True)
    assert found[1 - place] is None and torch.equal(found[place], every[place])


@pytest.mark.parametrize(("method", "dtype"), CASES)
@layouts
def test_two_runs_are_bitwise_the_same_and_leave_their_inputs(
    method: str, dtype: torch.dtype, layout: dict[str, bool]
) -> None:
    given, compute = inputs(10, dtype, method, layout), ours(method, **layout)
    assert_same(run(compute, given, LEAVES), run(compute, given, LEAVES))
    assert_inputs_stay(compute, given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
@layouts
@rotated_numbers
def test_every_element_that_comes_out_is_written(
    method: str, layout: dict[str, bool], rotated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(rotated, torch.float32, method, layout)
    assert_every_element_is_written(ours(method, **layout), given, LEAVES, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_right_where_what_was_saved_comes_back_with_other_strides(method: str) -> None:
    given = {**heads(method=method), **factors(E, torch.float32, method)}
    assert_saved_tensors_may_come_back_with_other_strides(ours(method), given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_and_compiled_it_gives_the_same(method: str) -> None:
    given = {**heads(method=method), **factors(E, torch.float32, method)}
    assert_checkpoints_alike(ours(method), given, LEAVES)
    assert_compiles_alike(ours(method), given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_neither_q_nor_k_is_kept(method: str) -> None:
    given = {**heads(method=method), **factors(E, torch.float32, method)}
    leaves = {name: x.detach().requires_grad_(name in LEAVES) for name, x in given.items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        results = ours(method)(**leaves)
    assert {x.data_ptr() for x in kept} == {given[name].data_ptr() for name in ("cos", "sin")} and len(results) == 2
    assert saved_beside(ours(method), given, LEAVES) == 0


@pytest.mark.parametrize("method", METHODS)
def test_without_gradient_the_result_is_the_same_and_keeps_nothing(method: str) -> None:
    given = {**heads(method=method), **factors(E, torch.float32, method)}
    expected = ours(method)(**given)
    with torch.no_grad():
        found = ours(method)(**{name: x.requires_grad_(name in LEAVES) for name, x in given.items()})
    assert all(not x.requires_grad and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# ---- what is refused, and what decides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 1, 4, 8)}, r"q \(2, 3, 5, 8\) and k \(2, 1, 4, 8\)"),
        ({"cos": torch.zeros(3, 5, 8)}, r"cos \(3, 5, 8\) and sin \(1, 5, 8\) must both be \(2 or 1, 5, columns\)"),
        ({"sin": torch.zeros(1, 5, 6)}, r"sin \(1, 5, 6\)"),
        ({"by_pair": True}, "cos has 8 columns for by_pair=True"),
        ({"cos": torch.zeros(1, 5, 7), "sin": torch.zeros(1, 5, 7)}, "cos has 7 columns"),
        ({"cos": torch.zeros(1, 5, 8, requires_grad=True)}, "pass them detached"),
        ({"q": torch.zeros(2, 3, 5, 8, dtype=torch.int64)}, "q is torch.int64"),
        ({"method": "magic"}, "method='magic' of rope"),
    ],
    ids=["k", "cos", "sin", "by_pair", "odd", "gradient", "dtype", "method"],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict, message: str) -> None:
    fine = {"q": torch.zeros(2, 3, 5, 8), "k": torch.zeros(2, 1, 5, 8)}
    factors = {"cos": torch.ones(1, 5, 8), "sin": torch.ones(1, 5, 8)}
    with pytest.raises(ValueError, match=message):
        rope(**{**fine, **factors, **change})


def test_auto_says_what_it_is() -> None:
    assert method_report(torch.device("cpu"))[0][1].startswith("torch")
    with launch.pretend(launch.EXAMPLES["H200"]):
        assert method_report(torch.device("cpu"))[0][1].startswith("triton")


# ---- real shapes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rotated"),
    [((2, 2048, 32, 8, 128), 128), ((1, 1000, 71, 1, 64), 64), ((1, 1000, 32, 2, 128), 64)],
    ids=str,
)
@layouts
def test_on_a_gpu_real_shapes_are_plain_torchs_bit_for_bit_and_repeat(
    dtype: torch.dtype, shape: tuple[int, ...], rotated: int, layout: dict[str, bool]
) -> None:
    """Two runs that differ in a bit would be a race."""
    columns = rotated // 2 if layout["by_pair"] else rotated
    cos, sin = torch.randn(2, 1, shape[1], columns, device="cuda").to(dtype)
    given = {**heads(dtype, "triton", shape), "cos": cos, "sin": sin}
    found = run(ours("triton", **layout), given, LEAVES)
    assert_same(found, run(ours("torch", **layout), given, LEAVES))
    for _ in range(3):
        assert_same(run(ours("triton", **layout), given, LEAVES), found)
