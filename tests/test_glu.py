"""glu: bit for bit transformers' gated MLPs, the kernels against fp64 truth, and what holds of any operation.

Legend: N rows, I intermediate size.
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
    upstream,
)
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fastdpo_kernels import launch
from fastdpo_kernels.glu import ACTIVATIONS, glu, glu_backward, glu_forward, method_report

# The interpreter computes with 3e38 too, and dynamo says what it looks through.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo (detected|does not know):UserWarning"),
]

TRITON = pytest.param("triton", marks=pytest.mark.kernels)
METHODS = ["torch", TRITON]
CASES = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *(pytest.param("triton", dtype, marks=pytest.mark.kernels, id=f"triton-{dtype}") for dtype in KERNEL_DTYPES),
]
LEAVES = ("gate", "up")
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # in transformers' configurations
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def device_of(method: str) -> str:
    return "cpu" if method == "torch" else KERNEL_DEVICE


def inputs(
    shape: tuple[int, ...] = (3, 5, 67), dtype: torch.dtype = torch.float32, method: str = "torch", scale: float = 3.0
) -> Given:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale for name in LEAVES}
    return {name: tensor.to(device_of(method), dtype) for name, tensor in made.items()}


def ours(activation: str, method: str) -> Any:
    return lambda gate, up: glu(gate, up, activation, method=method)


def transformers(activation: str) -> Any:
    act = ACT2FN[NAMES[activation]]
    return lambda gate, up: act(gate) * up


# ---- the numbers

FAMILIES = {  # module, its MLP, its configuration, which field names the activation
    "llama": ("LlamaMLP", "LlamaConfig", "hidden_act"),
    "mistral": ("MistralMLP", "MistralConfig", "hidden_act"),
    "qwen2": ("Qwen2MLP", "Qwen2Config", "hidden_act"),
    "qwen2_moe": ("Qwen2MoeMLP", "Qwen2MoeConfig", "hidden_act"),
    "qwen3": ("Qwen3MLP", "Qwen3Config", "hidden_act"),
    "qwen3_moe": ("Qwen3MoeMLP", "Qwen3MoeConfig", "hidden_act"),
    "gemma": ("GemmaMLP", "GemmaConfig", "hidden_act"),
    "gemma2": ("Gemma2MLP", "Gemma2Config", "hidden_activation"),
    "gemma3": ("Gemma3MLP", "Gemma3TextConfig", "hidden_activation"),
    "phi3": ("Phi3MLP", "Phi3Config", "hidden_act"),
    "smollm3": ("SmolLM3MLP", "SmolLM3Config", "hidden_act"),
    "olmo2": ("Olmo2MLP", "Olmo2Config", "hidden_act"),
    "granite": ("GraniteMLP", "GraniteConfig", "hidden_act"),
    "cohere": ("CohereMLP", "CohereConfig", "hidden_act"),
    "glm": ("GlmMLP", "GlmConfig", "hidden_act"),
    "glm4": ("Glm4MLP", "Glm4Config", "hidden_act"),
    "stablelm": ("StableLmMLP", "StableLmConfig", "hidden_act"),
    "llama4": ("Llama4TextMLP", "Llama4TextConfig", "hidden_act"),
}


def family_mlp(family: str, activation: str, dtype: torch.dtype) -> nn.Module:
    name, config_name, field = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module(f"transformers.models.{family}"), config_name)
    small: dict[str, Any] = {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        field: NAMES[activation],
    }
    if family == "phi3":
        small["pad_token_id"] = 0
    mlp = getattr(module, name)(config(**small)).to(dtype)
    mlp.down_proj = nn.Identity()
    if family == "gemma":  # its configuration takes "gelu" for a mistake
        mlp.act_fn = ACT2FN[NAMES[activation]]
    return mlp


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@activations
def test_a_familys_mlp_is_this_between_its_products_bit_for_bit(
    family: str, dtype: torch.dtype, activation: str
) -> None:
    mlp = family_mlp(family, activation, dtype)
    x = torch.randn(2, 5, 24, dtype=dtype) * 8

    def theirs(x: Tensor) -> Tensor:
        return mlp(x)

    def with_ours(x: Tensor) -> Tensor:
        packed = getattr(mlp, "gate_up_proj", None)
        gate, up = packed(x).chunk(2, dim=-1) if packed else (mlp.gate_proj(x), mlp.up_proj(x))
        return glu(gate, up, activation, method="torch")

    assert_same(run(with_ours, {"x": x}, ("x",)), run(theirs, {"x": x}, ("x",)))


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@activations
def test_values_and_gradients_err_at_most_twice_as_torchs(
    method: str, dtype: torch.dtype, activation: str, scale: float
) -> None:
    given = inputs(dtype=dtype, method=method, scale=scale)
    truth = run(ours(activation, "torch"), exactly(given), LEAVES)
    assert_accurate(run(ours(activation, method), given, LEAVES), run(transformers(activation), given, LEAVES), truth)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 1), (1, 2048), (3, 2049), (2, 129), (4097,)], ids=str)
@activations
def test_any_shape_will_do(shape: tuple[int, ...], activation: str) -> None:
    given = inputs(shape, method="triton")
    truth = run(ours(activation, "torch"), exactly(given), LEAVES)
    assert_accurate(run(ours(activation, "triton"), given, LEAVES), run(transformers(activation), given, LEAVES), truth)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)], ids=str)
def test_nothing_gives_nothing(method: str, shape: tuple[int, ...]) -> None:
    found = run(ours("silu", method), inputs(shape, method=method), LEAVES)
    assert all(value.shape == shape for value in found.values())


@pytest.mark.parametrize("method", METHODS)
@activations
def test_far_out_nothing_is_nan(method: str, activation: str) -> None:
    far = torch.tensor([-3e38, -1e10, -200.0, -90.0, 0.0, 90.0, 200.0, 1e10], device=device_of(method))
    found = run(ours(activation, method), {"gate": far, "up": torch.ones_like(far)}, LEAVES)
    assert all(value[1:].isfinite().all() for value in found.values())
    assert torch.equal(found["result 0"][-2:], far[-2:]) and not found["result 0"][1:3].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("view", ["halves", "transposed", "expanded", "every other"])
def test_views_are_read_as_they_lie(method: str, view: str) -> None:
    tensor = inputs((6, 2, 2 * 70), method=method)["gate"]
    gate, up = {
        "halves": tensor.chunk(2, -1),
        "transposed": (tensor.transpose(0, 1), tensor.transpose(0, 1) + 1),
        "expanded": (tensor[:, :1].expand_as(tensor), tensor),
        "every other": (tensor[..., ::2], tensor[..., 1::2]),
    }[view]
    found = run(ours("silu", method), {"gate": gate, "up": up}, LEAVES)
    dense = run(ours("silu", method), {"gate": gate.contiguous(), "up": up.contiguous()}, LEAVES)
    for name, value in found.items():  # torch has other code for strided tensors than for dense ones
        torch.testing.assert_close(value, dense[name], rtol=2e-6 if method == "torch" else 0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_mixed_dtypes_give_what_torch_promotes_them_to(method: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Under autocast one of them may be fp32."""
    given = inputs(method=method)
    given = {name: tensor.to(dtype) for (name, tensor), dtype in zip(given.items(), dtypes, strict=True)}
    with torch.autocast(device_of(method), torch.bfloat16):
        found = run(ours("silu", method), given, LEAVES)
    truth = run(ours("silu", "torch"), exactly(given), LEAVES)
    assert_accurate(found, run(transformers("silu"), given, LEAVES), truth)


