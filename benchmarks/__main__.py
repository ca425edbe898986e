"""`python -m benchmarks step` measures, `python -m benchmarks table` writes the tables of README.md again."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import step, table
from benchmarks.device import CPU, DEVICES


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("step", help="fastdpo against TRL 1.16 on the same rows")
    run.add_argument("--device", choices=list(DEVICES), default=CPU.name, help="default %(default)s; cuda: one GPU")
    defaults = ", ".join(f"{device.name} {device.pairs}" for device in DEVICES.values())
    run.add_argument("--pairs", type=int, help=f"rows, a multiple of --batch (default: {defaults})")
    run.add_argument("--epochs", type=int, default=3, help="reported beside one epoch (default %(default)s)")
    run.add_argument("--batch", type=int, default=8, help="pairs an optimizer step (default %(default)s, TRL's)")
    run.add_argument("--repeat", type=int, default=1, help="runs of each, medians reported (default %(default)s)")
    run.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default %(default)s)")
    run.add_argument("--tune", action="store_true", help="search TRL's fastest settings again before measuring")
    run.add_argument("--commit", help="of this code, where it was copied without its repository")
    run.add_argument("--output", type=Path, help=f"default: {table.RESULTS}/step-DEVICE.json")
    write = commands.add_parser("table", help="write the tables of benchmarks/README.md from results/*.json")
    write.add_argument("--check", action="store_true", help="write nothing; exit 1 where the tables differ")
    return top


def main(arguments: list[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(arguments)
    if options.command == "table":
        return table.main(options.check)
    if options.pairs is None:
        options.pairs = DEVICES[options.device].pairs
    if options.output is None:
        options.output = table.RESULTS / f"step-{options.device}.json"
    for name in ("pairs", "epochs", "batch", "repeat", "threads"):
        if getattr(options, name) < 1:
            commands.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    if options.pairs % options.batch:
        commands.error(
            f"--pairs {options.pairs} is not a multiple of --batch {options.batch}: TRL weighs a last, smaller step "
            "differently, so the curves could not be compared"
        )
    return step.main(options)


if __name__ == "__main__":
    sys.exit(main())
