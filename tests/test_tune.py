"""The tuner's way but for the GPU's clock: what compiles, what is let through to be timed, and what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import knobs, measure, tune
from benchmarks.measure import CpuMeter
from fastdpo_kernels import compile_report, launch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.0)


def tried(name: str, candidate: str, monkeypatch: pytest.MonkeyPatch, change: Any = None) -> dict[str, Any]:
    """In the interpreter, `change` in the candidate's place where it is given."""
    knob = knobs.KNOBS[name]
    if change is not None:
        monkeypatch.setitem(knobs.KNOBS, name, replace(knob, candidates={candidate: change}))
    return tune.against_default(name, knob.tasks[0], candidate, CpuMeter(), small=True)


@pytest.mark.parametrize(
    "name", ["nf4_config", "norm_config", "norm_programs", "rope_config", "glu_config", "MLP_ROWS"]
)
def test_a_candidate_with_the_defaults_results_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = tried(name, next(iter(knobs.KNOBS[name].candidates)), monkeypatch)
    assert row["error"] <= 1e-5 and row["seconds"] > 0 and row["default_seconds"] > 0, row


def test_a_candidate_with_other_results_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are shorter than a row."""
    short = lambda real: lambda *given, **named: replace(real(*given, **named), block=64)  # noqa: E731
    row = tried("norm_config", "short", monkeypatch, short)
    assert row["reason"].startswith("wrong: off by") and "seconds" not in row


def test_a_candidate_that_races_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call in three has another last bit, as sums in no fixed order do."""
    make, calls = knobs.TASKS["nf4"].make, []

    def racing(draw: Any, shape: Any) -> Any:
        call = make(draw, shape)
        return lambda: (calls.append(0), (call()[0] * (1 + 1e-7 * (len(calls) == 3)),))[1]

    monkeypatch.setitem(knobs.TASKS, "nf4", replace(knobs.TASKS["nf4"], make=racing))
    assert tried("nf4_config", "block times 2", monkeypatch)["reason"] == "wrong: another call gave other bits"


def test_a_candidate_that_fails_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    row = tried("norm_config", "odd", monkeypatch, lambda real: lambda *given, **named: 1 / 0)
    assert row["reason"] == "failed: ZeroDivisionError: division by zero"


def test_the_default_stands_again_after_a_candidate() -> None:
    before = launch.nf4_config
    with knobs.KNOBS["nf4_config"].turned("block times 2"):
        assert launch.nf4_config().block == 2 * before().block
    assert launch.nf4_config is before


def test_what_follows_from_a_number_follows_from_the_candidates() -> None:
    """The ranges of a head's vocabulary, which launch.py remembers."""
    device = launch.EXAMPLES["H200"]
    config = launch.fused_logits(4096, torch.bfloat16, device, aligned=True)
    ranges = lambda: launch.fused_ranges(4096, 32_000, config, device)  # noqa: E731
    default, knob = ranges(), knobs.KNOBS["ROW_TILES_SIDE_BY_SIDE"]
    with knob.turned("4"):
        assert ranges() != default
    assert ranges() == default


def test_a_candidates_launch_numbers_are_written_down_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried("nf4_config", "block times 2", monkeypatch)["launched"] == {
        "nf4_config()": "RowConfig(block=2048, num_warps=8, num_stages=1, registers=None)"
    }
    assert tried("norm_config", "rows times 2", monkeypatch)["launched"] == {
        "norm_config(128)": "NormConfig(rows=32, block=128, num_warps=4)"
    }
    assert tried("MLP_ROWS", "4096", monkeypatch)["launched"] == {"MLP_ROWS": "4096"}
    given: dict[str, str] = {}
    with knobs.KNOBS["fused_config:few"].turned(
        "few_logits: block_m=64, block_n=256, num_warps=8, num_stages=3, resident=1", given
    ):
        launch.fused_config(torch.bfloat16, launch.EXAMPLES["H200"], True)
    assert list(given) == ["fused_config(torch.bfloat16, True)"]
    assert given["fused_config(torch.bfloat16, True)"].startswith("few_logits=MatmulConfig(block_m=64, block_n=256")
    assert "gradient" not in given["fused_config(torch.bfloat16, True)"]


def test_the_help_names_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(knobs.KNOBS) == tune.KNOBS
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["tune", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in knobs.KNOBS)
    assert all(hasattr(launch, name) for name in tune.KNOBS if name != "fused_config:few")


def test_time_on_a_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(tune.DEVICES, "cuda", replace(tune.DEVICES["cuda"], find=lambda: None))
    with pytest.raises(SystemExit, match="error: --seconds 60 is time on a GPU, and there is none"):
        command_line.main(["tune", "nf4_config", "--seconds", "60"])


