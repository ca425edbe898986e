"""`make gpu`: what it says without a device, and what its stages leave when parts of them fail, hang or die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command_line
from benchmarks import gpu, gpu_page, markdown, memory_table, outcomes, provenance
from benchmarks.provenance import save
from benchmarks.table import PLANNED, file_name

ROOT = Path(__file__).parent.parent
MACHINE = {"gpu": "NVIDIA H200", "gpu_memory": 2**37, "cuda": "12.8", "driver": "570", "cpu": "a CPU", "cores": 2}
MODULES = {
    "well": "print('all is well')",
    "failing": "raise SystemExit('the reason')",
    "waiting": "import time; time.sleep(60)",
    "hanging": "import subprocess, sys, time; print('begun', flush=True); subprocess.Popen([sys.executable, '-m', "
    "'sleeping', 'OUT']).wait()",
    "sleeping": "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)",
}
TESTS = """
import os, time, pytest
def test_that_passes(record_property): record_property("planned / measured", 0.97)
def test_that_fails(): assert 1 + 1 == 3
def test_that_is_skipped(): pytest.skip("no bf16 here")
def test_that_dies(): os._exit(11)
def test_after_it(): pass
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """-> runs a stage as if there were a GPU; -> whether it ended well, its record and its page."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code.replace("OUT", str(tmp_path / "process")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which would take longer than the tests
    monkeypatch.setattr(gpu, "CUDA", type("Device", (), {"find": staticmethod(lambda: MACHINE)}))

    def run(*parts: gpu.Part, **more: Any) -> tuple[bool, dict[str, Any], str]:
        stages = {"tried": gpu.Stage("what is tried", parts, **more)}
        monkeypatch.setattr(gpu, "STAGES", stages)
        code = gpu.main(["--results", str(tmp_path / "out"), "--commit", "abc", "tried"])
        texts = [(tmp_path / "out" / name).read_text() for name in ("gpu-tried.json", "gpu-tried.md", "gpu.md")]
        return code == 0, json.loads(texts[0]), texts[1] + texts[2]

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield run
    gpu.STOP.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def part(module: str) -> gpu.Part:
    return gpu.Part((module,), file="out.json")


def test_without_a_device_every_stage_is_printed_with_its_commands_and_nothing_is_written(tmp_path: Path) -> None:
    """By a Python that has no torch, as where nothing is installed yet."""
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--results", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "has no torch, so this is what `make gpu` would run" in done.stdout
    for name, stage in gpu.STAGES.items():
        assert f"make gpu-{name}: {stage.measures}" in done.stdout and f"gpu-{name}.json" in done.stdout
    assert not (tmp_path / "out").exists()


def test_make_hands_a_stage_and_its_folder_to_the_command() -> None:
    command = ["make", "--no-print-directory", "-n", "gpu-memory", "RESULTS=/somewhere", "COMMIT=abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert re.search(r"-m benchmarks\.gpu +--results /somewhere +--commit abc +memory$", done.stdout.strip())


def test_every_target_of_make_for_a_gpu_is_a_stage() -> None:
    """One was of three stages, and nothing that is printed or written named it."""
    targets = re.findall(r"^(?:\.PHONY: .* )?gpu-([\w.-]+)", (ROOT / "Makefile").read_text(), re.M)
    assert not set(targets) - set(gpu.STAGES)


def test_the_first_half_hour_reaches_a_step_of_an_8b_model_and_its_tests_come_before_a_kernels_numbers() -> None:
    wanted = ["tests", "kernels", "step-8b-hh-rlhf", "step-8b-ultrafeedback", "step-mistral-nf4", "memory"]
    assert list(gpu.STAGES)[:9] == [*wanted, "block-tests", "block-kernels", "plan"]
    assert sum(gpu.STAGES[name].seconds for name in wanted[:3]) <= 1800


def test_what_is_not_installed_is_said_before_the_first_stage_with_the_stages_that_lack_it(
    stage: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It showed stage by stage, in the hour that the GPU was there."""
    absent = {"trl", "bitsandbytes", "cut_cross_entropy"}
    monkeypatch.setattr(gpu, "installed", lambda package, site: package not in absent)
    needed, compared = "without it these lack something or end early", "nothing is compared with it in"
    assert gpu.lacking(["tests", "kernels", "step", "step-mistral-nf4", "block-kernels", "tune"]) == [
        f"bitsandbytes is not installed; {needed}: tests, step-mistral-nf4, block-kernels",
        f"trl is not installed; {needed}: step, step-mistral-nf4",
        f"trl is not installed; {compared}: kernels",
        f"cut-cross-entropy is not installed; {compared}: kernels",
    ]
    stage(gpu.Part(("step",)))
    assert capsys.readouterr().err.startswith(f"trl is not installed; {needed}: tried\n")
    monkeypatch.setattr(gpu, "CUDA", type("Device", (), {"find": staticmethod(lambda: None)}))
    gpu.main(["tried"])
    assert f"trl is not installed; {needed}: tried\n" in capsys.readouterr().out


