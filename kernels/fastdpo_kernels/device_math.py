"""The functions of a formula's `m` on a device, with the slopes that stand in their derivatives: fp64, for scalars.

Triton has exp, log, sqrt and abs. The others are written so that they keep their digits where results are tiny and stay
finite where arguments are large: a loss of 1e-20 is right in every digit, one at a margin of -800 is 800. Relative
errors are a few units of 1e-16. NaN stays NaN. (The head's kernels have faster ones for fp32 blocks, in _device.py.)
"""

import triton
import triton.language as tl

from fastdpo_kernels.pair_loss import EXP_CAP, LOG1MEXP_MAX

_EXP_CAP, _LOG1MEXP_MAX = tl.constexpr(EXP_CAP), tl.constexpr(LOG1MEXP_MAX)


@triton.jit
def number(value: tl.constexpr):
    return tl.full((), value, tl.float64)


@triton.jit
def whole_power(x, n: tl.constexpr):
    """x^n for n >= 1, by squaring."""
    if n == 1:
        return x
    elif n % 2 == 0:
        return whole_power(x * x, n // 2)
    else:
        return x * whole_power(x * x, n // 2)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    """Kahan: what rounding 1 + x took off x is taken off log(1 + x) / x as well."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """Kahan's, where e^x - 1 would cancel."""
    near = tl.abs(x) < 1.0
    u = tl.exp(tl.where(near, x, 1.0))
    of_near = (u - 1.0) * (x / tl.where(u == 1.0, 1.0, tl.log(u)))
    return tl.where(near, tl.where(u == 1.0, x, of_near), tl.exp(x) - 1.0)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    magnitude = -t / (t + 2.0)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    return -softplus(-x)


@triton.jit
def softplus(x):
    return relu(x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def minimum(x, y):
    return tl.where(y < x, y, x)


@triton.jit
def maximum(x, y):
    return tl.where(y > x, y, x)


@triton.jit
def log1mexp(x):
    x = minimum(x, number(_LOG1MEXP_MAX))
    near = x > -0.6931471805599453
    of_near = tl.log(-expm1(tl.where(near, x, -1.0)))
    return tl.where(near, of_near, log1p(-tl.exp(tl.where(near, -1.0, x))))


@triton.jit
def capped_exp(x):
    return tl.exp(minimum(x, number(_EXP_CAP))) * (1.0 + relu(x - _EXP_CAP))


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(tl.float64)


@triton.jit
def step(x):
    return tl.where(x > 0.0, 1.0, 0.0).to(tl.float64)


@triton.jit
def below(x, y):
    return tl.where(x < y, 1.0, tl.where(x > y, 0.0, 0.5)).to(tl.float64)


@triton.jit
def log1mexp_slope(x):
    near_zero = x > _LOG1MEXP_MAX
    return tl.where(near_zero, 0.0, tl.exp(x) / expm1(tl.where(near_zero, -1.0, x)))
