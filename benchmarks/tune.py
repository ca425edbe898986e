"""`python -m benchmarks tune [KNOB ...]`: are the numbers of launch.py the best of their neighbours?

Each candidate is compiled first, without a GPU, for every architecture that would take it: what spills or asks for more
than there is, is not tried. On the GPU its results must then be the default's, to rounding, and the same bits twice,
before it takes turns with the default, between events. Nothing is changed: what is printed are the numbers that
launch.py should give for the shapes that were timed, with the GPU and the date. They are a rule's there, of any shape;
`make compile-report` then compiles it with every dtype and option, of which the tuner has one. Without a GPU what the
compiler says is all there is.
"""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.device import DEVICES
from benchmarks.markdown import machine_in_words, table, versions_in_words
from benchmarks.provenance import provenance, save

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton")
WORTH = 0.02  # a candidate that gains less is noise
ROUNDS, SECONDS = 40, 0.5  # of a candidate and its default at most
ON = "H200"  # of launch.EXAMPLES, where no GPU says otherwise
# Of knobs.py, which imports torch; this module must not, for the command line's sake (see apart.py).
KNOBS = (
    *("row_config", "column_config", "default_workspace_bytes", "fused_config", "fused_config:few"),
    *("ROW_TILES_SIDE_BY_SIDE", "pair_loss_config", "nf4_config", "norm_config", "norm_programs", "rope_config"),
    *("glu_config", "MLP_ROWS"),
)
_NAMES = ", ".join(name for name in KNOBS if ":" not in name)
KNOBS_IN_WORDS = f"names in launch.py: {_NAMES}; fused_config:few is what fused_config has for few rows"


def main(options: Namespace) -> int:
    """1 where a candidate fails otherwise than by its numbers."""
    from benchmarks import knobs
    from fastdpo_kernels import launch

    if launch.interpreting():
        raise SystemExit("error: TRITON_INTERPRET is set, and interpreted kernels are not tuned: unset it")
    started, device = time.monotonic(), DEVICES[options.device]
    machine, names = device.find(), tuple(options.knobs or knobs.KNOBS)
    if options.seconds is not None and not machine:
        raise SystemExit(f"error: --seconds {options.seconds:g} is time on a GPU, and there is none: leave it out")
    archs = tuple(options.arch or (launch.EXAMPLES if machine else [ON]))
    for given, known in ((names, knobs.KNOBS), (archs, launch.EXAMPLES)):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"error: {', '.join(unknown)}: expected some of {', '.join(known)}")
    own = example_of(machine["gpu"]) if machine else ON if ON in archs else archs[0]
    found = provenance(machine or DEVICES["cpu"].find() or {}, options.threads, PACKAGES, options.commit)
    result = {"benchmark": "tune", "device": device.name, "measured": bool(machine), "compiled_for": archs, **found}
    result["rows"] = compiled(names, knobs.cases(names, archs, own), options.threads)
    output = options.output or (RESULTS / f"tune-{device.name}.json" if machine else None)
    if machine and output:
        _time_all(result, started + (math.inf if options.seconds is None else options.seconds), output)
    elif output:
        save(output, result)
    print(render(json.loads(json.dumps(result))))
    return 1 if any(row["reason"].startswith("failed") for row in result["rows"]) else 0


def example_of(gpu: str) -> str:
    """The device of launch.EXAMPLES whose numbers this GPU takes: its own, or the last one before it."""
    from fastdpo_kernels import launch

    if (named := next((name for name in launch.EXAMPLES if name in gpu), None)) is not None:
        return named
    import torch

    arch = launch.device_of(torch.device("cuda")).arch
    alike = {name: card.arch for name, card in launch.EXAMPLES.items() if isinstance(card.arch, type(arch))}
    return max((name for name in alike if alike[name] <= arch), key=lambda name: alike[name])


def compiled(names: Iterable[str], cases: Any, jobs: int) -> list[dict[str, Any]]:
    """A row for each candidate and task: what its kernels take on each architecture, and what is wrong with them."""
    from benchmarks import knobs
    from fastdpo_kernels import compile_report

    fields = ("knob", "task", "candidate")
    rows = {key: {**dict(zip(fields, key, strict=True)), "takes": {}, "reason": ""} for key in knobs.to_try(names)}
    for case, kernels in compile_report.compile_each(cases, jobs).items():
        row = rows[case.op, dict(case.values)["task"], dict(case.values)["candidate"]]
        row["takes"][case.device] = [[one.name, one.registers, one.spill_bytes, one.shared_bytes] for one in kernels]
        row["reason"] = row["reason"] or next(iter(compile_report.problems(kernels)), "")
    return list(rows.values())


def _time_all(result: dict[str, Any], ends: float, file: Path) -> None:
    from benchmarks.measure import CudaMeter

    meter = CudaMeter()
    for row in result["rows"]:
        if not row["reason"] and time.monotonic() > ends:
            row["reason"] = "not run: the time for all of them was used up"
        if not row["reason"] and meter.dead:
            row["reason"] = f"not run: the GPU stopped answering before ({meter.dead})"
        if not row["reason"]:
            row |= against_default(row["knob"], row["task"], row["candidate"], meter)
        save(file, result)


