"""The longest pair that trains on a card of 8, 12, 16 or 24 GiB: NF4 base, LoRA, one pair a micro-batch, one step.

A card is simulated: torch's allocator may take its size less what CUDA's context takes on top. Lengths are bisected, a
real optimizer step each: it is through, or out of memory. All trials of a contender run in one process, which has the
quantised weights and builds everything else anew; what a trial found is written down at once, so a process that dies is
started again where it was, and one that runs out of time leaves what it knows. The widest gaps are narrowed first, so
that little time gives every card a rough answer instead of one an exact one.

`python -m benchmarks.memory SPEC.json TRIALS.json` is such a process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import memory_table, picture, workload
from benchmarks.apart import RunFailed, run_environment
from benchmarks.device import DEVICES, ROOT, Device
from benchmarks.memory_table import CONTEXT, GiB, pair
from benchmarks.models import MODELS, quantised
from benchmarks.provenance import provenance, save
from benchmarks.quantised import QuantisedWeights
from benchmarks.run import LORA_RANK, TRAINERS, RunSpec, common_settings, lora

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
FITS, FULL, FAILED, DIED, LATE = "fits", "out of memory", "failed", "died", "ended by its time"
LEAST, MOST = 2, 2**18  # tokens of a response: a word and the end; beyond the largest card asked for
PLANNED = 512  # tokens of a response in the pairs that are planned, one and more together: from here up to 32k tokens
ROOM = 2**20  # positions of the model: no trial is longer
STARTS = 3  # of a contender's process
GRACE = 20.0  # seconds that a trial may take longer than it was thought to


@dataclass(frozen=True)
class Task:
    """What a contender's process is to find."""

    trainer: str  # of run.TRAINERS
    settings: dict[str, Any]
    device: str
    model: str
    gibs: list[int]
    prompts: list[str]
    resolution: float  # of a length: a gap that is no wider is left
    guesses: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # prompt -> GiB -> lengths tried first
    most_tokens: dict[str, int] = field(default_factory=dict)  # GiB -> tokens of a batch from which memory is "full"
    threads: int = 2


@dataclass
class Trial:
    """One step with one pair."""

    prompt: str
    gib: int
    response: int  # tokens of each of the two
    outcome: str = LATE  # until it is known
    reason: str = ""
    seconds: float = 0.0
    peak_allocated: int = 0  # bytes
    peak_reserved: int = 0


class Bisection:
    """What the trials say so far, and which is next. What trains on a card trains on a larger one, too."""

    def __init__(self, task: Task, trials: list[Trial]) -> None:
        self.task, self.trials = task, trials

    def bounds(self, prompt: str, gib: int) -> tuple[int, int | None]:
        """-> the longest response that trained, 0 where none did, and the shortest that did not."""
        mine = [trial for trial in self.trials if trial.prompt == prompt]
        through = [trial.response for trial in mine if trial.outcome == FITS and trial.gib <= gib]
        stuck = [trial.response for trial in mine if trial.outcome in (FULL, DIED) and trial.gib >= gib]
        return max(through, default=0), min(stuck, default=None)

    def settled(self, prompt: str, gib: int) -> bool:
        low, high = self.bounds(prompt, gib)
        if high is None:
            return low >= MOST
        return high <= LEAST or high - low <= max(1, int(self.task.resolution * low))

    def next(self, seconds: float = math.inf) -> Trial | None:
        """The one that narrows the widest gap, of those that end within so many seconds."""
        cells = [(prompt, gib) for gib in sorted(self.task.gibs) for prompt in self.task.prompts]
        open_cells = sorted((cell for cell in cells if not self.settled(*cell)), key=lambda cell: -self._width(*cell))
        for prompt, gib in open_cells:
            response = self._length(prompt, gib)
            if self.expected_seconds(prompt, response) <= seconds:
                return Trial(prompt, gib, response)
        return None

    def _width(self, prompt: str, gib: int) -> float:
        low, high = self.bounds(prompt, gib)
        return high / low if low and high else math.inf

    def _length(self, prompt: str, gib: int) -> int:
        low, high = self.bounds(prompt, gib)
        guesses = self.task.guesses.get(prompt, {}).get(str(gib), [])
        for guess in guesses:
            if low < guess < (high or math.inf) and LEAST <= guess <= MOST:
                return guess
        stride = 1.2 if guesses else 2.0
        if high is None:
            return min(MOST, max(LEAST, low + 1, round(stride * low)))
        if low == 0:
            return max(LEAST, min(high - 1, round(high / stride)))
        return min(high - 1, max(low + 1, round(math.sqrt(low * high))))

    def expected_seconds(self, prompt: str, response: int) -> float:
        """By the slowest step so far, as if all of it were attention; 0 while nothing is known."""
        known = [trial for trial in self.trials if trial.prompt == prompt and trial.outcome == FITS]
        slowest = max(known, key=lambda trial: trial.response, default=None)
        if slowest is None:
            return 0.0
        return slowest.seconds * max(1.0, response / slowest.response) ** 2


