"""What differs between the devices that are measured: every number, setting and sentence that a run, the gate or a
table takes from its device stands here, so that nothing else asks which one it is.

The process that starts the runs reads this file, so torch is imported inside of functions only.
`python -m benchmarks.device` prints what torch knows of its first CUDA device, as JSON; null where it can use none.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.roofline import FORWARD, FROZEN_HEAD, TRAINED_HEAD
from benchmarks.workload import MAX_LENGTH, VOCABULARY

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


@dataclass(frozen=True)
class KernelBench:
    """What the kernel benchmarks run on a device."""

    heads: tuple[tuple[int, int, int], ...]  # rows N, vocabulary V, hidden size D of linear_logps
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
    unmeasured: str


@dataclass(frozen=True)
class Device:
    """One kind of machine: what runs there, how it is read, and what is said of it."""

    name: str  # of --device and of results/step-NAME.json
    title: str
    place: str  # where torch builds the model
    shape: Mapping[str, int]  # of the Llama that trains, as LlamaConfig's fields
    dtype: str  # of the frozen weights
    settings: Mapping[str, Any]  # fields of both trainers' DPOConfig
    learning_rate: float
    pairs: int  # unless --pairs says otherwise
    tuned_micro_batch: int  # pairs a micro-batch of TRL tuned, of an optimizer batch of 8
    trl_default_epochs: int | None  # after which it may stop, because later ones cost the same; None: never
    head_skips_rows: bool  # TRL's LM head leaves out the rows it need not score by itself
    later_epochs: bool  # whether they are reported apart from the first one too
    tolerances: Tolerances
    aims: Mapping[str, tuple[float, bool]]  # ratio -> (aim, whether larger is better)
    time_limit: float | None  # seconds of one run, imports included
    environment: Mapping[str, str]  # of a run, where the caller's has no other value
    find: Callable[[], dict[str, Any] | None]  # the machine in words and numbers, None where it has no such device
    wait: Callable[[], None]  # for everything that was asked of the device
    restart_peak: Callable[[], None]
    peak_memory: Callable[[], int]  # bytes, the most since restart_peak
    notes: tuple[str, ...]  # of its table alone
    unmeasured: str  # what its table will hold
    kernels: KernelBench


def _nothing() -> None:
    pass


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

    torch.cuda.reset_peak_memory_stats()


def _peak_allocated() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


CPU = Device(
    name="cpu",
    title="the CPU",
    place="cpu",
    shape={  # 20M parameters with a trunk larger than the head, as real models have; grouped queries as in Llama 3
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
    },
    dtype="float32",
    settings={"use_cpu": True, "bf16": False},
    learning_rate=3e-4,  # high for a preference run, so that a few steps move the loss and equal curves mean something
    pairs=16,
    # Seconds of one epoch (16 pairs, one run each, 1 thread on a shared 2-core Xeon, 2026-11-22): 1: 30.0, 2: 30.2,
    # 4: 34.0, 8: 72.6; 2 with the reference online: 28.0. `--tune` measures them again and takes the fastest.
    tuned_micro_batch=2,
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
    aims={
        "speed of fastdpo / TRL default": (2.5, True),
        "speed of fastdpo / TRL tuned": (1.6, True),
        "FLOPs of fastdpo / TRL default, 1 epoch": (0.32, False),
        "FLOPs of fastdpo / TRL default, 3 epochs": (0.23, False),
        "peak memory of fastdpo / TRL default": (0.6, False),
    },
    time_limit=None,
    environment={},
    find=_processor,
    wait=_nothing,
    restart_peak=_nothing,
    peak_memory=_peak_rss,
    notes=(
        "TRL scores every position through the LM head where it has no Triton, padding and prompt included; on a GPU "
        "it skips them. `response rows only` is TRL told to skip them here too: times and memory measured, FLOPs by "
        "taking the head's products with the other rows off the count.",
        "Memory is the most that the run's process had resident.",
    ),
    unmeasured="a training step of a small Llama in fp32 against TRL 1.16, default and tuned",
    kernels=KernelBench(
        heads=((256, 4096, 256), (512, 16_000, 256)),
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
        unmeasured="linear_logps and pair_loss on a CPU, plain torch and what peers have there",
    ),
)

_LLAMA_3_8B = (8192, 128_256, 4096)
H200_AIMS = (
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FORWARD, "fastdpo streamed", "ms", 1.10 * 11.4),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed", "ms", 1.10 * 22.8),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, TRAINED_HEAD, "fastdpo streamed", "ms", 1.15 * 45),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed", "MB beside results", 300),
    Aim("NVIDIA H200", "linear_logps", _LLAMA_3_8B, FROZEN_HEAD, "fastdpo streamed, 64 MiB", "MB beside results", 70),
    Aim("NVIDIA H200", "pair_loss", (64,), "sigmoid, forward", "fastdpo triton", "launches", 1),
    Aim("NVIDIA H200", "pair_loss", (64,), "sigmoid, forward and backward", "fastdpo triton", "GPU µs", 15),
)

CUDA = Device(
    name="cuda",
    title="a GPU",
    place="cuda",
    shape={  # Llama-3.2-1B's, with random weights
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": MAX_LENGTH,
    },
    dtype="bfloat16",
    settings={"bf16": True},
    # 16 layers 512 wide, bf16 on a CPU, 2026-11-22: when pairs come a second time their loss is 0.62 from lr 3e-5, 0.35
    # from 1e-4, 0.13 from 3e-4. What a step does grows about as the width; a loss near 0 would compare nothing.
    learning_rate=3e-5,
    pairs=64,
    tuned_micro_batch=8,  # by count, not measured: 4 scores 12% fewer positions of sorted rows in twice as many passes
    trl_default_epochs=None,  # a first epoch of seconds holds what starting costs, so later ones are not like it
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
    aims={},
    time_limit=150.0,
    environment={"CUDA_VISIBLE_DEVICES": "0"},  # TRL refuses a process that sees several
    find=_graphics_processor,
    wait=_synchronize,
    restart_peak=_restart_peak_allocated,
    peak_memory=_peak_allocated,
    notes=(
        "The clock waits for the GPU at every reading. The first epoch holds what starting costs (kernels loaded or "
        "compiled, memory asked for) and what precedes training (TRL tuned hashes its weights on the CPU and "
        "precomputes the reference); `later epochs` hold neither.",
        "TRL's LM head skips the rows that it need not score. Its products go through cuBLAS and are counted; its "
        "Triton kernels multiply no matrices.",
        "Memory is the most that torch had allocated on the GPU, the model's weights included.",
    ),
    unmeasured=(
        "a training step of Llama-3.2-1B's shape in bf16, time and peak memory, against TRL 1.16, default and tuned "
        "(`make gpu`, or `python -m benchmarks step --device cuda`, on a machine with an NVIDIA GPU)"
    ),
    kernels=KernelBench(
        heads=(_LLAMA_3_8B, (8192, 151_936, 3584), (2048, 128_256, 4096), (4096, 32_000, 4096)),
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
        unmeasured=(
            "linear_logps at the shapes of Llama-3 and Qwen2.5 in bf16 and pair_loss of 64 pairs, against torch, "
            "torch.compile, Liger, cut-cross-entropy and TRL (`make gpu`, or `python -m benchmarks kernels --device "
            "cuda`, on a machine with an NVIDIA GPU)"
        ),
    ),
)

DEVICES = {device.name: device for device in (CPU, CUDA)}

if __name__ == "__main__":
    print(json.dumps(_first_cuda_device()))
