"""Projections with low-rank adapters (LoRA, arXiv:2106.09685) on frozen dense or 4-bit weights: one, q/k/v, gated MLP.

    y = x W^T + bias + s u B^T        u = x A^T
    dX = dY W + dU A                  dU = s dY B       dA = dU^T x       dB = s dY^T u

    MLP: h = act(gate(x)) * up(x), y = down(h), gate, up and down such projections

Plain autograd over peft's layers keeps, for each adapter, a copy of x in the adapter's dtype and what comes after its
scaling, and for a MLP act(gate), h and a cast of it as well. Kept here: x, the (N, r) products u, and gate and up of a
MLP; the backward makes h again. For the MLP of an 8B model (I=14336, D=4096) at N=8192 that are 537 MB of bf16, plus
0.3 MB for each adapter of rank 16. Factors that had to be stacked, or cast to the dtype of x, are kept as they were
multiplied with: 2.6 MB of bf16 a block of such a model. What else is as wide as a MLP (h, dh, dup) is there for
`launch.MLP_ROWS` rows at a time. Weights are never kept: a 4-bit one is dequantised into `nf4.scratch` once each way,
for a MLP once each way and `launch.MLP_ROWS` rows, and only one is there at a time.

Products are cuBLAS's. Which of them are joined, by what they read and write at N=8192, I=O=4096, r=16 in bf16 (x and y
67 MB each, 16 us on an H200; unmeasured):

    x A^T of q, k and v   one product with the A's stacked: x is read once, not three times, 32 us less; so are dA and
                          the part dU A of dX. On a CPU (N=2048, fp32, one thread) 25 ms, not 37.
    + s u B^T             added to y by the product that makes it: reads and writes y, where a product and a sum of
                          their own write and read 67 MB more. It comes after x W^T, not before, which would
                          save reading y once (16 us of 430): so an adapter with B = 0 leaves y as it is, bit for bit.
    dX                    dU A first, then each dY W on top of it, in one buffer
    W + s B A             for one product alone: less to move than u B^T from 3000 rows on, but B A is lost to the
                          rounding of W, 2^-9 of its size in bf16. Not done.

Numerics: products in the dtype of x (under autocast in its dtype), adapters cast to it; gradients of adapters in their
own dtype, on a GPU as they were summed, in fp32. An adapter's product joins y after y was rounded, as peft's does.
Deterministic where cuBLAS is. Nothing that is given is written to. A dense weight that was written to between forward
and backward is noticed there.

Legend: N rows of x, I columns, O columns of y, r rank, R the ranks of the adapters that see one x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fastdpo_kernels import launch, nf4
from fastdpo_kernels.glu import glu_backward, glu_forward


@dataclass(frozen=True)
class Adapter:
    """Adds scaling * B A to a weight. a and b are any float dtype and may require a gradient."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r)
    scaling: float


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer, and its adapter; None: it has none, or it is switched off."""

    weight: Tensor | nf4.Packed  # (O, I)
    bias: Tensor | None = None  # (O,)
    adapter: Adapter | None = None


Factors = Sequence[Tensor | None]  # a, b of one projection, a, b of the next; None, None where there is no adapter


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """(..., I) -> (..., O), differentiable in x and in the adapter's a and b.

    Computes in autocast's dtype where that is on, else in the dtype of x. Raises ValueError for shapes that do not fit,
    and for a weight or bias that requires a gradient: they are frozen here.
    """
    return _project(x, {"projection": projection})[0]


def lora_qkv(x: Tensor, q: Projection, k: Projection, v: Projection) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_linear` of three projections that see one x: (..., I) -> (..., O) each, and one x is kept."""
    queries, keys, values = _project(x, {"q": q, "k": k, "v": v})
    return queries, keys, values


