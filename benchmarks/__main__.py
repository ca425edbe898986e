"""`python -m benchmarks step` and `kernels` measure, `table` writes the tables of README.md again."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import kernels, step, table
from benchmarks.device import CPU, DEVICES


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("step", help="fastdpo against TRL 1.16 on the same rows")
    defaults = ", ".join(f"{device.name} {device.pairs}" for device in DEVICES.values())
    run.add_argument("--pairs", type=int, help=f"rows, a multiple of --batch (default: {defaults})")
    run.add_argument("--epochs", type=int, default=3, help="reported beside one epoch (default %(default)s)")
    run.add_argument("--batch", type=int, default=8, help="pairs an optimizer step (default %(default)s, TRL's)")
    run.add_argument("--repeat", type=int, default=1, help="runs of each, medians reported (default %(default)s)")
    run.add_argument("--tune", action="store_true", help="search TRL's fastest settings again before measuring")
    race = commands.add_parser("kernels", help="linear_logps and pair_loss against torch, TRL, Liger and CCE")
    race.add_argument("--seconds", type=float, help="after them no further contender gets its turn")
    for name, command in (("step", run), ("kernels", race)):
        command.add_argument(
            "--device", choices=list(DEVICES), default=CPU.name, help="default %(default)s; cuda: one GPU"
        )
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default %(default)s)")
        command.add_argument("--commit", help="of this code, where it was copied without its repository")
        command.add_argument("--output", type=Path, help=f"default: {table.RESULTS}/{name}-DEVICE.json")
    write = commands.add_parser("table", help="write the tables of benchmarks/README.md from results/*.json")
    write.add_argument("--check", action="store_true", help="write nothing; exit 1 where the tables differ")
    return top


def main(arguments: list[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(arguments)
    if options.command == "table":
        return table.main(options.check)
    if options.output is None:
        options.output = table.RESULTS / f"{options.command}-{options.device}.json"
    if options.command == "kernels":
        return kernels.main(options)
    if options.pairs is None:
        options.pairs = DEVICES[options.device].pairs
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
