"""LoRA on 4-bit projections to compare implementations on, q, k and v of a block or its MLP; and who computes them.

One peft model holds weights and adapters of all contenders: NF4 with double quantisation, rank 16, adapters in fp32.

Legend: N rows, D hidden size, I intermediate size; K is D / 4, the columns of k and v (grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Unavailable
from benchmarks.roofline import Work
from fastdpo_kernels import nf4
from fastdpo_kernels.lora import Adapter, Projection, lora_mlp, lora_qkv

RANK = 16
PROJECTIONS = {"q/k/v": ("q", "k", "v"), "MLP": ("gate", "up", "down")}
TASKS = tuple(PROJECTIONS)


class _Layers(nn.Module):
    """A block's projections, to be called one by one."""

    def __init__(self, hidden: int, inner: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(hidden, hidden), linear(hidden, hidden // 4), linear(hidden, hidden // 4)
        self.gate, self.up, self.down = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)


@dataclass
class Block:
    layers: dict[str, Any]  # peft's, by name
    x: Tensor  # (N, D)

    def leaves(self, task: str) -> list[Tensor]:
        """x and the adapters that a task trains."""
        layers = [self.layers[name] for name in PROJECTIONS[task]]
        return [self.x, *(factor for layer in layers for factor in (_a(layer), _b(layer)))]

    def projection(self, name: str) -> Projection:
        layer = self.layers[name]
        weight = layer.base_layer.weight
        adapter = Adapter(_a(layer), _b(layer), layer.scaling["default"])
        return Projection(nf4.Packed.of(weight.data, weight.quant_state), None, adapter)

    def work(self, task: str) -> Work:
        """Products of all rows with the weights, and of the upstream gradients; adapters have their own to train by.
        Each weight is dequantised once each way.
        """
        rows, weights = self.x.shape[0], [self.projection(name).weight for name in PROJECTIONS[task]]
        ranks = sum(RANK * sum(weight.shape) for weight in weights)
        numels = sum(weight.shape[0] * weight.shape[1] for weight in weights)
        moved = 2 * numels * (0.5 + self.x.element_size())
        return Work(2.0 * rows * (2 * numels + 3 * ranks), moved)


def _a(layer: Any) -> Tensor:
    return layer.lora_A["default"].weight


def _b(layer: Any) -> Tensor:
    return layer.lora_B["default"].weight


def make_block(shape: tuple[int, int, int], dtype: str, place: str) -> Block:
    """`shape` is N, D, I."""
    try:
        import bitsandbytes
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise Unavailable(f"bitsandbytes and peft make the layers, and one is not installed ({error})") from None
    rows, hidden, inner = shape
    compute: torch.dtype = getattr(torch, dtype)
    torch.manual_seed(0)

    def linear(columns: int, out: int) -> nn.Module:
        layer: Any = bitsandbytes.nn.Linear4bit(columns, out, False, compute, quant_type="nf4")
        layer.support_avx512bf16_for_cpu = False
        return layer

    layers: Any = _Layers(hidden, inner, linear).to(place)
    names = [name for several in PROJECTIONS.values() for name in several]
    model: Any = get_peft_model(layers, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))
    found = {name: getattr(model.base_model.model, name).to(place) for name in names}
    for layer in found.values():
        nn.init.normal_(_b(layer), std=0.02)
    return Block(found, torch.randn(rows, hidden, device=place).to(compute).requires_grad_())


@dataclass(frozen=True)
class Way:
    compute: Callable[[str], Sequence[Tensor]]  # task -> outputs of block.x
    path: str
    version: str
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def fastdpo(block: Block) -> Way:
    projections = {name: block.projection(name) for name in block.layers}

    def compute(task: str) -> Sequence[Tensor]:
        first, second, third = (projections[name] for name in PROJECTIONS[task])
        if task == "q/k/v":
            return lora_qkv(block.x, first, second, third)
        return (lora_mlp(block.x, first, second, third, "silu"),)

    return Way(compute, f"weights by {nf4.method_report(block.x.device)[0][1].partition(':')[0]}", "")


def peft(block: Block, autocast: bool = False) -> Way:
    """`autocast` as trainers run it: adapters then compute in 16 bits, else in fp32."""
    from importlib.metadata import version

    if autocast and block.x.dtype == torch.float32:
        raise Unavailable("in fp32 there is nothing to cast")

    def compute(task: str) -> Sequence[Tensor]:
        first, second, third = (block.layers[name] for name in PROJECTIONS[task])
        if task == "q/k/v":
            return first(block.x), second(block.x), third(block.x)
        return (third(F.silu(first(block.x)) * second(block.x)),)

    around = partial(torch.autocast, block.x.device.type, block.x.dtype) if autocast else nullcontext
    return Way(compute, "its layers over bitsandbytes'" + (", autocast" if autocast else ""), version("peft"), around)


CONTENDERS: dict[str, Callable[[Block], Way]] = {
    "fastdpo": fastdpo,
    "peft": peft,
    "peft, autocast": partial(peft, autocast=True),
}


def timed_call(way: Way, block: Block, task: str) -> Callable[[], tuple[Tensor, ...]]:
    """-> a call that returns outputs and the gradients of x and of the adapters."""
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        with way.around():
            outputs = way.compute(task)
        if not upstream:
            upstream.extend(_upstream(outputs))
        gradients = torch.autograd.grad(list(outputs), block.leaves(task), upstream)
        return *(output.detach() for output in outputs), *gradients

    return call


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same for every contender, of any dtype."""
    made = []
    for output in outputs:
        generator = torch.Generator(output.device).manual_seed(1)
        made.append(torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype))
    return made


def errors(block: Block, task: str, results: Sequence[Tensor]) -> dict[str, float]:
    """|error| / |truth| of outputs and of gradients, each the largest of its kind, against fp64."""
    truth = _truth(block, task)
    found = [((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truth, strict=True)]
    outputs = len(results) - len(block.leaves(task))
    return {"outputs": max(found[:outputs]), "gradients": max(found[outputs:])}


def _truth(block: Block, task: str) -> Sequence[Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in block.leaves(task)]
    x, factors = leaves[0], iter(leaves[1:])
    rounded = getattr(torch, str(block.x.dtype).removeprefix("torch."))

    def linear(name: str, given: Tensor) -> Tensor:
        one, a, b = block.projection(name), next(factors), next(factors)
        assert isinstance(one.weight, nf4.Packed) and one.adapter is not None
        return given @ nf4.dequantize(one.weight, rounded).double().T + one.adapter.scaling * (given @ a.T) @ b.T

    first, second, third = PROJECTIONS[task]
    if task == "q/k/v":
        outputs = [linear(name, x) for name in (first, second, third)]
    else:
        outputs = [linear(third, F.silu(linear(first, x)) * linear(second, x))]
    upstream = [u.to(block.x.dtype).double() for u in _upstream([y.detach().float() for y in outputs])]
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)