def test_a_folder_with_unsloth_has_no_other_package_for_the_stages(tmp_path: Path) -> None:
    for name in ("unsloth", "liger_kernel"):
        (tmp_path / name).mkdir()
    without = {line.split(" ")[0] for line in gpu.lacking(["step"], tmp_path)}
    assert "unsloth" not in without and "liger-kernel" in without


def test_every_word_that_needs_a_package_is_one_of_a_stages_command() -> None:
    words = {word for stage in gpu.STAGES.values() for one in stage.parts for word in one.words}
    assert not {*gpu.NEEDS, *gpu.COMPARED} - words
    assert {name for needs in (*gpu.NEEDS.values(), *gpu.COMPARED.values()) for name in needs} <= set(gpu.PACKAGES)


def test_every_stage_ends_within_nine_minutes_by_commands_that_there_are(tmp_path: Path) -> None:
    options = gpu._options(["--commit", "abc", "--unsloth", str(tmp_path)])
    for stage in gpu.STAGES.values():
        assert stage.seconds + gpu.GRACE <= 540
        for one in stage.parts:
            words = one.command(options)
            if not one.is_test:
                given = command_line.parser().parse_args(words[words.index("benchmarks") + 1 :])
                assert (given.device, given.commit) == ("cuda", "abc")
                assert (getattr(given, "seconds", None) or 0) < stage.seconds


def test_every_file_of_tests_for_a_gpu_is_in_a_stage() -> None:
    run = {words for stage in gpu.STAGES.values() for one in stage.parts for words in one.words}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        marked = r"^(@|pytestmark = (\[\s+)?|.*marks=)pytest\.mark\.(gpu|kernels)"
        runs_there = re.search(marked, file.read_text(), re.M)
        assert (f"tests/{file.name}" in run) == bool(runs_there), file.name


def test_every_planned_number_of_a_gpu_is_made_by_the_stage_that_its_line_names() -> None:
    """Five steps were in no stage, so that `make gpu` left their tables empty."""
    for key, command in PLANNED.items():
        if key[1] == "cuda":
            stage = gpu.STAGES[command.removeprefix("make gpu-")]
            assert [one.file for one in stage.parts] == [file_name(*key)]


def test_the_benchmarks_page_names_every_stage() -> None:
    text = (ROOT / "benchmarks/README.md").read_text()
    assert [name for name in gpu.STAGES if f"`gpu-{name}`" not in text] == []


def test_an_unknown_stage_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["step-9b"])
    assert "there is no stage step-9b; there are tests, " in capsys.readouterr().err


def test_a_part_that_fails_costs_the_others_nothing_and_its_last_words_are_kept(stage: Any) -> None:
    well, record, page = stage(part("failing"), part("well"))
    assert not well and [row["ended"] for row in record["parts"]] == ["with 1", "well"]
    assert "the reason" in record["parts"][0]["output"] and "the reason" in page
    assert record["machine"]["driver"] == "570" and record["versions"]["torch"] and record["commit"] == "abc"
    assert "| gpu-tried | 1 of 2 commands failed |" in page


