"""Gated linear units: h = act(gate) * up, SwiGLU and GeGLU, forward and backward in one pass each.

    silu       act(x) = x s(x)                        s(x) = 1 / (1 + e^-x)
    gelu       act(x) = x Phi(x)                      Phi the normal distribution's integral
    gelu_tanh  act(x) = x s(2 u)                      u = sqrt(2 / pi) (x + 0.044715 x^3)

The activation never reaches memory: plain torch writes and reads act(gate), and keeps it, gate and up for the backward.
Here the forward reads gate and up and writes h, 6 bytes an element of bf16 in place of 10, and keeps gate and up, which
are there anyway (7 GB of activations less at N=8192 and I=14336 in a model of 32 layers); the backward reads three
tensors and writes two.

    gate, up (..., I) -> h (..., I);  halves of one (..., 2 I) product will do: rows may be any distance apart

What transformers computes: act(gate) rounded to the dtype of gate, times up, rounded to the dtype that torch promotes
both to. The torch method is that bit for bit, forward and backward; Triton's computes in fp32 with the forward's two
roundings, and rounds each gradient once. Element by element, so deterministic. `gelu_tanh` is "gelu_pytorch_tanh" of
transformers' configurations; "gelu_new" and "gelu_fast" round more often, and gpt-oss clamps its gates: none of these
is here.

Legend: N rows, I intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo_kernels import launch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def glu(
    gate: Tensor,  # (..., I)
    up: Tensor,  # (..., I)
    activation: str,  # one of ACTIVATIONS
    *,
    method: str = "auto",
) -> Tensor:  # (..., I)
    """act(gate) * up, differentiable in both; keeps gate and up for that, and nothing beside.

    `method` is one of launch.BLOCK_METHODS; "auto" takes triton on GPUs and torch elsewhere. Dtypes may differ (bf16,
    fp16 and fp32; any float for method="torch"): the result has the one that torch promotes them to.

    Raises ValueError for shapes that differ, an unknown activation or method, and a method that cannot run.
    """
    _check(gate, up, activation)
    method = launch.block_method("glu", method, gate, up)
    with torch.cuda.device_of(gate):  # Triton launches on the current device
        return _Glu.apply(gate, up, activation, method)


def glu_forward(gate: Tensor, up: Tensor, activation: str, method: str = "auto") -> Tensor:
    """`glu` without autograd."""
    _check(gate, up, activation)
    if launch.block_method("glu", method, gate, up) == "torch":
        return _forward_torch(gate, up, activation)
    from fastdpo_kernels import glu_triton  # Triton exists on Linux only

    with torch.cuda.device_of(gate):
        return glu_triton.forward(gate, up, activation)


def glu_backward(
    grad_h: Tensor,  # (..., I)
    gate: Tensor,  # (..., I)
    up: Tensor,  # (..., I)
    activation: str,
    method: str = "auto",
    *,
    with_h: bool = False,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> the gradients of gate and up in their dtypes and, `with_h`, what the forward gave, all three in one pass.

    `into` names tensors that the caller gives for them, of their shapes and dtypes. They may be halves of one tensor,
    or grad_h itself, whose elements are read before they are written: (N, I) of 20000 tokens are 0.6 GB. They must not
    overlap otherwise.
    """
    _check(gate, up, activation)
    _check_into(into, grad_h, gate, up)
    if launch.block_method("glu", method, grad_h, gate, up) == "torch":
        grad_gate, grad_up, h = _backward_torch(grad_h, gate, up, activation, with_h)
        return _put(grad_gate, into[0]), _put(grad_up, into[1]), None if h is None else _put(h, into[2])
    from fastdpo_kernels import glu_triton  # Triton exists on Linux only

    with torch.cuda.device_of(gate):
        return glu_triton.backward(grad_h, gate, up, activation, with_h, into)


def method_report(device: torch.device | None = None) -> list[tuple[str, str]]:
    """Which way `glu` goes on a device (the GPU where there is one): rows of (kernel, path)."""
    return [("glu", launch.block_method_in_words(device))]


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}, expected one of {ACTIVATIONS}")
    if gate.shape != up.shape or not gate.ndim:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must be of one shape, (..., I)")
    if not (gate.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"gate is {gate.dtype} and up {up.dtype}, expected floating-point numbers")


def _check_into(into: tuple[Tensor | None, ...], grad_h: Tensor, gate: Tensor, up: Tensor) -> None:
    if grad_h.shape != gate.shape:
        raise ValueError(f"grad_h is {tuple(grad_h.shape)}, expected the shape of gate, {tuple(gate.shape)}")
    dtypes = gate.dtype, up.dtype, torch.promote_types(gate.dtype, up.dtype)
    for name, given, dtype in zip(("grad_gate", "grad_up", "h"), into, dtypes, strict=True):
        if given is not None and (given.shape != gate.shape or given.dtype != dtype):
            came = f"{tuple(given.shape)} {given.dtype}"
            raise ValueError(f"into: {name} is {came}, expected {tuple(gate.shape)} {dtype}")


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, method: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.method = activation, method
        return glu_forward(gate, up, activation, method)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, _ = glu_backward(grad_h, gate, up, ctx.activation, ctx.method)
        return grad_gate, grad_up, None, None


# The torch method


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=_APPROXIMATE[activation])


def _forward_torch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _activate(gate, activation) * up


def _backward_torch(
    grad_h: Tensor, gate: Tensor, up: Tensor, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    active = _activate(gate, activation)
    grad_active = (grad_h * up).to(gate.dtype)
    if activation == "silu":
        grad_gate = torch.ops.aten.silu_backward(grad_active, gate)
    else:
        grad_gate = torch.ops.aten.gelu_backward(grad_active, gate, approximate=_APPROXIMATE[activation])
    return grad_gate, (grad_h * active).to(up.dtype), active * up if with_h else None


def _put(result: Tensor, place: Tensor | None) -> Tensor:
    return result if place is None else place.copy_(result)