def test_default_and_candidate_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def within(name: str) -> Any:
        order.append(name)
        yield

    monkeypatch.setattr(tune, "SECONDS", 0.05)
    contexts = {name: lambda name=name: within(name) for name in ("default_seconds", "seconds")}
    tune.in_turns(lambda: None, contexts, CpuMeter(), in_graph=False)
    assert len(order) > 4 and order == ["default_seconds", "seconds"] * (len(order) // 2)


def test_every_candidate_is_something_else_than_the_default() -> None:
    """By what launches: its config differs where the task's shape asks for it, its number differs anyhow."""
    given: dict[str, tuple[Any, ...]] = {
        "row_config": (128_256, 2),
        "default_workspace_bytes": (launch.EXAMPLES["H200"],),
        "fused_config": (torch.bfloat16, launch.EXAMPLES["H200"], True),
        "norm_config": (4096,),
        "norm_programs": (8192, 4096, launch.EXAMPLES["H200"]),
        "rope_config": (64, 32),
        "glu_config": (14_336, 2, True),
    }
    for name, knob in knobs.KNOBS.items():
        default, found = getattr(launch, knob.name), []
        arguments = given.get(knob.name, ())
        for change in knob.candidates.values():
            found.append(change(default)(*arguments) if callable(default) else change(default))
        assert (default(*arguments) if callable(default) else default) not in found, name
        assert len(set(found)) == len(found), name


def test_a_candidate_that_spills_anywhere_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def spilling(cases: Any, jobs: int) -> dict[Any, Any]:
        spills = {case: 8 * (case.device == "T4" and "block times 2" in str(case)) for case in cases}
        return {case: [compile_report.Kernel("k", case.device, "", spill_bytes=spills[case])] for case in cases}

    monkeypatch.setattr(compile_report, "compile_each", spilling)
    rows = tune.compiled(["nf4_config"], knobs.cases(["nf4_config"], ["T4", "H200"], "H200"), jobs=1)
    reasons = {row["candidate"]: row["reason"] for row in rows}
    assert len(rows) == 6 and sum(map(bool, reasons.values())) == 2
    assert reasons["block times 2"] == "k on T4 () spills 8 bytes a thread" and not reasons["num_warps times 2"]


def test_candidates_are_timed_while_there_is_time_and_each_is_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "CudaMeter", CpuMeter)
    monkeypatch.setitem(knobs.TASKS, "nf4", replace(knobs.TASKS["nf4"], shape=(48, 64)))
    clock = iter([0.0, 0.0, 1.0, *[9.0] * 20])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    fields = ("knob", "task", "candidate")
    rows = [{**dict(zip(fields, key, strict=True)), "reason": ""} for key in knobs.to_try(["nf4_config"])[:3]]
    rows[0]["reason"] = "k on T4 () spills 8 bytes a thread"
    tune._time_all({"rows": rows}, 5.0, tmp_path / "tune.json")
    found = json.loads((tmp_path / "tune.json").read_text())["rows"]
    assert ["seconds" in row for row in found] == [False, True, False]
    assert found[0]["reason"].endswith("spills 8 bytes a thread")
    assert found[2]["reason"] == "not run: the time for all of them was used up"


def test_without_a_gpu_candidates_are_compiled_and_nothing_is_timed(tmp_path: Path) -> None:
    """For one architecture, as `python -m benchmarks tune` does for all knobs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "tune", "pair_loss_config", "--threads", "1"]
    command += ["--output", str(tmp_path / "tune.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tune.json").read_text())
    assert result["compiled_for"] == ["H200"] and not result["measured"] and "nothing was run" in done.stdout
    for row in result["rows"]:
        names = {name for name, *_ in row["takes"]["H200"]}
        assert len(names) == 2 and all(registers > 16 for _, registers, _, _ in row["takes"]["H200"])
        assert row["reason"] == "" and "seconds" not in row


def test_what_is_not_known_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="error: glu: expected some of row_config, "):
        command_line.main(["tune", "glu"])
    with pytest.raises(SystemExit):
        command_line.main(["tune", "--device", "cpu"])
    assert "--device cpu, expected cuda" in capsys.readouterr().err


def row(candidate: str, task: str, seconds: float, default: float = 1.0) -> dict[str, Any]:
    times = {"seconds": seconds, "default_seconds": default}
    return {
        "knob": "nf4_config",
        "candidate": candidate,
        "task": task,
        "flops": 0.0,
        "bytes": 4e9,
        "reason": "",
        "launched": {"nf4_config()": f"RowConfig({candidate})"},
        **times,
    }


RESULT = {"machine": {"gpu": "NVIDIA H200"}, "date": "2026-11-23"}


def test_the_numbers_to_change_are_those_that_gain_on_every_task() -> None:
    rows = [row("a", "one", 0.5), row("a", "other", 1.2), row("b", "one", 0.8), row("b", "other", 0.8)]
    said = tune.to_change(rows, RESULT)
    assert said.startswith(
        "To change in launch.py (b): nf4_config() to give RowConfig(b) (measured: NVIDIA H200, 2026-11-23: one 5 GB/s, "
        "default 4 GB/s; other 5 GB/s"
    )


def test_where_nothing_gains_the_default_is_what_was_measured() -> None:
    said = tune.to_change([row("a", "one", 0.99), row("b", "one", 1.1)], RESULT)
    assert said == ("The default stays (measured: NVIDIA H200, 2026-11-23: one 4 GB/s; none of 2 others is 2% faster).")
