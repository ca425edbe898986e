"""4-bit weights as bitsandbytes packs them, back to bf16, fp16 or fp32 in one launch, into one reused buffer.

    w_i = code[nibble_i] * absmax[i / blocksize]
    absmax[b] = nested_code[byte_b] * nested_absmax[b / nested_blocksize] + offset      double quantisation only

NF4 and FP4 differ in the 16 numbers of `code` alone (QLoRA, arXiv:2305.14314). A training step's products have
thousands of rows, so they are cuBLAS's, on a weight that is dequantised just before: 2.52 bytes an element are read and
written where a product with N rows has 2 N FLOP an element. Both levels of scales are undone in the same launch:
bitsandbytes takes three, and writes the fp32 scales to memory in between. The result of the largest weight of a model
is all the memory that dequantised weights ever have (`scratch`; 117 MB of bf16 for 4096 x 14336).

Bitwise what bitsandbytes gives, on CPUs and GPUs: products and the sum in fp32, none fused, one rounding to the result.
(Where rows end amid a block, bitsandbytes 0.50's AVX512 code gives a row the scales of another; it is right here.)

Legend: O, I the weight's rows and columns, n = O I, b blocks of `blocksize` elements, counted through all rows.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo_kernels import launch

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = tuple(2**power for power in range(5, 13))
CPU_ELEMENTS = 2**18  # at a time: values and indices, 1.5 MB, stay in a CPU's cache; all at once takes 4 times as long


@dataclass(frozen=True)
class Packed:
    """A quantised weight (O, I): the tensors of a bitsandbytes QuantState, none of them copied."""

    data: Tensor  # ((n + 1) / 2,) uint8, two values each, the first in the high nibble; any shape
    shape: tuple[int, int]  # O, I
    absmax: Tensor  # (b,) uint8 if nested, else fp32
    blocksize: int  # elements that share a scale
    code: Tensor  # (16,) fp32
    nested_absmax: Tensor | None = None  # fp32
    nested_code: Tensor | None = None  # (256,) fp32
    nested_blocksize: int | None = None  # scales that share one of nested_absmax
    offset: Tensor | None = None  # 0-dim fp32

    @staticmethod
    def of(data: Tensor, state: Any) -> Packed:
        """From a Params4bit's data, in whatever dtype it is stored, and its `quant_state`.

        Raises ValueError for a quantisation that `dequantize` does not know.
        """
        if state.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type={state.quant_type!r} of a quantised weight, expected one of {QUANT_TYPES}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "the weight is packed for bitsandbytes' AVX512-bf16 products, expected it as it was quantised: set "
                "support_avx512bf16_for_cpu = False on its Linear4bit before an evaluation, and load it again"
            )
        if len(state.shape) != 2:
            raise ValueError(f"a quantised weight has shape {tuple(state.shape)}, expected (O, I)")
        rows, columns = state.shape
        plain = data.reshape(-1).view(torch.uint8), (int(rows), int(columns)), state.absmax, state.blocksize, state.code
        nested = state.state2
        packed = Packed(*plain)
        if nested is not None:
            packed = Packed(*plain, nested.absmax, nested.code, nested.blocksize, state.offset)
        _check(packed)
        return packed

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.blocksize)


def dequantize(
    packed: Packed,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,  # (O, I) contiguous, of `dtype`
    method: str = "auto",
) -> Tensor:  # (O, I)
    """The weight, written to `out` where that is given.

    `method` is one of launch.BLOCK_METHODS; "auto" takes triton on GPUs and torch elsewhere. `dtype` is bf16, fp16 or
    fp32; any float for method="torch".

    Raises ValueError for an `out` that does not fit, an unknown method, and a method that cannot run.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.data.device)
    elif out.shape != packed.shape or out.dtype != dtype or out.device != packed.data.device or not out.is_contiguous():
        came = f"{tuple(out.shape)} {out.dtype} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"out is {came}, expected {packed.shape} {dtype} on {packed.data.device}, contiguous")
    if launch.block_method("dequantize", method, out) == "torch":
        return _dequantize_torch(packed, out)
    from fastdpo_kernels import nf4_triton  # Triton exists on Linux only

    with torch.cuda.device_of(out):  # Triton launches on the current device
        return nf4_triton.dequantize(packed, out)


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way `dequantize` goes on a device (the GPU where there is one): rows of (kernel, path)."""
    return [("dequantize", launch.block_method_in_words(device))]


# The buffer

_scratch: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
scratch_lock = threading.RLock()


def scratch(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(numel,) of a device's, dtype's and stream's one buffer, which grows when needed and is never given up.

    Whoever asks again gets the same memory, so what it holds is to be used up before that, on the stream that was
    current when it was asked for. `scratch_lock` is to be held from asking until that use is enqueued: threads share a
    GPU's default stream, which keeps what they enqueue in order, and a CPU is done by then. A buffer for each thread
    would need no lock, and twice the memory: autograd's backward runs in a thread of its own. A tensor of its own where
    tensors are made that are no memory, as by FakeTensorMode.
    """
    if type(torch.empty(0)) is not Tensor:
        return torch.empty(numel, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = device, dtype, stream
    held = _scratch.get(key)
    if held is None or held.numel() < numel:
        _scratch.pop(key, None)
        del held  # before the larger one is made: both would be there at once
        with torch.inference_mode(False):  # what is made in inference mode may not be written to outside of it
            _scratch[key] = torch.empty(numel, dtype=dtype, device=device)
    with torch.inference_mode(False):
        return _scratch[key][:numel]


def free_scratch() -> None:
    """Gives every buffer up; the next `scratch` makes one anew."""
    _scratch.clear()


# Checks


def _check(packed: Packed) -> None:
    if packed.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize={packed.blocksize} of a quantised weight, expected one of {BLOCKSIZES}")
    if 2 * packed.data.numel() not in (packed.numel, packed.numel + 1):
        raise ValueError(
            f"a quantised weight of shape {packed.shape} has {packed.data.numel()} bytes, expected "
            f"{-(-packed.numel // 2)}: two values each"
        )
    if packed.nested_blocksize is not None and packed.nested_blocksize < 1:
        raise ValueError(f"nested blocksize={packed.nested_blocksize}, expected a number above 0")
    groups = -(-packed.blocks // (packed.nested_blocksize or 1))
    expected: tuple[tuple[str, Tensor | None, torch.dtype, int], ...] = (
        ("absmax", packed.absmax, torch.uint8 if packed.nested else torch.float32, packed.blocks),
        ("code", packed.code, torch.float32, 16),
        ("nested absmax", packed.nested_absmax, torch.float32, groups),
        ("nested code", packed.nested_code, torch.float32, 256),
        ("offset", packed.offset, torch.float32, 1),
    )
    for name, tensor, dtype, numel in expected[: 5 if packed.nested else 2]:
        if tensor is None or tensor.dtype != dtype or tensor.numel() != numel or tensor.device != packed.data.device:
            came = "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(
                f"{name} of a quantised weight of shape {packed.shape} is {came}, expected {numel} numbers of {dtype} "
                f"on {packed.data.device}, where its data is"
            )


# The torch method


def _scales(packed: Packed) -> Tensor:
    """(b,) fp32"""
    if packed.nested_absmax is None or packed.nested_code is None or packed.nested_blocksize is None:
        return packed.absmax.reshape(-1)
    assert packed.offset is not None
    groups = packed.nested_absmax.reshape(-1).repeat_interleave(packed.nested_blocksize)[: packed.blocks]
    return packed.nested_code[packed.absmax.reshape(-1).int()] * groups + packed.offset


def _dequantize_torch(packed: Packed, out: Tensor) -> Tensor:
    """A byte's two fp32 values are looked up as one 8-byte number of a table of 256."""
    pairs, scales = torch.cartesian_prod(packed.code, packed.code).view(torch.int64).view(-1), _scales(packed)
    data, flat, blocksize = packed.data.reshape(-1), out.view(-1), packed.blocksize
    step = max(CPU_ELEMENTS, blocksize)
    for start in range(0, packed.numel, step):
        stop = min(start + step, packed.numel)
        values = pairs.index_select(0, data[start // 2 : (stop + 1) // 2].int()).view(torch.float32)
        values = torch.nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)
        values *= scales[start // blocksize :][: len(values), None]
        flat[start:stop] = values.view(-1)[: stop - start]
    return out
