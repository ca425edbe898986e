"""`python -m benchmarks kernels`: what `pytest benchmarks/ --benchmark-only` measures, written down and printed.

The measurements run in a process of their own: this one imports no torch, as the runs of `step` are its children too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace

from benchmarks.device import DEVICES, ROOT
from benchmarks.kernel_table import render

OPS = ("pair_loss", "nf4", "blocks", "lora", "linear_logps")  # files bench_*.py; the one that takes longest is last


def main(options: Namespace) -> int:
    """pytest's exit code; what it had measured is in the file even where it failed."""
    device = DEVICES[options.device]
    if device.found() is None:
        return 0
    output = options.output.resolve()
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *(f"benchmarks/bench_{op}.py" for op in options.op)]
    command += [
        "--benchmark-only",
        "--benchmark-quiet",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "--kernel-device",
        device.name,
        "--kernel-json",
        str(output),
    ]
    for name in ("commit", "seconds"):
        if (value := getattr(options, name)) is not None:
            command += [f"--kernel-{name}", str(value)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
    }
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if output.exists():
        print(render(json.loads(output.read_text())))
        print(f"written to {output}")
    return code
