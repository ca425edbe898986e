"""Every kernel compiles for every architecture, as it would be launched there; no GPU takes part.

Compilation happens in processes of its own: this one may run kernels in Triton's interpreter, and the two exclude each
other. The kernels with faults, at the end, are what the report is tried on.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is made for Linux only")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from fastdpo_kernels import compile_cases, launch  # noqa: E402
from fastdpo_kernels import compile_report as report  # noqa: E402

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels/fastdpo_kernels").glob("*.py"))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that compiles."""
    path = f"{ROOT / 'kernels'}:{ROOT / 'tests'}"
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=settings, capture_output=True, text=True)


# The package's kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on a pairwise cover."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    done = run("-m", "fastdpo_kernels.compile_report", "--cover", "pairwise", "--json", str(path))
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


def test_no_kernel_spills_or_takes_more_than_its_architecture_has(compiled: dict[str, Any]) -> None:
    assert compiled["problems"] == []


def test_every_kernel_that_is_launched_is_compiled_for_every_device(compiled: dict[str, Any]) -> None:
    """The fused head's are products, and sm_75 has no matrix units that Triton reaches."""
    for device in launch.EXAMPLES:
        expected = {name for name, module in launched().items() if device != "T4" or module != "head_fused"}
        assert {kernel["name"] for kernel in compiled["kernels"] if kernel["device"] == device} == expected, device


def test_the_scan_finds_kernels_of_each_module() -> None:
    of_block = {"glu_triton", "nf4_triton", "rms_norm_triton", "rope_triton"}
    assert set(launched().values()) == {"head_streamed", "head_fused", "pair_loss_triton", *of_block}
    assert {"_softmax_rows_kernel", "_pair_loss_kernel", "_sequence_sums_kernel"} <= set(launched())


def test_products_are_compiled_in_every_dtype_and_use_matrix_units(compiled: dict[str, Any]) -> None:
    units = {"A100": "HMMA", "RTX 3090": "HMMA", "RTX 4090": "HMMA", "RTX 5090": "HMMA", "MI300X": "MFMA"}
    for device, dtype in itertools.product({*launch.EXAMPLES} - {"T4"}, ("bf16", "fp16", "fp32")):
        products = [k for k in compiled["kernels"] if k["device"] == device and k["is_matmul"]]
        of_dtype = [k for k in products if f"path=fused {dtype} " in k["options"]]
        assert of_dtype, (device, dtype)
        if dtype != "fp32" and device in units:
            assert {kernel["matrix_instruction"] for kernel in of_dtype} == {units[device]}, (device, dtype)


def test_the_row_kernels_load_sixteen_bytes_a_thread(compiled: dict[str, Any]) -> None:
    """The workspace's rows start aligned whatever V is, so this holds for odd vocabularies too."""
    for kernel in compiled["kernels"]:
        if kernel["name"] in ("_softmax_rows_kernel", "_gradient_rows_kernel"):
            assert kernel["wide_loads"], (kernel["device"], kernel["options"])


def test_what_moves_bytes_loads_sixteen_a_thread(compiled: dict[str, Any]) -> None:
    """But for rows that start anywhere."""
    found = [k for k in compiled["kernels"] if k["name"].startswith(("_glu", "_rms_norm", "_rope"))]
    assert len(found) > 100
    for kernel in found:
        assert kernel["wide_loads"] or "shape=odd" in kernel["options"], (kernel["device"], kernel["options"])


def test_dequantised_weights_are_loaded_by_sixteen_bytes_a_thread(compiled: dict[str, Any]) -> None:
    """But for those that end amid a word, which come byte by byte."""
    for kernel in compiled["kernels"]:
        if kernel["name"] == "_dequantize_kernel" and "shape=odd" not in kernel["options"]:
            assert kernel["wide_loads"], (kernel["device"], kernel["options"])


