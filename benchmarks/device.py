"""What differs between the devices that are measured: every number, setting and sentence that a run, the gate or a
table takes from its device stands here, so that nothing else asks which one it is.

The process that starts the runs reads this file, so torch is imported inside of functions only.
`python -m benchmarks.device` prints what torch knows of its first CUDA device, as JSON; null where it can use none.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.roofline import FORWARD, FROZEN_HEAD, TRAINED_HEAD

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Tolerances:
    """How far two right trainers' curves may be apart, step by step; no number is printed for curves further apart."""

    first_loss: float  # nats from ln 2
    loss_absolute: float  # nats from fastdpo's; what either of the two allows, passes
    loss_relative: float
    grad_norm_relative: float
    least_movement: float  # nats that a loss of fastdpo must leave ln 2 by: equal curves that stood still show nothing
    why: str


@dataclass(frozen=True)
class Aim:
    """The most that a contender may take on one GPU."""

    gpu: str
    op: str
    shape: tuple[int, ...]
    wants: str
    contender: str
    what: str  # of kernel_table.QUANTITIES
    most: float
    than: str = ""  # the contender of whose quantity it is a share


@dataclass(frozen=True)
class StepAim:
    """What a ratio or share of the step benchmark is to reach."""

    quantity: str  # a ratio's name, or what it begins with: over whatever span, then
    bound: float
    larger: bool  # is better
    model: str
    profiles: tuple[str, ...]
    gpu: str | None = None  # on this one only

    def met(self, value: float) -> bool:
        return value >= self.bound if self.larger else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.larger else '<='} {self.bound}"


@dataclass(frozen=True)
class KernelBench:
    """What the kernel benchmarks run on a device."""

    heads: tuple[tuple[int, int, int], ...]  # rows N, vocabulary V, hidden size D of linear_logps
    weights: tuple[tuple[int, int], ...]  # rows O, columns I of a 4-bit weight
    token_shape: tuple[int, ...]  # of bench_blocks: N, D, heads of q, of k, their numbers E, I
    blocks: tuple[tuple[int, int, int], ...]  # rows N, hidden size D, intermediate size I of LoRA projections
    dtype: str
    # A contender further from fp64 truth computes something else and gets no time: log-probs in nats (root mean square
    # over all rows), gradients as |error| / |truth|.
    allowed_logp_error: float
    allowed_gradient_error: float
    why_allowed: str
    laps: int  # times that all contenders of a shape take their turn, one after the other
    least_rounds: int  # of one contender in one lap, and for how many seconds at least
    seconds: float
    matmul_side: int  # the square product and the copy whose rates are the ceilings
    copy_bytes: int
    expected: tuple[str, float, float] | None  # GPU, FLOP/s and bytes/s to predict from while nothing is measured
    aims: tuple[Aim, ...]
    notes: tuple[str, ...]
    unmeasured: Mapping[tuple[str, ...], str]  # ops -> what is said of them until all have numbers


@dataclass(frozen=True)
class Device:
    """One kind of machine: what runs there, how it is read, and what is said of it."""

    name: str  # of --device and of results/
    title: str
    place: str  # where torch builds the model
    model: str  # of models.MODELS, unless --model says otherwise
    dtype: str  # of the frozen weights
    settings: Mapping[str, Any]  # fields of both trainers' DPOConfig
    leanest: Mapping[str, Any]  # fields of fastdpo's, by which it takes the least memory here
    work: float  # parameters x packed tokens of an epoch, which give the rows unless --pairs does
    most_pairs: int
    warm_up: bool  # one step of the longest rows before the clock starts: what is loaded and compiled once
    counts: bool  # FLOPs in runs of their own; else by formula, which the counts hold
    contenders: tuple[str, ...]  # of step.py's, in the order of their turns
    tuned_micro_batch: int | None  # pairs of TRL tuned, of an optimizer batch of 8; None: what memory has room for
    tuned_precompute: bool
    trl_default_epochs: int | None  # after which it may stop, because later ones cost the same; None: never
    head_skips_rows: bool  # TRL's LM head leaves out the rows it need not score by itself
    later_epochs: bool  # whether they are reported apart from the first one too
    tolerances: Tolerances
    aims: tuple[StepAim, ...]
    parts_aim: float | None  # a step over the sum of its parts, at most
    time_limit: float | None  # seconds of one run, imports included
    environment: Mapping[str, str]  # of a run, where the caller's has no other value
    find: Callable[[], dict[str, Any] | None]  # the machine in words and numbers, None where it has no such device
    wait: Callable[[], None]  # for everything that was asked of the device
    restart_peak: Callable[[], None]
    peak_memory: Callable[[], int]  # bytes, the most since restart_peak
    peak_reserved: Callable[[], int]  # the same, of what torch's allocator holds
    limit: Callable[[int | None], None]  # bytes that the allocator may hold; None: all there are
    notes: tuple[str, ...]  # of its table alone
    kernels: KernelBench

    def found(self) -> dict[str, Any] | None:
        """`find`, which says so where there is no such device."""
        machine = self.find()
        if machine is None:
            print(f"skipped: no {self.name.upper()} device that torch can use")
        return machine


