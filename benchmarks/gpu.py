"""`make gpu`: everything that needs a CUDA device, in stages of at most nine minutes, what matters most first.

    python -m benchmarks.gpu [STAGE ...] [--results FOLDER]

A stage is one or more commands in processes of their own. One that fails, hangs or dies costs the others nothing, and a
stage whose time is up leaves what it had: `gpu-STAGE.json` says with which GPU, driver, versions and commit it ran, how
each command ended and what became of each test; `gpu-STAGE.md` is a page of it with the numbers and their aims,
`gpu-STAGE.log` all that its failed commands said, and `gpu.md` a page over all stages. The commands write their own
files besides, from which `python -m benchmarks table` makes the tables. A rerun that finds less than an older run of
the stage leaves that one's record, and lies beside it as `gpu-STAGE.rerun.json`. Without a device that torch can use,
or without torch, it prints what it would run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_page, outcomes
from benchmarks.device import CUDA, ROOT
from benchmarks.provenance import provenance, save
from benchmarks.table import RESULTS, file_name
from benchmarks.trl_settings import installed

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
PACKAGES += ("liger-kernel", "cut-cross-entropy", "flash-attn", "unsloth", "pytest")
# A word of a command -> packages without which it ends early or leaves something out.
FASTDPO = ("triton", "transformers", "datasets", "peft", "accelerate")
NEEDS = {
    **dict.fromkeys(("parts", "trace", "explore"), FASTDPO),
    **dict.fromkeys(("kernels", "tune"), ("triton",)),
    **dict.fromkeys(("nf4", "lora"), ("peft", "bitsandbytes")),
    **dict.fromkeys((f"tests/test_{name}.py" for name in ("nf4", "lora", "memory", "patching")), ("bitsandbytes",)),
    "pytest": ("pytest", *FASTDPO),
    "step": (*FASTDPO, "trl"),
    "memory": (*FASTDPO, "trl", "bitsandbytes"),
    "--load-in-4bit": ("bitsandbytes",),
}
COMPARED = {  # a word of a command -> packages that fastdpo is only compared with there
    "step": ("liger-kernel", "flash-attn", "unsloth"),
    "linear_logps": ("trl", "liger-kernel", "cut-cross-entropy"),
    "blocks": ("liger-kernel",),
}
SILENT = 240  # seconds of a test from which on it hangs
GRACE = 10  # seconds between a process's first signal and its last
STOP = threading.Event()  # set by a signal: what runs is ended, and what was found is written down


@dataclass(frozen=True)
class Part:
    """A command: `python -m` and these words."""

    words: tuple[str, ...]
    file: str = ""  # of the results, which it writes itself
    under: tuple[str, ...] = ()  # a program that runs it
    environment: tuple[str, ...] = ()  # NAME=value

    @property
    def is_test(self) -> bool:
        return self.words[0] == "pytest"

    def command(self, options: argparse.Namespace) -> list[str]:
        words = ["env", *self.environment] if self.environment else []
        words += [*self.under, sys.executable, "-m", *self.words]
        if self.is_test:
            return words
        words += ["--output", str(options.results / self.file)]
        words += ["--commit", options.commit] if options.commit else []
        return words + (["--unsloth", str(options.unsloth)] if options.unsloth and "step" in self.words else [])


@dataclass(frozen=True)
class Stage:
    measures: str
    parts: tuple[Part, ...]
    side_by_side: bool = False
    seconds: float = 530


def _tests(*names: str, only: str = "") -> tuple[Part, ...]:
    more = ("-k", only) if only else ()
    return tuple(Part(("pytest", f"tests/test_{name}.py", "-m", "gpu or kernels", *more)) for name in names)


def _step(model: str, profile: str, *more: str) -> tuple[Part, ...]:
    words = "benchmarks", "step", "--device", "cuda", "--tune", "--epochs", "2", "--seconds", "500", "--model"
    weights = model + ("-nf4" if "--load-in-4bit" in more else "")
    return (Part((*words, model, *more, "--profile", profile), file_name("step", "cuda", weights, profile)),)


def _watched(command: str) -> tuple[Part, ...]:
    model, profile = "llama-3.1-8b", "hh-rlhf"
    file = file_name(command, "cuda", model, profile)
    return (Part(("benchmarks", command, "--device", "cuda", "--model", model), file),)


def _kernels(file: str, *ops: str) -> tuple[Part, ...]:
    return (Part(("benchmarks", "kernels", "--device", "cuda", "--seconds", "450", "--op", *ops), file),)


ALONE = "planned_peak or under_a_second"  # what other processes on the GPU would disturb
# Each with its environment: what is read or written beyond a tensor may well lie in a block that torch's cache keeps.
SANITIZERS = {"memcheck": ("PYTORCH_NO_CUDA_MEMORY_CACHING=1",), "racecheck": ()}
STAGES = {
    "tests": Stage(
        "head, pair loss, attention, training, memory and offloading on the GPU against fp64, torch and the CPU",
        (
            *_tests("gpu", only=f"not (backend or {ALONE})"),
            *_tests("gpu", only="backend"),
            *_tests("gpu_runs", "offload", "patching", "linear_logps", "head_fused", "pair_loss", "memory"),
            *_tests("compiled", "noise"),
        ),
        side_by_side=True,  # compiling takes most of the time
    ),
    "kernels": Stage(
        "linear_logps at four shapes against TRL, Liger, cut-cross-entropy and torch",
        _kernels("kernels-cuda.json", "linear_logps"),
    ),
    "step-8b-hh-rlhf": Stage(
        "a LoRA step of 8B in bf16, HH-RLHF's lengths, against TRL default and tuned", _step("llama-3.1-8b", "hh-rlhf")
    ),
    "step-8b-ultrafeedback": Stage("the same, UltraFeedback's lengths", _step("llama-3.1-8b", "ultrafeedback")),
    "step-mistral-nf4": Stage(
        "a LoRA step of Mistral-7B in NF4, UltraFeedback's lengths, against TRL and Unsloth",
        _step("mistral-7b", "ultrafeedback", "--load-in-4bit"),
    ),
    "memory": Stage(
        "the longest pair that trains an 8B model in NF4 on 8, 12, 16 and 24 GiB",
        (Part(("benchmarks", "memory", "--device", "cuda", "--seconds", "460"), "memory-cuda-llama-3.1-8b.json"),),
    ),
    "block-tests": Stage(
        "4-bit weights, LoRA, norms, rotary embeddings and gated MLPs against fp64 and torch; every kernel repeated",
        _tests("repeats", "interpreted_bf16", "nf4", "lora", "rms_norm", "rope", "glu"),
        side_by_side=True,
    ),
    "block-kernels": Stage(
        "what 4-bit weights, norms, rotary embeddings, gated MLPs and LoRA reach of bandwidth and FLOP/s; pair_loss",
        _kernels("kernels-cuda-blocks.json", "nf4", "blocks", "pair_loss", "lora"),
    ),
    "plan": Stage(
        "peak memory as planned against as measured; how long weights take to name", _tests("gpu", only=ALONE)
    ),
    "step-8b-helpsteer": Stage("as step-8b-hh-rlhf, HelpSteer's lengths", _step("llama-3.1-8b", "helpsteer")),
    "step": Stage("a LoRA step of 1B in bf16, HH-RLHF's lengths", _step("llama-3.2-1b", "hh-rlhf")),
    "parts": Stage("a step of 8B against the sum of its parts", _watched("parts")),
    "trace": Stage("where the time of an 8B model's step goes", _watched("trace")),
    "explore": Stage(
        "what ideas wait for: the host's time, FP8 products, dequantising, torch.compile",
        tuple(
            Part(("benchmarks", "explore", name, "--device", "cuda"), f"explore-{name}-cuda.json")
            for name in ("fp8", "host", "dequantise", "compiled")
        ),
    ),
    "tune": Stage(
        "launch numbers against their neighbours, each compiled for every architecture first",
        (Part(("benchmarks", "tune", "--device", "cuda", "--seconds", "500"), "tune-cuda.json"),),
    ),
    "sanitizer": Stage(
        "every kernel under compute-sanitizer: accesses out of bounds, races in shared memory",
        tuple(
            Part(
                ("pytest", "tests/test_repeats.py", "-k", "small"),
                under=("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
                environment=environment,
            )
            for tool, environment in SANITIZERS.items()
        ),
    ),
    "step-8b-capybara": Stage("as step-8b-hh-rlhf, Capybara's lengths", _step("llama-3.1-8b", "capybara")),
    "step-8b-tldr": Stage("as step-8b-hh-rlhf, TL;DR's lengths", _step("llama-3.1-8b", "tldr")),
    "step-8b-no-prompt": Stage("as step-8b-hh-rlhf, nothing to share or pad", _step("llama-3.1-8b", "no-prompt")),
    "step-qwen2.5-7b": Stage("a LoRA step of Qwen2.5-7B in bf16, HH-RLHF's lengths", _step("qwen2.5-7b", "hh-rlhf")),
    "step-mistral": Stage("a LoRA step of Mistral-7B in bf16, HH-RLHF's lengths", _step("mistral-7b", "hh-rlhf")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a stage did not end well."""
    options = _options(arguments)
    names = options.stages or list(STAGES)
    has_torch = importlib.util.find_spec("torch") is not None
    machine = CUDA.find() if has_torch else None
    if machine is None:
        why = "There is no CUDA device that torch can use" if has_torch else f"{sys.executable} has no torch"
        print(plan(names, options, why))
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    for line in lacking(names, options.unsloth):
        print(line, file=sys.stderr, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda *_: STOP.set())
    well = [_run_and_sum_up(name, options, machine) for name in names]
    if len(names) > 1:
        print(gpu_page.over_all(list(STAGES), options.results))
    if options.results == RESULTS.resolve():  # of which the pages' tables are made
        well.append(subprocess.run([sys.executable, "-m", "benchmarks", "table"], cwd=ROOT).returncode == 0)
    return 0 if all(well) else 1