@pytest.mark.parametrize("left", ["older", "newer"])
def test_an_older_result_stays_until_there_is_a_new_one_and_is_not_shown_as_new(
    left: str, stage: Any, tmp_path: Path
) -> None:
    """A rerun that failed had destroyed the last good file."""
    older, newer = ({"benchmark": "explore", "tables": {name: [{"x": 1}]}} for name in ("older", "newer"))
    writing = f"import sys\nopen(sys.argv[2], 'w').write({json.dumps(newer)!r})"
    (tmp_path / "trying.py").write_text(writing if left == "newer" else "raise SystemExit('the reason')")
    save(tmp_path / "out/out.json", older)
    _, record, page = stage(part("trying"))
    assert left in json.loads((tmp_path / "out/out.json").read_text())["tables"]
    assert ("**newer**" in page) == (left == "newer") and "**older**" not in page
    assert not [*(tmp_path / "out").glob("*.older")] and ("file" in record["parts"][0]) == (left == "newer")


def test_a_stage_whose_time_is_up_ends_what_runs_and_says_what_it_had(stage: Any, tmp_path: Path) -> None:
    """With the processes that it had started."""
    well, record, page = stage(part("well"), part("hanging"), part("well"), seconds=2)
    ended = [row["ended"] for row in record["parts"]]
    assert not well and ended == ["well", "cut off: the stage's time was up", "not begun: no time was left"]
    assert "begun" in page and "**cut off: the stage's time was up**" in page
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int((tmp_path / "process").read_text()), 0)
            time.sleep(0.1)


