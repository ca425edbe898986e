"""`dequantize` in Triton: a program takes words of eight packed values, looks up and scales them, and stores them.

Bytes of a bf16 element with blocks of 64: 0.5 in, 1/64 of scales in, 2 out. What matters for the 85% of bandwidth that
this is to reach is therefore how results are stored and what is on the way; all counts are for an H200, unmeasured.

    loads    a thread takes 16 bytes of words, the words then change threads through shared memory (4 bytes for 8
             elements), so that eight values of one word are 16 bytes of bf16 and a warp's stores are 512 bytes in one
             piece. Kept where they were loaded, a thread's 32 values would be stored in four pieces, each 16 bytes of
             every 64: twice the sectors from multiprocessor to L2.
    look-up  the 16 codes lie in 16 banks of shared memory: a warp's 32 look-ups are one access whatever they ask for.
             8.1 instructions an element in all (sm_90, bf16, nested), 40% of what can be issued while 85% of 4.3 TB/s
             move. From L1 by tl.load they are 9.8, for the addresses; 15 selects alone would be 74%; a table of 256
             pairs would halve the look-ups and spread them over 16 lines, 16 accesses for one.
    scales   once a word, both levels at once: neighbours ask for the same bytes of L1.

What a program holds, and why: launch.nf4_config.

Numerics: every operation rounds as it is written (no fused multiply-add), in fp32, the result once.

Legend: a word is four bytes, eight values; n elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo_kernels import launch
from fastdpo_kernels.nf4 import Packed


@triton.jit
def _words(data, base, word, inside, bytes_left, WHOLE: tl.constexpr) -> Any:
    """(BLOCK,) int32, the first byte lowest. Data that is not WHOLE comes as bytes, and may end amid a word."""
    if WHOLE:
        return tl.load(data + base + word, mask=inside, other=0)
    else:
        place = tl.arange(0, 4)
        at = word[:, None] * 4 + place[None, :]
        byte = tl.load(data + base * 4 + at, mask=at < bytes_left, other=0)
        return tl.sum(byte.to(tl.int32) << (8 * place[None, :]), 1)


@triton.jit
def _dequantize_kernel(
    data,  # int32 words if WHOLE, else uint8
    absmax,  # (b,) fp32, or uint8 with the tensors of nested scales
    code,  # (16,)
    nested_absmax,  # or None
    nested_code,  # (256,) or None
    offset,  # 0-dim or None
    out,  # (n,)
    n,
    words,  # n / 8, rounded up
    WHOLE: tl.constexpr,  # n is a multiple of 8
    WORDS_A_SCALE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # words, a multiple of WORDS_A_SCALE
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - base * 8, BLOCK * 8).to(tl.int32)
    word = tl.arange(0, BLOCK)
    inside = word < tl.minimum(words - base, BLOCK).to(tl.int32)  # so written, it is known to be one for four words
    packed = _words(data, base, word, inside, (left + 1) // 2, WHOLE)

    first, block = base // WORDS_A_SCALE, word // WORDS_A_SCALE
    if nested_absmax is None:
        scale = tl.load(absmax + first + block, mask=inside, other=0.0)
    else:
        small = tl.load(absmax + first + block, mask=inside, other=0).to(tl.int32)
        group = ((first % NESTED_BLOCKSIZE).to(tl.int32) + block) // NESTED_BLOCKSIZE
        large = tl.load(nested_absmax + first // NESTED_BLOCKSIZE + group, mask=inside, other=0.0)
        scale = tl.load(nested_code + small) * large + tl.load(offset)

    place = tl.arange(0, 8)
    nibble = (packed[:, None] >> (4 * (place ^ 1))[None, :]) & 15  # of each byte the high one first
    value = tl.gather(tl.load(code + tl.arange(0, 16)), nibble.reshape(BLOCK * 8), 0).reshape(BLOCK, 8)
    value = (value * scale[:, None]).to(out.dtype.element_ty)
    element = word[:, None] * 8 + place[None, :]
    if WHOLE:
        tl.store(out + base * 8 + element, value, mask=inside[:, None])
    else:
        tl.store(out + base * 8 + element, value, mask=element < left)


def dequantize(packed: Packed, out: Tensor) -> Tensor:
    n, config = packed.numel, launch.nf4_config()
    if not n:
        return out
    data = packed.data.reshape(-1)
    whole = n % 8 == 0 and data.data_ptr() % 4 == 0
    scales: tuple[Tensor | None, ...] = (packed.nested_absmax, packed.nested_code, packed.offset)
    kernel: Any = _dequantize_kernel
    kernel[(triton.cdiv(n, 8 * config.block),)](
        data.view(torch.int32) if whole else data, packed.absmax, packed.code, *scales, out, n, -(-n // 8),
        WHOLE=whole, WORDS_A_SCALE=packed.blocksize // 8, NESTED_BLOCKSIZE=packed.nested_blocksize or 1,
        BLOCK=config.block, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
