"""Device functions of the head's kernels: the way from a product to a logit, and the online softmax with statistics.

The state of a row's softmax runs over every column but the target's, which joins last with its exact logit:

    peak    largest logit                       spread   sum of e^d * d        d = z - peak
    total   sum of e^d                          squares  sum of e^(2 d)
    sum     sum of z

So log p(target) near 0 is -log1p(others / target), exact where 1 - (1 - p) would lose every digit, and never positive.

fp64 relatives of exp, tanh and log1p, for the losses, are in device_math.py.

Legend: R rows, B columns of a block, V vocabulary. Everything is fp32.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for "nothing yet": finite, so that differences and products with 0 stay numbers


@triton.jit
def exp(x):
    """e^x as 2^x, which flushes what is below 1e-38 to 0: tl.exp takes three instructions more to keep it."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """A series below 0.25, where 1 - 2 / (e^2x + 1) would lose digits; relative error below 1e-6."""
    x2 = x * x
    series = tl.fma(x2, tl.fma(x2, tl.fma(x2, 62.0 / 2835, -17.0 / 315), 2.0 / 15), -1.0 / 3)
    magnitude = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.885390081777927) + 1.0)
    return tl.where(tl.abs(x) < 0.25, tl.fma(x * x2, series, x), tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: 2 artanh(x / (2 + x)) as a series where 1 + x would round x away."""
    t = x / (2.0 + x)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3 + t2 * (1.0 / 5 + t2 * (1.0 / 7 + t2 * (1.0 / 9)))))
    return tl.where(x < 0.25, series, tl.log(1.0 + x))


@triton.jit
def to_logits(product, bias, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """W h and b -> z. `bias` is None where the head has none: adding a 0.0 would cost an instruction."""
    z = product
    if bias is not None:
        z += bias
    if HAS_SOFTCAP:
        return softcap * tanh(z * (logit_scale / softcap)) * inverse_temperature
    else:
        return z * (logit_scale * inverse_temperature)


@triton.jit
def slope(product, bias, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """dz / d(W h)."""
    factor = logit_scale * inverse_temperature
    if HAS_SOFTCAP:
        z = product
        if bias is not None:
            z += bias
        capped = tanh(z * (logit_scale / softcap))
        return factor * (1.0 - capped * capped)
    else:
        return tl.zeros_like(product) + factor


@triton.jit
def empty_state(R: tl.constexpr):
    """-> peak, total, spread, squares, sum of no column, (R,) each."""
    zero = tl.zeros((R,), tl.float32)
    return zero + LOWEST, zero, zero, zero, zero


@triton.jit
def absorb(peak, total, spread, squares, sum_, z, counted, WITH_STATS: tl.constexpr):
    """The state after a block of columns. z (R, B) logits; counted (R, B): in the vocabulary and not the target's.

    While no column of a row is counted its peak is LOWEST, and total grows by e^0 a column: the first column that
    counts, and the target at the latest, multiplies that by e^LOWEST, which is 0.
    """
    z = tl.where(counted, z, LOWEST)
    new_peak = tl.maximum(peak, tl.max(z, 1))
    d = z - new_peak[:, None]
    e = exp(d)
    shrink = exp(peak - new_peak)
    if WITH_STATS:
        spread = shrink * (spread + (peak - new_peak) * total) + tl.sum(e * d, 1)
        squares = shrink * shrink * squares + tl.sum(e * e, 1)
        sum_ += tl.sum(tl.where(counted, z, 0.0), 1)
    total = shrink * total + tl.sum(e, 1)
    return new_peak, total, spread, squares, sum_


@triton.jit
def finish(peak, total, target_logit):
    """-> logp, the whole row's peak and total, and 1 - p(target), with the target's column joined."""
    whole_peak = tl.maximum(peak, target_logit)
    others = total * exp(peak - whole_peak)
    of_target = exp(target_logit - whole_peak)
    whole = others + of_target
    likely = -log1p(others / tl.maximum(of_target, 1e-30))
    unlikely = (target_logit - whole_peak) - tl.log(whole)
    return tl.where(target_logit >= peak, likely, unlikely), whole_peak, whole, others / whole


@triton.jit
def finish_stats(peak, total, spread, squares, sum_, before, target_logit, V):
    """-> entropy, mean_logit, is_top1, log_sum_sq_probs, with the target's column joined. `before` is the peak of the
    columns before the target: of equals the first is the top.
    """
    whole_peak = tl.maximum(peak, target_logit)
    shrink, of_target = exp(peak - whole_peak), exp(target_logit - whole_peak)
    whole = shrink * total + of_target
    # log(whole) = log1p(what is not the peak): where the target is the peak that part is exact
    log_whole = tl.where(target_logit >= peak, log1p(shrink * total), tl.log(whole))
    whole_spread = shrink * (spread + (peak - whole_peak) * total) + of_target * (target_logit - whole_peak)
    whole_squares = shrink * shrink * squares + of_target * of_target
    is_top1 = (target_logit >= peak) & (target_logit > before)
    return (
        log_whole - whole_spread / whole,
        (sum_ + target_logit) / V,
        is_top1.to(tl.float32),
        tl.log(whole_squares) - 2.0 * log_whole,
    )
