"""rms_norm: bit for bit transformers' norms, the kernels against fp64 truth, and what holds of any operation.

Legend: N rows, D their length.
"""

from __future__ import annotations

import importlib
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
from fastdpo_kernels.rms_norm import method_report, rms_norm

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo (detected|does not know):UserWarning")

TRITON = pytest.param("triton", marks=pytest.mark.kernels)
METHODS = ["torch", TRITON]
CASES = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(pytest.param("triton", dtype, marks=pytest.mark.kernels, id=f"triton-{dtype}") for dtype in KERNEL_DTYPES),
]
LEAVES = ("x", "weight")
EPS = 1e-5
LLAMA: dict[str, Any] = {}
GEMMA = {"offset": 1.0, "round_first": False}
OLMO = {"round_first": False}
ORDERS = {"Llama": LLAMA, "Gemma": GEMMA, "OLMo-2": OLMO}
orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
FAMILIES = {  # of transformers' modules: their norm, and how it rounds
    "llama": ("LlamaRMSNorm", LLAMA),
    "llama4": ("Llama4TextRMSNorm", LLAMA),
    "mistral": ("MistralRMSNorm", LLAMA),
    "mixtral": ("MixtralRMSNorm", LLAMA),
    "qwen2": ("Qwen2RMSNorm", LLAMA),
    "qwen2_moe": ("Qwen2MoeRMSNorm", LLAMA),
    "qwen3": ("Qwen3RMSNorm", LLAMA),
    "qwen3_moe": ("Qwen3MoeRMSNorm", LLAMA),
    "gemma": ("GemmaRMSNorm", GEMMA),
    "gemma2": ("Gemma2RMSNorm", GEMMA),
    "gemma3": ("Gemma3RMSNorm", GEMMA),
    "phi3": ("Phi3RMSNorm", LLAMA),
    "smollm3": ("SmolLM3RMSNorm", LLAMA),
    "olmo2": ("Olmo2RMSNorm", OLMO),
    "granite": ("GraniteRMSNorm", LLAMA),
    "glm": ("GlmRMSNorm", LLAMA),
    "glm4": ("Glm4RMSNorm", LLAMA),
    "gpt_oss": ("GptOssRMSNorm", OLMO),
}


def device_of(method: str) -> str:
    return "cpu" if method == "torch" else KERNEL_DEVICE


def inputs(shape: tuple[int, ...] = (3, 5, 67), dtype: torch.dtype = torch.float32, method: str = "torch") -> Given:
    """Rows of lengths from 0.1 to 10, and one that eps decides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = max(1, x[..., :1].numel())
    x *= torch.logspace(-1, 1, rows, dtype=torch.float64).view(*shape[:-1], 1) if x.numel() else 1
    weight = 0.5 + torch.rand(shape[-1], generator=generator, dtype=torch.float64)
    if x.numel() and len(shape) > 1:
        x[(0,) * (len(shape) - 1)] *= 1e-2
    return {"x": x.to(device_of(method), dtype), "weight": weight.to(device_of(method), dtype)}


def ours(method: str, order: dict[str, Any]) -> Any:
    return lambda x, weight: rms_norm(x, weight, EPS, **order, method=method)


def norm_of(family: str) -> Any:
    """-> transformers' module as a function of x and weight."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = getattr(module, FAMILIES[family][0])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        made = kind(weight.shape[0], eps=EPS)
        del made.weight
        made.weight = weight
        return made(x)

    return norm


THEIRS = {"Llama": norm_of("llama"), "Gemma": norm_of("gemma2"), "OLMo-2": norm_of("olmo2")}


def theirs(order: dict[str, Any]) -> Any:
    return next(THEIRS[name] for name, value in ORDERS.items() if value is order)


def truth_of(given: Given, order: dict[str, Any], wanted: tuple[str, ...] = LEAVES) -> Given:
    return run(ours("torch", order), exactly(given), wanted)


# ---- the numbers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", ["same", torch.float32], ids=str)
def test_a_familys_norm_is_this_bit_for_bit_and_gradients_are_as_accurate(
    family: str, dtype: torch.dtype, weight_dtype: Any
) -> None:
    """A norm in fp32 beside activations in bf16 is what autocast makes."""
    given, order = inputs((2, 9, 64), dtype), FAMILIES[family][1]
    if weight_dtype != "same":
        given["weight"] = given["weight"].to(weight_dtype)
    found, expected = run(ours("torch", order), given, LEAVES), run(norm_of(family), given, LEAVES)
    assert found["result 0"].dtype == expected["result 0"].dtype
    assert torch.equal(found["result 0"], expected["result 0"])
    assert_accurate(found, expected, truth_of(given, order))