def _nothing() -> None:
    pass


def _no_limit(size: int | None) -> None:
    del size


def _processor() -> dict[str, Any]:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def _peak_rss() -> int:
    """The most this process has had resident so far, in bytes (ru_maxrss counts KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _graphics_processor() -> dict[str, Any] | None:
    """Asked of a process of its own, which is where torch's memory and the CUDA context go with it."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.device"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"torch could not be asked for CUDA devices: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found and {**found, "driver": _driver(), **_processor()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # a container may have the device and not the tool
        return "unknown"


def _first_cuda_device() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties: Any = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def _restart_peak_allocated() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _peak_allocated() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def _peak_reserved() -> int:
    import torch

    return torch.cuda.max_memory_reserved()


def _limit_allocator(size: int | None) -> None:
    import torch

    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if size is None else min(1.0, size / whole))


CPU = Device(
    name="cpu",
    title="the CPU",
    place="cpu",
    model="20m",
    dtype="float32",
    settings={"use_cpu": True, "bf16": False},
    leanest={"gradient_checkpointing": True},
    work=8e10,  # 16 pairs of 20M parameters as long as HH-RLHF's
    most_pairs=512,
    warm_up=False,
    counts=True,
    contenders=(
        "fastdpo",
        "TRL default",
        "TRL tuned",
        "TRL default, response rows only",
        "TRL tuned, response rows only",
    ),
    # Seconds of one epoch (16 pairs, one run each, 1 thread on a shared 2-core Xeon, 2026-11-22): 1: 30.0, 2: 30.2,
    # 4: 34.0, 8: 72.6; 2 with the reference online: 28.0. `--tune` measures them again and takes the fastest.
    tuned_micro_batch=2,
    tuned_precompute=True,
    trl_default_epochs=1,
    head_skips_rows=False,
    later_epochs=False,
    tolerances=Tolerances(
        first_loss=1e-5,
        loss_absolute=0.0,
        loss_relative=1e-3,
        grad_norm_relative=1e-3,
        least_movement=2e-3,
        why="That is fp32 rounding, grown over a few steps of AdamW.",
    ),
    aims=(
        StepAim("speed of fastdpo / TRL default", 2.5, True, "20m", ("hh-rlhf",)),
        StepAim("speed of fastdpo / TRL tuned", 1.8, True, "20m", ("hh-rlhf",)),
        StepAim("FLOPs of fastdpo / TRL default, 1 epoch", 0.32, False, "20m", ("hh-rlhf",)),
        StepAim("FLOPs of fastdpo / TRL default, 3 epochs", 0.23, False, "20m", ("hh-rlhf",)),
        StepAim("peak memory of fastdpo / TRL default", 0.6, False, "20m", ("hh-rlhf",)),
    ),
    parts_aim=None,
    time_limit=None,
    environment={},
    find=_processor,
    wait=_nothing,
    restart_peak=_nothing,
    peak_memory=_peak_rss,
    peak_reserved=_peak_rss,
    limit=_no_limit,
    notes=(
        "TRL scores every position through the LM head where it has no Triton, padding and prompt included; on a GPU "
        "it skips them. `response rows only` is TRL told to skip them here too: times and memory measured, FLOPs by "
        "formula.",
        "Memory is the most that the run's process had resident.",
    ),
    kernels=KernelBench(
        heads=((512, 16_000, 256), (256, 4096, 256)),
        weights=((1024, 2048),),
        token_shape=(1024, 1024, 8, 2, 128, 2816),
        blocks=((256, 256, 768),),
        dtype="float32",
        allowed_logp_error=1e-4,
        allowed_gradient_error=1e-4,
        why_allowed="fp32 rounding stays below 1e-5 here; TF32 would not.",
        laps=2,
        least_rounds=3,
        seconds=0.05,
        matmul_side=2048,
        copy_bytes=2**28,
        expected=None,
        aims=(),
        notes=(
            "Peak memory is the most that torch had allocated during one call beyond its inputs, by its profiler's "
            "allocation events; time is the host's clock.",
        ),
        unmeasured={
            ("linear_logps", "pair_loss"): "linear_logps and pair_loss on a CPU, plain torch and what peers have there"
        },
    ),
)

