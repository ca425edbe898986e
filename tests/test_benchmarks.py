"""The benchmark tool, driven from its command line: what it refuses, when it stays silent, and what it wrote down.

The tests of the harness run a copy of benchmarks/ whose training run is replaced by given numbers: they take seconds.
What a GPU run does is run here as far as a CPU can: its specs, its gate, and its recipe on a small model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # plain `pytest` finds tests/ only
from benchmarks import flops, step, workload  # noqa: E402
from benchmarks import run as training  # noqa: E402
from benchmarks.device import CPU, CUDA, DEVICES  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("step-*.json"))

# Put in place of benchmarks.run.run: TRL needs 4 s an epoch after 1 s, fastdpo 1 s an epoch, both the same curve.
STAND_IN = """
def run(spec):
    epochs = spec.stop_after or spec.epochs
    slow = 4.0 if spec.trainer == "trl" else 1.0
    losses = [0.6931472, 0.7, 0.5, 0.4, 0.3, 0.2][: 2 * epochs]
    if spec.trainer == "trl" and spec.settings:
        losses[-1] *= TUNED_FACTOR
    if (spec.trainer, bool(spec.settings)) in DYING:
        raise MemoryError("CUDA out of memory")
    totals = [1.0 + slow * epoch for epoch in range(epochs + 1)]
    flops = [int(1e12 * total) for total in totals] if spec.count_flops else []
    return RunResult(totals, 1.0, flops, 100, int(1000 * slow), losses, [1.0] * len(losses))
"""


FACTS = {"gpu": "NVIDIA H200", "gpu_memory": 150 * 2**30, "cuda": "13.0", "driver": "580.1", "cpu": "x", "cores": 16}


def benchmarks(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def stand_in(copy: Path, tuned_factor: float, dying: set[tuple[str, bool]] | None = None) -> None:
    """Runs become STAND_IN's, `dying` ones (trainer, whether it has settings) raise, and a GPU seems to be there."""
    given = f"TUNED_FACTOR, DYING = {tuned_factor}, {dying or set()}"
    for name, old, new in (
        ("run.py", "\ndef main(", f"\n{given}\n{STAND_IN}\n\ndef main("),
        ("device.py", "find=_graphics_processor", f"find=lambda: {FACTS}"),
    ):
        file = copy / "benchmarks" / name
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))


def test_the_tables_in_the_readme_are_what_the_results_generate() -> None:
    done = benchmarks(ROOT, "table", "--check")
    assert done.returncode == 0, done.stderr


def test_a_readme_that_drifted_is_told_and_written_again(copy: Path) -> None:
    readme = copy / "benchmarks" / "README.md"
    original = readme.read_text()
    readme.write_text(original.replace("<!-- end generated -->", "9000 pairs/s\n<!-- end generated -->"))
    assert benchmarks(copy, "table", "--check").returncode == 1
    assert benchmarks(copy, "table").returncode == 0
    assert readme.read_text() == original


def test_pairs_that_leave_a_smaller_last_step_are_refused() -> None:
    done = benchmarks(ROOT, "step", "--pairs", "10", "--batch", "8")
    assert done.returncode == 2
    assert "--pairs 10 is not a multiple of --batch 8" in done.stderr


def test_equal_curves_give_ratios_with_their_aims(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.0005)
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--epochs", "3", "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    ratios = {ratio["name"]: ratio for ratio in result["ratios"]}
    # TRL default ran one epoch of 4 s after 1 s: three are 13 s, against fastdpo's 4 s.
    assert ratios["speed of fastdpo / TRL default, 1 epoch"]["value"] == pytest.approx(5 / 2)
    assert ratios["speed of fastdpo / TRL default, 3 epochs"]["value"] == pytest.approx(13 / 4)
    assert ratios["FLOPs of fastdpo / TRL default, 3 epochs"]["value"] == pytest.approx(4 / 13)
    assert ratios["FLOPs of fastdpo / TRL default, 3 epochs"]["met"] is False
    assert ratios["peak memory of fastdpo / TRL default"] == {
        "name": "peak memory of fastdpo / TRL default",
        "value": 0.25,
        "aim": "<= 0.6",
        "met": True,
    }
    assert "| speed of fastdpo / TRL default, 1 epoch | 2.50 | >= 2.5 | met |" in done.stdout


def test_a_loss_that_differs_by_two_thousandths_is_an_error_and_gives_no_number(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.002)
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--output", str(output))
    assert done.returncode == 1
    assert "error: TRL tuned: loss of step 6" in done.stderr
    assert done.stdout == ""
    assert not output.exists()