def lora_mlp(
    x: Tensor,  # (..., D)
    gate: Projection,  # (I, D)
    up: Projection,  # (I, D)
    down: Projection,  # (D, I)
    activation: str,  # one of glu.ACTIVATIONS
) -> Tensor:  # (..., D)
    """down(act(gate(x)) * up(x)), differentiable in x and the adapters; dtypes and errors as of `lora_linear`."""
    projections = {"gate": gate, "up": up, "down": down}
    width = gate.weight.shape[0]
    for name, projection in projections.items():
        _check(name, projection, width if name == "down" else x.shape[-1])
    if up.weight.shape[0] != width:
        raise ValueError(f"gate and up have {width} and {up.weight.shape[0]} rows, expected as many")
    rows, factors = _rows(x), _factors(projections.values())
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, *factors))
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        count = math.ceil(rows.shape[0] / launch.MLP_ROWS)
        with torch.no_grad():
            cast = *_in_dtype(factors[4:], rows.dtype), *_in_dtype(factors[:4], rows.dtype)
        parts = [
            _Mlp.apply(part, tuple(projections.values()), activation, keep, cast, *factors)
            for part in (rows.chunk(count) if count > 1 else [rows])  # the gradient of chunks is a copy
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[-1])


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way LoRA projections go on a device (the GPU where there is one): rows of (kernel, path)."""
    ((_, path),) = nf4.method_report(device)
    return [("lora", f"products by torch's BLAS; 4-bit weights and gated units by {path.partition(':')[0]}")]


# Checks


def _check(name: str, projection: Projection, columns: int) -> None:
    weight, bias, adapter = projection.weight, projection.bias, projection.adapter
    if len(weight.shape) != 2 or weight.shape[1] != columns:
        raise ValueError(f"{name}: weight is {tuple(weight.shape)}, expected (O, {columns}) for what it is given")
    rows = weight.shape[0]
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{name}: bias is {tuple(bias.shape)}, expected ({rows},), one number a row of the weight")
    for what, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {what} requires a gradient and would get none: freeze it by requires_grad_(False), or use a "
                "plain linear layer"
            )
    if adapter is not None:
        rank = adapter.a.shape[0]
        if adapter.a.shape != (rank, columns) or adapter.b.shape != (rows, rank):
            raise ValueError(
                f"{name}: the adapter's a and b are {tuple(adapter.a.shape)} and {tuple(adapter.b.shape)}, expected "
                f"(r, {columns}) and ({rows}, r)"
            )


def _versions(projections: Iterable[Projection]) -> list[int | None]:
    """How often each dense weight was written to; saving it would do this, and keep an offloading hook's copy."""
    weights = [projection.weight for projection in projections]
    return [w._version if isinstance(w, Tensor) and not w.is_inference() else None for w in weights]


def _check_versions(projections: Sequence[Projection], versions: list[int | None]) -> None:
    for projection, before, now in zip(projections, versions, _versions(projections), strict=True):
        if now != before:
            raise RuntimeError(
                f"a frozen weight of shape {tuple(projection.weight.shape)} was changed in place between forward and "
                f"backward: it is at version {now}, expected version {before}; change it after the backward"
            )


def _rows(x: Tensor) -> Tensor:
    """(N, I) in the dtype that is computed in."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _factors(projections: Iterable[Projection]) -> Factors:
    adapters = [projection.adapter for projection in projections]
    return [factor for one in adapters for factor in ((None, None) if one is None else (one.a, one.b))]


# Projections of one x


def _project(x: Tensor, projections: dict[str, Projection]) -> list[Tensor]:
    for name, projection in projections.items():
        _check(name, projection, x.shape[-1])
    rows, several = _rows(x), tuple(projections.values())
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        outputs = _Project.apply(rows, several, *_factors(several))
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, projections: tuple[Projection, ...], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        stack, *bs = _in_dtype(factors, x.dtype)
        outputs, low = _forward(x, projections, stack, bs)
        needs = ctx.needs_input_grad[2:]
        ctx.save_for_backward(x if any(needs[0::2]) else None, low if any(needs[1::2]) else None, stack, *bs)
        ctx.projections, ctx.versions = projections, _versions(projections)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, stack, *bs = ctx.saved_tensors
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        _check_versions(ctx.projections, ctx.versions)
        with torch.autocast(given.device.type, enabled=False), torch.cuda.device_of(given):
            return _backward(grads, x, low, ctx.projections, stack, bs, ctx.needs_input_grad)


def _backward(
    grads: Sequence[Tensor | None],  # (N, O) each
    x: Tensor | None,
    low: Tensor | None,
    projections: Sequence[Projection],
    stack: Tensor | None,
    bs: Factors,
    needs: Sequence[bool],  # of x, projections, factors
) -> tuple[Tensor | None, ...]:
    """-> gradients of the function's arguments."""
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    grad_low = _grad_low(grads, projections, bs)
    of_factors = _factor_gradients(grads, x, low, grad_low, projections, needs[2:])
    grad_x = _input_gradient(grads, grad_low, projections, stack) if needs[0] else None
    return grad_x, None, *of_factors


