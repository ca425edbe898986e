"""`python -m benchmarks step`, `parts`, `trace`, `memory`, `kernels`, `tune` measure, `table` writes the tables again.

`explore` tries ideas out; `estimate` reckons, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from benchmarks import estimate, explore, kernels, memory, memory_table, pages, parts, step, table, trace, tune
from benchmarks.arguments import count, file, folder, positive
from benchmarks.device import CPU, CUDA, DEVICES
from benchmarks.models import MODELS, WHOLE, quantised
from benchmarks.provenance import save
from benchmarks.workload import PROFILES

WATCHED = {"parts": parts, "trace": trace}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("step", help="fastdpo against TRL 1.16 on the same rows")
    run.add_argument("--epochs", type=count, default=3, help="reported beside one epoch (default %(default)s)")
    run.add_argument("--tune", action="store_true", help="search TRL's fastest settings first")
    run.add_argument("--unsloth", type=folder, help="with unsloth and what it needs, where not installed")
    run.add_argument("--full", action="store_true", help="train all weights, in place of LoRA factors")
    run.add_argument("--processor-time", action="store_true", help="of one thread, where others use the machine too")
    share = commands.add_parser("parts", help="a step of fastdpo against its parts measured alone")
    view = commands.add_parser("trace", help="where the time of fastdpo's steps goes, by torch's profiler")
    race = commands.add_parser("kernels", help="the kernels alone, against torch, TRL, Liger, CCE, peft and others")
    race.add_argument("--op", nargs="+", choices=kernels.OPS, default=kernels.OPS, help="default: all")
    most = commands.add_parser("memory", help="the longest pair that trains in 4 bits with so much memory")
    for command in (run, share, view):
        command.add_argument("--model", choices=WHOLE, help="default: " + _defaults("model"))
        command.add_argument("--load-in-4bit", action="store_true", help="NF4 weights, for whoever trains them")
        command.add_argument("--profile", choices=list(PROFILES), default="hh-rlhf", help="default %(default)s")
        command.add_argument("--pairs", type=count, help="rows, a multiple of --batch; default: by model and profile")
        command.add_argument("--batch", type=count, default=8, help="pairs an optimizer step (default %(default)s)")
    run.add_argument("--repeat", type=count, default=1, help="runs of each, medians reported (default %(default)s)")
    share.add_argument("--repeat", type=count, default=3, help="measurements, medians reported (default %(default)s)")
    _add_memory_options(most)
    best = commands.add_parser("tune", help="launch numbers against their neighbours; compiled only without a GPU")
    best.add_argument("knobs", nargs="*", metavar="KNOB", help=f"{tune.KNOBS_IN_WORDS}; default: all")
    best.add_argument("--arch", nargs="+", metavar="GPU", help=f"to compile for; default: all, without a GPU {tune.ON}")
    for command in (run, race, most, best):
        command.add_argument("--seconds", type=positive, help="after them no further contender gets its turn")
    trained = " and ".join(explore.TAKE_DATA)
    try_out = commands.add_parser("explore", help="ideas, with a number for or against each")
    try_out.add_argument("name", choices=explore.NAMES)
    try_out.add_argument("--data", type=file, help=f"jsonl of prompt, chosen, rejected; for {trained}")
    for command in (run, share, view, race, most, best, try_out):
        default = CUDA.name if command in (most, best) else CPU.name
        command.add_argument("--device", choices=list(DEVICES), default=default, help="default %(default)s")
        command.add_argument("--threads", type=count, default=os.cpu_count(), help="of torch (default %(default)s)")
        command.add_argument("--commit", help="of this code, where it was copied without its repository")
        command.add_argument("--output", type=Path, help=f"default: a file in {table.RESULTS}")
    commands.add_parser("estimate", help="a 70B model under FSDP2 by arithmetic, the tables of docs/several_gpus.md")
    write = commands.add_parser("table", help="write tables and pictures of both README.md from results/")
    write.add_argument("--results", type=Path, default=table.RESULTS, help="folder to read (default %(default)s)")
    write.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page or a picture differs")
    return top


def _add_memory_options(command: argparse.ArgumentParser) -> None:
    prompts, cards = list(memory_table.PROMPTS), list(memory_table.AIMS)
    command.add_argument("--model", choices=WHOLE, default=memory_table.MODEL, help="default %(default)s, in NF4")
    command.add_argument("--gib", type=count, nargs="+", default=cards, help="sizes of cards (default %(default)s)")
    command.add_argument("--prompt", choices=prompts, nargs="+", default=prompts, help="default: all")
    command.add_argument("--resolution", type=positive, default=0.03, help="share of a length (default %(default)s)")
    command.add_argument(
        "--most-tokens",
        type=count,
        nargs="+",
        help="for each size the tokens of the largest batch, where no GPU says so",
    )


def _defaults(field: str) -> str:
    return ", ".join(f"{device.name} {getattr(device, field)}" for device in DEVICES.values())


def main(arguments: list[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(arguments)
    if options.command == "table":
        if not any(options.results.glob("*.json")):
            commands.error(f"--results {options.results} holds no result: give a folder of JSON files of benchmarks")
        return pages.main(options.check, options.results)
    if options.command == "estimate":
        print(estimate.tables(), end="")
        return 0
    if options.command == "kernels":
        options.output = options.output or table.RESULTS / f"kernels-{options.device}.json"
        return kernels.main(options)
    if options.command == "tune":
        if options.device != CUDA.name:
            commands.error("--device cpu, expected cuda: Triton's kernels run on no CPU")
        return tune.main(options)
    if options.command == "explore":
        options.output = options.output or table.RESULTS / f"explore-{options.name}-{options.device}.json"
        if options.name in explore.NEED_DATA and options.data is None:
            commands.error(f"explore {options.name} trains on preference pairs: give them by --data FILE.jsonl")
        if options.name not in explore.TAKE_DATA and options.data is not None:
            commands.error(f"explore {options.name} takes no --data, which is for {' and '.join(explore.TAKE_DATA)}")
        return explore.main(options)
    if options.command == "memory":
        if (options.device == CPU.name) != bool(options.most_tokens):
            commands.error("--most-tokens stands in for the memory of a GPU: give it with --device cpu, and only then")
        if len(options.most_tokens or options.gib) != len(options.gib):
            commands.error("--most-tokens needs a number for each of --gib")
        return memory.main(options)
    if getattr(options, "full", False) and options.load_in_4bit:
        commands.error("--full trains all weights, which those of --load-in-4bit cannot: leave one of the two out")
    if getattr(options, "processor_time", False) and (options.device != CPU.name or options.threads != 1):
        commands.error("--processor-time adds up the time of all threads: it needs --device cpu and --threads 1")
    if getattr(options, "unsloth", None) and "Unsloth" not in DEVICES[options.device].contenders:
        commands.error(
            f"--unsloth {options.unsloth} is for --device cuda: Unsloth does not run on the {options.device}"
        )
    _complete(options)
    if options.pairs % options.batch:
        commands.error(
            f"--pairs {options.pairs} is not a multiple of --batch {options.batch}: TRL weighs a last, smaller step "
            "differently, so the curves could not be compared"
        )
    return step.main(options) if options.command == "step" else _watch(options)


def _complete(options: argparse.Namespace) -> None:
    """What depends on other options, where it was not given."""
    device = DEVICES[options.device]
    options.model = options.model or device.model
    options.model = quantised(options.model) if options.load_in_4bit else options.model
    if options.pairs is None:
        options.pairs = step.rows_for(device, MODELS[options.model], PROFILES[options.profile], options.batch)
    full, batch = getattr(options, "full", False), options.batch
    name = table.file_name(options.command, options.device, options.model, options.profile, batch, full)
    options.output = options.output or table.RESULTS / name


def _watch(options: argparse.Namespace) -> int:
    """Measures in this process, writes the JSON, prints the table."""
    for name, value in DEVICES[options.device].environment.items():
        os.environ.setdefault(name, value)
    logging.disable(logging.WARNING)
    module = WATCHED[options.command]
    if (result := module.main(options)) is not None:
        save(options.output, result)
        print(module.render(json.loads(options.output.read_text())))
        print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
