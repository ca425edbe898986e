"""The benchmark tool, driven from its command line: what it refuses, when it stays silent, and what it wrote down.

The tests of the harness run a copy of benchmarks/ whose training run is replaced by given numbers: they take seconds.
What a GPU run does is run here as far as a CPU can: its specs, its gate, and its recipe on a small model. The kernels'
contenders are held to the truth that times them on a small head.
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
from statistics import median, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # plain `pytest` finds tests/ only
from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import (  # noqa: E402
    adapters,
    apart,
    bench_blocks,
    bench_linear_logps,
    bench_lora,
    bench_nf4,
    bench_pair_loss,
    blocks,
    contenders,
    flops,
    front_page,
    heads,
    kernel_table,
    measure,
    memory,
    memory_table,
    pairs,
    parts,
    step,
    table,
    trace,
    trl_settings,
    turn,
    weights,
    workload,
)
from benchmarks import run as training  # noqa: E402
from benchmarks.device import CPU, CUDA, DEVICES, step_aim  # noqa: E402
from benchmarks.measure import CpuMeter, median_seconds  # noqa: E402
from benchmarks.models import MODELS, Model, quantised  # noqa: E402
from benchmarks.quantised import QuantisedWeights  # noqa: E402
from benchmarks.record import Results, Row  # noqa: E402
from benchmarks.roofline import FORWARD, FROZEN_HEAD, TRAINED_HEAD, Ceilings, Work, head_work  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("step-*.json"))
KERNEL_RESULTS = sorted((ROOT / "benchmarks" / "results").glob("kernels-*.json"))

HH = workload.PROFILES["hh-rlhf"]

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
        (
            "step.py",
            "    gpu, rate, _ = device",
            "    return {'flops': 1e12, 'how': 'given'}\n    gpu, rate, _ = device",
        ),
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


def test_tables_of_another_folder_are_written_and_compared(copy: Path, tmp_path: Path) -> None:
    """As `make gpu RESULTS=...` fills it."""
    readme, elsewhere = copy / "benchmarks" / "README.md", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "--results" in benchmarks(copy, "table", "--results", str(elsewhere)).stderr
    kernel_results(elsewhere / "kernels-cuda.json")
    assert benchmarks(copy, "table", "--check", "--results", str(elsewhere)).returncode == 1
    assert benchmarks(copy, "table", "--results", str(elsewhere)).returncode == 0
    assert "### Kernels on a GPU" in readme.read_text() and "### Kernels on the CPU" not in readme.read_text()
    assert benchmarks(copy, "table", "--check", "--results", str(elsewhere)).returncode == 0
    assert benchmarks(copy, "table", "--check").returncode == 1


def test_pairs_that_leave_a_smaller_last_step_are_refused() -> None:
    done = benchmarks(ROOT, "step", "--pairs", "10", "--batch", "8")
    assert done.returncode == 2
    assert "--pairs 10 is not a multiple of --batch 8" in done.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--full", "--load-in-4bit"], "leave one of the two out"),
        (["--processor-time", "--threads", "2"], "it needs --device cpu and --threads 1"),
        (["--processor-time", "--threads", "1", "--device", "cuda"], "it needs --device cpu and --threads 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: list[str], why: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["step", *options])
    assert why in capsys.readouterr().err


MODULE = Path(command_line.__file__)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["step", "--seconds", "0"], "--seconds: 0, expected a number above 0"),
        (["memory", "--seconds", "-5"], "--seconds: -5, expected a number above 0"),
        (["tune", "--seconds", "nan"], "--seconds: nan, expected a number above 0"),
        (["memory", "--resolution", "0"], "--resolution: 0, expected a number above 0"),
        (["memory", "--gib", "8", "0"], "--gib: 0, expected a whole number of at least 1"),
        (["memory", "--device", "cpu", "--most-tokens", "0"], "--most-tokens: 0, expected a whole number"),
        (["kernels", "--threads", "0"], "--threads: 0, expected a whole number of at least 1"),
        (["tune", "--threads", "-1"], "--threads: -1, expected a whole number of at least 1"),
        (["step", "--pairs", "0"], "--pairs: 0, expected a whole number of at least 1"),
        (["step", "--epochs", "1.5"], "--epochs: 1.5, expected a whole number of at least 1"),
        (["step", "--batch", "0"], "--batch: 0, expected a whole number of at least 1"),
        (["parts", "--repeat", "few"], "--repeat: few, expected a whole number of at least 1"),
        (["step", "--device", "cuda", "--unsloth", "/nowhere"], "--unsloth: /nowhere, expected a folder that is there"),
        (["step", "--unsloth", str(MODULE.parent)], f"--unsloth {MODULE.parent} is for --device cuda"),
        (["explore", "fp8", "--data", "/nowhere"], "--data: /nowhere, expected a file that is there"),
        (["explore", "host", "--data", str(MODULE)], "explore host takes no --data, which is for fp8 and sparse"),
        (["explore", "graphs", "--data", str(MODULE)], "explore graphs takes no --data"),
    ],
    ids=lambda value: " ".join(value[:-1]) if isinstance(value, list) else "",
)
def test_what_no_run_can_use_is_refused_before_any_begins(given: list[str], why: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(given)
    assert why in capsys.readouterr().err


def test_the_kernels_time_is_refused_like_the_command_lines() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--kernel-seconds", "0", "--collect-only"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 4 and "--kernel-seconds: 0, expected a number above 0" in done.stderr


def test_processor_time_leaves_out_the_time_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is a minute late at every reading."""
    late = iter(range(0, 10**6, 60))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(late)))
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m", small(MODELS["20m"]))
    spec = replace(SPEC, trainer="fastdpo", pairs=2, batch=2, threads=1)
    assert training.run(spec).seconds[-1] >= 60
    own = training.run(replace(spec, processor_time=True))
    assert 0 < own.seconds[0] < own.seconds[-1] < 60 and own.seconds[-1] == pytest.approx(own.cpu_seconds, rel=0.05)


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
    assert ratios["peak memory of fastdpo / TRL default"]["value"] == 0.25
    row = result["configurations"]["fastdpo"]
    assert row["pairs_per_second"]["1"] == pytest.approx(16 / 2)
    tokens = workload.sequence_tokens(workload.pair_lengths(HH, 16))
    assert row["tokens_per_second"]["1"] == pytest.approx(tokens / 2)
    assert row["mfu"]["1"] == pytest.approx(result["needed_flops_per_pair"]["1"] * 16 / 2 / 1e12)
    assert ratios["MFU of fastdpo, 1 epoch"]["value"] == row["mfu"]["1"]
    for line in (
        "| speed of fastdpo / TRL default, 1 epoch | 2.50 | >= 2.5 | met |",
        "| FLOPs of fastdpo / TRL default, 3 epochs | 0.31 | <= 0.23 | missed |",
        "| peak memory of fastdpo / TRL default | 0.25 | <= 0.6 | met |",
        "| TRL default, response rows only | 2.50 | 3.25 |",
    ):
        assert line in done.stdout


def test_a_contender_whose_loss_differs_by_two_thousandths_gets_no_number_and_is_an_error(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.002)
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--output", str(output))
    assert done.returncode == 1
    assert "error: TRL tuned: loss of step 6" in done.stderr
    rows = json.loads(output.read_text())["configurations"]
    assert rows["TRL tuned"]["curve_differs"] and "seconds" not in rows["TRL tuned"]
    assert "seconds" in rows["TRL default"] and "| TRL tuned | failed |" in done.stdout


