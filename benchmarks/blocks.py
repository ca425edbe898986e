"""What stands between a block's products, to compare implementations on: fastdpo's, plain torch, torch.compile, Liger.

    rms_norm  rows of the hidden size, and of a head's numbers (q_norm), the weight frozen as under LoRA
    rope      queries and keys of one sequence, as attention has them: transposed views
    glu       SwiGLU

Everybody gets copies of the same tensors: Liger writes its results over some of its inputs, here as in a training step.

Legend: N tokens, D hidden size, H heads of q, G heads of k, E numbers of a head, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import FULL_GRAPHS, Unavailable, _imported
from benchmarks.roofline import FORWARD, Work
from fastdpo_kernels import launch
from fastdpo_kernels.glu import glu
from fastdpo_kernels.rms_norm import rms_norm
from fastdpo_kernels.rope import rope

WITH_GRADIENT = "forward and backward"
EPS = 1e-5
Results = tuple[Tensor, ...]
Compute = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    op: str
    shape: tuple[int, ...]
    learned: tuple[Tensor, ...]  # inputs that get a gradient
    fixed: tuple[Tensor, ...]
    moved: tuple[float, float]  # times that the bytes of `learned` are moved at least: forward, and backward

    def work(self, wants: str) -> Work:
        """Every input read and every result written once; the backward reads gradients and what it was kept."""
        own = sum(tensor.nbytes for tensor in self.learned)
        read = sum(tensor.nbytes for tensor in self.fixed)
        times = self.moved[0] if wants == FORWARD else sum(self.moved)
        return Work(0.0, times * own + (1 if wants == FORWARD else 2) * read)


def shapes(token_shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    tokens, hidden, heads, kv_heads, size, intermediate = token_shape
    return [
        ("rms_norm", (tokens, hidden)),
        ("rms_norm", (tokens * heads, size)),
        ("rope", (tokens, heads, kv_heads, size)),
        ("glu", (tokens, intermediate)),
    ]


def make_task(op: str, shape: tuple[int, ...], dtype: str, place: str) -> Task:
    generator = torch.Generator(place).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=place).to(getattr(torch, dtype))

    if op == "rms_norm":  # reads x, writes y; reads x and dy, writes dx
        return Task(op, shape, (normal(*shape),), (normal(shape[1]),), (2, 3))
    if op == "rope":
        tokens, heads, kv_heads, size = shape
        q, k = (normal(1, tokens, n, size).transpose(1, 2) for n in (heads, kv_heads))
        return Task(op, shape, (q, k), (normal(1, tokens, size), normal(1, tokens, size)), (2, 2))
    return Task(op, shape, (normal(*shape), normal(*shape)), (), (1.5, 2.5))  # 3 and 5 tensors of one's size


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    exact = x.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotate(q), rotate(k)


def _plain_glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


PLAIN: dict[str, Compute] = {"rms_norm": _plain_norm, "rope": _plain_rope, "glu": _plain_glu}


def _own(op: str, method: str) -> Compute:
    return {
        "rms_norm": lambda x, weight: rms_norm(x, weight, EPS, method=method),
        "rope": partial(rope, method=method),
        "glu": partial(glu, activation="silu", method=method),
    }[op]


@dataclass(frozen=True)
class Way:
    compute: Compute
    path: str
    version: str


def fastdpo(task: Task, method: str) -> Way:
    if method == "triton" and not launch.device_of(task.learned[0].device).compiles:
        raise Unavailable("method='triton' needs a GPU")
    path = {"triton": "one launch each way", "torch": "plain torch, forward and backward by hand"}[method]
    return Way(_own(task.op, method), path, "")


def torch_eager(task: Task) -> Way:
    return Way(PLAIN[task.op], "eager, autograd's backward", torch.__version__)


def torch_compile(task: Task) -> Way:
    config: Any = torch._dynamo.config  # pyright: ignore[reportAttributeAccessIssue]
    config.recompile_limit = FULL_GRAPHS
    compiled = torch.compile(PLAIN[task.op], fullgraph=True, dynamic=False)
    return Way(compiled, "inductor, one full graph for each shape", torch.__version__)


def liger(task: Task) -> Way:
    if task.learned[0].device.type != "cuda":
        raise Unavailable("Liger's kernels need a GPU")
    functional, number = _imported("liger_kernel.transformers.functional", "liger-kernel")
    compute = {
        "rms_norm": lambda x, weight: functional.liger_rms_norm(x, weight, EPS),
        "rope": functional.liger_rope,
        "glu": functional.liger_swiglu,
    }[task.op]
    return Way(compute, "its Triton kernels, in place where it goes in place", number)


CONTENDERS: dict[str, Callable[[Task], Way]] = {
    "fastdpo triton": partial(fastdpo, method="triton"),
    "fastdpo torch": partial(fastdpo, method="torch"),
    "torch": torch_eager,
    "torch.compile": torch_compile,
    "Liger": liger,
}


def timed_call(way: Way, task: Task, wants: str) -> Callable[[], Results]:
    """-> a call that returns the results and, where wanted, the gradients of `task.learned`."""
    learned = [tensor.clone().requires_grad_(wants != FORWARD) for tensor in task.learned]
    inputs = [leaf.view_as(leaf) for leaf in learned]  # in-place writers refuse leaves
    upstream = [tensor.clone() for tensor in _upstream(task)]

    def forward() -> Results:
        with torch.no_grad():
            return _tuple(way.compute(*inputs, *task.fixed))

    def both() -> Results:
        results = _tuple(way.compute(*(leaf.view_as(leaf) for leaf in learned), *task.fixed))
        gradients = torch.autograd.grad(results, learned, upstream)
        return *(result.detach() for result in results), *gradients

    return forward if wants == FORWARD else both


def _upstream(task: Task) -> Results:
    """As large as the inputs, and no other numbers than theirs."""
    return task.learned if task.op == "rope" else task.learned[:1]


def _tuple(results: Any) -> Results:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def errors(task: Task, wants: str, found: Results) -> dict[str, float]:
    """|error| / |truth|, the largest over results and gradients; truth in fp64."""
    exact = Task(task.op, task.shape, *(tuple(x.double() for x in part) for part in (task.learned, task.fixed)), (0, 0))
    truth = timed_call(Way(_own(task.op, "torch"), "", ""), exact, wants)()
    pairs = zip(found, truth, strict=True)
    return {"results": max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)}
