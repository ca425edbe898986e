"""Compiles every kernel for every architecture without a GPU, and says what the compiler made of it.

    python -m fastdpo_kernels.compile_report [--cover pairwise|full] [--arch H200 ...] [--op NAME ...] [--verbose]

The launchers themselves run, on meta tensors, under a driver that stands in for the GPU's: each launch is compiled with
the arguments that it would have had, and nothing is executed. So what is compiled is what would be launched, for each
device of `launch.EXAMPLES` and each combination of what a caller can ask for. A faulty kernel shows here as a sentence:
more shared memory than the architecture has, registers spilled to memory, a 16-bit product without matrix instructions.

`--cover pairwise` (the tests') takes few combinations that hold every pair of two factors' values, `--cover full` all.
Combinations are compiled in parallel, in processes of their own, as a fault can take the compiler down with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdpo_kernels import launch
from fastdpo_kernels.compile_cases import OPS, Case, Values, cases

# What Triton calls them in a kernel's arguments.
ELEMENT_TYPES = {"bf16": "bf16", "f16": "fp16", "f32": "fp32", "f64": "fp64"}


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one launch; or why it made nothing."""

    name: str
    device: str  # of launch.EXAMPLES
    options: str  # the combination that launched it first
    hash: str = ""  # of source, arguments and target: two launches of one hash are one kernel
    element_types: tuple[str, ...] = ()  # of the tensors that it is given
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0  # a thread
    shared_bytes: int = 0
    tensor_memory: int = 0  # columns (sm_100)
    spill_bytes: int = 0  # a thread
    is_matmul: bool = False
    rounds_to_tf32: bool = False  # a product of fp32 that keeps 10 bits of each factor
    matrix_instruction: str = ""
    wide_loads: bool = False  # some load takes 16 bytes a thread, or a whole tile
    error: str = ""

    @property
    def has_16_bits(self) -> bool:
        return not {"bf16", "fp16"}.isdisjoint(self.element_types)


# Compiling without a GPU


class StandInDriver:
    """What Triton's launcher asks a GPU's driver before it compiles."""

    def __init__(self, device: launch.Device) -> None:
        self.place = list(launch.EXAMPLES.values()).index(device)
        nvidia = device.kind == "cuda"
        self.target = GPUTarget("cuda" if nvidia else "hip", device.arch, 32 if nvidia else 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.place  # Triton remembers kernels by this number, so each device has its own

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling_for(name: str) -> Iterator[list[tuple[str, Any]]]:
    """Makes every launch a compilation for that device of launch.EXAMPLES; -> (name, compiled or exception) pairs."""
    compiled: list[tuple[str, Any]] = []
    failed: set[str] = set()
    before, real_run = driver._active, JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if self.__name__ in failed:
            return  # a chunk after the other would fail alike
        try:
            compiled.append((self.__name__, real_run(self, *arguments, grid=grid, warmup=True, **options)))
        except Exception as error:  # reported as this kernel's, while the launcher goes on to its other kernels
            compiled.append((self.__name__, error))
            failed.add(self.__name__)

    driver.set_active(StandInDriver(launch.EXAMPLES[name]))  # type: ignore[arg-type]
    JITFunction.run = run
    try:
        with launch.pretend(launch.EXAMPLES[name]):
            yield compiled
    finally:
        JITFunction.run = real_run
        driver.set_active(before)  # type: ignore[arg-type]


def compile_case(case: Case) -> list[Kernel]:
    """Every kernel that a case launches."""
    return compile_launches(case.launches(), dict(case.values), case.device, str(case))


def compile_launches(launches: Callable[[Values], object], values: Values, device: str, options: str) -> list[Kernel]:
    with compiling_for(device) as compiled:
        try:
            launches(values)
        except Exception as error:  # of the launcher; what it had launched until then stays in the report
            compiled.append((launches.__name__, error))
    once = {getattr(result, "hash", (name, str(result))): (name, result) for name, result in compiled}
    return [examined(name, result, device, options) for name, result in once.values()]


# Reading what was compiled

_examined: dict[str, Kernel] = {}  # by hash: in one process, most combinations launch kernels that others had


def examined(name: str, result: Any, device: str, options: str) -> Kernel:
    if isinstance(result, Exception):
        return Kernel(name, device, options, error=_reason(result))
    if result.hash not in _examined:
        _examined[result.hash] = _examine(name, result, device, options)
    return _examined[result.hash]


def _reason(error: BaseException) -> str:
    """What was wrong at the bottom: a fault in a device function reaches us through each of its callers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[-600:]


def _examine(name: str, result: Any, device: str, options: str) -> Kernel:
    """`result` is a triton CompiledKernel: its metadata, its intermediate text and its binary."""
    metadata, text = result.metadata, result.asm["ttir"]
    arguments = next(line for line in text.splitlines() if "tt.func public" in line)
    products = [line for line in text.splitlines() if re.search(r"= tt\.dot(_scaled)? ", line)]
    if "cubin" in result.asm:
        machine = _nvidia_facts(result.asm["cubin"], result.asm["ptx"], bool(products))
    else:
        machine = _amd_facts(result.asm["amdgcn"])
    return Kernel(
        name=name,
        device=device,
        options=options,
        hash=result.hash,
        element_types=tuple(ours for theirs, ours in ELEMENT_TYPES.items() if re.search(rf"[<x]{theirs}\b", arguments)),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        is_matmul=bool(products),
        rounds_to_tf32=any("inputPrecision = tf32 " in line and "xf32> *" in line for line in products),
        **machine,
    )


def _nvidia_facts(binary: bytes, ptx: str, is_matmul: bool) -> dict[str, Any]:
    """From NVIDIA's disassembler, which Triton brings along; it takes its time, so it sees what needs it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
        code = _cuobjdump("--dump-sass", file.name) if is_matmul or stack else ""
    # ptxas 12.8 gives some sm_120 kernels with tensor descriptors a stack of 8 bytes that nothing reads back: no spill
    reloads = re.search(r"\bLDL\b", code) is not None
    matrix = re.search(r"\b(HMMA|HGMMA|DMMA|UTC\w*MMA)\b", code)
    wide = r"ld\.global\S*\.(v4\.\w32|v2\.\w64|v8\.\w32|v4\.\w64)|cp\.async\.\S+ .*, 0x10,|cp\.async\.bulk\.tensor"
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spill_bytes": stack if reloads else 0,
        "matrix_instruction": matrix[1] if matrix else "",
        "wide_loads": re.search(wide, ptx) is not None,
    }