@activations
def test_gradcheck_in_fp64(activation: str) -> None:
    given = [tensor.requires_grad_() for tensor in inputs((2, 7), torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *leaves: glu(*leaves, activation), given)


# ---- what must not change them


@pytest.mark.parametrize(("method", "dtype"), CASES)
@activations
def test_each_gradient_alone_is_the_one_among_all(method: str, dtype: torch.dtype, activation: str) -> None:
    assert_each_gradient_alone_is_the_one_among_all(
        ours(activation, method), inputs(dtype=dtype, method=method), LEAVES
    )


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_two_runs_are_bitwise_the_same_and_leave_their_inputs(method: str, dtype: torch.dtype) -> None:
    given, compute = inputs((3, 5, 2500), dtype, method), ours("gelu_tanh", method)
    assert_same(run(compute, given, LEAVES), run(compute, given, LEAVES))
    assert_inputs_stay(compute, given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_every_element_that_comes_out_is_written(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_every_element_is_written(ours("silu", method), inputs((3, 2049), method=method), LEAVES, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_right_where_what_was_saved_comes_back_with_other_strides(method: str) -> None:
    given = inputs(method=method)
    assert_saved_tensors_may_come_back_with_other_strides(ours("silu", method), given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_and_compiled_it_gives_the_same(method: str) -> None:
    given = inputs(method=method)
    assert_checkpoints_alike(ours("silu", method), given, LEAVES)
    assert_compiles_alike(ours("silu", method), given, LEAVES)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_beside_gate_and_up(method: str) -> None:
    given = inputs(method=method)
    assert saved_beside(ours("silu", method), given, LEAVES) == 0
    assert saved_beside(transformers("silu"), given, LEAVES) == given["gate"].nbytes
    packed = {"packed": torch.cat([*given.values()], -1)}
    assert saved_beside(lambda packed: glu(*packed.chunk(2, -1), "silu", method=method), packed, ("packed",)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_without_gradient_the_result_is_the_same_and_keeps_nothing(method: str) -> None:
    given = inputs(method=method)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    with torch.no_grad():
        result = glu(**leaves, activation="silu", method=method)
    assert not result.requires_grad and torch.equal(result, glu(**leaves, activation="silu", method=method))


# ---- the functions without autograd


@pytest.mark.parametrize(("method", "dtype"), CASES)
@activations
def test_the_plain_functions_are_what_autograd_runs(method: str, dtype: torch.dtype, activation: str) -> None:
    given = inputs(dtype=dtype, method=method)
    expected = run(ours(activation, method), given, LEAVES)
    assert torch.equal(glu_forward(**given, activation=activation, method=method), expected["result 0"])
    grad_h = upstream(expected["result 0"])
    for with_h in (False, True):
        *gradients, h = glu_backward(grad_h, **given, activation=activation, method=method, with_h=with_h)
        assert all(torch.equal(*pair) for pair in zip(gradients, [*expected.values()][1:], strict=True))
        assert h is None if not with_h else torch.equal(h, expected["result 0"])


@pytest.mark.parametrize("method", METHODS)
def test_a_backward_writes_where_it_is_told_to(method: str) -> None:
    """Gradients into halves of one tensor, and h over the gradient that it was given."""
    given = inputs((5, 70), method=method)
    grad_h = upstream(given["gate"])
    expected = glu_backward(grad_h, **given, activation="silu", method=method, with_h=True)
    packed = torch.full((5, 140), torch.nan, device=grad_h.device)
    into = (packed[:, :70], packed[:, 70:], grad_h)
    found = glu_backward(grad_h, **given, activation="silu", method=method, with_h=True, into=into)
    assert all(got is given_for for got, given_for in zip(found, into, strict=True))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# ---- what is refused, and what decides


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation='relu', expected one of"),
        ({"up": torch.zeros(3, 5)}, r"gate \(3, 4\) and up \(3, 5\)"),
        ({"up": torch.zeros(3, 4, dtype=torch.int64)}, "up torch.int64"),
        ({"method": "magic"}, "method='magic' of glu"),
    ],
    ids=["activation", "shape", "dtype", "method"],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change: dict, message: str) -> None:
    arguments = {"gate": torch.zeros(3, 4), "up": torch.zeros(3, 4), "activation": "silu"} | change
    with pytest.raises(ValueError, match=message):
        glu(**arguments)


def test_a_backward_refuses_gradients_and_places_of_another_shape_or_dtype() -> None:
    gate = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"grad_h is \(3, 5\), expected the shape of gate, \(3, 4\)"):
        glu_backward(torch.zeros(3, 5), gate, gate, "silu")
    with pytest.raises(ValueError, match=r"grad_up is \(3, 4\) torch.float16, expected \(3, 4\) torch.float32"):
        glu_backward(gate, gate, gate, "silu", into=(None, gate.half(), None))


def test_kernels_refuse_fp64_and_devices_that_they_do_not_run_on() -> None:
    gate = torch.zeros(3, 4)
    with launch.pretend(launch.Device("other")), pytest.raises(ValueError, match="use method='torch'"):
        glu(gate, gate, "silu", method="triton")
    with launch.pretend(launch.INTERPRETER), pytest.raises(ValueError, match="not torch.float64: use method='torch'"):
        glu(gate.double(), gate.double(), "silu", method="triton")


def test_auto_is_torch_on_a_cpu_even_where_kernels_could_be_interpreted() -> None:
    assert launch.block_method("glu", "auto", torch.zeros(1)) == "torch"
    assert method_report(torch.device("cpu"))[0][1].startswith("torch")
    with launch.pretend(launch.EXAMPLES["H200"]):
        assert launch.block_method("glu", "auto", torch.zeros(1)) == "triton"
        assert launch.block_method("glu", "auto", torch.zeros(1, dtype=torch.float64)) == "torch"
        assert method_report(torch.device("cpu"))[0][1].startswith("triton")


# ---- real shapes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "halves"])
@activations
def test_on_a_gpu_real_shapes_are_as_accurate_and_repeat(dtype: torch.dtype, packed: bool, activation: str) -> None:
    """Two runs that differ in a bit would be a race."""
    gate, up = torch.randn(1024, 2 * 14336, device="cuda", dtype=dtype).mul_(2).chunk(2, -1)
    given = {"gate": gate, "up": up} if packed else {"gate": gate.contiguous(), "up": up.contiguous()}
    found = run(ours(activation, "triton"), given, LEAVES)
    assert_accurate(
        found, run(transformers(activation), given, LEAVES), run(ours(activation, "torch"), exactly(given), LEAVES)
    )
    for _ in range(3):
        assert_same(run(ours(activation, "triton"), given, LEAVES), found)


@pytest.mark.gpu
def test_on_a_gpu_elements_may_lie_beyond_two_to_the_31() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of device memory")
    rows = 2**17 + 1
    given = {name: torch.randn(rows, 2**14, device="cuda", dtype=torch.float16) for name in LEAVES}
    found = glu_forward(**given, activation="silu", method="triton")
    grad_gate, _, _ = glu_backward(found, **given, activation="silu", method="triton")
    last = {name: tensor[-2:].clone() for name, tensor in given.items()}
    assert torch.equal(found[-2:], glu_forward(**last, activation="silu", method="triton"))
    assert torch.equal(grad_gate[-2:], glu_backward(found[-2:].clone(), **last, activation="silu", method="triton")[0])