def test_a_norm_without_weight_is_llama_4s_l2_norm_bit_for_bit() -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

    for dtype in (torch.float32, torch.bfloat16):
        x = inputs((2, 9, 64), dtype)["x"]
        assert torch.equal(rms_norm(x, None, EPS), Llama4TextL2Norm(EPS)(x))


def test_qwen_3s_norm_over_a_heads_numbers_is_this() -> None:
    """The one that attention applies to (B, T, heads, numbers), with the module's own weight."""
    norm = norm_of("qwen3")
    given = inputs((2, 5, 4, 128), torch.bfloat16)
    assert torch.equal(ours("torch", LLAMA)(**given), norm(**given))


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(7, 67), (2, 3, 4, 128), (5, 1000)], ids=str)
@orders
def test_values_and_gradients_err_at_most_twice_as_torchs(
    method: str, dtype: torch.dtype, shape: tuple[int, ...], order: dict[str, Any]
) -> None:
    given = inputs(shape, dtype, method)
    assert_accurate(run(ours(method, order), given, LEAVES), run(theirs(order), given, LEAVES), truth_of(given, order))


@pytest.mark.kernels
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
@orders
def test_mixed_dtypes_give_what_transformers_gives(dtypes: tuple[torch.dtype, ...], order: dict[str, Any]) -> None:
    given = inputs(method="triton")
    given = {name: tensor.to(dtype) for (name, tensor), dtype in zip(given.items(), dtypes, strict=True)}
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        found, expected = run(ours("triton", order), given, LEAVES), run(theirs(order), given, LEAVES)
    assert_accurate(found, expected, truth_of(given, order))


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 2), (33, 17), (1, 8192), (2, 8193), (3, 16384)], ids=str)
@orders
def test_any_shape_will_do(shape: tuple[int, ...], order: dict[str, Any]) -> None:
    """From rows that share a program to those whose weight's gradient takes a launch of its own."""
    given = inputs(shape, method="triton")
    found, expected = run(ours("triton", order), given, LEAVES), run(theirs(order), given, LEAVES)
    assert_accurate(found, expected, truth_of(given, order))


@pytest.mark.kernels
def test_weights_gradient_adds_up_more_rows_than_programs_hold() -> None:
    """The interpreter has one multiprocessor, so that programs go through their rows several times here."""
    given = inputs((997, 24), method="triton")
    assert launch.norm_programs(997, 24, launch.INTERPRETER) * launch.norm_config(24, with_weight=True).rows < 500
    found, expected = run(ours("triton", GEMMA), given, LEAVES), run(theirs(GEMMA), given, LEAVES)
    assert_accurate(found, expected, truth_of(given, GEMMA))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_row_gives_nothing_and_a_weights_gradient_of_zero(method: str, shape: tuple[int, ...]) -> None:
    found = run(ours(method, LLAMA), inputs(shape, method=method), LEAVES)
    assert found["result 0"].shape == found["gradient of x"].shape == shape
    assert torch.equal(found["gradient of weight"].cpu(), torch.zeros(8))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("view", ["transposed heads", "part of rows", "expanded", "columns first"])
def test_views_are_read_as_they_lie(method: str, view: str) -> None:
    """Gemma 3 norms (B, heads, T, E), a transposed view. What can lie in memory as x does, does."""
    given = inputs((2, 5, 4, 24), method=method)
    tensor = given["x"]
    x = {
        "transposed heads": tensor.transpose(1, 2),
        "part of rows": torch.cat([tensor, tensor], -1)[..., 3:27],
        "expanded": tensor[:, :1].expand_as(tensor),
        "columns first": torch.cat([tensor] * 6, 2).transpose(-1, -2),
    }[view]
    assert not x.is_contiguous()
    found = run(ours(method, LLAMA), {**given, "x": x}, LEAVES)
    dense = run(ours(method, LLAMA), {**given, "x": x.contiguous()}, LEAVES)
    for name, value in found.items():
        torch.testing.assert_close(value, dense[name], rtol=1e-5, atol=1e-5)
    if view == "transposed heads":
        assert found["result 0"].stride() == x.stride()
        assert method == "torch" or found["gradient of x"].stride() == x.stride()


@pytest.mark.parametrize("method", METHODS)
@orders
def test_gradients_are_right_where_what_was_saved_comes_back_with_other_strides(
    method: str, order: dict[str, Any]
) -> None:
    given = inputs((2, 5, 4, 24), method=method)
    given["x"] = given["x"].transpose(1, 2)
    assert_saved_tensors_may_come_back_with_other_strides(ours(method, order), given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_is_what_it_is_among_others(method: str) -> None:
    given = inputs((37, 40), method=method)
    every = run(ours(method, LLAMA), given, ("x",))
    alone = run(ours(method, LLAMA), {**given, "x": given["x"][5:6]}, ())
    assert torch.equal(alone["result 0"], every["result 0"][5:6])


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_zeros_gives_zeros(method: str) -> None:
    given = inputs((3, 40), method=method)
    given["x"][1] = 0
    found = run(ours(method, LLAMA), given, LEAVES)
    assert not found["result 0"][1].any() and all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
@orders
def test_gradcheck_in_fp64(order: dict[str, Any], weight: bool) -> None:
    given = inputs((2, 3, 7), torch.float64)
    if weight:
        leaves = [tensor.requires_grad_() for tensor in given.values()]
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, **order), leaves)
    elif not order.get("offset"):
        assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS, **order), given["x"].requires_grad_())