@pytest.mark.parametrize(
    ("own", "others", "why"),
    [
        (0.5, 0.6, "TRL default: loss of step 2 is 0.6, fastdpo's is 0.5"),
        (math.log(2), math.log(2), "no loss of fastdpo left ln 2"),
    ],
    ids=["another", "still"],
)
def test_where_nobody_can_be_compared_with_fastdpo_there_is_no_number_but_all_runs_are_kept(
    own: float, others: float, why: str, tmp_path: Path, capsys: Any
) -> None:
    ours = training.RunResult([0, 1], 0, [], 0, 1, [math.log(2), own], [1.0, 1.0])
    other = replace(ours, losses=[math.log(2), others])
    specs = {name: replace(SPEC, trainer=kind) for name, kind in (("fastdpo", "fastdpo"), ("TRL default", "trl"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "in_own_process", lambda name, *_: ours if name == "fastdpo" else other)
        with pytest.raises(step.CurvesDiffer, match=why) as caught:
            step.timed_runs(specs, 2, ours, {}, apart.Clock(None, None))
        assert {name: len(runs) for name, runs in caught.value.runs.items()} == {"fastdpo": 2, "TRL default": 1}
        patch.setattr(step, "measure", lambda *_: step.timed_runs(specs, 2, ours, {}, apart.Clock(None, None)))
        patch.setattr(type(CPU), "found", lambda *_: {})
        assert step.main(SimpleNamespace(device="cpu", output=tmp_path / "step.json")) == 1  # type: ignore[arg-type]
    kept = json.loads((tmp_path / "step.runs").read_text())
    assert [run["losses"] for run in kept["TRL default"]] == [other.losses] and len(list(tmp_path.iterdir())) == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("command", ["step", "parts", "trace", "kernels"])
def test_without_a_cuda_device_a_benchmark_says_so_and_ends_well(command: str, tmp_path: Path) -> None:
    done = benchmarks(ROOT, command, "--device", "cuda", "--output", str(tmp_path / "out.json"))
    assert (done.returncode, done.stdout) == (0, "skipped: no CUDA device that torch can use\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_gpus_results_stand_beside_the_cpus(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.1)  # 0.02 nats: more than fp32 may differ by, less than bf16 may
    file, readme = copy / "benchmarks/results/step-cuda-llama-3.1-8b-helpsteer.json", copy / "benchmarks/README.md"
    line = "Llama-3.1-8B's shape in bfloat16 on a GPU, pairs as long as HelpSteer's (`make gpu-step-8b-helpsteer`)"
    file.unlink(missing_ok=True)
    assert benchmarks(copy, "table").returncode == 0
    assert line in readme.read_text()
    choice = ["--device", "cuda", "--model", "llama-3.1-8b", "--profile", "helpsteer"]
    done = benchmarks(copy, "step", *choice, "--commit", "abc")
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert list(result["configurations"]) == list(CUDA.contenders)
    assert result["configurations"]["fastdpo leanest"]["spec"]["settings"] == step.LEANEST
    assert {result["configurations"][name]["failed"] for name in ("TRL tuned, Liger", "Unsloth")} == {"not installed"}
    assert result["machine"] == {**FACTS, "threads": os.cpu_count()} and result["commit"] == "abc"
    work = result["workload"]
    assert work["dtype"] == "bfloat16" and work["pairs"] == 32 and work["longest"] <= work["max_length"]
    assert result["tolerances"]["loss_absolute"] == 0.05 and result["tolerances"]["why"]
    ratios = {ratio["name"]: ratio["value"] for ratio in result["ratios"]}
    assert ratios["speed of fastdpo / TRL default, 3 epochs"] == pytest.approx(13 / 4)
    assert ratios["speed of fastdpo / TRL default, later epochs"] == pytest.approx(4)  # 1 s of start-up is in neither
    assert ratios["speed of fastdpo leanest / TRL default, 1 epoch"] == pytest.approx(5 / 2)
    assert 0.15 < ratios["FLOPs of fastdpo / TRL default, 1 epoch"] < 0.25  # by formula

    assert benchmarks(copy, "table").returncode == 0
    text, front = readme.read_text(), (copy / "README.md").read_text()
    assert "### A training step on a GPU: Llama-3.1-8B's shape, pairs as long as HelpSteer's" in text
    assert "NVIDIA H200, 150 GiB, driver 580.1, CUDA 13.0" in text and line not in text
    assert "| speed of fastdpo / TRL default, 1 epoch | 2.50 | >= 2.5 | met |" in text
    assert "| Unsloth | not installed |" in text and "- Unsloth: not installed\n" in text
    assert "Llama-3.1-8B's shape, LoRA r=16, pairs as long as HelpSteer's; NVIDIA H200, bfloat16" in front
    row = next(line for line in front.splitlines() if "as long as HelpSteer's" in line and line.startswith("|"))
    assert (
        "| **16**, 0.0 GiB, MFU" in row and "| 6.4 (2.5x), 0.0 GiB | 6.4 (2.5x), 0.0 GiB | fastdpo leanest: 16" in row
    )


def test_a_trl_configuration_that_dies_costs_its_own_row_only(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.0, dying={("trl", True)})
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--device", "cuda", "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["configurations"]["TRL tuned"]["failed"] == "MemoryError: CUDA out of memory"
    assert result["uncounted"] == {}  # nothing is counted there
    assert all("TRL tuned" not in ratio["name"] for ratio in result["ratios"]) and result["ratios"]
    assert "| TRL tuned | failed |" in done.stdout
    assert "- TRL tuned: failed: `MemoryError: CUDA out of memory`" in done.stdout


def test_fastdpo_dying_is_an_error(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.0, dying={("fastdpo", False)})
    output = copy / "out.json"
    done = benchmarks(copy, "step", "--device", "cuda", "--output", str(output))
    assert done.returncode == 1 and done.stdout == "" and not output.exists()
    assert "error: the run of fastdpo" in done.stderr and "MemoryError: CUDA out of memory" in done.stderr


SPEC = training.RunSpec("trl", "cpu", "20m", "hh-rlhf", 8, 1, 8)


def test_a_run_beyond_its_limit_has_failed() -> None:
    with pytest.raises(apart.RunFailed, match=r"the run of TRL took longer than 0\.01 s") as caught:
        apart.in_own_process("TRL", SPEC, apart.Clock(None, 0.01))
    assert caught.value.line == "took longer than 0.01 s"


def test_no_run_begins_after_the_time_of_all_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = apart.Clock(100.0, 30.0)
    assert clock.left() == 30
    monkeypatch.setattr(apart.time, "monotonic", lambda: clock.started + 45)
    assert clock.left() == 30 and clock.left(share=0.5) == 5
    monkeypatch.setattr(apart.time, "monotonic", lambda: clock.started + 101)
    with pytest.raises(apart.RunFailed, match="the time for all of them was used up"):
        apart.in_own_process("TRL", SPEC, clock)
    assert apart.Clock(None, None).left() == math.inf
    assert apart.Clock(0, None).left() <= 0 and apart.Clock(None, 0).left() <= 0


def test_the_search_varies_the_fastest_split_and_keeps_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 4 pairs are what memory has room for; 8 run out of it, 2 are faster, and Liger faster still."""
    tried: list[dict[str, Any]] = []

    def run(name: str, spec: training.RunSpec, *_: Any, share: float) -> training.RunResult:
        tried.append(spec.settings)
        if spec.settings["per_device_train_batch_size"] == 8:
            raise apart.RunFailed(name, "", "torch.OutOfMemoryError: CUDA out of memory")
        slow = spec.settings["per_device_train_batch_size"] + 3 * spec.settings["precompute_ref_log_probs"]
        return training.RunResult([0.0, slow - bool(spec.settings.get("use_liger_kernel"))], 0, [], 0, 1, [], [])

    monkeypatch.setattr(trl_settings, "in_own_process", run)
    monkeypatch.setattr(trl_settings, "installed", lambda package, site=None: package == "liger_kernel")
    tuned = replace(SPEC, device="cuda", settings=trl_settings.split_settings(8, 4, False))
    found = trl_settings.search_tuned(tuned, CUDA, apart.Clock(None, None))
    assert [settings["per_device_train_batch_size"] for settings in tried] == [4, 8, 2, 2, 2, 8]
    assert [settings["precompute_ref_log_probs"] for settings in tried] == [False, False, False, True, False, False]
    assert tried[-1]["gradient_checkpointing"] and tried[-1]["gradient_accumulation_steps"] == 1
    best = trl_settings.fastest(found)
    assert best is not None and best["settings"]["use_liger_kernel"] and best["seconds"] == 1
    assert [row["failed"] for row in found if "failed" in row] == ["torch.OutOfMemoryError: CUDA out of memory"] * 2
    assert trl_settings.fastest([row for row in found if "failed" in row]) is None


@pytest.mark.parametrize(
    ("profile", "pairs", "micro_batch"), [("tldr", 72, 4), ("hh-rlhf", 128, 4), ("capybara", 16, 1)]
)
def test_untuned_micro_batches_are_what_memory_has_room_for(profile: str, pairs: int, micro_batch: int) -> None:
    base = training.RunSpec("fastdpo", "cuda", "llama-3.1-8b", profile, pairs, 2, 8)
    assert step.rows_for(CUDA, MODELS["llama-3.1-8b"], workload.PROFILES[profile], 8) == pairs
    spec = trl_settings.tuned_spec(base, CUDA, {"gpu_memory": 141 * 2**30})
    assert spec.micro_batch == micro_batch and spec.longest_first and not spec.settings["gradient_checkpointing"]
    assert spec.micro_batch * spec.settings["gradient_accumulation_steps"] == 8
    smaller = trl_settings.tuned_spec(base, CUDA, {"gpu_memory": 24 * 2**30})
    assert smaller.micro_batch == 1


def test_the_same_work_is_an_epoch_everywhere() -> None:
    assert step.rows_for(CPU, MODELS["20m"], HH, 8) == 16
    assert step.rows_for(CUDA, MODELS["llama-3.2-1b"], HH, 8) == CUDA.most_pairs
    assert all(step.rows_for(CUDA, m, p, 8) % 8 == 0 for m in MODELS.values() for p in workload.PROFILES.values())


@pytest.mark.parametrize(
    ("quantity", "model", "profile", "gpu", "aim"),
    [
        ("speed of fastdpo / TRL default, 1 epoch", "llama-3.1-8b", "helpsteer", "NVIDIA H200", ">= 2.5"),
        ("speed of fastdpo / TRL tuned, 1 epoch", "llama-3.1-8b", "hh-rlhf", "NVIDIA H200", ">= 1.8"),
        ("speed of fastdpo / TRL tuned, 1 epoch", "llama-3.1-8b", "ultrafeedback", "NVIDIA H200", ">= 1.4"),
        ("MFU of fastdpo, 1 epoch", "llama-3.1-8b", "ultrafeedback", "NVIDIA H200", ">= 0.5"),
        ("memory added by training, fastdpo leanest / TRL default", "llama-3.1-8b", "hh-rlhf", "NVIDIA H200", "<= 0.5"),
        ("speed of fastdpo / TRL default, 2 epochs", "llama-3.1-8b", "hh-rlhf", "NVIDIA H200", None),
        ("speed of fastdpo / TRL default, 1 epoch", "llama-3.1-8b", "hh-rlhf", "NVIDIA A100", None),
        ("speed of fastdpo / TRL default, 1 epoch", "qwen2.5-7b", "hh-rlhf", "NVIDIA H200", None),
        ("speed of fastdpo / TRL tuned, 3 epochs", "20m", "hh-rlhf", None, ">= 1.8"),
        ("speed of fastdpo / TRL tuned, response rows only, 3 epochs", "20m", "hh-rlhf", None, None),
        ("FLOPs of fastdpo / TRL default, 3 epochs", "20m", "hh-rlhf", None, "<= 0.23"),
    ],
)
def test_aims_belong_to_a_device_a_model_and_a_profile(
    quantity: str, model: str, profile: str, gpu: str | None, aim: str | None
) -> None:
    machine = {"gpu": gpu} if gpu else {}
    result = {"device": "cuda" if gpu else "cpu", "model": model, "profile": profile, "machine": machine}
    found = step_aim(result, quantity)
    assert (str(found) if found else None) == aim


def test_an_error_of_several_lines_is_named_by_its_first() -> None:
    output = (
        "Traceback ...\ntorch.AcceleratorError: CUDA error: an illegal access\nCompile with `TORCH_USE_CUDA_DSA`.\n"
    )
    line = "torch.AcceleratorError: CUDA error: an illegal access"
    assert apart.RunFailed("TRL", "ended with 1", output).line == line
    assert apart.RunFailed("TRL", "ended with -9").line == "ended with -9"  # killed without a word


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
    step.check_curves("TRL", still, still, allowed)
    with pytest.raises(step.CurvesDiffer, match="left ln 2"):
        step.check_movement(still, allowed)


def test_what_precedes_training_counts_from_the_start_only() -> None:
    seconds = [10.0, 14.0, 16.0, 18.0]
    spans = step.reported_spans(3, later=True)
    assert {name: step.over(span, seconds) for name, span in spans.items()} == {"1": 14, "3": 18, "later": 4}
    assert step.reported_spans(1, later=True) == {"1": (0, 1)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("20m", 19_996_928),
        ("20m-stablelm", 20_005_376),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("mistral-7b", 7_248_023_552),
    ],
)
def test_a_model_has_its_namesakes_parameters(name: str, parameters: int) -> None:
    model = workload.build_model(MODELS[name], 2048, "bfloat16", "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert MODELS[name].parameters["total"] == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}  # rotations lose their angles in bf16
    assert MODELS[name].vocab_size >= workload.VOCABULARY and model.config.max_position_embeddings == 2048
    assert getattr(model.config, "sliding_window", None) is None
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == MODELS[name].qkv_bias


@pytest.mark.parametrize("profile", workload.PROFILES.values(), ids=workload.PROFILES)
@pytest.mark.parametrize("pairs", [16, 64])
def test_rows_have_their_profiles_median_ratio_and_spread_and_are_never_truncated(
    profile: workload.Profile, pairs: int
) -> None:
    lengths = workload.pair_lengths(profile, pairs)
    totals = [pair.prompt + side for pair in lengths for side in (pair.chosen, pair.rejected)]
    assert median(totals) == pytest.approx(profile.median_total, abs=1)
    ratio = 2 * sum(pair.prompt for pair in lengths) / sum(pair.chosen + pair.rejected for pair in lengths)
    assert ratio == pytest.approx(profile.prompt_to_response, rel=0.005)
    for side in ("prompt", "chosen"):
        spread = stdev(math.log(getattr(pair, side)) for pair in lengths)
        assert spread == pytest.approx(profile.log_spread, rel=0.1)
    room = workload.room_for(lengths)
    assert room - 1024 < max(totals) <= room and room % 1024 == 0


def test_rows_of_hh_rlhf_are_those_that_the_recorded_cpu_result_had() -> None:
    lengths = workload.pair_lengths(HH, 16)
    assert max(pair.prompt + max(pair.chosen, pair.rejected) for pair in lengths) == 544
    assert workload.room_for(lengths) == 1024 and sum(pair.prompt for pair in lengths) == 2460


FAMILIES = {"llama": "llama-3.1-8b", "llama, tied": "llama-3.2-1b", "qwen2": "qwen2.5-7b", "mistral": "mistral-7b"}
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 500}


def small(model: Model) -> Model:
    return replace(model, **SMALL, learning_rate=3e-3)


@pytest.mark.parametrize("family", [*FAMILIES, "llama, NF4", "llama, all weights"])
def test_formulas_agree_with_the_count_for_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fastdpo's first epoch and second; one of TRL as it comes, and without checkpointing on rows by length."""
    full = family == "llama, all weights"
    model = small(MODELS["20m" if full else FAMILIES.get(family, quantised("llama-3.1-8b"))])
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m", model)
    spec = replace(SPEC, trainer="fastdpo", pairs=4, epochs=2, batch=2, count_flops=True, full=full, threads=1)
    counted = training.run(spec).flops
    lengths = workload.pair_lengths(HH, 4)
    first, later = (flops.packed_flops(lengths, model, spec.lora_rank, on) for on in (True, False))
    assert counted[1] - counted[0] == pytest.approx(first, rel=1e-3)
    assert counted[2] - counted[1] == pytest.approx(later, rel=1e-3)
    tuned = {**trl_settings.split_settings(2, 1, True)}
    # the last product of a block that trains is not run again, and the formula has it
    for settings in (tuned,) if full else ({}, tuned):
        theirs = replace(spec, trainer="trl", epochs=1, settings=settings, longest_first=bool(settings))
        expected = step.flops_at(theirs, None)
        assert training.run(theirs).flops == pytest.approx(expected, rel=1e-2)


def test_checkpointing_is_counted_by_formula_as_torch_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m", small(MODELS["20m"]))
    spec = replace(SPEC, trainer="fastdpo", pairs=2, batch=2, settings=step.LEANEST, count_flops=True, threads=1)
    before, after = training.run(spec).flops
    assert after - before == pytest.approx(step.flops_at(spec, None)[1], rel=1e-2)


def test_what_is_needed_is_the_count_with_half_of_the_attention() -> None:
    pair, model = workload.PairLengths(5, 3, 4), small(MODELS["llama-3.1-8b"])
    first = [(q, k) for q in range(8) for k in range(q + 1)]
    second = [(q, k) for q in range(4) for k in range(5 + q + 1)]
    seen, rectangles = len(first) + len(second), 8 * 8 + 4 * 9
    scores = 4 * model.hidden_size * model.num_hidden_layers
    packed, needed = (f([pair], model, 16, False) for f in (flops.packed_flops, flops.needed_flops))
    assert packed - needed == scores * (3.5 * rectangles - 3 * seen)
    with_reference = flops.needed_flops([pair], model, 16, True) - needed
    weights = model.num_hidden_layers * sum(i * o for i, o in model.linears.values())
    mlp = 3 * model.hidden_size * model.intermediate_size
    unread = 5 + 1  # prompt rows but the last, and the last of both responses
    assert (
        with_reference
        == 2 * (12 * weights - unread * mlp) + scores * seen + 2 * model.vocab_size * model.hidden_size * 7
    )


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


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-1b-nf4"])
def test_both_trainers_run_the_gpus_recipe_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the GPU: bf16 weights and autocast, more vocabulary than words, a step ahead, a waiting clock. In 4
    bits TRL's adapters are in bf16, too.
    """
    calls: list[str] = []
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    on_a_cpu = replace(
        CUDA,
        place="cpu",
        settings={**CUDA.settings, "use_cpu": True},
        leanest=CPU.leanest,
        wait=lambda: calls.append("wait"),
        restart_peak=lambda: calls.append("restart"),
        peak_memory=lambda: calls.append("peak") or len(calls),
    )
    monkeypatch.setitem(DEVICES, "cuda", on_a_cpu)
    monkeypatch.setitem(MODELS, name, replace(small(MODELS[name]), num_hidden_layers=2))
    base = training.RunSpec("fastdpo", "cuda", name, "hh-rlhf", pairs=16, epochs=2, batch=8, threads=1)
    tuned = trl_settings.tuned_spec(base, on_a_cpu, {"gpu_memory": 2**37})
    assert tuned.micro_batch == 8
    specs, _ = step.configurations(base, on_a_cpu, replace(tuned, settings=trl_settings.split_settings(8, 4, True)))
    contenders = ("fastdpo", "fastdpo leanest", "TRL default", "TRL tuned")
    curves = {who: training.run(replace(specs[who], longest_first=False)) for who in contenders}
    for who, curve in curves.items():
        step.check_curves(who, curve, curves["fastdpo"], CUDA.tolerances)
        epochs = 1 if who == "TRL default" else 2
        assert len(curve.seconds) == 1 + epochs and len(curve.losses) == 2 * epochs
    before = ["restart", "peak", "wait", "restart", "peak", "wait"]
    once = [*before, "wait", "wait", "peak"]  # an epoch's end, the end, the peak of it all
    assert calls[:19] == [*once, *before, "wait", *once[-3:]]
    assert curves["fastdpo"].baseline_memory == 3 and curves["fastdpo"].peak_memory == 8  # less what was there before


def test_in_4_bits_all_contenders_of_a_cpu_have_one_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m-nf4", small(MODELS["20m-nf4"]))
    base = replace(SPEC, trainer="fastdpo", model="20m-nf4", pairs=4, batch=2, threads=1)
    specs, _ = step.configurations(base, CPU, trl_settings.tuned_spec(base, CPU, {}))
    curves = {name: training.run(replace(spec, longest_first=False)) for name, spec in specs.items()}
    assert list(curves) == list(CPU.contenders)
    for name, curve in curves.items():
        step.check_curves(name, curve, curves["fastdpo"], CPU.tolerances)


def test_a_step_in_4_bits_has_a_file_of_its_own_and_a_leaner_leanest(copy: Path) -> None:
    stand_in(copy, tuned_factor=1.0)
    choice = ["--device", "cuda", "--model", "mistral-7b", "--load-in-4bit", "--profile", "ultrafeedback"]
    done = benchmarks(copy, "step", *choice, "--commit", "abc")
    assert done.returncode == 0, done.stderr
    result = json.loads((copy / "benchmarks/results/step-cuda-mistral-7b-nf4-ultrafeedback.json").read_text())
    lean = result["configurations"]["fastdpo leanest"]["spec"]["settings"]
    assert lean == {**step.LEANEST, "activation_offloading": True}
    assert result["model"] == "mistral-7b-nf4" and result["workload"]["parameters"]["total"] == 7_248_023_552
    assert (
        "### A training step on a GPU: Mistral-7B-v0.3's shape in NF4, pairs as long as UltraFeedback's" in done.stdout
    )
    assert "| speed of fastdpo / TRL tuned, 1 epoch | 2.50 | >= 1.7 | met |" in done.stdout
    assert "| memory added by training, fastdpo leanest / TRL default |" in done.stdout


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_quantised_weights_are_drawn_once_and_their_models_start_as_new(family: str) -> None:
    from bitsandbytes.nn import Linear4bit

    model = small(MODELS[quantised(family)])
    weights = QuantisedWeights(workload.model_config(model, 1024), "float32", "cpu", None)
    one = weights.model()
    linears = [module for module in one.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 7 * model.num_hidden_layers and one.num_parameters() == model.parameters["total"]
    assert {(module.weight.quant_type, module.quant_state.nested) for module in linears} == {("nf4", True)}
    assert (one.lm_head.weight is one.model.embed_tokens.weight) == model.tie_word_embeddings
    assert one.lm_head.weight.dtype == torch.float32 and one.is_loaded_in_4bit
    tokens = torch.arange(20)[None]
    before = one(tokens).logits
    one.model.layers[0].register_forward_hook(lambda *given: torch.zeros(1))
    one.train().gradient_checkpointing_enable()
    two = weights.model()
    assert two.model.layers[0].mlp.up_proj.weight is one.model.layers[0].mlp.up_proj.weight
    assert torch.equal(two(tokens).logits, before) and not two.is_gradient_checkpointing
    other = workload.build_model(model, 1024, "float32", "cpu")
    assert torch.equal(other(tokens).logits, before)


def test_weights_in_4_bits_take_what_is_counted() -> None:
    assert MODELS["llama-3.1-8b-nf4"].weight_bytes / 2**30 == pytest.approx(5.31, abs=0.01)
    assert MODELS["llama-3.1-8b"].weight_bytes == 2 * 8_030_261_248


TASK = memory.Task("fastdpo", {}, "cpu", "20m-nf4", [8, 12, 16, 24], ["short", "ultrafeedback"], 0.0, threads=1)
ROOM_FOR = {8: 1443, 12: 6964, 16: 12_485, 24: 23_527}  # short; a third of it with longer prompts


def bisected(task: memory.Task, seconds: float = math.inf, a_step: float = 0.0) -> memory.Bisection:
    """All trials of cards that hold ROOM_FOR; a step takes `a_step` seconds for 10000 tokens, more by their square."""
    search, left = memory.Bisection(task, []), seconds
    while (trial := search.next(left)) is not None and left > 0:
        limit = ROOM_FOR[trial.gib] // (1 if trial.prompt == "short" else 3)
        trial.outcome = memory.FITS if trial.response <= limit else memory.FULL
        trial.seconds = a_step * (trial.response / 1e4) ** 2
        left -= trial.seconds
        search.trials.append(trial)
        assert len(search.trials) < 300
    return search


def test_the_bisection_finds_every_boundary_to_the_token() -> None:
    search = bisected(TASK)
    for gib, limit in ROOM_FOR.items():
        assert search.bounds("short", gib) == (limit, limit + 1)
        assert search.bounds("ultrafeedback", gib) == (limit // 3, limit // 3 + 1)
    tried = [(trial.prompt, trial.gib, trial.response) for trial in search.trials]
    assert len(tried) == len(set(tried))


def test_guesses_come_first_and_a_coarse_answer_takes_few_steps() -> None:
    guesses = {"short": {str(gib): [aim, 1000] for gib, aim in memory_table.AIMS.items()}}
    search = bisected(replace(TASK, prompts=["short"], guesses=guesses, resolution=0.03))
    assert [(trial.gib, trial.response) for trial in search.trials[:2]] == [(8, 1500), (8, 1000)]
    for gib, limit in ROOM_FOR.items():
        low, high = search.bounds("short", gib)
        assert low <= limit < high <= 1.03 * low + 1
    assert len(search.trials) < 40


def test_a_card_that_nothing_fits_is_told_and_one_that_is_never_full_ends() -> None:
    for limit, bounds in ((1, (0, memory.LEAST)), (10**9, (memory.MOST, None))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ROOM_FOR, 8, limit)
            search = bisected(replace(TASK, gibs=[8], prompts=["short"]))
        assert search.bounds("short", 8) == bounds and search.settled("short", 8)


def test_the_search_ends_in_time_with_what_it_knows() -> None:
    search = bisected(TASK, seconds=30.0, a_step=1.0)
    assert sum(trial.seconds for trial in search.trials) <= 32
    assert all(search.bounds("short", gib)[0] for gib in ROOM_FOR)
    assert not all(search.settled("short", gib) for gib in ROOM_FOR)
    assert bisected(TASK, seconds=0.0).trials == []


@pytest.mark.parametrize(
    ("trainer", "found"), [("fastdpo", {"short": 32, "ultrafeedback": 33}), ("trl", {"short": 24, "ultrafeedback": 28})]
)
def test_a_step_with_a_pair_one_token_too_long_is_out_of_memory(
    trainer: str, found: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real steps in 4 bits; room for 80 tokens stands in for the GPU's. TRL has the prompt twice."""
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m-nf4", small(MODELS["20m-nf4"]))
    near = {prompt: {"8": [length - 1, length, length + 1]} for prompt, length in found.items()}
    settings = memory.contenders(CPU)[{"trl": "TRL"}.get(trainer, trainer)][1]
    task = replace(TASK, trainer=trainer, settings=settings, gibs=[8], guesses=near, most_tokens={"8": 80})
    trials: list[memory.Trial] = []
    memory.work(task, trials, math.inf)
    assert {trial.outcome for trial in trials} == {memory.FITS, memory.FULL} and len(trials) == 6
    longest = memory.bounds_of(memory.Bisection(task, trials))
    for prompt, length in found.items():
        assert longest[prompt]["8"]["response"] == length and longest[prompt]["8"]["too_long"] == length + 1
        assert longest[prompt]["8"]["peak_allocated"] > 0 and longest[prompt]["8"]["seconds"] > 0


def test_what_fails_otherwise_ends_the_search_and_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr(memory, "one_step", broken)
    monkeypatch.setattr(memory, "QuantisedWeights", lambda *given: None)
    trials: list[memory.Trial] = []
    with pytest.raises(RuntimeError, match="illegal"):
        memory.work(TASK, trials, 10.0)
    assert [(trial.outcome, trial.reason) for trial in trials] == [
        (memory.FAILED, "CUDA error: an illegal memory access")
    ]


def test_a_process_that_dies_in_a_trial_is_started_again_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[list[dict[str, Any]]] = []

    def run(command: list[str], **options: Any) -> Any:
        file = Path(command[-1])
        starts.append(json.loads(file.read_text()))
        rows = [memory.Trial("short", 8, 100, memory.FITS), memory.Trial("short", 8, 101)]
        file.write_text(json.dumps([vars(row) for row in rows]))
        return SimpleNamespace(returncode=-9 if len(starts) == 1 else 0, stderr="")

    monkeypatch.setattr(memory.subprocess, "run", run)
    row = memory.in_own_process(replace(TASK, gibs=[8], prompts=["short"]), math.inf)
    assert [trial["outcome"] for trial in starts[1]] == [memory.FITS, memory.DIED]
    assert row["failed"] is None and len(starts) == 2

    def hangs(command: list[str], **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(memory.subprocess, "run", hangs)
    row = memory.in_own_process(replace(TASK, gibs=[8], prompts=["short"]), 5.0)
    assert row["failed"] == memory.LATE and row["longest"]["short"]["8"]["response"] == 0


def test_without_a_gpu_memory_says_what_is_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(DEVICES, "cuda", replace(CUDA, find=lambda: None))
    monkeypatch.setitem(MODELS, "20m-nf4", small(MODELS["20m-nf4"]))
    monkeypatch.setattr(memory.logging, "disable", lambda level: None)
    choice = ["--model", "20m", "--gib", "2", "8", "--prompt", "short", "--output", str(tmp_path / "out.json")]
    assert command_line.main(["memory", *choice]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert not result["measured"] and result["contenders"] == {}
    assert 1000 < result["predicted"]["short"]["2"] < result["predicted"]["short"]["8"]
    drawn = [(tmp_path / name).read_text() for name in ("out.svg", "out-dark.svg")]
    assert all(f"2 x {result['predicted']['short']['8']:,}" in text for text in drawn)
    said = capsys.readouterr()
    assert "nothing is measured" in said.err and "**Predicted by `fastdpo plan`, not measured" in said.out


def measured_memory() -> dict[str, Any]:
    """As a GPU's result would be: fastdpo reaches the aim on 8 GiB, misses it on 12, ran out of time on 24."""
    cell = {"peak_allocated": 7 * 2**30, "peak_reserved": 2**33, "seconds": 3.0}
    lengths = {"8": (1600, 1601, True), "12": (9000, 9100, True), "16": (0, 900, False), "24": (30_000, 50_000, False)}
    found = {gib: {"response": low, "too_long": up, "settled": s, **cell} for gib, (low, up, s) in lengths.items()}
    row = {"trainer": "fastdpo", "settings": {}, "failed": None, "longest": {"short": found}, "trials": []}
    head = memory._head("llama-3.1-8b", ["short"], [8, 12, 16, 24], {"short": dict.fromkeys(lengths, 1443)})
    origin = {"machine": {**FACTS, "threads": 2}, "versions": {}, "python": "3", "date": "", "commit": "abc"}
    late = {**row, "trainer": "trl", "failed": memory.LATE}
    measured = {"device": "cuda", "measured": True, "uncommitted_changes": False, "resolution": 0.03, "simulated": {}}
    return {**head, **origin, **measured, "contenders": {"fastdpo": row, "TRL": late}}


def test_measured_lengths_take_the_place_of_predicted_ones(tmp_path: Path) -> None:
    shutil.copy(table.RESULTS / memory_table.plan_file(memory_table.MODEL), tmp_path)
    before = table.generated(tmp_path)
    assert memory_table.unmeasured() in before and "**Predicted by `fastdpo plan`, not measured" in before
    (tmp_path / memory_table.file_name("cuda", "llama-3.1-8b")).write_text(json.dumps(measured_memory()))
    text = table.generated(tmp_path)
    assert memory_table.unmeasured() not in text and "Predicted by `fastdpo plan`, not" not in text
    assert "response tokens of the longest pair" not in table.waiting_aims(CUDA, tmp_path)
    for line in (
        "| 8 GiB | 2 x 1500 | 2 x 1443 | 2 x 1600, met | 2 x 1600 | 7.00 GiB | 2972 |",
        "| 12 GiB | 2 x 10000 | 2 x 1443 | 2 x 9000, missed | 2 x 9000 | 7.00 GiB | 21848 |",
        "| 16 GiB | 2 x 20000 | 2 x 1443 | less than 2 x 900, missed | less than 2 x 900 | 7.00 GiB | 40724 |",
        "| 24 GiB | 2 x 40000 | 2 x 1443 | 2 x 30000 to 50000 | 2 x 30000 to 50000 | 7.00 GiB | 78475 |",
        "- TRL ended early: `ended by its time`",
    ):
        assert line in text


def test_the_notes_of_a_memory_result_say_what_ran() -> None:
    """On the CPU nothing is offloaded, predicted or in bf16, and there is no card."""
    result = measured_memory()
    result["contenders"]["fastdpo"]["settings"] = dict(CUDA.leanest)
    result["contenders"]["TRL, offloading"] = result["contenders"]["TRL"]
    text = memory_table.render({**result, "planned_for": "B200"})
    for words in ("gradient checkpointing and activation offloading", "as planned for a B200", "`offloading` with"):
        assert words in text
    assert "modules, bf16, one" in text and "adapters in bf16" in text and "for CUDA's context" in text

    contenders = {name: {**result["contenders"][name], "settings": dict(CPU.leanest)} for name in ("fastdpo", "TRL")}
    simulated = {"device": "cpu", "predicted": {}, "simulated": {"8": 80}, "contenders": contenders}
    text = memory_table.render({**result, **simulated})
    assert "fastdpo with gradient checkpointing. Nothing of this is memory" in text
    assert "modules, fp32, one" in text and "adapters in fp32" in text
    for words in ("offloading", "Predicted: as", "bf16", "for CUDA's context"):
        assert words not in text, words


def watched(command: str) -> Any:
    choice = ["--model", "20m", "--pairs", "4", "--batch", "2", "--threads", "1", "--commit", "abc"]
    choice += ["--repeat", "1"] if command == "parts" else []
    options = command_line.parser().parse_args([command, *choice])
    command_line._complete(options)
    return options


def test_parts_of_a_step_are_measured_alone_and_beside_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m", small(MODELS["20m"]))
    options = watched("parts")
    assert options.output == table.RESULTS / "parts-cpu-20m-hh-rlhf-batch-2.json"
    result = json.loads(json.dumps(parts.main(options)))
    names = ["backbone, forward and backward", "reference, forward", "head", "optimizer"]
    assert list(result["parts"]) == names and all(seconds > 0 for seconds in result["parts"].values())
    assert result["step_seconds"] > 0 and result["spread"] == 0 and result["commit"] == "abc"
    result |= {"device": "cuda", "parts": dict(zip(names, (0.5, 0.2, 0.2, 0.1), strict=True)), "step_seconds": 1.04}
    text = parts.render(result)
    assert "| sum of the parts | 1000.00 | 100.0 |" in text and "| the whole step | 1040.00 | 104.0 |" in text
    assert "The aim is 103% at most: missed." in text


def test_a_trace_divides_a_steps_time_and_counts_what_the_host_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(MODELS, "20m", small(MODELS["20m"]))
    result = json.loads(json.dumps(trace.main(watched("trace"))))
    assert list(result["seconds"]) == [*trace.GROUPS, "between operations"]
    assert all(result["seconds"][name] > 0 for name in ("matmul", "attention", "head", "pair loss", "optimizer"))
    assert result["counts"]["operations of torch"] > 100 and result["counts"]["kernels launched"] == 0
    assert "| matmul |" in trace.render(result) and "| host waits for the device | 0 |" in trace.render(result)


def event(name: str, start: float, end: float, device: str = "CUDA", note: bool = False) -> Any:
    """As torch's profiler gives them, in microseconds."""
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, time_range=span, device_type=SimpleNamespace(name=device), is_user_annotation=note
    )


def test_a_gpus_trace_goes_by_ranges_then_by_names_and_finds_the_gaps() -> None:
    events = [
        event("Memset (Device)", 0, 5),  # before the steps: not theirs
        event(trace.WINDOW, 10, 900, "CPU", note=True),
        event("cudaDeviceSynchronize", 950, 990, "CPU"),  # after them
        event("cudaStreamSynchronize", 20, 30, "CPU"),
        event("aten::_local_scalar_dense", 19, 31, "CPU"),
        event("head", 200, 300, note=True),
        event("Optimizer.step#AdamW.step", 800, 850, note=True),
        event("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", 100, 200),
        event("void pytorch_flash::flash_fwd_kernel<...>", 150, 250),  # beside it, until inside of head's range
        event("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", 210, 300),
        event("Memcpy DtoH (Device -> Pinned)", 400, 404),
        event("void at::native::vectorized_elementwise_kernel<4>", 404, 444),
        event("multi_tensor_apply_kernel", 810, 850),
    ]
    result = trace.summary(events, wall=1.0, on_gpu=True)
    per_step = {name: round(1e6 * trace.STEPS * seconds) for name, seconds in result["seconds"].items()}
    assert per_step == {
        **{"matmul": 100, "attention": 100, "head": 90, "pair loss": 0, "optimizer": 40, trace.REST: 40, "copies": 4},
        "idle": 750 - (200 + 44 + 40),
    }
    counts = {name: trace.STEPS * count for name, count in result["counts"].items()}
    assert counts["host waits for the device"] == 1 and counts["values read by the host"] == 1
    assert counts["copies to the host"] == 1 and counts["kernels launched"] == 5


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matmul"),
        ("cublasLt::splitKreduce_kernel", "matmul"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80", "attention"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("aten::addmm", "matmul"),
        ("aten::addcmul_", trace.REST),
        ("void at::native::indexSelectLargeIndex", trace.REST),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, group: str) -> None:
    assert trace.group_of(kernel) == group


def test_a_ceiling_is_measured_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(CPU, kernels=replace(CPU.kernels, matmul_side=64, copy_bytes=4096))
    monkeypatch.setitem(DEVICES, "cpu", tiny)
    measure.main("cpu")
    assert json.loads(capsys.readouterr().out)["flops"] > 0
    known = step.peak_rate(CUDA, {"gpu": "NVIDIA H200"}, 1)
    assert known["flops"] == 790e12


@pytest.fixture(scope="module", params=RESULTS, ids=lambda file: file.stem)
def result(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text())


def test_the_recorded_result_says_where_it_comes_from(result: dict) -> None:
    assert set(result["versions"]) >= {"torch", "transformers", "trl"}
    assert result["versions"]["trl"] == "1.16.0"
    assert result["machine"]["cpu"] and result["machine"]["cores"] and result["commit"] != "none"
    assert result["machine"].keys() >= {"cpu": {"cpu"}, "cuda": {"gpu", "driver", "cuda"}}[result["device"]]


def test_the_recorded_workload_has_the_profile_it_claims(result: dict) -> None:
    work, profile = result["workload"], workload.PROFILES[result["profile"]]
    assert work["median_tokens"] == pytest.approx(profile.median_total, abs=1)
    assert work["prompt_to_response"] == pytest.approx(profile.prompt_to_response, rel=0.01)
    assert work["longest"] <= work.get("max_length", 1024) and work["vocabulary"] >= 32_000
    assert work["parameters"] == MODELS[result["model"]].parameters


def test_a_recorded_result_is_called_by_what_it_measured(result: dict) -> None:
    work = result["workload"]
    named = result["device"], result["model"], result["profile"], work["batch"], work["lora_rank"] is None
    name = table.file_name("step", *named)
    assert (table.RESULTS / name) in RESULTS


def test_the_recorded_flops_are_within_5_percent_of_the_formula(result: dict) -> None:
    """The formula is that of packed pairs: more is computed where a model cannot pack."""
    counted, most = result["configurations"]["fastdpo"]["flops_per_pair"], 1.05
    for epoch, value in result["formula_flops_per_pair"].items():
        assert 0.95 * value < counted[epoch] < (most if MODELS[result["model"]].packs else 2 * most) * value


def test_the_recorded_runs_start_at_ln_2(result: dict) -> None:
    for row in result["configurations"].values():
        for run in row["runs"]:
            assert run["losses"][0] == pytest.approx(math.log(2), abs=result["tolerances"]["first_loss"])


def test_every_aim_of_a_step_stands_on_the_page_until_it_is_measured(tmp_path: Path) -> None:
    """Those of kernels stood there, and those of whole steps nowhere."""
    text = table.waiting_aims(CUDA, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) == len(CUDA.aims) + 2 + len(memory_table.AIMS) and text in table.generated(tmp_path)
    shape = "Llama-3.1-8B's shape, pairs as long as HH-RLHF's"
    quantised_shape, longest = "Mistral-7B-v0.3's shape in NF4", "response tokens of the longest pair"
    for line in (
        f"| speed of fastdpo / TRL tuned, 1 epoch: {shape}, HelpSteer's | >= 1.8 |",
        f"| MFU of fastdpo, 1 epoch: {shape}, HelpSteer's, UltraFeedback's | >= 0.5 |",
        f"| a step / the sum of its parts: {shape} | <= 1.03 |",
        "| peak memory as planned / as measured, in 16 settings (`make gpu-plan`) | 0.9 to 1.1 |",
        f"| speed of fastdpo / Unsloth, 1 epoch: {quantised_shape}, pairs as long as UltraFeedback's | >= 1.3 |",
        f"| {longest} on 24 GiB, prompts of 16 tokens: Llama-3.1-8B's shape in NF4 | >= 2 x 40000 |",
    ):
        assert line in rows
    (tmp_path / table.file_name("parts", "cuda", "llama-3.1-8b", "hh-rlhf")).touch()
    file = tmp_path / table.file_name("step", "cuda", "llama-3.1-8b", "hh-rlhf")
    here = {"device": "cuda", "model": "llama-3.1-8b", "profile": "hh-rlhf", "machine": FACTS}
    ratios = [{"name": aim.quantity, "value": 1.0} for aim in CUDA.aims]
    file.write_text(json.dumps({**here, "ratios": ratios}))
    text = table.waiting_aims(CUDA, tmp_path)
    assert "HH-RLHF" not in text and "sum of its parts" not in text and "as long as HelpSteer's | >= 2.5 |" in text
    file.write_text(json.dumps({**here, "ratios": [ratio for ratio in ratios if "TRL" not in ratio["name"]]}))
    text = table.waiting_aims(CUDA, tmp_path)
    assert f"| speed of fastdpo / TRL tuned, 1 epoch: {shape}, HelpSteer's | >= 1.8 |" in text  # TRL did not run
    assert "| MFU of fastdpo, 1 epoch: Llama-3.1-8B's shape, pairs as long as HelpSteer's" in text


@pytest.mark.parametrize("without", [None, "TRL default", "TRL tuned", "Unsloth"])
def test_a_step_is_measured_once_trl_ran(without: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("step", "cuda", "mistral-7b", "hh-rlhf")
    monkeypatch.setattr(table, "PLANNED", {key: "make gpu-step-mistral"})
    assert any("make gpu-step-mistral" in line for line in table.unmeasured(tmp_path))
    names = ("fastdpo", "TRL default", "TRL tuned", "Unsloth")
    rows = {name: {"failed": "not installed"} if name == without else {} for name in names}
    (tmp_path / table.file_name(*key)).write_text(json.dumps({"configurations": rows}))
    waits = any("make gpu-step-mistral" in line for line in table.unmeasured(tmp_path))
    assert waits == (without in ("TRL default", "TRL tuned"))


def stage_record(file: Path, *parts: dict[str, Any]) -> None:
    machine = {**FACTS, "threads": 16}
    origin = {"date": "2026-01-01", "commit": "abc", "uncommitted_changes": False, "python": "3.12", "versions": {}}
    file.write_text(json.dumps({**origin, "machine": machine, "parts": parts}))


@pytest.mark.parametrize("stage", ["tests", "plan"])
def test_what_a_stage_shows_is_open_until_all_of_its_commands_ended_well(stage: str, tmp_path: Path) -> None:
    """Its record is written before the first command begins."""
    for ends, waiting in (((False, False), True), ((True, False), True), ((True, True), False)):
        stage_record(tmp_path / f"gpu-{stage}.json", *({"ok": ok} for ok in ends))
        line = "peak memory as planned" if stage == "plan" else "encoder-decoders, rows with images"
        assert (line in table.generated(tmp_path)) == waiting


def test_the_plans_ratios_stand_in_a_table_with_their_aim(tmp_path: Path) -> None:
    name = "tests/test_gpu.py::test_the_planned_peak_is_the_measured_one"
    figures = {f"{name}[1B-2048-lora-checkpointing]": 0.97, f"{name}[small-8192-full-]": 1.2}
    noted = [{"test": test, "figures": {"planned / measured": x, "MiB measured": 512}} for test, x in figures.items()]
    stage_record(tmp_path / "gpu-plan.json", {"ok": False, "tests": [*noted, {"test": "another", "figures": {}}]})
    text = table.generated(tmp_path)
    assert "### Peak memory as planned and as measured on a GPU\n\nNVIDIA H200, 150 GiB" in text
    assert "| 1B, 2048, lora, checkpointing | 512 | 0.970 | 0.9 to 1.1 | met |" in text
    assert "| small, 8192, full | 512 | 1.200 | 0.9 to 1.1 | missed |" in text and "another" not in text


def test_the_least_work_counts_one_two_and_three_products() -> None:
    shape, ceilings = (8192, 128_256, 4096), Ceilings(790e12, 4.3e12)
    product = 2 * 8192 * 128_256 * 4096
    assert [head_work(shape, wants, 2).flops / product for wants in kernel_table.WANTS] == [1, 2, 3]
    assert [round(1e3 * head_work(shape, wants, 2).seconds(ceilings), 1) for wants in kernel_table.WANTS] == [
        10.9,
        21.8,
        32.7,
    ]
    few = (1, 128_256, 4096)  # one row reads the whole head: bound by bytes
    assert head_work(few, FORWARD, 2).seconds(ceilings) == pytest.approx(2 * 128_257 * 4096 / 4.3e12, rel=1e-3)
    gradients = [head_work(few, wants, 2).bytes - head_work(few, FORWARD, 2).bytes for wants in kernel_table.WANTS]
    assert gradients == [0, 2 * 4096, 2 * (1 + 128_256) * 4096]


@pytest.fixture(scope="module")
def head() -> heads.Head:
    return heads.make_head((520, 1030, 64), "float32", "cpu")


def test_a_heads_truth_is_that_of_autograd_in_fp64(head: heads.Head) -> None:
    hidden, weight = head.hidden.double().requires_grad_(), head.weight.double().requires_grad_()
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, head.targets[:, None])[:, 0]
    gradients = torch.autograd.grad(logps, (hidden, weight), head.upstream.double())
    assert max(heads.errors(head, TRAINED_HEAD, (logps.detach(), *gradients)).values()) < 1e-13
    one_off = logps.detach().clone()
    one_off[-1] += 0.1
    assert heads.errors(head, FORWARD, (one_off,))["logps"] == pytest.approx(0.1 / 520**0.5, rel=1e-3)


def test_targets_are_likely_from_one_to_99_percent_and_sequences_share_their_upstream(head: heads.Head) -> None:
    chances = head.truth.logps.exp()
    assert chances.min() < 0.02 and chances.max() > 0.97 and abs(chances.median() - 0.5) < 0.05
    values = head.upstream.unique_consecutive()
    assert len(values) == 2 and values[0] > 0 > values[1]
    assert 0 < head.truth.kept_tiles <= 1
    again = heads.make_head((520, 1030, 64), "float32", "cpu")
    assert torch.equal(again.hidden, head.hidden) and torch.equal(again.targets, head.targets)


def test_rare_tokens_leave_tiles_that_a_filter_may_skip() -> None:
    assert 0.2 < heads.make_head((128, 128_256, 128), "float32", "cpu").truth.kept_tiles < 0.5


@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if name != "torch.compile"])  # it takes long
def test_a_contender_that_runs_here_computes_log_probs_and_gradients(name: str, head: heads.Head) -> None:
    """The way each is called and its sign; what needs a GPU says so."""
    try:
        way = contenders.CONTENDERS[name](head)
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    for wants in kernel_table.WANTS:
        values = bench_linear_logps.timed_call(way, head, wants)()
        assert len(values) == kernel_table.WANTS.index(wants) + 1
        found = heads.errors(head, wants, (way.sign * values[0], *values[1:]))
        assert max(found.values()) < CPU.kernels.allowed_gradient_error, found


@pytest.mark.parametrize("name", [name for name in pairs.CONTENDERS if "compile" not in name])
@pytest.mark.parametrize("loss", pairs.WEIGHTED)
def test_preference_losses_of_all_contenders_agree(name: str, loss: str) -> None:
    some, weights = pairs.make_pairs(7, "cpu"), pairs.WEIGHTED[loss]
    try:
        way = pairs.CONTENDERS[name](some, weights)
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    for wants in (FORWARD, bench_pair_loss.WITH_GRADIENT):
        found = pairs.errors(some, weights, way, wants, pairs.timed_call(way, some, wants)())
        assert max(found.values()) < 1e-4, found


def test_padded_rows_hold_chosen_responses_first_and_pack_back() -> None:
    some = pairs.make_pairs(3, "cpu")
    assert some.rows.shape[0] == 6 and int(some.scored.sum()) == len(some.token_logps)
    assert torch.equal(some.rows[1], torch.nn.functional.pad(*_second_chosen(some)))
    assert torch.equal(some.packed(some.rows), some.token_logps)


def _second_chosen(some: pairs.Pairs) -> tuple[torch.Tensor, tuple[int, int]]:
    start, end = some.cu_seqlens[2:4].tolist()
    return some.token_logps[start:end], (0, some.rows.shape[1] - (end - start))


class Stopwatch:
    """What a turn needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.stats = "", {}, None

    def pedantic(self, call: Any, setup: Any, rounds: int, iterations: int) -> None:
        seconds = [median_seconds(CpuMeter(), call, rounds=1, warmup=0) for _ in range(rounds)]
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds))


def take_turn(row: Row, first: Any, deadline: float = math.inf, meter: CpuMeter | None = None) -> None:
    turn.take_turn(Stopwatch(), row, meter or CpuMeter(), CPU.kernels, deadline, first)


@pytest.mark.parametrize("name", [name for name in weights.CONTENDERS if name != "torch.compile"])
def test_four_bit_weights_of_all_contenders_are_one_in_every_bit(name: str) -> None:
    weight = weights.make_weight((64, 128), "bfloat16", "cpu")
    try:
        way = weights.CONTENDERS[name](weight)
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    assert weights.errors(weight, way.compute()) == {"elements": 0.0}
    assert weight.work.bytes == 64 * 128 * 2.5 + 128 + 4 / 2


@pytest.mark.parametrize("task", adapters.TASKS)
@pytest.mark.parametrize("name", adapters.CONTENDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_of_all_contenders_is_what_fp64_says(name: str, task: str, dtype: str) -> None:
    block = adapters.make_block((24, 256, 512), dtype, "cpu")
    try:
        way = adapters.CONTENDERS[name](block)
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    found = adapters.errors(block, task, adapters.timed_call(way, block, task)())
    assert max(found.values()) < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("wants", [FORWARD, blocks.WITH_GRADIENT])
@pytest.mark.parametrize("name", [name for name in blocks.CONTENDERS if name != "torch.compile"])
@pytest.mark.parametrize(("op", "shape"), blocks.shapes((6, 24, 4, 2, 8, 40)), ids=str)
def test_a_blocks_contenders_compute_the_same(op: str, shape: tuple[int, ...], name: str, wants: str) -> None:
    task = blocks.make_task(op, shape, "float32", "cpu")
    try:
        way = blocks.CONTENDERS[name](task)
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    found = blocks.timed_call(way, task, wants)()
    assert blocks.errors(task, wants, found)["results"] < 1e-6
    assert len(found) == (1 if wants == FORWARD else 1 + len(task.learned)) + (op == "rope")


def test_a_blocks_work_is_its_inputs_once_in_and_its_results_once_out() -> None:
    bytes_of = {
        op: [blocks.make_task(op, shape, "bfloat16", "cpu").work(wants).bytes for wants in (FORWARD, "both")]
        for op, shape in blocks.shapes((6, 24, 4, 2, 8, 40))
        if op != "rms_norm" or shape[1] == 24
    }
    x, weight, h, heads, factors = 6 * 24 * 2, 24 * 2, 6 * 40 * 2, 6 * 6 * 8 * 2, 6 * 16 * 2
    assert bytes_of["rms_norm"] == [2 * x + weight, 5 * x + 2 * weight]
    assert bytes_of["rope"] == [2 * heads + factors, 4 * heads + 2 * factors]
    assert bytes_of["glu"] == [3 * h, 8 * h]


def test_a_weights_row_shows_its_bandwidth(tmp_path: Path) -> None:
    results = Results({"device": "cuda"}, Ceilings(1e12, 4e12), tmp_path / "out.json")
    row = results.row("nf4", (64, 128), "bfloat16", "nested scales", "fastdpo triton")
    row.laps, row.work, row.peak_bytes = [[1e-3]], Work(0.0, 3.4e9), 2**20
    results.save()
    text = kernel_table._rate_table(json.loads((tmp_path / "out.json").read_text())["rows"])
    assert "| fastdpo triton | 1 | 3400 | 85 | 1 |" in text


def new_row(contender: str = "Liger FLCE") -> Row:
    return Row("linear_logps", (8, 16, 4), "float32", FORWARD, contender)


def test_a_turn_is_timed_in_every_lap() -> None:
    row = new_row()
    for _ in range(2):
        take_turn(row, lambda: lambda: None)
    assert [len(lap) for lap in row.laps] == [turn.MOST_ROUNDS] * 2 and row.reason is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (turn.Wrong("wrong: logps off by 1"), "wrong: logps off by 1"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("CUDA error: an illegal access\nmore"), "failed: RuntimeError: CUDA error: an illegal access"),
        (contenders.Unavailable("it is not installed"), "it is not installed"),
    ],
    ids=["wrong", "memory", "dies", "missing"],
)
def test_a_contender_that_fails_keeps_a_row_that_says_why_and_no_time(error: Exception, reason: str) -> None:
    row = new_row()
    row.laps.append([1.0])  # of an earlier lap: a time of who fails later is none

    def first() -> Any:
        raise error

    for _ in range(2):  # the second lap does not try again
        with pytest.raises(pytest.skip.Exception, match=reason.split(":")[0]):
            take_turn(row, first)
    assert row.reason == reason and row.laps == []
    assert row.summary(Ceilings(1.0, 1.0))["median"] is None


def test_fastdpo_failing_is_an_error_unless_it_cannot_run_there() -> None:
    def wrong() -> Any:
        raise turn.Wrong("wrong")

    def missing() -> Any:
        raise contenders.Unavailable("needs a GPU")

    with pytest.raises(turn.Wrong):
        take_turn(new_row("fastdpo streamed"), wrong)
    with pytest.raises(pytest.skip.Exception, match="needs a GPU"):
        take_turn(new_row("fastdpo streamed"), missing)


def test_errors_beyond_what_is_allowed_and_nan_are_wrong() -> None:
    row = new_row()
    turn.check(row, {"logps": 0.9, "hidden gradient": 0.1}, {"logps": 1.0, "hidden gradient": 0.1})
    assert row.errors == {"logps": 0.9, "hidden gradient": 0.1}
    for error in (1.1, math.nan):
        with pytest.raises(turn.Wrong, match="logps off by"):
            turn.check(row, {"logps": error}, {"logps": 1.0})


def test_nobody_gets_a_turn_after_the_time_is_up_or_on_a_gpu_that_died() -> None:
    late, dead = new_row("fastdpo streamed"), new_row("fastdpo streamed")
    with pytest.raises(pytest.skip.Exception, match="time for all of them was used up"):
        take_turn(late, lambda: lambda: None, deadline=0.0)
    meter = CpuMeter()
    meter.dead = "CUDA error: an illegal access"
    with pytest.raises(pytest.skip.Exception, match="stopped answering"):
        take_turn(dead, lambda: lambda: None, meter=meter)


def test_contenders_take_turns_and_the_riskiest_comes_last() -> None:
    order = bench_linear_logps.turns(CUDA.kernels)
    task = [t for t in order if (t.shape, t.wants) == (CUDA.kernels.heads[0], FROZEN_HEAD)]
    others = [name for name in contenders.CONTENDERS if name not in contenders.AIMED_AT]
    assert {t.contender for t in order[: len(order) // 3]} == set(contenders.AIMED_AT)
    first = [name for name in contenders.CONTENDERS if name in contenders.AIMED_AT]
    assert [t.contender for t in task] == first * CUDA.kernels.laps + others * CUDA.kernels.laps
    assert list(contenders.CONTENDERS)[-1].startswith("CCE") and len({str(t) for t in order}) == len(order)
    assert CUDA.kernels.heads == ((8192, 128256, 4096), (8192, 151936, 3584), (2048, 128256, 4096), (4096, 32000, 4096))


def test_a_cpus_peak_counts_what_a_call_allocates_and_returns() -> None:
    def call() -> torch.Tensor:
        big = torch.ones(1000, 1000)
        return big.sum(0)

    assert CpuMeter().peak(call) == pytest.approx(4_000_000 + 4000, rel=0.01)


def kernel_results(file: Path, gpu: str = "NVIDIA H200") -> None:
    """As a GPU would write them: fastdpo at twice its roofline, Liger out of memory, TRL wrong at one task."""
    origin = {
        **{"device": "cuda", "date": "2026-01-01", "commit": "abc", "uncommitted_changes": False},
        **{"machine": {**FACTS, "gpu": gpu, "threads": 16}, "python": "3.12", "versions": {"torch": "2.11"}},
        "load_before": 0.0,
    }
    results = Results(origin, Ceilings(790e12, 4.3e12), file)
    shape = CUDA.kernels.heads[0]
    results.heads.append({"shape": shape, "p_target": {}, "kept_tiles": 0.23})
    for wants in kernel_table.WANTS:
        ours = results.row("linear_logps", shape, "bfloat16", wants, "fastdpo streamed")
        ours.work = head_work(shape, wants, 2)
        ours.laps = [[2 * ours.work.seconds(results.ceilings)] * 3] * 2
        ours.path, ours.errors, ours.peak_bytes, ours.result_bytes = "chunks", {"logps": 1e-3}, 3 * 10**8, 10**7
        results.row("linear_logps", shape, "bfloat16", wants, "Liger FLCE").reason = "out of memory"
    results.row("linear_logps", shape, "bfloat16", FORWARD, "TRL chunked").reason = "wrong: logps off by 9"
    one = results.row("pair_loss", (64,), "float32", "sigmoid, forward", "fastdpo triton")
    results.row("pair_loss", (64,), "float32", "sigmoid, forward and backward", "fastdpo triton").reason = "failed"
    one.laps, one.seconds_in_graph, one.launches, one.path = [[30e-6]], 5e-6, [("_pair_loss_kernel", 1, 4.0)], "kernel"
    results.save()


def test_a_gpus_kernels_get_tables_with_their_aims_and_reasons(copy: Path) -> None:
    waiting = list(CUDA.kernels.unmeasured.values())
    assert all(line in (copy / "benchmarks/README.md").read_text() for line in waiting)
    kernel_results(copy / "benchmarks/results/kernels-cuda.json")
    assert benchmarks(copy, "table", "--check").returncode == 1
    assert benchmarks(copy, "table").returncode == 0
    text, front = (copy / "benchmarks/README.md").read_text(), (copy / "README.md").read_text()
    assert "### Kernels on a GPU" in text and [line in text for line in waiting] == [False, True]
    assert "By arithmetic" not in text and "| ms: fastdpo triton, nested scales, 14336x4096 | <= 0.0404 |" in text
    assert "| fastdpo streamed | 21.8 | 50 | 286 | 43.6 | 50 | 286 | 65.4 | 50 | 286 | 1.0e-03 |  |" in text
    assert "| ms: fastdpo streamed, forward, 8192x128256x4096 | 21.8 | <= 12.5 | missed |" in text
    assert "| MB beside results: fastdpo streamed, frozen head, 8192x128256x4096 | 290 | <= 300 | met |" in text
    assert "| fastdpo triton | 5 | 1 | 30 |" in text
    assert "| GPU µs: fastdpo triton, sigmoid, forward and backward, 64 |  | <= 15 | no number |" in text
    assert "| launches: fastdpo triton, sigmoid, forward, 64 | 1 | <= 1 | met |" in text
    assert "without a number: Liger FLCE: out of memory." in text
    assert "without a number: TRL chunked: wrong: logps off by 9." in text
    assert (
        "| linear_logps 8192x128256x4096 bfloat16, frozen head | fastdpo streamed: 43.6; 50%; 286 |  |  |  |" in front
    )
    assert "Plain torch on a CPU" not in front


def test_kernels_in_two_files_of_a_device_make_one_table_of_the_front_page(tmp_path: Path) -> None:
    """Only the head's file was read, so that what `make gpu` measured of pair_loss stood nowhere."""
    file = tmp_path / "kernels-cuda.json"
    kernel_results(file)
    result = json.loads(file.read_text())
    loss = [{**row, "wants": "sigmoid, forward and backward"} for row in result["rows"] if row["op"] == "pair_loss"]
    head = [row for row in result["rows"] if row["op"] == "linear_logps"]
    for name, rows in (("", head), ("-blocks", loss)):
        (tmp_path / f"kernels-cuda{name}.json").write_text(json.dumps({**result, "rows": rows}))
    text = front_page.kernels(tmp_path)
    assert [line.split(",")[0] for line in text.splitlines()[2:-2]] == [
        *["| linear_logps 8192x128256x4096 bfloat16"] * 3,
        "| pair_loss 64 float32",
    ]
    assert text.count("NVIDIA H200, 150 GiB") == 1


def test_aims_are_of_the_gpu_that_they_name(tmp_path: Path) -> None:
    kernel_results(tmp_path / "out.json", gpu="NVIDIA A100")
    assert "aim" not in kernel_table.render(json.loads((tmp_path / "out.json").read_text()))


def test_a_row_has_the_median_of_all_rounds_and_its_share_of_the_roofline() -> None:
    row = new_row()
    row.laps, row.work = [[1.0, 2.0, 3.0], [4.0, 5.0]], Work(flops=3.0, bytes=1.0)
    summary = row.summary(Ceilings(flops=2.0, bytes=1.0))
    assert summary["median"] == 3.0 and summary["laps"] == [2.0, 4.5] and summary["iqr"] == 2.0
    assert summary["roofline_seconds"] == 1.5 and summary["of_roofline"] == 0.5


def bench(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    usual = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # beside others none is measured
    environment = usual | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_interpreted_kernels_are_not_measured() -> None:
    done = bench(interpret="1")
    assert done.returncode == 4 and "TRITON_INTERPRET is set" in done.stderr


def test_the_benchmarks_write_down_what_they_measure_with_machine_and_versions(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    chosen = (
        "(256x4096x256-forward and (fastdpo or cross_entropy)) or (pair_loss and sigmoid-forward-TRL and not compile)"
    )
    done = bench("-k", chosen, "--kernel-json", str(output), "--kernel-commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["benchmark"] == "kernels" and result["device"] == "cpu" and result["commit"] == "abc"
    assert result["machine"]["cpu"] and result["versions"]["torch"] == torch.__version__
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows["fastdpo streamed"]["reason"] and rows["fastdpo streamed"]["median"] is None
    ours = rows["fastdpo torch"]
    assert ours["reason"] is None and ours["median"] > 0 and ours["iqr"] >= 0 and len(ours["laps"]) == CPU.kernels.laps
    assert (
        ours["of_roofline"] > 0 and ours["errors"]["logps"] < 1e-4 and ours["path"] == "chunks of rows in plain torch"
    )
    assert ours["peak_bytes"] > 4 * 256 * 4096 and rows["torch cross_entropy"]["version"] == torch.__version__
    assert rows["TRL's formulas"]["op"] == "pair_loss" and rows["TRL's formulas"]["median"] > 0


@pytest.fixture(scope="module", params=KERNEL_RESULTS, ids=lambda file: file.stem)
def kernel_result(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text())


def test_recorded_kernels_say_where_they_come_from(kernel_result: dict) -> None:
    assert kernel_result["commit"] != "none" and kernel_result["versions"]["trl"] == "1.16.0"
    facts = {"cpu": {"cpu"}, "cuda": {"gpu", "driver", "cuda"}}[kernel_result["device"]]
    assert kernel_result["machine"].keys() >= facts and kernel_result["ceilings"]["flops"] > 0


def test_recorded_kernels_hold_every_contender_at_every_task(kernel_result: dict) -> None:
    device = DEVICES[kernel_result["device"]].kernels
    found = {(row["op"], tuple(row["shape"]), row["wants"], row["contender"]) for row in kernel_result["rows"]}
    tasks = {(bench_linear_logps.OP, t.shape, t.wants, t.contender) for t in bench_linear_logps.turns(device)}
    of_pairs = {(t.wants, t.loss, t.contender) for t in bench_pair_loss.turns(device)}
    tasks |= {(bench_pair_loss.OP, (64,), f"{loss}, {wants}", name) for wants, loss, name in of_pairs}
    recorded = {op for op, *_ in found}  # files from before these were measured have none of them
    if bench_nf4.OP in recorded:
        tasks |= {(bench_nf4.OP, t.shape, bench_nf4.WANTS, t.contender) for t in bench_nf4.turns(device)}
    if bench_lora.OP in recorded:
        tasks |= {(bench_lora.OP, t.shape, t.task, t.contender) for t in bench_lora.turns(device)}
    if "glu" in recorded:
        tasks |= {(t.op, t.shape, t.wants, t.contender) for t in bench_blocks.turns(device)}
    assert found == tasks


def test_recorded_kernels_have_a_number_that_was_checked_or_a_reason(kernel_result: dict) -> None:
    device = DEVICES[kernel_result["device"]].kernels
    for row in kernel_result["rows"]:
        assert (row["median"] is None) == (row["reason"] is not None), row["contender"]
        if row["median"] is not None:
            assert row["path"] and len(row["laps"]) == device.laps and row["errors"]
        if row["median"] is not None and row["op"] == bench_linear_logps.OP:
            limits = {"logps": device.allowed_logp_error}
            assert all(e <= limits.get(name, device.allowed_gradient_error) for name, e in row["errors"].items())