def _run_and_sum_up(name: str, options: argparse.Namespace, machine: dict[str, Any]) -> bool:
    """`run`; the page over all stages is written after each of them, as the machine may be gone before the last."""
    try:
        well = not STOP.is_set() and run(name, STAGES[name], options, machine)
        (options.results / "gpu.md").write_text(gpu_page.over_all(list(STAGES), options.results))
    except Exception:  # whatever it is: the hours of the stages that follow would be lost with this one
        traceback.print_exc()
        return False
    return well


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(STAGES)}; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all files (default %(default)s)")
    parser.add_argument("--commit", help="of this code, where it was copied without its repository")
    parser.add_argument("--unsloth", type=Path, help="folder with unsloth and the packages it needs")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.stages if name not in STAGES]:
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    options.results = options.results.resolve()
    return options


def plan(names: Sequence[str], options: argparse.Namespace, why: str) -> str:
    """What would be run: of each stage its commands, what it measures, how long it may take, and what it writes."""
    lines = [f"{why}, so this is what `make gpu` would run; files go to {options.results}."]
    lines += lacking(names, options.unsloth)
    for name in names:
        stage = STAGES[name]
        files = [*(part.file for part in stage.parts if part.file), f"gpu-{name}.json", f"gpu-{name}.md"]
        together = ", side by side" if stage.side_by_side else ""
        lines += ["", f"make gpu-{name}: {stage.measures}"]
        lines += [f"    {shlex.join(part.command(options))}" for part in stage.parts]
        lines.append(f"    at most {stage.seconds:.0f} s{together}; writes {', '.join(files)}")
    return "\n".join(lines)