@pytest.mark.kernels
def test_without_weight_gradients_err_at_most_twice_as_torchs() -> None:
    given = {"x": inputs(method="triton")["x"]}

    def plain(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    found = run(lambda x: rms_norm(x, None, EPS, method="triton"), given, ("x",))
    assert_accurate(found, run(plain, given, ("x",)), run(plain, exactly(given), ("x",)))


# ---- what must not change them


@pytest.mark.parametrize(("method", "dtype"), CASES)
@orders
def test_each_gradient_alone_is_the_one_among_all(method: str, dtype: torch.dtype, order: dict[str, Any]) -> None:
    given = inputs(dtype=dtype, method=method)
    assert_each_gradient_alone_is_the_one_among_all(ours(method, order), given, LEAVES)


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_two_runs_are_bitwise_the_same_and_leave_their_inputs(method: str, dtype: torch.dtype) -> None:
    given, compute = inputs((70, 40), dtype, method), ours(method, GEMMA)
    assert_same(run(compute, given, LEAVES), run(compute, given, LEAVES))
    assert_inputs_stay(compute, given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(70, 40), (3, 8193)], ids=str)
def test_every_element_that_comes_out_is_written(
    method: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_every_element_is_written(ours(method, LLAMA), inputs(shape, method=method), LEAVES, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_and_compiled_it_gives_the_same(method: str) -> None:
    given = inputs(method=method)
    assert_checkpoints_alike(ours(method, LLAMA), given, LEAVES)
    assert_compiles_alike(ours(method, LLAMA), given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_one_number_a_row_is_kept_beside_x_and_weight(method: str) -> None:
    given = inputs((30, 64), method=method)
    assert saved_beside(ours(method, LLAMA), given, LEAVES) == 4 * 30
    assert saved_beside(norm_of("llama"), given, LEAVES) > given["x"].nbytes


@pytest.mark.parametrize("method", METHODS)
def test_without_gradient_the_result_is_the_same_and_keeps_nothing(method: str) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(method=method).items()}
    with torch.no_grad():
        result = ours(method, LLAMA)(**leaves)
    assert not result.requires_grad and torch.equal(result, ours(method, LLAMA)(**leaves))


# ---- what is refused, and what decides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight is \(5,\) torch.float32, expected \(4,\)"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, r"x is \(3, 4\) torch.int64"),
        ({"x": torch.zeros(3, 0)}, r"x is \(3, 0\)"),
        ({"offset": 1.0}, "offset=1.0 goes with a weight and round_first=False"),
        ({"method": "magic"}, "method='magic' of rms_norm"),
    ],
    ids=["weight", "dtype", "shape", "offset", "method"],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": torch.zeros(3, 4), "weight": torch.ones(4), "eps": EPS} | change)


def test_rows_too_long_for_registers_take_torch() -> None:
    x = torch.randn(2, launch.LONGEST_NORM + 1)
    with launch.pretend(launch.EXAMPLES["H200"]):
        assert torch.equal(rms_norm(x, None, EPS), rms_norm(x, None, EPS, method="torch"))
        with pytest.raises(ValueError, match="rows of up to 16384 elements, not 16385: use method='torch'"):
            rms_norm(x, None, EPS, method="triton")


def test_auto_says_what_it_is() -> None:
    assert method_report(torch.device("cpu"))[0][1].startswith("torch")
    with launch.pretend(launch.EXAMPLES["H200"]):
        assert method_report(torch.device("cpu"))[0][1].startswith("triton")


# ---- real shapes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (2, 1024, 32, 128), (500, 16384), (301, 3585)], ids=str)
@orders
def test_on_a_gpu_real_shapes_are_as_accurate_and_repeat(
    dtype: torch.dtype, shape: tuple[int, ...], order: dict[str, Any]
) -> None:
    """Two runs that differ in a bit would be a race."""
    given = inputs(shape, dtype, "triton")
    found = run(ours("triton", order), given, LEAVES)
    assert_accurate(found, run(theirs(order), given, LEAVES), truth_of(given, order))
    for _ in range(3):
        assert_same(run(ours("triton", order), given, LEAVES), found)
