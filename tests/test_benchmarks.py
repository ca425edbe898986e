"""The benchmark tool, driven from its command line: what it refuses, when it stays silent, and what it wrote down.

The tests of the harness run a copy of benchmarks/ whose training run is replaced by given numbers: they take seconds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "step-cpu.json"

# Put in place of benchmarks.run.run: TRL needs 4 s an epoch after 1 s, fastdpo 1 s an epoch, both the same curve.
STAND_IN = """
def run(spec):
    epochs = spec.stop_after or spec.epochs
    slow = 4.0 if spec.trainer == "trl" else 1.0
    losses = [0.6931472, 0.7, 0.5, 0.4, 0.3, 0.2][: 2 * epochs]
    if spec.trainer == "trl" and spec.settings:
        losses[-1] *= TUNED_FACTOR
    totals = [1.0 + slow * epoch for epoch in range(epochs + 1)]
    flops = [int(1e12 * total) for total in totals] if spec.count_flops else []
    return RunResult(totals, 1.0, flops, 100, int(1000 * slow), losses, [1.0] * len(losses))
"""


def benchmarks(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def stand_in(copy: Path, tuned_factor: float) -> None:
    file = copy / "benchmarks" / "run.py"
    text = file.read_text().replace("\ndef main(", f"\nTUNED_FACTOR = {tuned_factor}\n{STAND_IN}\n\ndef main(")
    file.write_text(text)


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


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(RESULT.read_text())


def test_the_recorded_result_says_where_it_comes_from(result: dict) -> None:
    assert set(result["versions"]) >= {"torch", "transformers", "trl"}
    assert result["versions"]["trl"] == "1.16.0"
    assert result["machine"]["cpu"] and result["machine"]["cores"] and result["commit"]


def test_the_recorded_workload_has_the_profile_it_claims(result: dict) -> None:
    work = result["workload"]
    assert work["median_tokens"] == pytest.approx(186, abs=1)
    assert work["prompt_to_response"] == pytest.approx(2.15, rel=0.01)
    assert work["longest"] <= 1024 and work["vocabulary"] >= 32_000
    assert work["parameters"]["total"] == pytest.approx(20e6, rel=0.05)


def test_the_recorded_flops_are_within_5_percent_of_the_formula(result: dict) -> None:
    counted = result["configurations"]["fastdpo"]["flops_per_pair"]
    assert counted == {
        epoch: pytest.approx(value, rel=0.05) for epoch, value in result["formula_flops_per_pair"].items()
    }


def test_the_recorded_runs_start_at_ln_2(result: dict) -> None:
    for row in result["configurations"].values():
        for run in row["runs"]:
            assert run["losses"][0] == pytest.approx(math.log(2), abs=1e-5)
