"""A benchmark's runs, each in a process of its own: what dies, hangs or finds no time left costs the others nothing.

The process that starts them imports no torch: a child begins with its parent's peak memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.device import DEVICES, ROOT, Device
from benchmarks.run import RunResult, RunSpec

NO_TIME = "not run: the time for all of them was used up"


class RunFailed(RuntimeError):
    """A run left no result; `line` says why: the last one it wrote that names an error, as CUDA's go on after that."""

    def __init__(self, name: str, what: str, output: str = "") -> None:
        super().__init__(f"the run of {name} {what}" + (f": {output[-3000:]}" if output else ""))
        lines = output.strip().splitlines()
        self.line = ([line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines or [what])[-1]


class Clock:
    """The time that all runs together may take, and one of them."""

    def __init__(self, seconds: float | None, one_run: float | None) -> None:
        self.started = time.monotonic()
        self.seconds, self.one_run = (math.inf if limit is None else limit for limit in (seconds, one_run))

    def left(self, share: float = 1.0) -> float:
        """Seconds for a run that begins now, when runs like it may take up `share` of the time."""
        return min(self.one_run, share * self.seconds - (time.monotonic() - self.started))


def in_own_process(name: str, spec: RunSpec, clock: Clock, note: str = "", share: float = 1.0) -> RunResult:
    """One run in a fresh interpreter. This process imports no torch: a child starts with its parent's peak memory."""
    print(f"{name}{note} ...", end=" ", file=sys.stderr, flush=True)
    try:
        result = _run_apart(name, spec, clock.left(share))
    except RunFailed as error:
        print(f"failed: {error.line}", file=sys.stderr, flush=True)
        raise
    print(f"{result.seconds[-1]:.1f} s, {result.peak_memory / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    return result


def run_environment(device: Device, threads: int, site: str = "") -> dict[str, str]:
    paths = [site] * bool(site) + [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {
        **device.environment,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _run_apart(name: str, spec: RunSpec, seconds: float) -> RunResult:
    if seconds <= 0:
        raise RunFailed(name, NO_TIME)
    environment = run_environment(DEVICES[spec.device], spec.threads, spec.site)
    with tempfile.TemporaryDirectory() as folder:
        spec_file, result_file = Path(folder, "spec.json"), Path(folder, "result.json")
        spec_file.write_text(json.dumps(asdict(spec)))
        command = [sys.executable, "-m", "benchmarks.run", str(spec_file), str(result_file)]
        options: Any = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, timeout=None if math.isinf(seconds) else seconds, **options)
        except subprocess.TimeoutExpired:
            raise RunFailed(name, f"took longer than {seconds:.3g} s") from None
        if done.returncode:
            raise RunFailed(name, f"ended with {done.returncode}", done.stderr)
        return RunResult(**json.loads(result_file.read_text()))