def lacking(names: Sequence[str], unsloth: Path | None = None) -> list[str]:
    """A line for each package that is not installed, with the stages that have less to show without it."""
    lines = []
    without = {"without it these lack something or end early": NEEDS, "nothing is compared with it in": COMPARED}
    for loss, packages_of in without.items():
        stages_of: dict[str, dict[str, None]] = {}
        for name in names:
            for word in (word for part in STAGES[name].parts for word in part.words):
                for package in packages_of.get(word, ()):
                    stages_of.setdefault(package, {})[name] = None
        for package, stages in stages_of.items():
            if not installed(package.replace("-", "_"), unsloth if package == "unsloth" else None):
                named = [*stages][:4] + [f"{len(stages) - 4} more"] * (len(stages) > 4)
                lines.append(f"{package} is not installed; {loss}: {', '.join(named)}")
    return lines


# Running


class _Record:
    """What is known of a stage, on disk after every change; a lock, as parts side by side are in threads of their own.

    An older record that says more stays, as tables are made of it. This one lies beside it until it says as much.
    """

    def __init__(self, file: Path, result: dict[str, Any]) -> None:
        self.result, self._whole = result, file
        self._beside = file.with_suffix(".rerun.json")
        self._older = _said(file)
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.file = self._save()

    def update(self, number: int, row: dict[str, Any]) -> None:
        with self._lock:
            self.result["parts"][number] |= row
            self.result["seconds"] = round(time.monotonic() - self._started, 1)
            self.file = self._save()

    def _save(self) -> Path:
        rows = self.result["parts"]
        if not all(row["ok"] for row in rows) and _worth(rows) < self._older:
            save(self._beside, self.result)
            return self._beside
        save(self._whole, self.result)
        for left in (self._beside, self._beside.with_suffix(".md")):
            left.unlink(missing_ok=True)
        return self._whole