def work(task: Task, trials: list[Trial], seconds: float, save: Any = lambda: None) -> None:
    """Adds to `trials` until all is found, or the time is up. Raises whatever a step fails with but for memory."""
    ends = time.monotonic() + seconds
    device, model = DEVICES[task.device], MODELS[task.model]
    weights = QuantisedWeights(workload.model_config(model, ROOM), device.dtype, device.place, None)
    search = Bisection(task, trials)
    while (trial := search.next(ends - time.monotonic())) is not None and time.monotonic() < ends:
        trials.append(trial)
        save()
        try:
            attempt(task, weights, trial)
        finally:
            save()


def attempt(task: Task, weights: QuantisedWeights, trial: Trial) -> None:
    """Writes down what became of the trial."""
    from fastdpo.retry import out_of_memory

    device = DEVICES[task.device]
    device.restart_peak()
    device.limit(trial.gib * GiB - CONTEXT)
    start = time.monotonic()
    try:
        one_step(task, weights, trial)
        device.wait()
        trial.outcome = FITS
    except RuntimeError as error:
        full = out_of_memory(error)
        trial.outcome, trial.reason = FULL if full else FAILED, str(error).splitlines()[0][:300]
        if not full:
            raise
    finally:
        trial.seconds = time.monotonic() - start
        trial.peak_allocated, trial.peak_reserved = device.peak_memory(), device.peak_reserved()
        device.limit(None)


def one_step(task: Task, weights: QuantisedWeights, trial: Trial) -> None:
    from datasets import Dataset

    lengths = pair(trial.prompt, trial.response)
    spec = RunSpec(task.trainer, task.device, task.model, "ultrafeedback", 1, 1, 1, task.settings)
    model = weights.model()
    if limit := task.most_tokens.get(str(trial.gib)):
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: _fill(args[0].numel(), limit))
    with tempfile.TemporaryDirectory() as folder, _unplanned(task.trainer):
        settings = {**common_settings(spec, ROOM), "max_steps": 1, "output_dir": folder, **task.settings}
        rows = Dataset.from_list(workload.text_rows([lengths]))
        training = TRAINERS[task.trainer]().build(model, rows, settings, None, spec)
        training.train()
    if training.state.global_step != 1:
        raise ValueError(f"{training.state.global_step} optimizer steps were taken, expected 1")


def _fill(tokens: int, most: int) -> None:
    """What a full GPU does, where there is none."""
    if tokens > most:
        import torch

        raise torch.OutOfMemoryError(f"CUDA out of memory: {tokens} tokens, and there is room for {most}")


def _unplanned(trainer: str) -> Any:
    """fastdpo's plan at a run's start sees the whole card, and one pair has no budget to be given."""
    if trainer != "fastdpo":
        return nullcontext()
    from benchmarks.observe import replaced
    from fastdpo import build

    return replaced(build, "plan_batches", lambda _: lambda *given: None)