def against_default(knob: str, task: str, candidate: str, meter: Any, small: bool = False) -> dict[str, Any]:
    """Seconds of both, once the candidate's results are the default's; else the reason why it has none."""
    import torch

    from benchmarks import knobs
    from benchmarks.turn import Wrong, in_words

    setting, call = knobs.KNOBS[knob], knobs.TASKS[task].on(meter.place, small)
    work = knobs.TASKS[task].work(*(knobs.TASKS[task].small if small else knobs.TASKS[task].shape))
    row: dict[str, Any] = {"flops": work.flops, "bytes": work.bytes, "launched": {}}
    try:
        expected = call()
        meter.poison()
        with setting.turned(candidate, row["launched"]):
            found, again = call(), call()
        error, allowed = difference(found, expected), knobs.TASKS[task].allowed
        if not error <= allowed:
            raise Wrong(f"wrong: off by {error:.2g}, allowed {allowed:.2g}")
        if not all(torch.equal(one, other) for one, other in zip(found, again, strict=True)):
            raise Wrong("wrong: another call gave other bits")
        del expected, found, again
        turns = {"default_seconds": nullcontext, "seconds": lambda: setting.turned(candidate)}
        return {**row, "error": error, **in_turns(call, turns, meter, knobs.TASKS[task].in_graph)}
    except Exception as error:
        meter.recover()
        return {**row, "reason": in_words(error)}


def difference(found: Any, expected: Any) -> float:
    """|difference| / |expected|, the largest over all results; NaN where one has a NaN."""
    shares = [
        ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()
        for one, other in zip(found, expected, strict=True)
    ]
    return math.nan if any(math.isnan(share) for share in shares) else max(shares)


def in_turns(call: Any, turns: dict[str, Any], meter: Any, in_graph: bool) -> dict[str, float]:
    """The median seconds of a call within each of several contexts, which take turns."""
    from benchmarks.measure import median_seconds

    seconds: dict[str, list[float]] = {name: [] for name in turns}
    ends = time.monotonic() + SECONDS * len(turns)
    while not all(seconds.values()) or (time.monotonic() < ends and len(seconds["seconds"]) < ROUNDS):
        for name, within in turns.items():
            with within():
                alone = meter.seconds_in_graph(call, replays=5) if in_graph else None
                seconds[name].append(alone or median_seconds(meter, call, rounds=1, warmup=1))
    return {name: median(values) for name, values in seconds.items()}


# ---- what is said


def render(result: dict[str, Any]) -> str:
    """A table a knob, and the numbers to change where a candidate is worth it."""
    title = "### Launch numbers and their neighbours"
    if not result["measured"]:
        title += f"\n\nCompiled for {', '.join(result['compiled_for'])}; nothing was run."
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["knob"], []).append(row)
    pieces = [title, f"{machine_in_words(result['machine'])}. {versions_in_words(result)}."]
    for knob, tried in rows.items():
        pieces += [f"**{knob}**", table(_header(result), [_line(row, result) for row in tried])]
        pieces += [to_change(tried, result)] if result["measured"] else []
    return "\n\n".join(pieces) + "\n"


def _header(result: dict[str, Any]) -> list[str]:
    took = ["registers", "spilled bytes", "shared KiB"]
    return [
        "candidate",
        "timed on",
        *took,
        *(["", "default", "gain %", "not timed"] if result["measured"] else ["problem"]),
    ]


def _line(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    taken = [kernel for kernels in row["takes"].values() for kernel in kernels]
    most = [max((kernel[place] for kernel in taken), default=0) for place in (1, 2, 3)]
    line = [row["candidate"], row["task"], str(most[0]), str(most[1]), f"{most[2] / 1024:.0f}"]
    if result["measured"]:
        line += [_rate(row, row["seconds"]), _rate(row, row["default_seconds"])] if "seconds" in row else ["", ""]
        line.append(f"{100 * _gain(row):.1f}" if "seconds" in row else "")
    return [*line, row["reason"]]


def _gain(row: dict[str, Any]) -> float:
    return row["default_seconds"] / row["seconds"] - 1


def _rate(row: dict[str, Any], seconds: float) -> str:
    if row["flops"]:
        return f"{row['flops'] / seconds / 1e12:.4g} TFLOP/s"
    return f"{row['bytes'] / seconds / 1e9:.4g} GB/s"


def to_change(rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """The candidate that gains most over all tasks, where it loses on none: what launch.py gave in its place, by call,
    and the measurement as a comment there says it.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["candidate"], []).append(row)
    whole = {name: own for name, own in by_name.items() if all("seconds" in row for row in own)}
    if not whole:
        return "Nothing was timed: the default stays unmeasured against others."
    best = max(whole, key=lambda name: min(_gain(row) for row in whole[name]))
    where = f"{result['machine']['gpu']}, {result['date']}"
    if min(_gain(row) for row in whole[best]) < WORTH:
        numbers = "; ".join(dict.fromkeys(f"{row['task']} {_rate(row, row['default_seconds'])}" for row in whole[best]))
        return f"The default stays (measured: {where}: {numbers}; none of {len(whole)} others is {WORTH:.0%} faster)."
    numbers = "; ".join(
        f"{row['task']} {_rate(row, row['seconds'])}, default {_rate(row, row['default_seconds'])}"
        for row in whole[best]
    )
    given = dict.fromkeys(f"{call} to give {one}" for row in whole[best] for call, one in row["launched"].items())
    return f"To change in launch.py ({best}): {'; '.join(given)} (measured: {where}: {numbers})."
