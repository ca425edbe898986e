"""bf16 in a kernel has torch's bits: on a GPU, and in the interpreter as interpreted_bf16 mends it.

Whatever stopped rounding there would only make the other tests of bf16 easier.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import KERNEL_DEVICE
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is made for Linux only")

import triton.language as tl  # noqa: E402

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's, of inf and nan
]

TIE, ULP = 2.0**-8, 2.0**-7  # half of the distance between 1 and the next bf16 number, and all of it
SUBNORMAL = 2.0**-133  # the smallest
CASTS = {
    "exact": [0.0, 1.0, 1 + ULP, 0.15625, 256.0],
    "ties to even": [1 + TIE, 1 + ULP + TIE, 1 + 2 * ULP + TIE, 257.0, 259.0],
    "beside a tie": [1 + TIE + 2.0**-23, 1 + TIE - 2.0**-23, 1 + ULP + TIE + 2.0**-23, 1 + ULP + TIE - 2.0**-23],
    "carry into the exponent": [2 - TIE / 2, 2 - TIE, 511.5, torch.finfo(torch.float32).max],
    "no numbers": [math.inf, math.nan],
    "subnormal": [n * SUBNORMAL / 2 for n in (1, 2, 3, 5, 7)] + [2.0**-126 - SUBNORMAL / 2],
}


@triton.jit
def _casts(x, narrowed, through, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    rounded = tl.load(x + place).to(tl.bfloat16)
    tl.store(narrowed + place, rounded)
    tl.store(through + place, rounded.to(tl.float32))


@triton.jit
def _arithmetic(x, y, total, less, product, smaller, size, chosen, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    a, b = tl.load(x + place), tl.load(y + place)
    tl.store(total + place, a + b)
    tl.store(less + place, a - b)
    tl.store(product + place, a * b)
    tl.store(smaller + place, a < b)
    tl.store(size + place, tl.abs(a))
    tl.store(chosen + place, tl.where(a < b, a, b))


@triton.jit
def _dot(left, right, addend, sums, rounded, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, terms = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(left + rows * K + terms[None, :])
    b = tl.load(right + terms[:, None] * N + columns)
    found = tl.dot(a, b, tl.load(addend + rows * N + columns))
    tl.store(sums + rows * N + columns, found)
    tl.store(rounded + rows * N + columns, found.to(tl.bfloat16))


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """But for the bits of a NaN."""
    assert found.dtype == expected.dtype
    bits = torch.int16 if found.dtype == torch.bfloat16 else torch.int32
    torch.testing.assert_close(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    torch.testing.assert_close(found[numbers].view(bits), expected[numbers].view(bits), rtol=0, atol=0)


@pytest.mark.parametrize("what", CASTS)
def test_a_cast_rounds_to_the_nearest_and_ties_to_even(what: str) -> None:
    given = CASTS[what] + [-value for value in CASTS[what]]
    x = torch.tensor(given + [0.0] * (32 - len(given)), dtype=torch.float32, device=KERNEL_DEVICE)
    narrowed, through = torch.full_like(x, 7, dtype=torch.bfloat16), torch.full_like(x, 7)
    _casts[(1,)](x, narrowed, through, BLOCK=32)
    assert_same_bits(narrowed, x.bfloat16())
    assert_same_bits(through, x.bfloat16().float())


def test_a_cast_of_integers_rounds_alike() -> None:
    integers = torch.arange(-272, -240, dtype=torch.int32, device=KERNEL_DEVICE)
    narrowed, through = torch.full((32,), 7.0).to(integers.device, torch.bfloat16), integers.float() * 0 + 7
    _casts[(1,)](integers, narrowed, through, BLOCK=32)
    assert_same_bits(narrowed, integers.bfloat16())
    assert_same_bits(through, integers.bfloat16().float())


def test_bf16_numbers_are_added_multiplied_and_compared_as_torch_does() -> None:
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0, SUBNORMAL, -3 * SUBNORMAL, 256.0, 1 + ULP, 3e38]
    pairs = [(one, other) for one in special for other in special] + [(256.0, 1.0), (256.0, 3.0), (-256.0, -3.0)]
    drawn = torch.randn(512 - len(pairs), 2) * 2.0 ** torch.randint(-8, 8, (512 - len(pairs), 2))
    both = torch.cat([torch.tensor(pairs), drawn]).bfloat16().to(KERNEL_DEVICE)
    x, y = both[:, 0].contiguous(), both[:, 1].contiguous()
    total, less, product, size, chosen = (torch.full_like(x, 7) for _ in range(5))
    smaller = torch.zeros_like(x, dtype=torch.bool)
    _arithmetic[(1,)](x, y, total, less, product, smaller, size, chosen, BLOCK=512)
    assert_same_bits(total, x + y)
    assert_same_bits(less, x - y)
    assert_same_bits(product, x * y)
    assert torch.equal(smaller, x < y)
    assert_same_bits(size, x.abs())
    assert_same_bits(chosen, torch.where(x < y, x, y))


def test_a_dot_of_bf16_sums_in_fp32() -> None:
    """Integers whose sums fp32 holds exactly, in any order, and bf16 does not."""
    draw = lambda *shape: torch.randint(-100, 101, shape, device=KERNEL_DEVICE)  # noqa: E731
    left, right, addend = draw(16, 32).bfloat16(), draw(32, 16).bfloat16(), draw(16, 16).float()
    sums, rounded = torch.empty_like(addend), addend.bfloat16()
    _dot[(1,)](left, right, addend, sums, rounded, M=16, N=16, K=32)
    expected = (left.double() @ right.double() + addend.double()).float()
    assert (expected.bfloat16() != expected).any()
    assert_same_bits(sums, expected)
    assert_same_bits(rounded, expected.bfloat16())