def test_without_a_cuda_device_the_step_says_so_and_ends_well(tmp_path: Path) -> None:
    done = benchmarks(ROOT, "step", "--device", "cuda", "--output", str(tmp_path / "out.json"))
    assert (done.returncode, done.stdout) == (0, "skipped: no CUDA device that torch can use\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_gpus_results_stand_beside_the_cpus(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.1)  # 0.02 nats: more than fp32 may differ by, less than bf16 may
    file, readme = copy / "benchmarks/results/step-cuda.json", copy / "benchmarks/README.md"
    file.unlink(missing_ok=True)
    assert benchmarks(copy, "table").returncode == 0
    assert "### Not yet measured" in readme.read_text()
    done = benchmarks(copy, "step", "--device", "cuda", "--commit", "abc")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert list(result["configurations"]) == ["fastdpo", "TRL default", "TRL tuned"]
    assert result["machine"] == {**FACTS, "threads": os.cpu_count()} and result["commit"] == "abc"
    assert result["workload"]["dtype"] == "bfloat16" and result["workload"]["pairs"] == CUDA.pairs
    assert result["tolerances"]["loss_absolute"] == 0.05 and result["tolerances"]["why"]
    ratios = {ratio["name"]: ratio["value"] for ratio in result["ratios"]}
    assert ratios["speed of fastdpo / TRL default, 3 epochs"] == pytest.approx(13 / 4)
    assert ratios["speed of fastdpo / TRL default, later epochs"] == pytest.approx(4)  # 1 s of start-up is in neither
    assert ratios["FLOPs of fastdpo / TRL tuned, later epochs"] == pytest.approx(1 / 4)

    assert benchmarks(copy, "table").returncode == 0
    text = readme.read_text()
    assert "### A training step on the CPU" in text and "### A training step on a GPU" in text
    assert "NVIDIA H200, 150 GiB, driver 580.1, CUDA 13.0" in text and "### Not yet measured" not in text


def test_a_trl_configuration_that_dies_costs_its_own_row_only(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.0, dying={("trl", True)})
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--device", "cuda", "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["configurations"]["TRL tuned"]["failed"] == "MemoryError: CUDA out of memory"
    assert result["uncounted"] == {"TRL tuned": "MemoryError: CUDA out of memory"}
    assert all("TRL tuned" not in ratio["name"] for ratio in result["ratios"]) and result["ratios"]
    assert "| TRL tuned | failed |" in done.stdout
    assert "- TRL tuned failed: `MemoryError: CUDA out of memory`" in done.stdout


def test_fastdpo_dying_is_an_error(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.0, dying={("fastdpo", False)})
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--device", "cuda", "--output", str(output))
    assert done.returncode == 1 and done.stdout == "" and not output.exists()
    assert "error: the run of fastdpo" in done.stderr and "MemoryError: CUDA out of memory" in done.stderr


def test_a_run_beyond_its_devices_limit_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICES, "cpu", replace(CPU, time_limit=0.01))
    with pytest.raises(step.RunFailed, match=r"the run of TRL took longer than 0\.01 s") as caught:
        step.in_own_process("TRL", training.RunSpec("trl", "cpu", 8, 1, 8))
    assert caught.value.line == "took longer than 0.01 s"


def test_an_error_of_several_lines_is_named_by_its_first() -> None:
    output = (
        "Traceback ...\ntorch.AcceleratorError: CUDA error: an illegal access\nCompile with `TORCH_USE_CUDA_DSA`.\n"
    )
    assert step.RunFailed("TRL", "ended with 1", output).line == "torch.AcceleratorError: CUDA error: an illegal access"
    assert step.RunFailed("TRL", "ended with -9").line == "ended with -9"  # killed without a word


@pytest.mark.parametrize(
    ("device", "differs", "passes"),
    [
        ("cpu", 0.0004, True),
        ("cpu", 0.001, False),
        ("cuda", 0.04, True),
        ("cuda", 0.06, False),
        ("cuda", math.nan, False),
    ],
)
def test_curves_may_be_as_far_apart_as_their_device_says(device: str, differs: float, passes: bool) -> None:
    curve = training.RunResult([], 0, [], 0, 0, [math.log(2), 0.5], [1.0, 1.0])
    other = replace(curve, losses=[math.log(2), 0.5 + differs])
    if passes:
        step.check_curves("TRL", other, curve, DEVICES[device].tolerances)
    else:
        with pytest.raises(step.CurvesDiffer, match="loss of step 2"):
            step.check_curves("TRL", other, curve, DEVICES[device].tolerances)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_curve_that_moves_less_than_three_times_its_tolerance_shows_nothing(device: Any) -> None:
    allowed = device.tolerances
    assert allowed.least_movement >= 2.8 * max(allowed.loss_absolute, math.log(2) * allowed.loss_relative)
    still = training.RunResult([], 0, [], 0, 0, [math.log(2)] * 2, [1.0, 1.0])
    with pytest.raises(step.CurvesDiffer, match="left ln 2"):
        step.check_curves("TRL", still, still, allowed)