def _worth(rows: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """How much of parts a table could be made of: figures, outcomes of tests, other commands that ended well.

    A test that failed counts: what was measured last is right even where it missed its aim.
    """
    tests = [test for row in rows for test in row.get("tests", [])]
    ended = [test for test in tests if test["outcome"] not in (outcomes.NOT_REACHED, outcomes.DIED)]
    well = [row for row in rows if row["ok"] and not row.get("tests")]
    return sum(bool(test["figures"]) for test in tests), len(ended), len(well)


def _said(file: Path) -> tuple[int, int, int]:
    """Of an older record; nothing where it is no record, which must not end the run."""
    try:
        return _worth(json.loads(file.read_text())["parts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0, 0, 0


def run(name: str, stage: Stage, options: argparse.Namespace, machine: dict[str, Any]) -> bool:
    """Whether no command ended badly; its record is written after each of them, its page at the end."""
    ends = time.monotonic() + stage.seconds
    print(f"gpu-{name}: {stage.measures}; at most {stage.seconds:.0f} s", file=sys.stderr, flush=True)
    origin = provenance(machine, os.cpu_count() or 1, PACKAGES, options.commit)
    rows = [{"command": shlex.join(part.command(options)), "ended": "not begun", "ok": False} for part in stage.parts]
    result = {"benchmark": "gpu", "stage": name, "measures": stage.measures, **origin, "parts": rows}
    record = _Record(options.results / f"gpu-{name}.json", result)
    logs = [options.results / f"gpu-{name}-{number}.log" for number in range(len(rows))]

    def one(number: int) -> None:
        try:
            row = run_part(stage.parts[number], logs[number], ends, options)
        except Exception as error:  # of this part alone, as a program that cannot be started; the others go on
            row = {"ended": f"not run: {type(error).__name__}: {error}", "ok": False}
        record.update(number, row)

    with ThreadPoolExecutor(min(len(rows), os.cpu_count() or 1) if stage.side_by_side else 1) as threads:
        list(threads.map(one, range(len(rows))))
    _join(logs, rows, options.results / f"gpu-{name}.log")
    page = gpu_page.page(result, options.results)
    record.file.with_suffix(".md").write_text(page)
    print(page, flush=True)
    return not any(row["ok"] is False for row in rows)


def _join(logs: Sequence[Path], rows: Sequence[dict[str, Any]], whole: Path) -> None:
    """One log a stage, of the commands that ended badly: what the others found is in their files and in the record, and
    some machines hand back few files only.
    """
    whole.unlink(missing_ok=True)
    for log, row in zip(logs, rows, strict=True):
        if log.exists() and row["ok"] is False:
            with whole.open("ab") as output, log.open("rb") as lines:
                output.write(f"\n{row['command']}: {row['ended']}\n\n".encode())
                shutil.copyfileobj(lines, output)
        log.unlink(missing_ok=True)


def run_part(part: Part, log: Path, ends: float, options: argparse.Namespace) -> dict[str, Any]:
    """How it ended, well or not (None: it did not run), after how many seconds; its last lines where not well; the file
    that it wrote, in place of an older one, which else stays; of tests each outcome. Where it wrote a file and did not
    end well, that may be half of one, and the older one is kept beside it.
    """
    if STOP.is_set() or time.monotonic() > ends:
        return {"ended": "not begun: no time was left", "ok": False, "seconds": 0.0}
    if part.under and shutil.which(part.under[0]) is None:
        return {"ended": f"not run: {part.under[0]} is not on PATH", "ok": None, "seconds": 0.0}
    file = options.results / part.file
    older = file.with_name(f"{file.name}.older")
    if part.file and file.exists() and not older.exists():
        file.replace(older)  # it would pass for this run's
    elif part.file:
        file.unlink(missing_ok=True)  # of a run that did not end well: the one before it is kept
    started, found = time.monotonic(), log.with_suffix(".outcomes")
    found.unlink(missing_ok=True)
    with log.open("w") as output:
        if part.is_test:
            command = [*part.command(options), "-p", "benchmarks.outcomes", "--outcomes", str(found)]
            ended = _until_all_are_known(command, output, ends, found)
        else:
            ended = _watch(part.command(options), output, ends)
    row: dict[str, Any] = {"ended": ended, "ok": ended == "well", "seconds": round(time.monotonic() - started, 1)}
    if not row["ok"]:
        row["output"] = log.read_text(errors="replace")[-3000:]
    if part.file and file.exists():
        row["file"] = part.file
        if row["ok"]:
            older.unlink(missing_ok=True)
    elif part.file and older.exists():
        older.replace(file)
    if part.is_test:
        row["tests"] = list(outcomes.read(found).values())
        found.unlink(missing_ok=True)
    return row


def _until_all_are_known(command: list[str], output: Any, ends: float, found: Path) -> str:
    """Starts a file of tests again where its process died before the last of them, as long as that reaches another."""
    while True:
        known = len(outcomes.reached(found))
        ended = _watch(command, output, ends, found)
        rows = outcomes.read(found)
        left = len(rows) - len(outcomes.reached(found))
        if not left or len(rows) - left == known or ended.startswith("cut off"):
            break
    if not rows or ended not in ("well", "with 1"):
        return ended
    failed = sum(row["outcome"] not in ("passed", "skipped") for row in rows.values())
    return f"{failed} failed" if failed else "well"


def _watch(command: list[str], output: Any, ends: float, sign_of_life: Path | None = None) -> str:
    """-> "well", "with" its exit code, or why it was ended; it and all processes that it started are gone then."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    why, begun = "", time.time()
    try:
        while process.poll() is None and not why:
            heard = max(begun, sign_of_life.stat().st_mtime if sign_of_life and sign_of_life.exists() else 0)
            if STOP.is_set() or time.monotonic() > ends:
                why = "cut off by a signal" if STOP.is_set() else "cut off: the stage's time was up"
            elif sign_of_life and time.time() - heard > SILENT:
                why = f"ended after {SILENT} s in one test"
            time.sleep(0.2)
    finally:
        _end(process)
    return why or ("well" if process.returncode == 0 else f"with {process.returncode}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group, also what a process that ended left behind."""
    for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