def _forward(
    x: Tensor, projections: Sequence[Projection], stack: Tensor | None, bs: Factors
) -> tuple[list[Tensor], Tensor | None]:
    """-> y (N, O) of each, and u (N, R) of all that have an adapter."""
    low, outputs = None if stack is None else linear(x, stack), []
    for projection, part, b in zip(projections, _parts(low, projections), bs, strict=True):
        bias = projection.bias
        with _dense(projection.weight, x.dtype) as weight:
            y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        if part is not None and b is not None and projection.adapter is not None:
            y.addmm_(part, b.T, alpha=projection.adapter.scaling)
        outputs.append(y)
    return outputs, low


def _dense(weight: Tensor | nf4.Packed, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
    """(O, I) in this dtype."""
    return nullcontext(weight) if isinstance(weight, Tensor) and weight.dtype == dtype else _in_scratch(weight, dtype)


@contextmanager
def _in_scratch(weight: Tensor | nf4.Packed, dtype: torch.dtype) -> Iterator[Tensor]:
    """In a buffer that is no other thread's meanwhile."""
    rows, columns = weight.shape
    with nf4.scratch_lock:
        out = nf4.scratch(rows * columns, dtype, weight.data.device).view(rows, columns)
        packed = isinstance(weight, nf4.Packed)
        yield nf4.dequantize(weight, dtype, out=out) if packed else out.copy_(weight.detach())


def _in_dtype(factors: Factors, dtype: torch.dtype) -> list[Tensor | None]:
    """The A's one below the other, (R, I), and each B."""
    found = [a for a in factors[0::2] if a is not None]
    stack = None if not found else found[0] if len(found) == 1 else torch.cat(found)
    return [None if factor is None else factor.to(dtype) for factor in (stack, *factors[1::2])]


def _parts(stack: Tensor | None, projections: Sequence[Projection], dim: int = 1) -> Factors:
    """Of something that has R entries along `dim`, each adapter's part; None where there is no adapter."""
    if stack is None or len(projections) == 1:
        return [stack] * len(projections)
    adapters = [projection.adapter for projection in projections]
    parts = stack.split_with_sizes([0 if one is None else one.a.shape[0] for one in adapters], dim)
    return [None if one is None else part for one, part in zip(adapters, parts, strict=True)]


def _grad_low(grads: Factors, projections: Sequence[Projection], bs: Factors) -> Tensor | None:
    """dU (N, R)"""
    ranks = [b.shape[1] for b in bs if b is not None]
    if not ranks:
        return None
    given = next(grad for grad in grads if grad is not None)
    grad_low = given.new_empty(given.shape[0], sum(ranks))
    for grad, part, b, projection in zip(grads, _parts(grad_low, projections), bs, projections, strict=True):
        if part is None or b is None or projection.adapter is None:
            continue
        if grad is None:
            part.zero_()
        else:
            part.addmm_(grad, b.to(grad.dtype), beta=0, alpha=projection.adapter.scaling)
    return grad_low


def _input_gradient(
    grads: Factors, grad_low: Tensor | None, projections: Sequence[Projection], stack: Tensor | None
) -> Tensor | None:
    """dX (N, I)"""
    total = None if grad_low is None or stack is None else grad_low @ stack.to(grad_low.dtype)
    for grad, projection in zip(grads, projections, strict=True):
        if grad is not None:
            with _dense(projection.weight, grad.dtype) as weight:
                total = grad @ weight if total is None else total.addmm_(grad, weight)
    return total


def _factor_gradients(
    grads: Factors,
    x: Tensor | None,
    low: Tensor | None,
    grad_low: Tensor | None,
    projections: Sequence[Projection],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """dA, dB of each projection, where they are needed."""
    adapters = [projection.adapter for projection in projections]
    found: list[Tensor | None] = [None] * len(needs)
    if x is not None and grad_low is not None:
        dtypes = [one.a.dtype for one in adapters if one is not None]
        of_all = _product(grad_low.T, x, max(dtypes, key=lambda dtype: dtype.itemsize))
        for place, (one, part) in enumerate(zip(adapters, _parts(of_all, projections, dim=0), strict=True)):
            if one is not None and part is not None and needs[2 * place]:
                found[2 * place] = part.to(one.a.dtype)
    for place, (one, grad, part) in enumerate(zip(adapters, grads, _parts(low, projections), strict=True)):
        if one is not None and grad is not None and part is not None and needs[2 * place + 1]:
            found[2 * place + 1] = _product(grad.T, part, one.b.dtype, one.scaling)
    return found


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale * left @ right in `dtype`; in fp32 on a GPU it never was in the factors' 16 bits."""
    wide = left.is_cuda and dtype == torch.float32 and left.dtype in (torch.float16, torch.bfloat16)
    out = left.new_empty(left.shape[0], right.shape[1], dtype=dtype if wide else left.dtype)
    if wide:
        torch.addmm(out, left, right, out_dtype=dtype, beta=0, alpha=scale, out=out)
    else:
        out.addmm_(left, right, beta=0, alpha=scale)
    return out.to(dtype)


# The gated MLP


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projections: tuple[Projection, ...],
        activation: str,
        keep: bool,
        cast: Factors,  # A and B of down, and what gate and up have in common, as they are multiplied with
        *factors: Tensor | None,
    ) -> Tensor:
        down_a, down_b, stack, *bs = cast
        (gate, up), low = _forward(x, projections[:2], stack, bs)
        h = glu_forward(gate, up, activation)
        if not keep:
            del gate, up
        ((y,), down_low) = _forward(h, projections[2:], down_a, [down_b])
        if keep:
            of_a, of_b = ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]
            kept = x if any(of_a[:2]) else None, low if any(of_b[:2]) else None, down_low if of_b[2] else None
            ctx.save_for_backward(gate, up, *kept, *cast)
        ctx.projections, ctx.versions, ctx.activation = projections, _versions(projections), activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, x, low, down_low, down_a, down_b, stack, *bs = ctx.saved_tensors
        first, down, needs = ctx.projections[:2], ctx.projections[2:], ctx.needs_input_grad[5:]
        _check_versions(ctx.projections, ctx.versions)
        with torch.autocast(grad.device.type, enabled=False), torch.cuda.device_of(grad):
            grad = grad.contiguous()
            grad_low = _grad_low([grad], down, [down_b])
            grad_h = _input_gradient([grad], grad_low, down, down_a)
            assert grad_h is not None
            into = grad_h, None, None  # dgate takes its place: one (N, I) less
            *grads, h = glu_backward(grad_h, gate, up, ctx.activation, with_h=needs[4], into=into)
            of_down = _factor_gradients([grad], h, down_low, grad_low, down, needs[4:])
            del h, grad_h
            wanted = ctx.needs_input_grad[0], False, *needs[:4]
            grad_x, _, *of_first = _backward(grads, x, low, first, stack, bs, wanted)
        return grad_x, None, None, None, None, *of_first, *of_down