def contenders(device: Device) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> trainer and settings. TRL checkpoints as it comes."""
    found = {"fastdpo": ("fastdpo", dict(device.leanest)), "TRL": ("trl", {})}
    if device.leanest.get("activation_offloading"):
        found["TRL, offloading"] = ("trl", {"activation_offloading": True})
    return found


def planned_for(gpu: str) -> str:
    """Whose plan predicts for this GPU, of launch.EXAMPLES."""
    from fastdpo_kernels import launch

    return next((name for name in launch.EXAMPLES if name in gpu), memory_table.PLANNED_FOR)


def predicted(model: str, prompts: Iterable[str], gibs: Iterable[int], gpu: str = "") -> dict[str, dict[str, int]]:
    """Prompt -> GiB -> response tokens of the longest pair by fastdpo's plan of this GPU, cut down to that memory."""
    from dataclasses import replace

    from fastdpo import DPOConfig
    from fastdpo.memory import SLACK, PairLengths, plan_memory
    from fastdpo_kernels import launch

    card = launch.EXAMPLES[planned_for(gpu)]
    found: dict[str, dict[str, int]] = {}
    for prompt in prompts:
        lengths = pair(prompt, PLANNED)
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(output_dir=folder, bf16=True, load_in_4bit=True, gradient_checkpointing=True)
        config.activation_offloading = True  # which is refused where there is no GPU
        config.per_device_train_batch_size = config.gradient_accumulation_steps = 1
        plan = plan_memory(
            workload.model_config(MODELS[model], ROOM),
            config,
            memory=card.memory_bytes,
            device=card,
            peft_config=lora(),
            lengths=PairLengths(lengths.prompt, lengths.chosen, lengths.rejected),
        )
        found[prompt] = {}
        for gib in gibs:
            tokens = replace(plan, memory=gib * GiB, slack=round(SLACK * gib * GiB)).longest_pair
            found[prompt][str(gib)] = _response(prompt, tokens)
    return found


def _response(prompt: str, tokens: int) -> int:
    """Of each side of the longest pair with at most so many tokens; 0 where that is none."""
    low, high = 0, tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pair(prompt, middle).tokens <= tokens else (low, middle)
    return low if low >= LEAST else 0


def main(options: Namespace) -> int:
    """Measures where there is such a device, predicts where there is none; writes JSON and picture, prints tables."""
    for name, value in DEVICES[options.device].environment.items():
        os.environ.setdefault(name, value)
    device = DEVICES[options.device]
    machine = device.find()
    if machine is None:
        logging.disable(logging.WARNING)
        result = prediction(options.model, options.prompt, options.gib)
        output = options.output or memory_table.RESULTS / memory_table.plan_file(options.model)
    else:
        result = measure(options, device, machine)
        output = options.output or memory_table.RESULTS / memory_table.file_name(options.device, options.model)
    save(output, result)
    result = json.loads(output.read_text())
    for file, drawing in picture.files(output, *memory_table.picture_of(result)).items():
        file.write_text(drawing)
    print(memory_table.render(result))
    print(f"written to {output}, and drawn in {output.with_suffix('.svg').name}")
    failed = result["contenders"].get("fastdpo", {}).get("failed")
    if failed:
        print(f"error: fastdpo: {failed}", file=sys.stderr)
    return 1 if failed else 0


def prediction(model: str, prompts: list[str], gibs: list[int]) -> dict[str, Any]:
    """A result that holds nothing measured: the same for the same code."""
    print("no CUDA device that torch can use: the plan's predictions alone, nothing is measured", file=sys.stderr)
    expected = predicted(quantised(model), prompts, gibs)
    return {**_head(model, prompts, gibs, expected), "device": "cuda", "measured": False, "contenders": {}}


def _head(model: str, prompts: list[str], gibs: list[int], expected: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    named = {"benchmark": "memory", "model": model, "prompts": prompts, "gibs": sorted(gibs)}
    return {**named, "lora_rank": LORA_RANK, "context": CONTEXT, "predicted": expected}


def measure(options: Namespace, device: Device, machine: dict[str, Any]) -> dict[str, Any]:
    origin = provenance(machine, options.threads, PACKAGES, options.commit)
    ends = time.monotonic() + (math.inf if options.seconds is None else options.seconds)
    model, card = quantised(options.model), machine.get("gpu_memory", math.inf) / GiB
    gibs = [gib for gib in sorted(options.gib) if gib < card + 1]
    expected = predicted(model, options.prompt, gibs, machine["gpu"]) if "gpu" in machine else {}
    most = dict(zip(map(str, gibs), sorted(options.most_tokens or []), strict=False))
    rows: dict[str, dict[str, Any]] = {}
    named = contenders(device)
    for number, (name, (trainer, settings)) in enumerate(named.items()):
        own = trainer == "fastdpo"
        first = {"guesses": _guesses(options.model, expected) if own else {}, "most_tokens": most}
        limits = {"resolution": options.resolution, "threads": options.threads, **first}
        task = Task(trainer, settings, device.name, model, gibs, options.prompt, **limits)
        # fastdpo's pairs are the longest, and its steps take the most of the time
        share = 0.6 if own and len(named) > 1 else 1 / (len(named) - number)
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = in_own_process(task, share * (ends - time.monotonic()))
    result = {**_head(options.model, options.prompt, gibs, expected), "device": device.name, "measured": True}
    if expected:
        result["planned_for"] = planned_for(machine["gpu"])
    return {**result, **origin, "resolution": options.resolution, "simulated": most, "contenders": rows}


def _guesses(model: str, expected: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, list[int]]]:
    """The aim first, so that whether it is met is known soonest, then what the plan says."""
    return {
        prompt: {gib: memory_table.aims(model, prompt, int(gib)) + [response] for gib, response in row.items()}
        for prompt, row in expected.items()
    }


