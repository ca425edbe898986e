"""Launch numbers: pure functions of shape, dtype and device, and which method a head takes.

Every number says what chose it: a measurement with its GPU and date, or the word "unmeasured" and the reasoning. There
is no autotuning in a training run, so one shape always launches one way, and results repeat.

Legend: N rows, V vocabulary, D hidden size, C rows of a chunk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec

import torch

MiB = 2**20


@dataclass(frozen=True)
class Device:
    """What launch numbers depend on."""

    kind: str  # "cuda", "hip", "interpreter" (Triton on CPU tensors) or "other"
    arch: int | str = 0  # 10 * compute capability (90 is sm_90), or AMD's "gfx942"
    multiprocessors: int = 1
    memory_bytes: int = 0
    shared_bytes: int = 0  # shared memory that one block may ask for

    @property
    def compiles(self) -> bool:
        return self.kind in ("cuda", "hip")

    @property
    def has_matrix_products(self) -> bool:
        """Whether Triton's tl.dot reaches matrix units: it dropped Turing's (sm_75) in 3.3."""
        return self.kind == "interpreter" or (self.compiles and self.arch != 75)


# By architecture, from NVIDIA's and AMD's programming guides.
_SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
SHARED_BYTES = {arch: kib * 1024 for arch, kib in _SHARED_KIB.items()}

# One device of each architecture that kernels are compiled for: the compile report and its tests go through these.
EXAMPLES = {
    "T4": Device("cuda", 75, 40, 16 * 2**30, SHARED_BYTES[75]),
    "A100": Device("cuda", 80, 108, 80 * 2**30, SHARED_BYTES[80]),
    "RTX 3090": Device("cuda", 86, 82, 24 * 2**30, SHARED_BYTES[86]),
    "RTX 4090": Device("cuda", 89, 128, 24 * 2**30, SHARED_BYTES[89]),
    "H200": Device("cuda", 90, 132, 141 * 2**30, SHARED_BYTES[90]),
    "B200": Device("cuda", 100, 148, 180 * 2**30, SHARED_BYTES[100]),
    "RTX 5090": Device("cuda", 120, 170, 32 * 2**30, SHARED_BYTES[120]),
    "MI300X": Device("hip", "gfx942", 304, 192 * 2**30, SHARED_BYTES["gfx942"]),
}
INTERPRETER = Device("interpreter", memory_bytes=8 * 2**30)

_pretended: Device | None = None


def device_of(device: torch.device) -> Device:
    """The device's facts; those of the pretended one while `pretend` is on."""
    if _pretended is not None:
        return _pretended
    if device.type == "cuda":
        return _cuda_device(device.index if device.index is not None else torch.cuda.current_device())
    return INTERPRETER if interpreting() and device.type == "cpu" else Device("other")


@lru_cache
def _cuda_device(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = facts.gcnArchName.split(":")[0]
        shared = SHARED_BYTES.get(arch, SHARED_BYTES["gfx942"])
        return Device("hip", arch, facts.multi_processor_count, facts.total_memory, shared)
    arch = 10 * facts.major + facts.minor
    shared = facts.shared_memory_per_block_optin
    return Device("cuda", arch, facts.multi_processor_count, facts.total_memory, shared)


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Launch numbers as on `device`: what compiling without a GPU, on meta tensors, goes by."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before


@lru_cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes") and triton_installed()


# ---- the LM head


def head_method(
    vocabulary: int, dtype: torch.dtype, device: Device, workspace_bytes: int, rows: int
) -> tuple[str, str]:
    """-> (method, why): "streamed" where Triton compiles, "fused" where its workspace would be too small."""
    if not device.compiles:
        return "torch", "Triton compiles for CUDA and ROCm devices only"
    if not triton_installed():
        return "torch", "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "torch", f"the kernels take bf16, fp16 and fp32, not {dtype}"
    fitting = workspace_bytes // (row_stride(vocabulary) * dtype.itemsize)
    if fitting < min(rows, MIN_STREAMED_ROWS) and device.has_matrix_products:
        return "fused", f"only {fitting} rows of {vocabulary} logits fit the workspace of {workspace_bytes} bytes"
    return "streamed", "cuBLAS products and one row kernel, the gradient in the forward"


# Below this a chunk's products read the LM head once for so few rows that they are bound by memory: 64 rows of bf16 are
# 64 FLOP a byte, a third of what an H200 needs (unmeasured; A100 156, RTX 4090 165 FLOP a byte).
MIN_STREAMED_ROWS = 64


def default_workspace_bytes(device: Device) -> int:
    """384 MiB hold the 1152 rows that fill an H200 at V=152k, D=3584 (see `streamed_rows`); a small card gives 1/128
    of its memory, 64 MiB of 8 GiB (unmeasured). On a CPU 64 MiB are 256 rows at V=32k in fp32, enough for both
    products of a chunk to be compute-bound.
    """
    return min(384 * MiB, device.memory_bytes // 128) if device.compiles else 64 * MiB


def row_stride(vocabulary: int) -> int:
    """Elements from one row of a logits workspace to the next: every row starts aligned for 16-byte loads."""
    return -(-vocabulary // 64) * 64


def streamed_rows(
    rows: int, vocabulary: int, hidden_size: int, itemsize: int, device: Device, workspace_bytes: int
) -> int:
    """Rows of a chunk: as many as fit, in whole waves of the device's multiprocessors.

    The second product of a chunk, (C, V) x (V, D), has C/128 * D/256 output tiles: 128 for C=1024 at D=4096, one wave
    of an H200's 132 multiprocessors. Of the multiples of 128 that fit, the one that wastes least; the smaller of equals
    (unmeasured: counts tiles, and cuBLAS may pick others or split K).
    """
    fitting = max(1, workspace_bytes // (row_stride(vocabulary) * itemsize))
    if rows <= fitting:
        return max(1, rows)
    if fitting < 128:
        return fitting
    across = math.ceil(hidden_size / 256)

    def waves_a_row(chunk: int) -> float:
        return math.ceil(chunk // 128 * across / device.multiprocessors) / chunk

    return min(range(128, fitting + 1, 128), key=lambda chunk: (round(waves_a_row(chunk), 9), chunk))


@dataclass(frozen=True)
class RowConfig:
    """A kernel that goes along rows in blocks."""

    block: int
    num_warps: int
    num_stages: int = 1


def row_config(vocabulary: int) -> RowConfig:
    """The kernel along a row of logits. 16 elements a thread keep enough loads in flight, and the statistics in
    registers (unmeasured).
    """
    block = min(8192, max(64, 1 << (vocabulary - 1).bit_length()))
    return RowConfig(block, num_warps=max(1, min(16, block // 512)))


def pair_loss_config() -> RowConfig:
    """One program a pair, most responses in one block; one warp would leave a long response to 32 threads
    (unmeasured).
    """
    return RowConfig(block=1024, num_warps=4)


@dataclass(frozen=True)
class MatmulConfig:
    """A matrix product: tile sizes and how it is launched."""

    block_rows: int
    block_vocabulary: int
    block_hidden: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # tensor descriptors (TMA) in place of pointers


def with_descriptors(config: MatmulConfig) -> MatmulConfig:
    return replace(config, descriptors=True)
