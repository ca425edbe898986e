"""Tables of the kernel benchmarks from results/kernels-*.json, and what is to be expected where nothing is measured.

Numbers come from the files alone, but for the predictions, which are arithmetic and say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.device import DEVICES, Aim, Device
from benchmarks.markdown import machine_in_words, table, versions_in_words
from benchmarks.roofline import FORWARD, FROZEN_HEAD, TRAINED_HEAD, Ceilings, head_work

WANTS = (FORWARD, FROZEN_HEAD, TRAINED_HEAD)
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MiB = 2**20
BLOCK_OPS = ("nf4", "lora", "rms_norm", "rope", "glu")
OPS = ("linear_logps", "pair_loss", *BLOCK_OPS)
BANDWIDTH = (
    "nf4: GB/s are of the least bytes, two values a byte in and the result out; % is of a large copy's rate. A result "
    "that differs from plain torch's in a bit of an element gets no time. lora (N x D x I, rank 16, forward and "
    "backward): the roofline has each product with a weight once each way and three for each adapter. "
    "rms_norm (rows x length, weight frozen), rope (N x heads of q x of k x numbers) and glu (N x I, SwiGLU): inputs "
    "once in and results once out, each way."
)

Row = dict[str, Any]


def _scaled(name: str, factor: float) -> Callable[[Row], float | None]:
    return lambda row: None if row[name] is None else factor * row[name]


# What an aim or a column may be about, from a row that was measured; None where the device has no such thing.
QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "ms": _scaled("median", 1e3),
    "µs": _scaled("median", 1e6),
    "GPU µs": _scaled("seconds_in_graph", 1e6),
    "launches": lambda row: sum(times for _, times, _ in row["launches"]) if row["launches"] else None,
    "MB beside results": lambda row: (row["peak_bytes"] - row["result_bytes"]) / 1e6,
}


def render(result: dict[str, Any]) -> str:
    """A device's kernels: a table a shape of linear_logps and of nf4, one a loss of pair_loss; what has no number."""
    device = DEVICES[result["device"]]
    heads = _grouped(result["rows"], "linear_logps", lambda row: tuple(row["shape"]))
    losses = _grouped(result["rows"], "pair_loss", lambda row: row["wants"])
    others = [_grouped(result["rows"], op, lambda row: (*row["shape"], row["wants"])) for op in BLOCK_OPS]
    parts = [
        _heading(result, device),
        *(_head_table(shape, rows, result) for shape, rows in heads.items()),
        *(_pair_table(wants, rows) for wants, rows in losses.items()),
        *(_rate_table(rows) for groups in others for rows in groups.values()),
        *([reached] if (reached := aims(result, device)) else []),
        _notes(result, device),
    ]
    return "\n\n".join(parts) + "\n"


def _grouped(rows: list[Row], op: str, key: Any) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row["op"] == op:
            groups.setdefault(key(row), []).append(row)
    return groups


def _heading(result: dict[str, Any], device: Device) -> str:
    rates = result["ceilings"]
    return (
        f"### Kernels on {device.title}\n\n{machine_in_words(result['machine'])}; load before the runs "
        f"{result['load_before']:.1f}. {versions_in_words(result)}.\n\nMeasured there first, as the roofline: a large "
        f"product in {device.kernels.dtype} at {rates['flops'] / 1e12:.3g} TFLOP/s, a large copy at "
        f"{rates['bytes'] / 1e9:.4g} GB/s."
    )


def _head_table(shape: tuple[int, int, int], rows: list[Row], result: dict[str, Any]) -> str:
    cells = {(row["contender"], row["wants"]): row for row in rows}
    measured = [name for name in _contenders(rows) if any((name, w) in cells and _ran(cells[name, w]) for w in WANTS)]
    columns = [f"{wants}: {unit}" for wants in WANTS for unit in ("ms", "%", "MiB")]
    lines = [
        [name, *(text for wants in WANTS for text in _head_cells(cells.get((name, wants)))), *_errors(name, cells)]
        for name in measured
    ]
    ceilings = Ceilings(**result["ceilings"])
    least = [head_work(shape, wants, BYTES[rows[0]["dtype"]]).seconds(ceilings) for wants in WANTS]
    title = f"**linear_logps, N={shape[0]}, V={shape[1]}, D={shape[2]}, {rows[0]['dtype']}**"
    line = "roofline " + ", ".join(f"{1e3 * s:.3g} ms {wants}" for s, wants in zip(least, WANTS, strict=True))
    return f"{title}; {line}.\n\n" + table(["", *columns, "log-prob error", "gradient error"], lines)


