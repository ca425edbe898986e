"""Dequantised 4-bit weights are bitsandbytes' own, bit for bit; and one buffer holds them, one after the other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import KERNEL_DEVICE, KERNEL_DTYPES
from torch import Tensor

from fastdpo_kernels import launch, nf4
from fastdpo_kernels.nf4 import Packed, dequantize

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for macOS")
functional = bitsandbytes.functional

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
METHODS = ["torch", pytest.param("triton", marks=pytest.mark.kernels)]
CASES = [
    *(pytest.param("torch", dtype, id=f"torch-{dtype}") for dtype in DTYPES),
    *(pytest.param("triton", dtype, marks=pytest.mark.kernels, id=f"triton-{dtype}") for dtype in KERNEL_DTYPES),
]
SHAPES = [(64, 256), (130, 66), (33, 31), (1, 1), (3, 5), (700, 96)]


def device_of(method: str) -> str:
    return "cpu" if method == "torch" else KERNEL_DEVICE


def quantized(
    shape: tuple[int, int],
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> tuple[Tensor, Any]:
    """bitsandbytes' data and QuantState of random weights with outliers and an empty block."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    weight.view(-1)[::97] *= 8
    weight.view(-1)[blocksize : 2 * blocksize] = 0
    given = weight.to(device, dtype)
    return functional.quantize_4bit(
        given, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, **options
    )


def bitsandbytes_dequantized(data: Tensor, state: Any) -> Tensor:
    """As one row: where rows end amid a block, bitsandbytes 0.50.2 gives most of them wrong scales on AVX512. It
    would compile its code for each odd size.
    """
    whole = copy.copy(state)
    whole.shape = torch.Size((1, state.shape.numel()))
    with torch.compiler.set_stance("force_eager"):
        return functional.dequantize_4bit(data.view(-1, 1), whole).view(state.shape)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """But for the sign of zeros: of FP4's code 8 bitsandbytes makes 0.0 or -0.0, as its ways on a CPU have it."""
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


# ---- the numbers


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "nested"])
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
def test_a_weight_is_what_bitsandbytes_makes_of_it_bit_for_bit(
    method: str, dtype: torch.dtype, quant_type: str, nested: bool, blocksize: int
) -> None:
    for shape in SHAPES:
        data, state = quantized(shape, quant_type, blocksize, nested, dtype, device_of(method))
        ours = dequantize(Packed.of(data, state), dtype, method=method)
        assert_same_bits(ours, bitsandbytes_dequantized(data, state))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1031, 1024), (517, 2047)], ids=str)
def test_many_programs_and_many_groups_of_scales_are_right(method: str, shape: tuple[int, int]) -> None:
    """More than 256 scales of a group, more elements than the torch method takes at a time, an odd end."""
    assert shape[0] * shape[1] > 3 * nf4.CPU_ELEMENTS
    data, state = quantized(shape, device=device_of(method), dtype=torch.float16)
    ours = dequantize(Packed.of(data, state), torch.float16, method=method)
    assert_same_bits(ours, bitsandbytes_dequantized(data, state))


@pytest.mark.parametrize("method", METHODS)
def test_the_scales_product_and_sum_are_rounded_one_after_the_other(method: str) -> None:
    """Of 4000 random scales some hundred would differ if the compiler fused the two."""
    data, state = quantized((500, 512), device=device_of(method))
    groups = state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    codes = state.state2.code[state.absmax.int()]
    fused = (codes.double() * groups.double() + state.offset.double()).float()
    rounded = codes * groups + state.offset
    assert (fused != rounded).sum() > 50
    ours = dequantize(Packed.of(data, state), torch.float32, method=method)
    assert_same_bits(ours, bitsandbytes_dequantized(data, state))


