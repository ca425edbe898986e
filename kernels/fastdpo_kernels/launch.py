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
from dataclasses import dataclass, fields, replace
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
        """Whether Triton's tl.dot reaches matrix units: it dropped Volta's and Turing's in 3.3."""
        return self.kind == "interpreter" or (self.compiles and (isinstance(self.arch, str) or self.arch >= 80))


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
# Cards to plan for, by their makers' data sheets: capability, multiprocessors, GiB.
CARDS = EXAMPLES | {
    name: Device("cuda", arch, multiprocessors, gib * 2**30, SHARED_BYTES[arch])
    for name, arch, multiprocessors, gib in (
        ("RTX 3060", 86, 28, 12),
        ("RTX 3070", 86, 46, 8),
        ("RTX 3080", 86, 68, 10),
        ("A6000", 86, 84, 48),
        ("RTX 4060", 89, 24, 8),
        ("RTX 4070", 89, 46, 12),
        ("RTX 4080", 89, 76, 16),
        ("L4", 89, 58, 24),
        ("L40S", 89, 142, 48),
        ("H100", 90, 132, 80),
        ("RTX 5060", 120, 30, 8),
        ("RTX 5070", 120, 48, 12),
        ("RTX 5080", 120, 84, 16),
    )
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


# ---- which method the parts of a block take

BLOCK_METHODS = ("auto", "triton", "torch")
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def block_method(name: str, method: str, *tensors: torch.Tensor) -> str:
    """-> "triton" or "torch" for the function `name`; "auto" takes triton where it compiles and knows the dtypes.

    Raises ValueError for an unknown method, and where triton was asked for and cannot run.
    """
    if method not in BLOCK_METHODS:
        raise ValueError(f"method={method!r} of {name}, expected one of {BLOCK_METHODS}")
    if method == "torch":
        return method
    facts = device_of(tensors[0].device)
    wrong = [str(tensor.dtype) for tensor in tensors if tensor.dtype not in _KERNEL_DTYPES]
    if method == "auto":
        return "triton" if facts.compiles and triton_installed() and not wrong else "torch"
    if not (facts.compiles or facts.kind == "interpreter") or not triton_installed():
        raise ValueError(
            f"method='triton' of {name} needs triton and a CUDA or ROCm device, not {tensors[0].device}: use "
            "method='torch'"
        )
    if wrong:
        raise ValueError(f"method='triton' of {name} takes bf16, fp16 and fp32, not {wrong[0]}: use method='torch'")
    return method


def block_method_in_words(device: torch.device | None = None) -> str:
    """What "auto" is on a device (the GPU where there is one)."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device_of(device).compiles and triton_installed():
        return "triton: one launch each way"
    return "torch: Triton compiles for CUDA and ROCm devices only"


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
    registers: int | None = None  # a thread's at most; None leaves it to the compiler


def row_config(vocabulary: int, itemsize: int = 2, crowded: bool = False) -> RowConfig:
    """The kernel along a row of logits: 16 KB a block by 16 warps, two loads of 16 bytes a thread (unmeasured).

    To keep HBM busy an H200's multiprocessor needs about 26 KB on the way (4.3 TB/s, 0.8 us). Two rows at a time have
    32 KB, and 64 registers a thread; bf16 takes 40, or 59 with statistics. Left to itself ptxas guesses at more rows,
    and spills for some variants (8 bytes, fp32 on sm_120). Blocks of 8 KB would need nearly as many registers for half
    the bytes, of 32 KB twice as many. Fewer warps would have more rows under way for the same bytes, and then what a
    row reads again for its gradient has left the L2 cache: 132 rows of 256 KB are 34 of its 50 MB. `crowded`, a
    softcap or a bias beside statistics, does not fit 64 registers (8 bytes spilled on sm_100): a row at a time.
    """
    block = min(16384 // itemsize, max(64, 1 << (vocabulary - 1).bit_length()))
    registers = 128 if crowded else 64
    return RowConfig(block, num_warps=max(1, block * itemsize // 1024), registers=registers)


def target_block(hidden_size: int, num_warps: int = 16) -> int:
    """Of the dot h . W[y] after a row: 8 elements a thread, 16 bytes of bf16, and for 16 warps D=4096 at once. With
    more, one warp of a small vocabulary spills (unmeasured).
    """
    return min(256 * num_warps, max(64, 1 << (hidden_size - 1).bit_length()))


def pair_loss_config() -> RowConfig:
    """One program a pair, most responses in one block; one warp would leave a long response to 32 threads. It may have
    every register: left to itself ptxas makes room for more programs than come, and spills 8 bytes of some formulas for
    that on sm_90, sm_100 and sm_120 (unmeasured; Triton 3.9).
    """
    return RowConfig(block=1024, num_warps=4, registers=255)


@dataclass(frozen=True)
class TileConfig:
    """A kernel that goes through a matrix in tiles."""

    block_rows: int
    block_vocabulary: int
    num_warps: int


def column_config() -> TileConfig:
    """The sums of a bias's gradient: 1000 programs at V=128k, each with 8 KB of bf16 on the way (unmeasured)."""
    return TileConfig(block_rows=32, block_vocabulary=128, num_warps=4)


@dataclass(frozen=True)
class MatmulConfig:
    """A matrix product: its tile, and how it is launched."""

    block_m: int  # rows of the result
    block_n: int  # columns of the result
    block_k: int  # terms of its sums
    num_warps: int
    num_stages: int
    epilogue: int  # columns that are taken out of the result at a time, by what register use allows
    descriptors: bool = False  # tensor descriptors (TMA) in place of pointers
    resident: int = 1  # programs that a multiprocessor holds at a time, by their registers and shared memory

    @property
    def registers(self) -> int:
        """A thread's at most, so that `resident` programs share the 65536 of a multiprocessor. Left to itself ptxas
        makes room for a third program where two fit, and spills for it (fp32 on sm_100, Triton 3.9).
        """
        return min(255, 65536 // (32 * self.num_warps * self.resident) // 8 * 8)


# ---- the LM head, fused


@dataclass(frozen=True)
class FusedConfig:
    """Products of hidden with the LM head, then of the logits' gradient with either; `few` fill a GPU with few rows."""

    logits: MatmulConfig
    few_logits: MatmulConfig
    gradient: MatmulConfig
    few_gradients: MatmulConfig


# How the tiles were chosen, all unmeasured. 128 x 256 needs 85 FLOP of each byte from the L2 cache, which on an H200 is
# 9 TB/s at 790 TFLOP/s; 128 x 128 needs 64, and 256 accumulators a thread leave the softmax no registers. Beside the
# softmax's state of 8 rows a thread, 128 x 256 spills on sm_80 to sm_89 and sm_120, so they take 128 x 128. The rest is
# what compiles without a spill with every option, with as many stages as fit (Triton 3.6 and 3.9).
#
# Descriptors free the registers of 64-bit addresses (180 in place of 210 on sm_90 in the plain forward), and one
# instruction loads a tile, so they are taken where the hardware has them and the compiler uses them: UTMALDG feeds
# HGMMA on sm_90, UTCMMA on sm_100 and HMMA on sm_120. Below, Triton rewrites them to loads that it does not pipeline.
_ON_SM80 = FusedConfig(
    logits=MatmulConfig(128, 128, 64, num_warps=8, num_stages=4, epilogue=64),
    few_logits=MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, epilogue=64, resident=2),
    gradient=MatmulConfig(128, 128, 64, num_warps=8, num_stages=4, epilogue=64),
    few_gradients=MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, epilogue=64, resident=2),
)
_ON_SM86 = FusedConfig(
    logits=MatmulConfig(128, 128, 64, num_warps=8, num_stages=3, epilogue=64),
    few_logits=MatmulConfig(64, 128, 64, num_warps=4, num_stages=3, epilogue=64, resident=2),
    gradient=MatmulConfig(128, 128, 64, num_warps=8, num_stages=3, epilogue=64),
    few_gradients=MatmulConfig(64, 128, 64, num_warps=4, num_stages=3, epilogue=64, resident=2),
)
_ON_SM90 = FusedConfig(
    logits=MatmulConfig(128, 256, 64, num_warps=8, num_stages=4, epilogue=64, descriptors=True),
    few_logits=MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, epilogue=64, descriptors=True, resident=2),
    gradient=MatmulConfig(128, 256, 64, num_warps=8, num_stages=4, epilogue=64, descriptors=True),
    few_gradients=MatmulConfig(64, 128, 64, num_warps=4, num_stages=4, epilogue=64, descriptors=True, resident=2),
)
# 64 rows are half of what the matrix unit of sm_100 takes, and their layout spills. So does a softmax beside 128 x 256,
# or with 128 registers a thread: one program of 128 x 128 has 255.
_ON_SM100 = FusedConfig(
    logits=MatmulConfig(128, 128, 64, num_warps=8, num_stages=6, epilogue=64, descriptors=True),
    few_logits=MatmulConfig(128, 128, 64, num_warps=8, num_stages=6, epilogue=64, descriptors=True),
    gradient=MatmulConfig(128, 256, 64, num_warps=8, num_stages=4, epilogue=64, descriptors=True),
    few_gradients=MatmulConfig(128, 128, 64, num_warps=8, num_stages=3, epilogue=64, descriptors=True, resident=2),
)
# For few rows 64 x 128 spills on sm_120 with a softcap and log_sum_sq_probs; 64 x 64 leaves room for another stage.
_ON_SM120 = replace(
    FusedConfig(*(replace(getattr(_ON_SM86, product.name), descriptors=True) for product in fields(FusedConfig))),
    few_logits=MatmulConfig(64, 64, 64, num_warps=4, num_stages=4, epilogue=64, descriptors=True, resident=2),
)
_ON_GFX942 = FusedConfig(
    logits=MatmulConfig(128, 128, 64, num_warps=8, num_stages=2, epilogue=128),
    few_logits=MatmulConfig(64, 128, 64, num_warps=4, num_stages=2, epilogue=128, resident=2),
    gradient=MatmulConfig(128, 128, 64, num_warps=8, num_stages=2, epilogue=128),
    few_gradients=MatmulConfig(64, 128, 64, num_warps=4, num_stages=2, epilogue=128, resident=2),
)
# Rows that are not a multiple of 16 elements apart (no model has such a D) are read an element at a time, through
# registers.
_UNALIGNED = FusedConfig(*[MatmulConfig(64, 64, 32, num_warps=8, num_stages=2, epilogue=64, resident=2)] * 4)
# No matrix units for fp32 with all its digits on NVIDIA: 64 x 64 is 16 FLOP of each byte from the L2 cache, where 67
# TFLOP/s (H200) need 4 TB/s; 64 x 128 spills on sm_90 and sm_100, and of 64 x 64 all columns at a time on sm_80, 32 on
# sm_100. For few rows 16, as 64 would make a product bound by arithmetic, not by reading W.
_IN_FP32 = FusedConfig(
    logits=MatmulConfig(64, 64, 16, num_warps=8, num_stages=2, epilogue=16, resident=2),
    few_logits=MatmulConfig(16, 64, 32, num_warps=4, num_stages=2, epilogue=64, resident=4),
    gradient=MatmulConfig(64, 64, 16, num_warps=8, num_stages=2, epilogue=32, resident=2),
    few_gradients=MatmulConfig(16, 64, 32, num_warps=4, num_stages=2, epilogue=64, resident=4),
)
_INTERPRETED = FusedConfig(*[MatmulConfig(16, 64, 32, num_warps=1, num_stages=1, epilogue=32)] * 4)