def _cuobjdump(what: str, path: str) -> str:
    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


def _amd_facts(code: str) -> dict[str, Any]:
    """From the assembly's metadata. Scalar registers that do not fit go to lanes of vector registers, not to memory."""

    def count(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", code)[-1])

    return {
        "registers": count("vgpr_count"),
        "spill_bytes": max(count("private_segment_fixed_size"), 4 * count("vgpr_spill_count")),
        "matrix_instruction": "MFMA" if "v_mfma_" in code else "",
        "wide_loads": "load_dwordx4" in code,
    }


TENSOR_MEMORY_COLUMNS = 512  # of one multiprocessor (sm_100)


def problems(kernels: Iterable[Kernel]) -> list[str]:
    """A sentence for each fault of each kernel."""
    return [
        f"{kernel.name} on {kernel.device} ({kernel.options}) {fault}"
        for kernel in kernels
        for fault in _faults(kernel)
    ]


def _faults(kernel: Kernel) -> Iterator[str]:
    if kernel.error:
        yield f"does not compile: {kernel.error}"
        return
    device = launch.EXAMPLES[kernel.device]
    if kernel.shared_bytes > device.shared_bytes:
        yield f"takes {kernel.shared_bytes} bytes of shared memory, and there are {device.shared_bytes}"
    if kernel.tensor_memory > TENSOR_MEMORY_COLUMNS:
        yield f"takes {kernel.tensor_memory} columns of tensor memory, and there are {TENSOR_MEMORY_COLUMNS}"
    if kernel.spill_bytes:
        yield f"spills {kernel.spill_bytes} bytes a thread"
    if kernel.is_matmul and not device.has_matrix_products:
        yield "has a tl.dot, and Triton reaches no matrix units there"
    elif kernel.is_matmul and kernel.has_16_bits and not kernel.matrix_instruction:
        yield "is a product of 16-bit tensors without matrix instructions"
    if kernel.rounds_to_tf32:
        yield "rounds fp32 factors to TF32: give tl.dot input_precision='ieee'"


# Many at once


def compile_all(wanted: Sequence[Case], jobs: int) -> list[Kernel]:
    """Every case's kernels, each compiled kernel once, in the order of the cases."""
    once: dict[tuple[str, ...], Kernel] = {}
    for kernel in itertools.chain(*compile_each(wanted, jobs).values()):
        once.setdefault((kernel.device, kernel.hash) if kernel.hash else (kernel.name, kernel.options), kernel)
    return list(once.values())


def compile_each(wanted: Sequence[Case], jobs: int) -> dict[Case, list[Kernel]]:
    """The kernels that each case launches."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in wanted:  # kernels of one dtype and method have much in common, and a process keeps what it compiled
        values = dict(case.values)
        groups.setdefault((case.op, case.device, values.get("path", ""), values.get("dtype", "")), []).append(case)
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for _ in range(jobs):
        idle.put(Worker())

    def compiled(group: list[Case]) -> list[tuple[Case, list[Kernel]]]:
        worker = idle.get()
        try:
            return [(case, worker.compile(case)) for case in group]
        finally:
            idle.put(worker)
            print(f"{group[0].op} on {group[0].device}: {len(group)} combinations done", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as threads:
        found = dict(itertools.chain(*threads.map(compiled, groups.values())))
    for _ in range(jobs):
        idle.get().stop()
    return found


class Worker:
    """A process that compiles one case after another. A case that kills it is at fault, and the next gets a new one."""

    process: Any = None
    pipe: Connection

    def compile(self, case: Case) -> list[Kernel]:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(case)
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"the compiler died with exit code {self.process.exitcode}"
            self.process = None
            return [Kernel(case.op, case.device, str(case), error=reason)]

    def stop(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(compile_case(case))


# The report


def table(kernels: Iterable[Kernel]) -> str:
    """Markdown, a row for each kernel and architecture: the most that any of its compiled variants takes."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name, kernel.device), []).append(kernel)
    rows = [["kernel", "device", "variants", "warps", "registers", "shared KiB", "spill bytes", "16-bit products by"]]
    rows[0].append("16-byte loads")
    order = list(launch.EXAMPLES)
    for name, device in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
        rows.append([name.strip("_"), f"{device} ({architecture(device)})", *_summary(groups[name, device])])
    return as_markdown(rows)


def _summary(group: list[Kernel]) -> list[str]:
    compiled = [kernel for kernel in group if not kernel.error]
    if not compiled:
        return ["0", *["-"] * 6]
    warps = sorted({kernel.num_warps for kernel in compiled})
    products = [kernel for kernel in compiled if kernel.is_matmul and kernel.has_16_bits]
    return [
        str(len(compiled)),
        ", ".join(map(str, warps)),
        str(max(kernel.registers for kernel in compiled)),
        f"{max(kernel.shared_bytes for kernel in compiled) / 1024:.1f}",
        str(max(kernel.spill_bytes for kernel in compiled)),
        ", ".join(sorted({kernel.matrix_instruction or "none" for kernel in products})),
        f"{sum(kernel.wide_loads for kernel in compiled)} of {len(compiled)}",
    ]


def architecture(device: str) -> str:
    arch = launch.EXAMPLES[device].arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


def every_row(kernels: Iterable[Kernel]) -> str:
    columns = ["name", "device", "element_types", "num_warps", "num_stages", "registers", "shared_bytes", "spill_bytes"]
    columns += ["matrix_instruction", "wide_loads", "options", "error"]
    rows = [columns]
    for kernel in kernels:
        facts = {**asdict(kernel), "element_types": " ".join(kernel.element_types)}
        rows.append([str(facts[column]) for column in columns])
    return as_markdown(rows)


def as_markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def document(kernels: Sequence[Kernel], cover: str, faults: Sequence[str]) -> str:
    """What is committed as docs/compile-report.md."""
    said = "\n".join(["Problems:", "", *(f"- {fault}" for fault in faults)]) if faults else "No problems."
    return f"""# What the compiler makes of the kernels

Written with Triton {triton.__version__} by `python -m fastdpo_kernels.compile_report --cover {cover} --markdown
docs/compile-report.md`; no GPU takes part (`make compile-report` does it with the full cover). A row is the most that
any compiled variant of a kernel takes: registers and spilled bytes of a thread, shared memory of a program. The last
column counts the variants that load 16 bytes a thread.

{table(kernels)}

{said}
"""


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastdpo_kernels.compile_report",
        description="Compile every kernel for every architecture without a GPU, and print what came of it.",
    )
    parser.add_argument("--cover", choices=("pairwise", "full"), default="pairwise", help="of the combinations")
    parser.add_argument(
        "--arch",
        nargs="+",
        choices=launch.EXAMPLES,
        default=list(launch.EXAMPLES),
        metavar="DEVICE",
        help=f"any of {', '.join(launch.EXAMPLES)}",
    )
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="which functions' kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--verbose", action="store_true", help="a row for every compiled kernel as well")
    parser.add_argument("--markdown", metavar="FILE", help="write the table to this file")
    parser.add_argument("--json", metavar="FILE", help="write every compiled kernel and every problem to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    if launch.interpreting():
        print(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it and run again",
            file=sys.stderr,
        )
        return 2
    wanted = cases(options.cover, options.arch, options.op)
    kernels = compile_all(wanted, options.jobs)
    faults = problems(kernels)
    if options.verbose:
        print(every_row(kernels), end="\n\n")
    print(table(kernels))
    print(f"\n{len(kernels)} kernels of {len(wanted)} combinations with Triton {triton.__version__}")
    print("\n".join([f"{len(faults)} problems:", *faults]) if faults else "no problems")
    if options.markdown:
        Path(options.markdown).write_text(document(kernels, options.cover, faults))
    if options.json:
        report = {"triton": triton.__version__, "cases": [asdict(case) for case in wanted], "problems": faults}
        Path(options.json).write_text(
            json.dumps({**report, "kernels": [asdict(kernel) for kernel in kernels]}, indent=1)
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