_OF_BLOCK_KERNELS = ("pair_loss", "nf4", "lora", "rms_norm", "rope", "glu")
_LLAMA_3_8B = (8192, 128_256, 4096)
H200_AIMS = (
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FORWARD, "fastdpo streamed", "ms", 1.10 * 11.4),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed", "ms", 1.10 * 22.8),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, TRAINED_HEAD, "fastdpo streamed", "ms", 1.15 * 45),
    *(
        Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed", "ms", 1 / 1.4, than)
        for than in ("TRL chunked", "Liger FLCE", "Liger FLSCE")
    ),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FORWARD, "fastdpo fused", "MB beside results", 10),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed", "MB beside results", 300),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed, 64 MiB", "MB beside results", 70),
    # 2.52 bytes for each of 58.7 million elements, at 85% of 4.3 TB/s
    Aim("NVIDIA H200", "nf4", (14_336, 4096), "nested scales", "fastdpo triton", "ms", 0.0404),
    Aim("NVIDIA H200", "pair_loss", (64,), "sigmoid, forward", "fastdpo triton", "launches", 1),
    Aim("NVIDIA H200", "pair_loss", (64,), "sigmoid, forward and backward", "fastdpo triton", "GPU µs", 15),
)

_8B, _7B_NF4 = "llama-3.1-8b", "mistral-7b-nf4"
_ADDED_LEANEST = "memory added by training, fastdpo leanest / TRL default"
_ALL_8B = ("hh-rlhf", "helpsteer", "ultrafeedback")
H200_STEP_AIMS = (
    StepAim("speed of fastdpo / TRL default, 1 epoch", 2.5, True, _8B, ("hh-rlhf", "helpsteer"), "NVIDIA H200"),
    StepAim("speed of fastdpo / TRL tuned, 1 epoch", 1.8, True, _8B, ("hh-rlhf", "helpsteer"), "NVIDIA H200"),
    StepAim("speed of fastdpo / TRL default, 1 epoch", 2.0, True, _8B, ("ultrafeedback",), "NVIDIA H200"),
    StepAim("speed of fastdpo / TRL tuned, 1 epoch", 1.4, True, _8B, ("ultrafeedback",), "NVIDIA H200"),
    StepAim("MFU of fastdpo, 1 epoch", 0.5, True, _8B, _ALL_8B, "NVIDIA H200"),
    StepAim(_ADDED_LEANEST, 0.5, False, _8B, _ALL_8B, "NVIDIA H200"),
    StepAim("speed of fastdpo leanest / TRL default, 1 epoch", 1.0, True, _8B, _ALL_8B, "NVIDIA H200"),
    StepAim("speed of fastdpo / TRL default, 1 epoch", 2.5, True, _7B_NF4, ("ultrafeedback",), "NVIDIA H200"),
    StepAim("speed of fastdpo / TRL tuned, 1 epoch", 1.7, True, _7B_NF4, ("ultrafeedback",), "NVIDIA H200"),
    StepAim("speed of fastdpo / Unsloth, 1 epoch", 1.3, True, _7B_NF4, ("ultrafeedback",), "NVIDIA H200"),
    StepAim(_ADDED_LEANEST, 0.5, False, _7B_NF4, ("ultrafeedback",), "NVIDIA H200"),
    StepAim("speed of fastdpo leanest / TRL default, 1 epoch", 1.0, True, _7B_NF4, ("ultrafeedback",), "NVIDIA H200"),
)