def test_what_precedes_training_counts_from_the_start_only() -> None:
    seconds = [10.0, 14.0, 16.0, 18.0]
    spans = step.reported_spans(3, later=True)
    assert {name: step.over(span, seconds) for name, span in spans.items()} == {"1": 14, "3": 18, "later": 4}
    assert step.reported_spans(1, later=True) == {"1": (0, 1)}


def test_the_gpus_model_has_the_shape_of_llama_3_2_1b() -> None:
    model = workload.build_model(CUDA.shape, CUDA.dtype, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_235_814_400
    assert workload.parameter_counts(workload.model_config(CUDA.shape))["total"] == 1_235_814_400
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}  # rotations lose their angles in bf16
    assert CUDA.shape["vocab_size"] >= workload.VOCABULARY


def test_the_counter_sees_the_products_of_a_gpus_kernels() -> None:
    """torch's own formula raises on the addmm that ends TRL's backward on a GPU."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with flops.counter() as counter:
        torch.mm(empty(3, 4), empty(4, 5), out=empty(3, 5))
        total = empty(3, 5, dtype=torch.float32)
        torch.addmm(total, empty(3, 4), empty(4, 5), out_dtype=torch.float32, out=total)
    assert counter.get_total_flops() == 2 * (2 * 3 * 4 * 5)
    with flops.counter() as counter:  # 4 query heads, 2 key heads
        torch.ops.aten._scaled_dot_product_flash_attention(empty(1, 4, 6, 16), empty(1, 2, 9, 16), empty(1, 2, 9, 16))
    assert counter.get_total_flops() == 4 * 4 * 6 * 9 * 16


def test_both_trainers_run_the_gpus_recipe_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: bf16 weights and autocast, more vocabulary than words, a clock that waits."""
    calls: list[str] = []
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    shape = {**CUDA.shape, "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = replace(
        CUDA,
        place="cpu",
        shape=shape,
        settings={**CUDA.settings, "use_cpu": True},
        learning_rate=3e-3,
        wait=lambda: calls.append("wait"),
        restart_peak=lambda: calls.append("restart"),
        peak_memory=lambda: len(calls),
    )
    monkeypatch.setitem(DEVICES, "cuda", small)
    base = training.RunSpec("fastdpo", "cuda", pairs=16, epochs=2, batch=8, threads=1)
    specs = step.configurations(base, small, step.tuned_settings(8, 4))
    curves = {name: training.run(replace(spec, longest_first=False)) for name, spec in specs.items()}
    for name, curve in curves.items():
        step.check_curves(name, curve, curves["fastdpo"], CUDA.tolerances)
        assert len(curve.seconds) == 3 and len(curve.losses) == 4
    assert calls == ["wait", "restart", "wait", "wait", "wait", "wait"] * 3
    assert curves["fastdpo"].baseline_memory == 2 and curves["fastdpo"].peak_memory == 6


@pytest.fixture(scope="module", params=RESULTS, ids=lambda file: file.stem)
def result(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text())


def test_the_recorded_result_says_where_it_comes_from(result: dict) -> None:
    assert set(result["versions"]) >= {"torch", "transformers", "trl"}
    assert result["versions"]["trl"] == "1.16.0"
    assert result["machine"]["cpu"] and result["machine"]["cores"] and result["commit"] != "none"
    assert result["machine"].keys() >= {"cpu": {"cpu"}, "cuda": {"gpu", "driver", "cuda"}}[result["device"]]


def test_the_recorded_workload_has_the_profile_it_claims(result: dict) -> None:
    work = result["workload"]
    assert work["median_tokens"] == pytest.approx(186, abs=1)
    assert work["prompt_to_response"] == pytest.approx(2.15, rel=0.01)
    assert work["longest"] <= 1024 and work["vocabulary"] >= 32_000
    assert work["parameters"]["total"] == pytest.approx({"cpu": 20e6, "cuda": 1.236e9}[result["device"]], rel=0.05)


def test_the_recorded_flops_are_within_5_percent_of_the_formula(result: dict) -> None:
    counted = result["configurations"]["fastdpo"]["flops_per_pair"]
    assert counted == {
        epoch: pytest.approx(value, rel=0.05) for epoch, value in result["formula_flops_per_pair"].items()
    }


def test_the_recorded_runs_start_at_ln_2(result: dict) -> None:
    for row in result["configurations"].values():
        for run in row["runs"]:
            assert run["losses"][0] == pytest.approx(math.log(2), abs=result["tolerances"]["first_loss"])