ROW_TILES_SIDE_BY_SIDE = 8  # see fused_ranges
FUSED_JOIN_ROWS = 8  # a program: 1024 of them at N=8192, with 8 x 256 elements of hidden and W on the way (unmeasured)


def fused_config(dtype: torch.dtype, device: Device, aligned: bool) -> FusedConfig:
    """`aligned`: whether the operands' rows are a multiple of 16 elements apart. An architecture that is not listed
    takes the numbers of the one before it.
    """
    if device.kind == "interpreter":
        return _INTERPRETED
    if dtype == torch.float32:
        return _IN_FP32
    if not aligned:
        return _UNALIGNED
    if isinstance(device.arch, str):
        return _ON_GFX942
    listed = {80: _ON_SM80, 86: _ON_SM86, 90: _ON_SM90, 100: _ON_SM100, 120: _ON_SM120}
    return listed[max(arch for arch in listed if arch <= device.arch)]


def fused_logits(rows: int, dtype: torch.dtype, device: Device, aligned: bool) -> MatmulConfig:
    """hidden (N, D) x W.T (D, V). Up to few_logits.block_m rows the product is bound by reading W, on every
    architecture listed: 64 rows of bf16 are 64 FLOP a byte.
    """
    config = fused_config(dtype, device, aligned)
    return config.few_logits if rows <= config.few_logits.block_m else config.logits