def _contenders(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def _ran(row: Row) -> bool:
    return row["median"] is not None


def _head_cells(row: Row | None) -> list[str]:
    if row is None or not _ran(row):
        return ["", "", ""]
    return [_number(1e3 * row["median"]), f"{100 * row['of_roofline']:.0f}", _number(row["peak_bytes"] / MiB)]


def _number(value: float | None) -> str:
    """Three digits, or all of those before the point."""
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _errors(name: str, cells: dict[tuple[str, str], Row]) -> list[str]:
    """The largest over what was wanted: log-probs in nats, gradients relatively."""
    found = [cells[name, wants]["errors"] for wants in WANTS if (name, wants) in cells]
    logps = [errors["logps"] for errors in found if "logps" in errors]
    gradients = [error for errors in found for which, error in errors.items() if which != "logps"]
    return [f"{max(values):.1e}" if values else "" for values in (logps, gradients)]


def _pair_table(wants: str, rows: list[Row]) -> str:
    """What only a GPU has is no column on a CPU."""
    quantities = {"GPU µs": "GPU µs", "launches": "launches", "µs": "µs a call from Python"}
    shown = [what for what in quantities if any(QUANTITIES[what](row) is not None for row in rows)]
    lines = [[row["contender"], *(_number(QUANTITIES[what](row)) for what in shown)] for row in rows if _ran(row)]
    header = ["", *(quantities[what] for what in shown)]
    return f"**pair_loss, {rows[0]['shape'][0]} pairs, {wants}**\n\n{table(header, lines)}"


def _rate_table(rows: list[Row]) -> str:
    """Bytes a second of what hardly computes, FLOPs of what does, and how much that is of the roofline."""
    what, unit, size = ("flops", "TFLOP/s", 1e12) if rows[0]["op"] == "lora" else ("bytes", "GB/s", 1e9)
    lines = [
        [
            row["contender"],
            _number(1e3 * row["median"]),
            _number(row["work"][what] / row["median"] / size),
            f"{100 * row['of_roofline']:.0f}",
            _number(row["peak_bytes"] / MiB),
        ]
        for row in rows
        if _ran(row)
    ]
    shape = "x".join(map(str, rows[0]["shape"]))
    return f"**{rows[0]['op']}, {shape}, {rows[0]['wants']}**\n\n{table(['', 'ms', unit, '%', 'MiB'], lines)}"


def aims(result: dict[str, Any], device: Device) -> str:
    rows = {(row["op"], tuple(row["shape"]), row["wants"], row["contender"]): row for row in result["rows"]}
    lines = []
    for aim in device.kernels.aims:
        row, other = (rows.get((aim.op, aim.shape, aim.wants, name)) for name in (aim.contender, aim.than))
        if aim.gpu == result["machine"].get("gpu") and row is not None:
            found = QUANTITIES[aim.what](row) if _ran(row) else None
            if aim.than and found is not None:
                theirs = QUANTITIES[aim.what](other) if other is not None and _ran(other) else None
                found = found / theirs if theirs else None
            met = "no number" if found is None else "met" if found <= aim.most else "missed"
            lines.append([_aim_in_words(aim), _number(found), f"<= {_number(aim.most)}", met])
    return table(["", "measured", "aim", ""], lines) if lines else ""


def _aim_in_words(aim: Aim) -> str:
    share = f", as a share of {aim.than}'s" if aim.than else ""
    return f"{aim.what}: {aim.contender}, {aim.wants}, {'x'.join(map(str, aim.shape))}{share}"


def _notes(result: dict[str, Any], device: Device) -> str:
    bench, rows = device.kernels, result["rows"]
    kept = ", ".join(f"{head['kept_tiles']:.2f} at V={head['shape'][1]}" for head in result["heads"])
    laps = max((len(row["laps"]) for row in rows), default=0)
    notes = [
        f"Medians over {laps} laps in which the contenders take turns. % is the roofline's time over the measured one; "
        "the roofline counts one product for log-probs, two with a frozen head's gradient, three with both gradients: "
        "whoever recomputes the logits does one more.",
        "A contender gets a time only if its log-probs (root mean square over all rows, in nats) are within "
        f"{bench.allowed_logp_error:g} and its gradients (|error| / |truth|) within {bench.allowed_gradient_error:g} "
        f"of fp64. {bench.why_allowed}",
        *bench.notes,
        "pair_loss: microseconds of one among 50 calls from Python in a row; of the GPU alone, of one among 20 calls "
        "in a CUDA graph.",
        *([BANDWIDTH] if any(row["op"] in BLOCK_OPS for row in rows) else []),
        "MiB include the results."
        + " Random rows with p(target) from 0.01 to 0.99 and a vocabulary after Zipf, of which cut-cross-entropy's "
        f"filter keeps this share of the gradient's tiles: {kept}." * bool(kept),
        *(line for op in OPS for line in _paths(op, rows) + _missing(op, rows)),
        *(f"{row['contender']} cannot be captured: {row['graph_error']}" for row in rows if row["graph_error"]),
    ]
    return "\n".join(f"- {note}" for note in notes)


def _paths(op: str, rows: list[Row]) -> list[str]:
    """What ran, once a contender; chunk sizes differ between shapes."""
    paths: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["op"] == op and _ran(row):
            paths.setdefault(" ".join(filter(None, [row["contender"], row["version"]])), {})[row["path"]] = None
    return [f"{op}, {name}: {' | '.join(found)}." for name, found in paths.items()]


def _missing(op: str, rows: list[Row]) -> list[str]:
    """Who has no number and why, once a reason."""
    rows = [row for row in rows if row["op"] == op]
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if not _ran(row):
            places = reasons.setdefault(row["reason"] or "not run", {}).setdefault(row["contender"], [])
            places.append(f"{'x'.join(map(str, row['shape']))} {row['wants']}")
    total = Counter(row["contender"] for row in rows)
    lines = []
    for reason, contenders in reasons.items():
        names = [
            name if len(places) == total[name] else f"{name} ({', '.join(places)})"
            for name, places in contenders.items()
        ]
        lines.append(f"{op}, without a number: {'; '.join(names)}: {reason}.")
    return lines


def measured(results: list[dict[str, Any]]) -> set[str]:
    """The ops that have a number."""
    return {row["op"] for result in results for row in result["rows"] if _ran(row)}


def predictions(device: Device, measured: set[str]) -> list[str]:
    """The rooflines of the head, and the aims of all kernels, as far as they have no number yet."""
    pieces = [] if device.kernels.expected is None or "linear_logps" in measured else [_rooflines(device)]
    if waiting := [aim for aim in device.kernels.aims if aim.op not in measured]:
        lines = [[_aim_in_words(aim), f"<= {_number(aim.most)}"] for aim in waiting]
        pieces.append(
            "Aims that wait for their measurement; a trained head's counts the product that computes the logits again."
            f"\n\n{table(['', 'aim'], lines)}\n"
        )
    return pieces


def _rooflines(device: Device) -> str:
    assert device.kernels.expected is not None
    gpu, flops, copied = device.kernels.expected
    ceilings, itemsize = Ceilings(flops, copied), BYTES[device.kernels.dtype]
    lines = [
        [f"N={s[0]}, V={s[1]}, D={s[2]}", *(f"{1e3 * head_work(s, w, itemsize).seconds(ceilings):.1f}" for w in WANTS)]
        for s in device.kernels.heads
    ]
    return (
        f"By arithmetic, not measured: least milliseconds of linear_logps on an {gpu} at {flops / 1e12:.0f} TFLOP/s "
        f"and {copied / 1e12:.1f} TB/s (one, two and three matrix products).\n\n{table(['', *WANTS], lines)}\n"
    )


def front_table(every: list[Row], device: Device) -> str:
    """A row a task: the fastest ways of fastdpo, of TRL and of all others, and the leanest that is not fastdpo's. Each
    kernel is at its first shape.
    """
    shapes = {op: next((tuple(row["shape"]) for row in every if row["op"] == op), None) for op in OPS}
    shapes["linear_logps"] = device.kernels.heads[0]
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in every:
        shown = row["op"] != "pair_loss" or row["wants"] == "sigmoid, forward and backward"
        if shown and tuple(row["shape"]) == shapes[row["op"]] and _ran(row):
            tasks.setdefault((row["op"], row["wants"]), []).append(row)
    ordered = sorted(tasks.items(), key=lambda task: OPS.index(task[0][0]))
    lines = [_front_row(op, wants, rows) for (op, wants), rows in ordered]
    return table(["ms; % of the roofline; peak MiB", "fastdpo", "TRL", "fastest other", "leanest other"], lines)


def _front_row(op: str, wants: str, rows: list[Row]) -> list[str]:
    ours, trl, others = [], [], []
    for row in rows:
        name = row["contender"]
        (ours if name.startswith("fastdpo") else trl if name.startswith("TRL") else others).append(row)
    shape = "x".join(map(str, rows[0]["shape"]))
    cells = [_front_cell(found, _seconds) for found in (ours, trl, others)]
    leanest = _front_cell(trl + others, lambda row: row["peak_bytes"]) if ours and ours[0]["of_roofline"] else ""
    return [f"{op} {shape} {rows[0]['dtype']}, {wants}", *cells, leanest]


def _front_cell(rows: list[Row], least: Callable[[Row], float]) -> str:
    """The first of them by that; "" where none ran."""
    if not rows:
        return ""
    row = min(rows, key=least)
    cell = _number(1e3 * _seconds(row)) + (f"; {100 * row['of_roofline']:.0f}%" if row["of_roofline"] else "")
    cell += f"; {_number(row['peak_bytes'] / MiB)}" if row["of_roofline"] else ""
    return f"{row['contender']}: {cell}"


def _seconds(row: Row) -> float:
    """A GPU's own where calls were captured, else of a call."""
    return row["seconds_in_graph"] or row["median"]