def launched() -> dict[str, str]:
    """{kernel: its module}, of the package's `@triton.jit` functions whose name ends in _kernel.

    What is launched under another name would be a kernel in the report that is none here.
    """
    kernels = {}
    for path in KERNELS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                kernels[node.name] = path.stem
    return {name: module for name, module in kernels.items() if name.endswith("_kernel")}


# The combinations


def test_the_cover_trains_a_head_with_a_bias_on_every_device() -> None:
    """Which launches every kernel of a method, and takes three values together."""
    trained = [
        case
        for case in compile_cases.cases("pairwise", list(launch.EXAMPLES), ["linear_logps"])
        if {("wants", "ALL_GRADIENTS"), ("bias", "yes")} <= set(case.values)
    ]
    methods = {(case.device, dict(case.values)["path"].split()[0]) for case in trained}
    assert methods == {*itertools.product(launch.EXAMPLES, ("streamed", "fused"))} - {("T4", "fused")}


@pytest.mark.parametrize("name", compile_cases.OPS)
def test_the_pairwise_cover_holds_every_pair_that_any_combination_holds(name: str) -> None:
    op = compile_cases.OPS[name]
    every = compile_cases.combinations(op, list(launch.EXAMPLES))
    cover = compile_cases.pairwise(every, op.beyond_pairs)
    wanted = set().union(*map(compile_cases.pairs_of, every))
    assert set().union(*map(compile_cases.pairs_of, cover)) == wanted
    assert all(values in every for values in cover)
    sizes = sorted(map(len, [launch.EXAMPLES, *op.factors.values()]))
    assert sizes[-1] * sizes[-2] <= len(cover) + 8 and len(cover) <= 2 * sizes[-1] * sizes[-2]


def test_a_pairwise_cover_of_two_factors_is_every_combination() -> None:
    every = [{"a": a, "b": b} for a in "123" for b in "xy"]
    assert sorted(compile_cases.pairwise(every), key=str) == sorted(every, key=str)


def test_a_pairwise_cover_of_ten_switches_is_small_and_repeats() -> None:
    every = [dict(zip("abcdefghij", values, strict=True)) for values in itertools.product("01", repeat=10)]
    cover = compile_cases.pairwise(every)
    assert len(cover) <= 12
    assert cover == compile_cases.pairwise(every)


def test_what_no_device_can_run_is_in_no_combination() -> None:
    every = compile_cases.combinations(compile_cases.OPS["linear_logps"], ["T4", "A100"])
    on_turing = [values for values in every if values["device"] == "T4"]
    assert {values["path"] for values in on_turing} == {f"streamed {dtype}" for dtype in ("bf16", "fp16", "fp32")}
    assert len({values["path"] for values in every}) == 6


# The report itself


def test_the_report_refuses_to_compile_interpreted_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tried() -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """What print_death and print_faults print, from one process."""
    done = run("-c", "import test_compile as test; test.print_death(); test.print_faults()")
    assert done.returncode == 0, done.stderr
    death, faults = map(json.loads, done.stdout.splitlines())
    return death, faults


def test_a_case_that_kills_the_compiler_is_named_and_the_next_is_compiled(tried: tuple) -> None:
    died, survived = tried[0]
    assert died["error"] == "the compiler died with exit code 1"
    assert (survived["name"], survived["error"]) == ("_sequence_sums_kernel", "")


def print_death() -> None:
    fine = compile_cases.Case("sequence_sums", "T4", (("dtype", "fp32"), ("ld_alpha", "no")))
    kernels = report.compile_all([compile_cases.Case("no such function", "T4", ()), fine], jobs=1)
    print(json.dumps([vars(kernel) for kernel in kernels]))


def test_each_planted_fault_is_found_and_a_sound_kernel_has_none(tried: tuple) -> None:
    faults = dict(tried[1])
    assert faults.pop("sound") == []
    for name, (device, said) in EXPECTED.items():
        (fault,) = faults.pop(name)
        assert f"on {device} " in fault and said in fault, (name, fault)
    assert not faults