def test_eleven_parts_that_are_cut_off_together_leave_a_record_and_a_page(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their threads saved the record under one name for a moment, and whoever came second found no file there."""
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 11)
    for _ in range(3):
        well, record, page = stage(*[gpu.Part(("waiting",))] * 11, side_by_side=True, seconds=1)
        assert not well and {row["ended"] for row in record["parts"]} == {"cut off: the stage's time was up"}
        assert page.count("**cut off: the stage's time was up**") == 11


def test_a_file_that_several_threads_save_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with ThreadPoolExecutor(11) as threads:
        list(threads.map(lambda number: save(file, {"rows": [number] * 1000}), range(200)))
    assert len(set(json.loads(file.read_text())["rows"])) == 1 and list(tmp_path.iterdir()) == [file]


def test_a_part_that_cannot_be_started_costs_the_others_nothing(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu, "_watch", refuse)
    well, record, _ = stage(part("well"), part("well"))
    assert not well and {row["ended"] for row in record["parts"]} == {
        "not run: OSError: [Errno 28] No space left on device"
    }


def test_a_stage_that_raises_costs_the_next_ones_nothing(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(part("well"))
    monkeypatch.setattr(gpu, "STAGES", {name: gpu.Stage(name, (part("well"),)) for name in ("broken", "sound")})
    (tmp_path / "out/gpu-broken.md").mkdir()
    assert gpu.main(["--results", str(tmp_path / "out"), "--commit", "abc"]) == 1
    assert "IsADirectoryError" in capsys.readouterr().err
    assert "| gpu-sound | well |" in (tmp_path / "out/gpu.md").read_text()


def test_a_terminal_that_hangs_up_is_a_signal_too_but_not_under_nohup(stage: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stage(part("well"))
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stage(part("well"))
    signal.raise_signal(signal.SIGHUP)
    assert gpu.STOP.is_set()


@pytest.mark.parametrize("failing", [0, 1, 11])
def test_a_stage_leaves_one_log_and_of_failed_parts_only(failing: int, stage: Any, tmp_path: Path) -> None:
    """Eleven logs a stage were more files than some machines hand back."""
    stage(part("failing"))  # an older log, which would pass for this run's
    parts = [gpu.Part(("failing",))] * failing + [gpu.Part(("well",))] * (11 - failing)
    _, record, _ = stage(*parts)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"gpu-tried.json", "gpu-tried.md", "gpu.md"} | ({"gpu-tried.log"} if failing else set())
    if failing:
        text = (tmp_path / "out/gpu-tried.log").read_text()
        assert text.count("the reason") == failing and f"{record['parts'][0]['command']}: with 1\n" in text


def test_a_stage_has_at_most_eight_files() -> None:
    for stage in gpu.STAGES.values():
        pictures = 2 * sum("memory" in one.words for one in stage.parts)
        assert pictures + sum(bool(one.file) for one in stage.parts) + len(("json", "md", "log", "gpu.md")) <= 8


NOTING = """
import os, pytest
@pytest.mark.parametrize("number", range(3))
def test_some(number, record_property):
    record_property("planned / measured", RATIO)
    assert RATIO < 1.1
"""


@pytest.mark.parametrize(
    ("then", "stays"),
    [
        ("raise SystemExit('no driver')", True),
        (NOTING.replace("RATIO", "0.5") + "    os._exit(1)", True),
        (NOTING.replace("RATIO", "1.5"), False),
        (NOTING.replace("RATIO", "0.5").replace("range(3)", "range(1)"), False),
    ],
    ids=["nothing", "without its figures", "missed", "fewer, all well"],
)
def test_a_rerun_that_finds_less_leaves_the_older_record_that_tables_are_made_of(
    then: str, stays: bool, stage: Any, tmp_path: Path
) -> None:
    """gpu-plan.json is where the planned peaks stand, and a rerun that had only begun wrote over it. One that measured
    all of it again replaces it, even where an aim is missed now.
    """
    tests, file = tmp_path / "test_some.py", tmp_path / "out/gpu-tried.json"
    tests.write_text(NOTING.replace("RATIO", "0.97"))
    _, older, _ = stage(gpu.Part(("pytest", str(tests))))
    tests.write_text(then)
    _, found, _ = stage(gpu.Part(("pytest", str(tests))))
    assert (found == older) == stays
    rerun = {name for name in ("gpu-tried.rerun.json", "gpu-tried.rerun.md") if file.with_name(name).exists()}
    assert len(rerun) == 2 * stays
    assert ("| gpu-tried.rerun | 1 of 1 commands failed |" in file.with_name("gpu.md").read_text()) == stays
    tests.write_text(NOTING.replace("RATIO", "0.98"))
    assert stage(gpu.Part(("pytest", str(tests))))[0]
    assert "0.98" in file.read_text() and not [*file.parent.glob("*.rerun.*")]


def test_an_older_record_of_another_shape_is_replaced(stage: Any, tmp_path: Path) -> None:
    for text in ("[]", "null", '{"parts": 1}', '{"parts": [{"tests": [1]}]}', '{"par'):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/gpu-tried.json").write_text(text)
        _, record, _ = stage(part("failing"))
        assert record["parts"][0]["ended"] == "with 1"


def test_a_file_that_was_not_finished_lies_beside_the_older_one_until_the_next_run(stage: Any, tmp_path: Path) -> None:
    """What a command had written when its time was up took the place of a whole result."""
    (tmp_path / "half.py").write_text("import sys; open(sys.argv[2], 'w').write('{}'); raise SystemExit(1)")
    whole, older = tmp_path / "out/out.json", tmp_path / "out/out.json.older"
    save(whole, ["older"])
    for _ in range(2):
        stage(part("half"))
        assert (json.loads(whole.read_text()), json.loads(older.read_text())) == ({}, ["older"])
    stage(part("failing"))
    assert json.loads(whole.read_text()) == ["older"] and not older.exists()


def test_a_signal_ends_what_runs_and_the_rest_is_written_down(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "save", lambda file, record: (save(file, record), os.kill(os.getpid(), signal.SIGTERM)))
    well, record, _ = stage(part("hanging"), part("well"))
    assert not well and [row["seconds"] for row in record["parts"]] == [0.0, 0.0]


def test_a_test_that_kills_its_process_costs_the_others_nothing(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    well, record, page = stage(gpu.Part(("pytest", str(tmp_path / "test_some.py"))))
    found = {row["test"].split("::")[1].removeprefix("test_"): row["outcome"] for row in record["parts"][0]["tests"]}
    expected = {"that_passes": "passed", "that_fails": "failed", "that_is_skipped": "skipped"}
    assert found == {**expected, "that_dies": outcomes.DIED, "after_it": "passed"}
    assert not well and record["parts"][0]["ended"] == "2 failed"
    assert "2 passed, 1 failed, 1 skipped, 1 died" in page and "- skipped 1: no bf16 here" in page
    assert "- failed: `test_that_fails`: assert (1 + 1) == 3" in page
    assert "- `test_that_passes`: planned / measured 0.97" in page


def test_tests_that_no_time_was_left_for_are_counted(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import time\ndef test_a(): time.sleep(60)\ndef test_b(): pass\n")
    well, record, page = stage(gpu.Part(("pytest", str(tmp_path / "test_some.py"))), seconds=3)
    assert not well and record["parts"][0]["ended"] == "cut off: the stage's time was up"
    assert "test_some.py: 1 died, 1 not reached." in page


def test_a_test_that_hangs_is_ended_and_the_next_one_runs(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SILENT", 2)
    (tmp_path / "test_some.py").write_text("import time\ndef test_a(): time.sleep(60)\ndef test_b(): pass\n")
    _, record, _ = stage(gpu.Part(("pytest", str(tmp_path / "test_some.py"))))
    assert [row["outcome"] for row in record["parts"][0]["tests"]] == [outcomes.DIED, "passed"]


def test_after_a_fault_of_the_gpu_the_other_tests_get_a_new_process(stage: Any, tmp_path: Path) -> None:
    """An illegal access ends a process's CUDA context: what ran after it would fail, too."""
    (tmp_path / "test_some.py").write_text("""
import os, sys, types
def fault(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=fault)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
def test_a(record_property):
    record_property("process", os.getpid())
    assert False
def test_b(record_property): record_property("process", os.getpid())
""")
    _, record, _ = stage(gpu.Part(("pytest", str(tmp_path / "test_some.py"))))
    first, second = record["parts"][0]["tests"]
    assert (first["outcome"], second["outcome"]) == ("failed", "passed") and first["figures"] != second["figures"]
    assert record["parts"][0]["ended"] == "1 failed" and "the GPU answers no more" in record["parts"][0]["output"]


def test_what_watches_tests_may_find_a_fault_that_they_pass_by(stage: Any, tmp_path: Path) -> None:
    """As a sanitizer does, by an exit code of its own."""
    (tmp_path / "test_some.py").write_text("def test_a(): pass")
    watcher = tmp_path / "watcher"
    watcher.write_text('#!/bin/sh\n"$@"\nexit 9\n')
    watcher.chmod(0o755)
    well, record, page = stage(gpu.Part(("pytest", str(tmp_path / "test_some.py")), under=(str(watcher),)))
    assert not well and record["parts"][0]["ended"] == "with 9" and "1 passed" in page


def test_tests_that_cannot_be_collected_are_a_failure(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import no_such_module")
    well, record, page = stage(gpu.Part(("pytest", str(tmp_path / "test_some.py"))))
    assert not well and record["parts"][0]["ended"] == "with 2" and "no_such_module" in page


def test_a_program_that_is_not_there_is_said_and_is_neither_a_failure_nor_well(stage: Any) -> None:
    well, record, page = stage(gpu.Part(("well",), file="out.json", under=("no-such-sanitizer",)))
    assert well and record["parts"][0]["ok"] is None
    assert "| gpu-tried | not run: no-such-sanitizer is not on PATH |" in page and "Failed" not in page


def test_a_part_has_an_environment_of_its_own(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text("import os; raise SystemExit(os.environ.get('CACHING', 'none'))")
    _, record, _ = stage(gpu.Part(("asking",), environment=("CACHING=no",)), part("asking"))
    assert [row["output"].strip() for row in record["parts"]] == ["no", "none"]
    assert record["parts"][0]["command"].startswith("env CACHING=no ")


@pytest.mark.parametrize("lacks", ["git", "a repository"])
@pytest.mark.parametrize("commit", ["abc", None])
def test_where_git_says_nothing_the_commit_is_the_given_one_and_changes_are_unknown(
    lacks: str, commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    found = provenance.provenance(MACHINE, 2, ["torch"], commit)
    assert (found["commit"], found["uncommitted_changes"]) == (commit or "none", None)
    assert markdown.versions_in_words(found).endswith(f"commit {commit or 'none'} (uncommitted changes unknown)")


def test_a_page_of_kernels_has_a_row_a_task_and_says_why_others_have_no_number() -> None:
    result = json.loads((ROOT / "benchmarks/results/kernels-cpu.json").read_text())
    text = gpu_page.numbers(result)
    tasks = {(row["op"], tuple(row["shape"]), row["wants"]) for row in result["rows"]}
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(tasks) + 2
    heads = [row for row in result["rows"] if row["op"] == "linear_logps" and row["shape"] == [256, 4096, 256]]
    fastest = min((row for row in heads if row["wants"] == "forward" and row["median"]), key=lambda row: row["median"])
    (line,) = [line for line in text.splitlines() if line.startswith("| linear_logps, 256x4096x256, forward |")]
    assert f"{fastest['contender']} | {1e3 * fastest['median']:.3g} |" in line
    assert "method='fused' needs a GPU." in text


def a_ratio_of_null() -> str:
    result = json.loads((ROOT / "benchmarks/results/step-cpu-20m-hh-rlhf.json").read_text())
    return json.dumps({**result, "ratios": [{**ratio, "value": None} for ratio in result["ratios"]]})


UNREADABLE: dict[str, str | Callable[[], str]] = {
    "cut off": '{"benchmark": "tu',
    "without its fields": '{"benchmark": "tune"}',
    "a list": "[]",
    "null": "null",
    "a table without rows": '{"benchmark": "explore", "tables": {"a": []}}',
    "no tables": '{"benchmark": "explore", "tables": null}',
    "a ratio of null": a_ratio_of_null,
}


@pytest.mark.parametrize("made", UNREADABLE.values(), ids=UNREADABLE)
def test_a_result_file_that_cannot_be_read_is_a_line_and_costs_the_rest_nothing(
    made: str | Callable[[], str], stage: Any, tmp_path: Path
) -> None:
    """A command that was ended while it wrote left half of a file, and no stage after it was summed up."""
    (tmp_path / "made.json").write_text(made if isinstance(made, str) else made())
    copy = f"import shutil, sys\nshutil.copy({str(tmp_path / 'made.json')!r}, sys.argv[2])"
    (tmp_path / "half.py").write_text(copy)
    well, _, page = stage(part("half"))
    assert well and re.search(r"\*\*out\.json cannot be read \(\w+Error: .*\*\*", page)
    assert "| gpu-tried | well |" in page


@pytest.mark.parametrize("record", ['{"stage": "st', "[]", "null", '{"parts": [1]}', '{"parts": []}'])
def test_a_stages_record_that_cannot_be_read_is_a_line_of_the_page_over_all(record: str, tmp_path: Path) -> None:
    (tmp_path / "gpu-step.json").write_text(record)
    text = gpu_page.over_all(["step", "memory"], tmp_path)
    assert "| gpu-step | unknown |" in text and "| gpu-memory | not run |" in text
    assert re.search(r"- gpu-step: gpu-step.json cannot be read \(\w+Error: ", text)


def test_whoever_reads_a_result_while_it_is_written_again_has_the_old_one_whole(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "out.json"
    save(file, {"rows": [1]})
    with file.open() as reader:
        save(file, {"rows": [1, 2]})
        assert json.load(reader) == {"rows": [1]} and json.loads(file.read_text()) == {"rows": [1, 2]}


def test_the_page_over_all_counts_aims_and_names_those_that_were_missed(tmp_path: Path) -> None:
    """Of a recorded run, one of whose aims it cannot have met."""
    shutil.copy(ROOT / "benchmarks/results/step-cpu-20m-hh-rlhf.json", tmp_path / "step.json")
    result = json.loads((tmp_path / "step.json").read_text())
    speed = next(ratio for ratio in result["ratios"] if ratio["name"] == "speed of fastdpo / TRL default, 1 epoch")
    speed["value"] = 0.5
    (tmp_path / "step.json").write_text(json.dumps(result))
    origin = {name: result[name] for name in ("date", "commit", "machine", "python", "versions", "uncommitted_changes")}
    parts: list[dict[str, Any]] = [
        {"command": "step", "ended": "well", "ok": True, "seconds": 3.0, "file": "step.json"}
    ]
    record = {"stage": "step", "measures": "a step", **origin, "parts": parts}
    (tmp_path / "gpu-step.json").write_text(json.dumps(record))
    text = gpu_page.over_all(["step", "memory"], tmp_path)
    aims = sum(1 for line in gpu_page.page(record, tmp_path).splitlines() if line.endswith(("| met |", "| missed |")))
    assert f"| gpu-step | well | 0 | {aims - 1} | 1 |" in text
    assert "- gpu-step: speed of fastdpo / TRL default, 1 epoch | 0.50 | >= 2.5 | missed" in text
    assert "| gpu-memory | not run |" in text


def test_met_and_missed_count_in_the_tables_of_results_only(tmp_path: Path) -> None:
    """A page's logs and assertion messages may say the words as well, and were counted as aims."""
    origin = {"date": "2026-01-01", "commit": "abc", "python": "3.12", "versions": {}, "uncommitted_changes": False}
    test = {"test": "a.py::test_a", "outcome": "failed", "reason": "assert missed == met", "figures": {"missed": 1}}
    parts = [
        {"command": "a", "ended": "1 failed", "ok": False, "tests": [test]},
        {"command": "b", "ended": "with 1", "ok": False, "output": "a deadline was missed\n| x | missed |"},
    ]
    record = {"stage": "tests", "measures": "aims met", **origin, "machine": {**MACHINE, "threads": 1}, "parts": parts}
    (tmp_path / "gpu-tests.json").write_text(json.dumps(record))
    text = gpu_page.over_all(["tests"], tmp_path)
    assert "| gpu-tests | 2 of 2 commands failed | 0 |  |  |" in text and "Missed" not in text


def test_an_aim_of_memory_and_one_of_a_steps_parts_count_as_those_of_a_table_do() -> None:
    found = {"response": 1600, "too_long": 1700, "settled": True}
    cells = [memory_table._found(found, [aim]) for aim in (1500, 2000)]
    lines = [f"| 8 GiB | 2 x 1500 | {cell} | 7 GiB |" for cell in cells]
    lines += ["| failed: `a deadline, missed` |", "- a deadline was missed.", "- All. The aim is 103% at most: met."]
    assert gpu_page.verdicts("\n".join(lines)) == [("met", lines[0]), ("missed", lines[1]), ("met", lines[-1])]


@pytest.mark.parametrize(("its_own", "code", "well"), [(True, 0, True), (True, 1, False), (False, 1, True)])
def test_results_in_their_own_folder_are_put_into_the_pages(
    its_own: bool, code: int, well: bool, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command on a GPU fills the tables."""
    run, tabled = subprocess.run, []

    def watched(command: list[str], **options: Any) -> Any:
        if command[-1] != "table":
            return run(command, **options)
        tabled.append(command[1:])
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", watched)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / ("out" if its_own else "elsewhere"))
    assert stage(gpu.Part(("well",)))[0] == well
    assert tabled == [["-m", "benchmarks", "table"]] * its_own