def fused_gradient(rows: int, columns: int, dtype: torch.dtype, device: Device, aligned: bool) -> MatmulConfig:
    """A gradient of rows x columns: large tiles where there is one for every multiprocessor."""
    config = fused_config(dtype, device, aligned)
    tiles = math.ceil(rows / config.gradient.block_m) * math.ceil(columns / config.gradient.block_n)
    return config.gradient if tiles >= device.multiprocessors else config.few_gradients


def fused_join(hidden_size: int) -> RowConfig:
    """The target's dot, 256 terms of FUSED_JOIN_ROWS rows at a time: 8 KB of bf16 on the way a program (unmeasured).
    512 spill on sm_90, in fp32 with Triton 3.6, in bf16 with 3.9.
    """
    return RowConfig(block=min(256, max(16, 1 << (hidden_size - 1).bit_length())), num_warps=4)


@lru_cache(maxsize=4096)  # 0.1 to 0.3 ms of host time for few rows
def fused_ranges(rows: int, vocabulary: int, config: MatmulConfig, device: Device) -> int:
    """Ranges of the vocabulary, so that row tiles x ranges fill the multiprocessors a whole number of times.

    Programs go in order of groups of 8 row tiles, in a group by ranges, in a range by row tiles. With at least
    (multiprocessors / 8) ranges those that run together are of one or two groups: their hidden tiles stay in the L2
    cache (8 x 1 MB of bf16 at D=4096) while W streams by, once a group. At (8192, 128256, 4096) in bf16 on an H200
    these are 64 row tiles x 39 ranges, 17 ranges of 8 row tiles at a time, and W's 1.05 GB are read 8 times: 8.4 GB,
    2.0 ms at 4.3 TB/s beside 10.9 ms of arithmetic. The states of the ranges are 3 MB, with statistics 8 MB.

    Of up to four times as many ranges the number with the least steps on the busiest multiprocessor, a program's start
    and end counting as a quarter of a step (unmeasured).
    """
    row_tiles, tiles = math.ceil(rows / config.block_m), math.ceil(vocabulary / config.block_n)
    places = device.multiprocessors * config.resident
    fewest = max(1, places // min(row_tiles, ROW_TILES_SIDE_BY_SIDE))

    def steps(ranges: int) -> float:
        return math.ceil(row_tiles * ranges / places) * (math.ceil(tiles / ranges) + 0.25)

    return min(range(min(tiles, fewest), min(tiles, 4 * fewest) + 1), key=steps)


def fused_slab(
    rows: int,
    vocabulary: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: Device,
    workspace_bytes: int,
    whole_rows: bool,
) -> tuple[int, int]:
    """-> rows of a chunk, columns of a slab of the logits' gradient; `whole_rows`: all rows in one chunk.

    With D columns a slab adds to each element of dH D products for 8 bytes of its sum read and written: 2048 FLOP a
    byte for bf16 at D=4096, where an H200 needs 184 (unmeasured). Few rows take more columns, 4 million elements, to
    have work for every multiprocessor, but never more than a quarter of the vocabulary. Then as many rows as fit
    `workspace_bytes` with their fp32 sums, in chunks of equal size, as each chunk reads W twice.
    """
    config = fused_logits(rows, dtype, device, aligned=True)
    unit, least = config.block_n, rows if whole_rows else min(rows, config.block_m)
    sums = 0 if whole_rows or dtype == torch.float32 else 4 * hidden_size
    fitting = (workspace_bytes // least - sums) // dtype.itemsize
    columns = min(max(hidden_size, 2**22 // rows), math.ceil(vocabulary / 4), fitting // unit * unit)
    columns = max(1, math.ceil(columns / unit)) * unit
    most = rows if whole_rows else max(least, workspace_bytes // (columns * dtype.itemsize + sums))
    chunks = math.ceil(rows / most)
    chunk = math.ceil(rows / chunks / config.block_m) * config.block_m
    return min(rows, chunk if chunk <= most else max(least, chunk - config.block_m)), columns


# ---- the parts of a block between its products


def glu_config(width: int, itemsize: int, aligned: bool) -> RowConfig:
    """act(gate) * up and its gradients: two loads of 16 bytes of each tensor a thread; half as many elements where rows
    are not `aligned` to 16 elements, each of which then has an address and a load of its own (with as many, 24 to 32
    bytes spill on sm_90 and sm_100, whatever the registers).

    Bytes count, nothing else: 6 an element of bf16 forward, 10 backward (12 with h), 18 in fp32 at most. An H200 needs
    about 26 KB on the way a multiprocessor (see row_config); 128 threads have 8 KB of gate and up, so four programs do,
    and the registers leave room for eight. Half the block would be twice the programs, 115 thousand of N=8192 and
    I=14336, for the same bytes (unmeasured).
    """
    block = min(4096 // itemsize, max(128, 1 << (width - 1).bit_length()))
    return RowConfig(block, num_warps=max(1, block * itemsize // (1024 if aligned else 512)))


# Rows of a gated MLP that are computed together. At I=14336 in bf16 three temporaries of the backward are 0.7 GB for
# 8192 rows, and would be 6.9 GB for a pair of 80000 tokens, more than the rest of a block keeps. A 4-bit weight is
# dequantised anew for each part: 6 times 34 us on an H200 beside 11 ms of products, 1.9% (unmeasured).
MLP_ROWS = 8192


def nf4_config() -> RowConfig:
    """Words of eight 4-bit values: 1024 by 8 warps, one load of 16 bytes and four stores of 16 bytes of bf16 a thread.

    A program waits for its words and scales, then for the scales' code, and stores: some 2 us, in which an H200's
    multiprocessor at 85% of 4.3 TB/s moves 22 thousand bf16 elements of 2.52 bytes each. At 48 registers five programs
    fit one, 41 thousand elements. Half the words a thread take 11 instructions an element in place of 8, half of what
    can be issued at that rate; twice as many take 94 registers for 7, and hold no more (unmeasured; counted on sm_90).
    8192 elements are also whole blocks of every size that there is.
    """
    return RowConfig(block=1024, num_warps=8)


# Elements of a row. 32 a thread of 16 warps; twice as many would spill in the backward, and with weight's sums beside x
# and g already these do (72 bytes of bf16 on sm_90), so longer rows than the second give them in a launch of their own,
# which reads x and g again (unmeasured).
LONGEST_NORM = 16384
LONGEST_NORM_WITH_WEIGHT = 8192


@dataclass(frozen=True)
class NormConfig:
    """A kernel that holds whole rows in registers."""

    rows: int
    block: int  # columns
    num_warps: int


def norm_config(width: int, with_weight: bool = False) -> NormConfig:
    """Whole rows, 16 elements a thread: two loads of 16 bytes of each tensor in bf16, before anything is summed.

    Bytes count: 4 an element of bf16 forward, 6 backward. A row of 4096 has 8 warps, so the forward has 8 KB of x on
    the way and the backward 16 KB of x and g, and three programs a multiprocessor do for the 26 KB that an H200 needs
    (see row_config). Short rows (q_norm's 128) go 16 to a program, where a program each would be 16 times as many
    for 256 bytes; 8 of them with weight's sums, for 64 registers a thread and not 96. 16384 take 16 warps and 32
    elements a thread: 32 warps would have 64 registers (unmeasured).
    """
    block = max(16, 1 << (width - 1).bit_length())
    rows = max(1, (1024 if with_weight else 2048) // block)
    return NormConfig(rows, block, num_warps=min(16, max(4, rows * block // 512)))


def norm_programs(rows: int, width: int, device: Device) -> int:
    """Programs of the backward with weight's gradient, each with D sums: as many as hold 8192 elements of x and of g a
    multiprocessor, 32 KB of bf16 on the way. On an H200 at D=4096 these are 264 programs with 4.3 MB of sums, which its
    L2 cache holds, where x, g and dx of N=8192 are 201 MB (unmeasured).
    """
    config = norm_config(width, with_weight=True)
    resident = max(1, 8192 // (config.rows * config.block))
    return min(math.ceil(rows / config.rows), device.multiprocessors * resident)


def every_register(num_warps: int, device: Device) -> dict[str, int]:
    """The launch option that gives a program all registers that it may have. Left to itself ptxas makes room for more
    programs than come, and spills for that: 16 bytes of interleaved pairs on sm_100 (at 56 registers), 8 of rows of
    16384 fp32 elements there, 16 of unaligned fp32 rows under gelu on sm_90 and sm_100 (unmeasured; Triton 3.6, 3.9).
    """
    return {"maxnreg": min(255, 65536 // (32 * num_warps) // 8 * 8)} if device.kind == "cuda" else {}  # not AMD's


def rope_config(pairs: int, heads: int) -> NormConfig:
    """All heads of a token in one program, 16 numbers a thread at a time: one load of 16 bytes of bf16 for the first
    of each pair, one for the second.

    Bytes count: 4 an element of bf16, 20 KB a token of 32 + 8 heads of 128, beside 512 bytes of cos and sin. 128
    threads have 16 such heads, 4 KB, on the way; 50 to 93 registers leave room for five to ten programs, 20 to 40 KB,
    where an H200 needs 26 (see row_config). Several programs a token would each read its cos and sin (unmeasured).
    """
    block = max(1, 1 << (pairs - 1).bit_length())
    rows = min(1 << (heads - 1).bit_length(), max(1, 1024 // block))
    return NormConfig(rows, block, num_warps=max(1, min(4, rows * block // 256)))
