"""`python -m benchmarks explore NAME`: ideas with a number for or against each, one file an idea.

Where there is no GPU, what can be had without one: numbers emulated, FLOPs and bytes counted, the host timed. With
`--device cuda` the same command measures. docs/LOG.md has the verdicts.
"""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from typing import Any

from benchmarks.device import DEVICES
from benchmarks.markdown import table
from benchmarks.provenance import provenance, save

NAMES = ("compiled", "dequantise", "fp8", "graphs", "host", "sparse")
TAKE_DATA, NEED_DATA = ("fp8", "sparse"), ("sparse",)
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def main(options: Namespace) -> int:
    """Runs one, writes its JSON, prints its tables."""
    import torch

    device = DEVICES[options.device]
    if (machine := device.found()) is None:
        return 0
    torch.set_num_threads(options.threads)
    origin = provenance(machine, options.threads, PACKAGES, options.commit)
    tables = import_module(f"benchmarks.explore.{options.name}").measure(options)
    result = {"benchmark": "explore", "name": options.name, "device": device.name, **origin, "tables": tables}
    save(options.output, result)
    print(f"{render(result)}\nwritten to {options.output}")
    return 0


def render(result: dict[str, Any]) -> str:
    return "\n\n".join(f"**{title}**\n\n{rendered(rows)}" for title, rows in result["tables"].items()) + "\n"


def rendered(rows: list[dict[str, Any]]) -> str:
    """The first row's keys are the columns."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    return table(list(rows[0]), cells)