@pytest.mark.parametrize("method", METHODS)
def test_data_that_starts_at_any_byte_is_read_right(method: str) -> None:
    data, state = quantized((40, 64), device=device_of(method))
    expected = dequantize(Packed.of(data, state), torch.float32, method=method)
    for shift in (1, 2, 3, 4):
        moved = torch.cat([data.new_zeros(shift), data.view(-1)])[shift:]
        assert_same_bits(dequantize(Packed.of(moved, state), torch.float32, method=method), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_that_codes_are_stored_in_does_not_matter(storage: torch.dtype) -> None:
    data, state = quantized((64, 64), quant_storage=storage)
    plain, plain_state = quantized((64, 64))
    assert data.dtype == storage
    ours = dequantize(Packed.of(data, state), torch.float32)
    assert_same_bits(ours, dequantize(Packed.of(plain, plain_state), torch.float32))


def test_a_loaded_linear4bit_is_read_as_it_lies() -> None:
    layer = bitsandbytes.nn.Linear4bit(128, 48, bias=False, quant_type="nf4").to("cpu")
    packed = Packed.of(layer.weight.data, layer.weight.quant_state)
    assert packed.shape == (48, 128) and packed.nested and packed.data.data_ptr() == layer.weight.data_ptr()
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same_bits(dequantize(packed, torch.float32), expected)


def test_double_precision_holds_the_fp32_numbers() -> None:
    packed = Packed.of(*quantized((33, 31)))
    assert torch.equal(dequantize(packed, torch.float64), dequantize(packed, torch.float32).double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["fp32 scales", "nested"])
def test_a_gpus_weight_is_what_bitsandbytes_cuda_kernels_make_of_it(
    dtype: torch.dtype, quant_type: str, nested: bool
) -> None:
    for shape, blocksize in (((4096, 14336), 64), ((1001, 333), 64), ((512, 1024), 4096), ((100, 96), 128)):
        data, state = quantized(shape, quant_type, blocksize, nested, dtype, "cuda")
        ours = dequantize(Packed.of(data, state), dtype, method="triton")
        assert_same_bits(ours, functional.dequantize_4bit(data, state))


@pytest.mark.gpu
def test_elements_beyond_two_to_the_31_are_reached() -> None:
    rows, columns = 2**15 + 8, 2**16
    packed = Packed(
        data=torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device="cuda"),
        shape=(rows, columns),
        absmax=torch.rand(rows * columns // 4096, device="cuda"),
        blocksize=4096,
        code=torch.linspace(-1, 1, 16, device="cuda"),
    )
    last = replace(packed, data=packed.data[-4 * columns :], absmax=packed.absmax[-8 * 16 :], shape=(8, columns))
    whole = dequantize(packed, torch.bfloat16, method="triton")
    assert_same_bits(whole[-8:], dequantize(last, torch.bfloat16, method="torch"))


# ---- where it is written


@pytest.mark.parametrize("method", METHODS)
def test_every_element_of_out_is_written_and_none_beside_it(method: str) -> None:
    packed = Packed.of(*quantized((33, 31), device=device_of(method)))
    around = torch.full((33 * 31 + 20,), torch.nan, device=device_of(method))
    out = around[10:-10].view(33, 31)
    assert dequantize(packed, torch.float32, out=out, method=method) is out
    assert not out.isnan().any() and around[:10].isnan().all() and around[-10:].isnan().all()


def test_packed_tensors_stay_as_they_are() -> None:
    packed = Packed.of(*quantized((64, 64)))
    before = {name: value.clone() for name, value in vars(packed).items() if isinstance(value, Tensor)}
    dequantize(packed, torch.bfloat16)
    assert all(torch.equal(getattr(packed, name), value) for name, value in before.items())


def test_scratch_is_one_buffer_for_each_dtype_that_grows_when_needed() -> None:
    nf4.free_scratch()
    cpu = torch.device("cpu")
    first = nf4.scratch(100, torch.float32, cpu)
    assert nf4.scratch(60, torch.float32, cpu).data_ptr() == first.data_ptr()
    assert nf4.scratch(60, torch.float32, cpu).shape == (60,)
    assert nf4.scratch(60, torch.bfloat16, cpu).data_ptr() != first.data_ptr()
    assert nf4.scratch(1000, torch.float32, cpu).untyped_storage().nbytes() == 4000
    assert nf4.scratch(100, torch.float32, cpu).untyped_storage().nbytes() == 4000
    nf4.free_scratch()
    assert nf4.scratch(100, torch.float32, cpu).untyped_storage().nbytes() == 400


def test_scratch_that_an_evaluation_made_serves_training_too() -> None:
    nf4.free_scratch()
    with torch.inference_mode():
        nf4.scratch(10, torch.float32, torch.device("cpu"))
    later = nf4.scratch(10, torch.float32, torch.device("cpu"))
    assert not later.is_inference()
    later.fill_(1.0)


@pytest.mark.gpu
def test_each_stream_has_its_own_scratch() -> None:
    device = torch.device("cuda")
    first, other = nf4.scratch(10, torch.float32, device), torch.cuda.Stream()
    assert nf4.scratch(10, torch.float32, torch.device("cuda", 0)).data_ptr() == first.data_ptr()
    with torch.cuda.stream(other):
        assert nf4.scratch(10, torch.float32, device).data_ptr() != first.data_ptr()


# ---- what is refused


def test_what_does_not_fit_is_refused_with_what_came_and_what_was_expected() -> None:
    data, state = quantized((32, 64))
    packed = Packed.of(data, state)
    for out in (torch.empty(64, 32), torch.empty(32, 64, dtype=torch.bfloat16), torch.empty(64, 32).T):
        with pytest.raises(ValueError, match=r"out is .* expected \(32, 64\) torch.float32 on cpu, contiguous"):
            dequantize(packed, torch.float32, out=out)
    with pytest.raises(ValueError, match="method='fast' of dequantize"):
        dequantize(packed, torch.float32, method="fast")
    with pytest.raises(ValueError, match="has 1023 bytes, expected 1024"):
        Packed.of(data[:-1], state)
    for name, value, said in (
        ("quant_type", "int8", "quant_type='int8'"),
        ("blocksize", 100, "blocksize=100"),
        ("shape", torch.Size((2048,)), r"shape \(2048,\), expected \(O, I\)"),
        ("packing_format_for_cpu", True, "support_avx512bf16_for_cpu = False"),
        ("code", state.code[:8], "code of a quantised weight"),
        ("offset", None, "offset of a quantised weight"),
        ("absmax", state.absmax.float(), "absmax of a quantised weight"),
    ):
        changed = copy.copy(state)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=said):
            Packed.of(data, changed)


@pytest.mark.kernels
def test_the_kernels_refuse_double_precision() -> None:
    packed = Packed.of(*quantized((32, 64), device=KERNEL_DEVICE))
    with pytest.raises(ValueError, match="not torch.float64: use method='torch'"):
        dequantize(packed, torch.float64, method="triton")


def test_a_gpu_takes_triton_and_a_cpu_torch() -> None:
    assert nf4.method_report(torch.device("cpu"))[0][1].startswith("torch")
    with launch.pretend(launch.EXAMPLES["RTX 4090"]):
        assert nf4.method_report(torch.device("cpu"))[0][1].startswith("triton")