def test_a_table_row_holds_the_most_of_each_number() -> None:
    kernels = [
        report.Kernel("_k", "A100", "", "1", ("bf16",), 4, 2, 100, 2048, is_matmul=True, matrix_instruction="HMMA"),
        report.Kernel("_k", "A100", "", "2", ("fp32",), 8, 3, 90, 4096, spill_bytes=8, is_matmul=True, wide_loads=True),
    ]
    (row,) = report.table(kernels).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["k", "A100 (sm_80)", "2", "4, 8", "100", "4.0", "8", "HMMA", "1 of 2"]


def test_the_committed_report_has_a_row_for_every_kernel_and_device() -> None:
    """And no problems. Its numbers are those of the day it was made: `make compile-report` writes it anew."""
    text = (ROOT / "docs/compile-report.md").read_text()
    assert "No problems." in text
    for (name, module), device in itertools.product(launched().items(), launch.EXAMPLES):
        if device != "T4" or module != "head_fused":
            row = rf"| {name.strip('_')} "
            assert any(line.startswith(row) and f"| {device} (" in line for line in text.splitlines()), (name, device)


# Kernels with faults


@triton.jit
def sound(x, out, B: tl.constexpr):
    along = tl.arange(0, B)
    tl.store(out + along, tl.load(x + along).to(tl.float32) + 1.0)


@triton.jit
def spills(x, out, B: tl.constexpr):
    """512 numbers a thread that stay alive, and 255 registers."""
    along = tl.arange(0, B)
    values = tl.load(x + along).to(tl.float32)
    tl.store(out + along, values / tl.sum(values, 0))


@triton.jit
def multiplies(x, out, K, B: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    along = tl.arange(0, B)
    products = tl.zeros((B, B), tl.float32)
    for start in range(0, K, B):
        a = tl.load(x + along[:, None] * K + start + along[None, :])
        if UPCAST:
            a = a.to(tl.float32)
        products = tl.dot(a, a.T, products, input_precision=PRECISION)
    tl.store(out + along[:, None] * B + along[None, :], products)


@triton.jit
def takes_a_range_of_three(out):
    tl.store(out + tl.arange(0, 3), 0.0)


def print_faults() -> None:
    """Compiles the kernels above, each for the device where it is faulty; prints {fault: the report's sentences}."""

    def meta(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(2**20, dtype=dtype, device="meta")

    out, half, brain, single = map(meta, (torch.float32, torch.float16, torch.bfloat16, torch.float32))
    launches = {
        "sound": ("RTX 3090", lambda _: sound[(1,)](half, out, 1024)),
        "spills": ("RTX 3090", lambda _: spills[(1,)](half, out, 2**14, num_warps=1)),
        "too much shared memory": (
            "RTX 3090",
            lambda _: multiplies[(1,)](half, out, 1024, 128, False, "ieee", num_warps=8, num_stages=5),
        ),
        "a product on Turing": ("T4", lambda _: multiplies[(1,)](half, out, 1024, 16, False, "ieee")),
        "no matrix instructions": ("H200", lambda _: multiplies[(1,)](brain, out, 1024, 32, True, "ieee", num_warps=8)),
        "TF32": ("A100", lambda _: multiplies[(1,)](single, out, 1024, 32, False, "tf32")),
        "does not compile": ("MI300X", lambda _: takes_a_range_of_three[(1,)](out)),
        "the launcher fails": ("B200", lambda _: 1 / 0),
    }
    faults = {}
    for name, (device, launches_it) in launches.items():
        faults[name] = report.problems(report.compile_launches(launches_it, {}, device, name))
    print(json.dumps(faults))


EXPECTED = {
    "spills": ("RTX 3090", "bytes a thread"),
    "too much shared memory": ("RTX 3090", "bytes of shared memory, and there are 101376"),
    "a product on Turing": ("T4", "has a tl.dot"),
    "no matrix instructions": ("H200", "without matrix instructions"),
    "TF32": ("A100", "rounds fp32 factors to TF32"),
    "does not compile": ("MI300X", "arange's range must be a power of 2"),
    "the launcher fails": ("B200", "ZeroDivisionError"),
}
