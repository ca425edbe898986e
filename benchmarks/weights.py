"""4-bit weights to compare dequantisers on, and who computes them: fastdpo's methods, bitsandbytes and plain torch.

The task is one weight from NF4 with double quantisation, as QLoRA has it, to the dtype of the products. Everybody's
result must be the same in every bit.

Legend: O, I a weight's rows and columns, n = O I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Unavailable
from benchmarks.roofline import Work
from fastdpo_kernels import launch
from fastdpo_kernels.nf4 import Packed, dequantize


@dataclass
class Weight:
    data: Tensor  # as bitsandbytes packs it
    state: Any  # its QuantState
    dtype: torch.dtype

    @cached_property
    def packed(self) -> Packed:
        return Packed.of(self.data, self.state)

    @cached_property
    def out(self) -> Tensor:
        """(O, I), written again by each call, as a training step does."""
        return torch.empty(self.packed.shape, dtype=self.dtype, device=self.data.device)

    @cached_property
    def truth(self) -> Tensor:
        return plain(self.packed, self.dtype)

    @property
    def work(self) -> Work:
        """Two values a byte, a byte for each scale and four for 256 of them, and the result."""
        packed = self.packed
        scales = packed.blocks + 4 * packed.blocks / (packed.nested_blocksize or 1)
        return Work(0.0, packed.numel * (0.5 + self.dtype.itemsize) + scales)


@dataclass(frozen=True)
class Way:
    compute: Callable[[], Tensor]
    path: str
    version: str


def make_weight(shape: tuple[int, int], dtype: str, place: str, seed: int = 0) -> Weight:
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise Unavailable(f"bitsandbytes, which packs the weight, is not installed ({error})") from None
    kept: torch.dtype = getattr(torch, dtype)
    values = torch.randn(shape, generator=torch.Generator(place).manual_seed(seed), device=place) * 0.02
    functional: Any = bitsandbytes.functional
    data, state = functional.quantize_4bit(values.to(kept), compress_statistics=True, quant_type="nf4")
    return Weight(data, state, kept)


def plain(packed: Packed, dtype: torch.dtype) -> Tensor:
    """One line of torch after the other."""
    assert packed.nested_code is not None and packed.nested_absmax is not None and packed.offset is not None
    groups = packed.nested_absmax.repeat_interleave(packed.nested_blocksize or 1)[: packed.blocks]
    scales = packed.nested_code[packed.absmax.int()] * groups + packed.offset
    nibbles = torch.stack([packed.data >> 4, packed.data & 15], -1).view(-1, packed.blocksize)
    return (packed.code[nibbles.int()] * scales[:, None]).to(dtype).view(packed.shape)


def fastdpo(weight: Weight, method: str) -> Way:
    facts = launch.device_of(weight.data.device)
    if method == "triton" and not facts.compiles:
        raise Unavailable("method='triton' needs a GPU")
    path = {"triton": "one Triton kernel, into one buffer", "torch": "plain torch in pieces, into one buffer"}[method]
    return Way(lambda: dequantize(weight.packed, weight.dtype, out=weight.out, method=method), path, "")


def bitsandbytes_dequantize(weight: Weight) -> Way:
    import bitsandbytes

    functional: Any = bitsandbytes.functional
    path = "dequantize_4bit: scales to memory, then values"
    return Way(lambda: functional.dequantize_4bit(weight.data, weight.state), path, bitsandbytes.__version__)


def torch_eager(weight: Weight) -> Way:
    return Way(lambda: plain(weight.packed, weight.dtype), "eager, all at once", torch.__version__)


def torch_compile(weight: Weight) -> Way:
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    return Way(lambda: compiled(weight.packed, weight.dtype), "inductor, one full graph", torch.__version__)


CONTENDERS: dict[str, Callable[[Weight], Way]] = {
    "fastdpo triton": partial(fastdpo, method="triton"),
    "fastdpo torch": partial(fastdpo, method="torch"),
    "bitsandbytes": bitsandbytes_dequantize,
    "torch": torch_eager,
    "torch.compile": torch_compile,
}


def errors(weight: Weight, result: Tensor) -> dict[str, float]:
    """The share of elements that are not the truth's."""
    return {"elements": (result != weight.truth).double().mean().item()}