def in_own_process(task: Task, seconds: float) -> dict[str, Any]:
    """What was found: settings, trials, bounds of each card; and why it ended before, where it did."""
    ends, failed = time.monotonic() + seconds, None
    with tempfile.TemporaryDirectory() as folder:
        spec, found = Path(folder, "spec.json"), Path(folder, "trials.json")
        found.write_text("[]")
        for _ in range(STARTS):
            left = ends - time.monotonic()
            if left <= 0:
                failed = failed or LATE
                break
            spec.write_text(json.dumps({**asdict(task), "seconds": left if math.isfinite(left) else None}))
            command = [sys.executable, "-m", "benchmarks.memory", str(spec), str(found)]
            environment = run_environment(DEVICES[task.device], task.threads)
            options: Any = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
            try:
                done = subprocess.run(command, timeout=left + GRACE if math.isfinite(left) else None, **options)
            except subprocess.TimeoutExpired:
                failed = LATE
                break
            if done.returncode == 0:
                failed = None
                break
            failed = RunFailed(task.trainer, f"ended with {done.returncode}", done.stderr).line
            if not _bury(found):  # not a trial that died: it will fail again
                break
        trials = [Trial(**row) for row in json.loads(found.read_text())]
    return {
        "trainer": task.trainer,
        "settings": task.settings,
        "failed": failed,
        "longest": bounds_of(Bisection(task, trials)),
        "trials": [asdict(trial) for trial in trials],
    }


def _bury(found: Path) -> bool:
    """Whether the process went down within a trial, by a signal or so: then that length does not train."""
    rows = json.loads(found.read_text())
    unfinished = [row for row in rows if row["outcome"] == LATE]
    for row in unfinished:
        row["outcome"] = DIED
    found.write_text(json.dumps(rows))
    return bool(unfinished)


def bounds_of(search: Bisection) -> dict[str, dict[str, dict[str, Any]]]:
    """Prompt -> GiB -> the longest response that trained, the shortest that did not, and what the longest one took."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for prompt in search.task.prompts:
        for gib in search.task.gibs:
            low, high = search.bounds(prompt, gib)
            at = [t for t in search.trials if (t.prompt, t.response, t.outcome) == (prompt, low, FITS) and t.gib <= gib]
            best = max(at, key=lambda trial: trial.gib, default=None)
            cell = {"response": low, "too_long": high, "settled": search.settled(prompt, gib)}
            cell["peak_allocated"] = best.peak_allocated if best else None
            cell["peak_reserved"] = best.peak_reserved if best else None
            cell["seconds"] = best.seconds if best else None
            found.setdefault(prompt, {})[str(gib)] = cell
    return found


def child(spec_file: str, trials_file: str) -> None:
    logging.disable(logging.WARNING)
    import torch

    given, found = json.loads(Path(spec_file).read_text()), Path(trials_file)
    seconds = given.pop("seconds")
    task = Task(**given)
    torch.set_num_threads(task.threads)
    trials = [Trial(**row) for row in json.loads(found.read_text())]

    work(task, trials, math.inf if seconds is None else seconds, lambda: save(found, [asdict(one) for one in trials]))


if __name__ == "__main__":
    child(*sys.argv[1:])