CUDA = Device(
    name="cuda",
    title="a GPU",
    place="cuda",
    model="llama-3.2-1b",
    dtype="bfloat16",
    settings={"bf16": True},
    leanest={"gradient_checkpointing": True, "activation_offloading": True},
    work=2.5e14,  # 128 pairs of 8B parameters as long as HH-RLHF's: 1.5 PFLOP, some seconds
    most_pairs=512,
    warm_up=True,
    counts=False,
    contenders=(
        "fastdpo",
        "TRL default",
        "TRL tuned",
        "fastdpo leanest",
        "TRL tuned, other reference",
        "TRL tuned, Liger",
        "Unsloth",
    ),
    tuned_micro_batch=None,
    tuned_precompute=False,  # hashing 16 GB of weights takes longer than a short epoch's reference
    trl_default_epochs=1,
    head_skips_rows=True,
    later_epochs=True,
    tolerances=Tolerances(
        first_loss=2e-2,
        loss_absolute=5e-2,
        loss_relative=0.0,
        grad_norm_relative=0.1,
        least_movement=0.15,
        # Both trainers in bf16 on a CPU, 2026-11-22: 16 layers 512 wide, 6 steps from lr 1e-4, losses 8e-4 apart and
        # gradient norms 0.3%; 8 layers 128 wide, 12 steps from lr 3e-4, 5e-4 and 0.2%.
        why="bf16 keeps 8 bits: a token's log-prob errs by 1e-3 to 1e-2 nats, a pair's margin by 1e-2 to 1e-1 and its "
        "loss by beta / 2 of that, so the mean of 8 by about 1e-3, as seen between the two on a CPU. Kernels that sum "
        "in another order and more steps of AdamW come on top. Curves that left ln 2 by less than three times what is "
        "forgiven do not count as equal.",
    ),
    aims=H200_STEP_AIMS,
    parts_aim=1.03,
    time_limit=180.0,
    environment={"CUDA_VISIBLE_DEVICES": "0"},  # TRL refuses a process that sees several
    find=_graphics_processor,
    wait=_synchronize,
    restart_peak=_restart_peak_allocated,
    peak_memory=_peak_allocated,
    peak_reserved=_peak_reserved,
    limit=_limit_allocator,
    notes=(
        "Before the clock starts each run takes one step of its longest rows with another model, so that kernels are "
        "loaded and compiled; the clock waits for the GPU at every reading. What precedes training (tokenization, "
        "adapters, probes; a precomputed reference, for which TRL hashes its weights on the CPU) is part of the first "
        "epoch; `later epochs` do not hold it.",
        "TRL gets the model in bf16 too; given its name it would load fp32. Its LM head skips the rows that it need "
        "not score. FLOPs are by formula, which counted runs on a CPU hold to 1%.",
        "Memory is the most that torch had allocated on the GPU, the model's weights included; added MiB is what is "
        "beyond them.",
        "fastdpo leanest: gradient checkpointing and micro-batches of 2048 tokens. Reading an 8B model's weights "
        "takes a GPU as long as computing some 200 tokens, so 2048 still run at nearly full speed; a longer pair goes "
        "alone. With weights in 4 bits block inputs go to the host besides.",
        "TRL tuned, other reference: the same with the reference precomputed where TRL tuned runs it online, or the "
        "other way around. TRL tuned, Liger: the same with Liger's layer kernels. Unsloth: as it comes, its own "
        "checkpointing on.",
    ),
    kernels=KernelBench(
        heads=(_LLAMA_3_8B, (8192, 151_936, 3584), (2048, 128_256, 4096), (4096, 32_000, 4096)),
        weights=((14_336, 4096), (4096, 4096), (28_672, 8192)),
        token_shape=(8192, 4096, 32, 8, 128, 14_336),
        blocks=((8192, 4096, 14_336), (2048, 4096, 14_336)),
        dtype="bfloat16",
        allowed_logp_error=5e-2,
        allowed_gradient_error=6e-2,
        why_allowed="bf16 logits of 20 are rounded by up to 6e-2 nats; a gradient added up in bf16 from 1000 tiles, as "
        "cut-cross-entropy does, errs by 3e-2 by count.",
        laps=2,
        least_rounds=5,
        seconds=0.1,
        matmul_side=8192,
        copy_bytes=2**32,
        expected=("NVIDIA H200", 790e12, 4.3e12),
        aims=H200_AIMS,
        notes=(
            "Peak memory is the most that torch had allocated on the GPU during one call beyond its inputs; time is "
            "the GPU's, between events, the L2 cache flushed before each call.",
        ),
        unmeasured={
            ("linear_logps",): "linear_logps at the shapes of Llama-3 and Qwen2.5 in bf16, against torch, "
            "torch.compile, Liger, cut-cross-entropy and TRL (`make gpu-kernels`)",
            _OF_BLOCK_KERNELS: "pair_loss of 64 pairs against TRL's formulas; nf4, lora, rms_norm, rope and glu "
            "against bitsandbytes, peft and transformers, on which hangs whether each stays in the block "
            "(`make gpu-block-kernels`)",
        },
    ),
)

DEVICES = {device.name: device for device in (CPU, CUDA)}


def step_aim(result: Mapping[str, Any], quantity: str) -> StepAim | None:
    """The aim of one of a result's ratios, where it has one."""
    anywhere = re.sub(r", (\d+ epochs?|later epochs)$", "", quantity)
    for aim in DEVICES[result["device"]].aims:
        here = result["model"] == aim.model and result["profile"] in aim.profiles
        here = here and aim.gpu in (None, result["machine"].get("gpu"))
        if here and aim.quantity in (quantity, anywhere):
            return aim
    return None


if __name__ == "__main__":
    print(json.dumps(_first_cuda_device()))
