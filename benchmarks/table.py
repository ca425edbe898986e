"""The page of all results, from results/*.json; pages.py writes it between markers, and a test holds it to them.

Numbers come from the files alone; what is said of a device beside them, and the aims, stand in device.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import kernel_table, memory_table, parts, trace
from benchmarks.device import CPU, CUDA, DEVICES, Device, StepAim, step_aim
from benchmarks.markdown import PROCESSOR_TIME, machine_in_words, table, versions_in_words, why_without_number
from benchmarks.models import MODELS
from benchmarks.provenance import load
from benchmarks.workload import PROFILES

RESULTS = Path(__file__).parent / "results"
LATER = "later"  # the span of all epochs after the first

# What is to be measured, in the order of the tables, of which the first step on a GPU makes the front page's claim:
# benchmark, device, model, profile -> the command that does it.
_8B, _1B = "llama-3.1-8b", "llama-3.2-1b"
_7B_NF4 = "mistral-7b-nf4"
PLANNED = {
    ("step", CPU.name, "20m", "hh-rlhf"): "python -m benchmarks step",
    ("step", CUDA.name, _8B, "hh-rlhf"): "make gpu-step-8b-hh-rlhf",
    ("step", CUDA.name, _8B, "helpsteer"): "make gpu-step-8b-helpsteer",
    ("step", CUDA.name, _8B, "ultrafeedback"): "make gpu-step-8b-ultrafeedback",
    ("step", CUDA.name, _8B, "capybara"): "make gpu-step-8b-capybara",
    ("step", CUDA.name, _8B, "tldr"): "make gpu-step-8b-tldr",
    ("step", CUDA.name, _8B, "no-prompt"): "make gpu-step-8b-no-prompt",
    ("step", CUDA.name, "qwen2.5-7b", "hh-rlhf"): "make gpu-step-qwen2.5-7b",
    ("step", CUDA.name, "mistral-7b", "hh-rlhf"): "make gpu-step-mistral",
    ("step", CUDA.name, _7B_NF4, "ultrafeedback"): "make gpu-step-mistral-nf4",
    ("step", CUDA.name, _1B, "hh-rlhf"): "make gpu-step",
    ("parts", CUDA.name, _8B, "hh-rlhf"): "make gpu-parts",
    ("trace", CUDA.name, _8B, "hh-rlhf"): "make gpu-trace",
}
_WHAT = {
    "step": "a training step against TRL 1.16, default and tuned",
    "parts": "a step against the sum of its parts",
    "trace": "where a step's time on the GPU goes",
}

_IN_4_BITS = (
    "NF4 with double quantisation, the same weights for all. TRL casts the adapters of a quantised model to bf16; "
    "where all else is float32 they are cast back, so that curves can be compared. fastdpo's are fp32."
)


BATCH = 8  # pairs an optimizer step, where a file's name does not say otherwise


def file_name(benchmark: str, device: str, model: str, profile: str, batch: int = BATCH, full: bool = False) -> str:
    names = [benchmark, device, model, profile] + [f"batch-{batch}"] * (batch != BATCH) + ["full"] * full
    return f"{'-'.join(names)}.json"


def in_order(benchmark: str, folder: Path) -> list[Path]:
    """A benchmark's files, the planned ones first."""
    planned = [folder / file_name(*key) for key in PLANNED if key[0] == benchmark]
    found = sorted(folder.glob(f"{benchmark}-*.json"))
    return [file for file in planned if file in found] + [file for file in found if file not in planned]


def render(result: dict[str, Any]) -> str:
    """One result as a heading, the runs, the ratios with their aims, and what the numbers leave out."""
    return f"{_measured(result)}\n{_listed(notes(result))}\n"


def _measured(result: dict[str, Any]) -> str:
    """What is this result's own."""
    pieces = [_heading(result), _runs(result), _ratios(result), *([aims] if (aims := _aims(result)) else [])]
    if result["tuning"]:
        pieces.append(_tuning(result["tuning"], DEVICES[result["device"]]))
    return "\n\n".join([*pieces, _listed(own_notes(result))]) + "\n"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _heading(result: dict[str, Any]) -> str:
    work, machine = result["workload"], result["machine"]
    sizes, repeats = work["parameters"], work["repeat"]
    head = "untied" if sizes["untied_head"] else "tied to the embedding"
    return (
        f"### A training step on {DEVICES[result['device']].title}: {MODELS[result['model']].title}, "
        f"{PROFILES[result['profile']].pairs}\n\n"
        f"{_million(sizes['total'])} parameters ({_million(sizes['trunk'])} trunk, "
        f"{_million(sizes['embedding'])} embedding over {work['vocabulary']} tokens, head {head}), "
        f"{what_trains(work)}, {work['dtype']}. {work['pairs']} pairs, "
        f"{work['batch']} an optimizer step, {work['median_tokens']:.0f} tokens a sequence (median; longest "
        f"{work['longest']}), prompts {work['prompt_to_response']:.2f} times as long as a response.\n\n"
        f"{machine_in_words(machine)}; load before the runs {result['load_before']:.1f}. {versions_in_words(result)}. "
        f"{'One run each' if repeats == 1 else f'Medians of {repeats}'}."
    )


def what_trains(work: dict[str, Any]) -> str:
    return f"LoRA r={work['lora_rank']} on all linear modules" if work["lora_rank"] else "all weights train"


def _runs(result: dict[str, Any]) -> str:
    spans = list(result["formula_flops_per_pair"])
    rows = [[name, *_cells(row, spans)] for name, row in result["configurations"].items()]
    quantities = ("pairs/s", "tokens/s", "GFLOP/pair", "MFU %")
    header = ["", "s before training", *(f"{what}, {span_in_words(s)}" for what in quantities for s in spans)]
    formula = [_giga(value) for value in result["formula_flops_per_pair"].values()]
    packed = "fastdpo" if MODELS[result["model"]].packs else "fastdpo, if it packed"
    rows.append([f"{packed}, by formula", "", *[""] * 2 * len(spans), *formula, *[""] * len(spans), "", ""])
    return _without_empty_columns([*header, "peak MiB", "added MiB"], rows)


def _cells(row: dict[str, Any], spans: list[str]) -> list[str]:
    if "failed" in row:
        return [why_without_number(row), *[""] * (4 * len(spans) + 2)]
    tokens, shares = row.get("tokens_per_second", {}), row.get("mfu", {})
    return [
        f"{row['seconds_before_training']:.1f}",
        *(f"{row['pairs_per_second'][span]:.3g}" for span in spans),
        *(f"{tokens[span]:.0f}" if tokens else "" for span in spans),
        *(_giga(row["flops_per_pair"][span]) if row["flops_per_pair"] else "" for span in spans),
        *(f"{100 * shares[span]:.0f}" if shares else "" for span in spans),
        f"{row['peak_memory'] / 2**20:.0f}",
        f"{row['added_memory'] / 2**20:.0f}",
    ]


def _without_empty_columns(header: list[str], rows: list[list[str]]) -> str:
    """A column that no row has a number in was not measured when the file was written."""
    kept = [0] + [i for i in range(1, len(header)) if any(row[i] for row in rows)]
    return table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _ratios(result: dict[str, Any]) -> str:
    """fastdpo over each other contender that ran: a row for each of them."""
    values = {ratio["name"]: ratio["value"] for ratio in result["ratios"]}
    others = [name for name, row in result["configurations"].items() if "failed" not in row and _is_other(name)]
    columns = {
        f"{what}, {words}": f"{what} of fastdpo / {{}}, {words}"
        for what in ("speed", "FLOPs")
        for words in map(span_in_words, result["formula_flops_per_pair"])
    }
    columns |= {"peak memory": "peak memory of fastdpo / {}"}
    columns |= {"memory added by training": "memory added by training, fastdpo / {}"}
    found = [[values.get(name.format(other)) for name in columns.values()] for other in others]
    rows = [["" if value is None else f"{value:.2f}" for value in row] for row in found]
    cells = [[other, *row] for other, row in zip(others, rows, strict=True)]
    return _without_empty_columns(["fastdpo's, as a multiple of that of", *columns], cells)


def _is_other(name: str) -> bool:
    return not name.startswith("fastdpo")


def _aims(result: dict[str, Any]) -> str:
    """Of this setting; "" where it has none."""
    rows = []
    for ratio in result["ratios"]:
        if aim := step_aim(result, ratio["name"]):
            verdict = "met" if aim.met(ratio["value"]) else "missed"
            rows.append([ratio["name"], f"{ratio['value']:.2f}", str(aim), verdict])
    return table(["ratio", "measured", "aim", ""], rows) if rows else ""


def _tuning(tuning: list[dict[str, Any]], device: Device) -> str:
    ran = sorted((row for row in tuning if "seconds" in row), key=lambda row: row["seconds"])
    rows = [[_settings(row), f"{row['seconds']:.1f}"] for row in ran]
    rows += [[_settings(row), _reason(row)] for row in tuning if "failed" in row]
    scored = "" if device.head_skips_rows else ", response rows only"
    title = f"TRL's settings that were tried, rows sorted by length{scored}:"
    return f"{title}\n\n{table(['settings', 's, 1 epoch'], rows)}"


def _settings(row: dict[str, Any]) -> str:
    named = {**row["settings"], **({"attention": row["attention"]} if row.get("attention") else {})}
    return ", ".join(f"{name}={value}" for name, value in named.items())


def _reason(row: dict[str, Any]) -> str:
    return f"failed: `{row['failed']}`" if why_without_number(row) == "failed" else row["failed"]


def own_notes(result: dict[str, Any]) -> list[str]:
    """What is to be said of one result beside its numbers."""
    rows = result["configurations"]
    tuned = ", ".join(f"`{setting}`" for setting in _settings(rows["TRL tuned"]["spec"]).split(", "))
    return [
        *([PROCESSOR_TIME] if result["workload"].get("processor_time") else []),
        f"TRL tuned: {tuned}, rows sorted by length.",
        *([_IN_4_BITS] if MODELS[result["model"]].in_4_bits else []),
        *(f"{name}: {_reason(row)}" for name, row in rows.items() if "failed" in row),
        *(f"FLOPs of {name} are by formula, as counting failed: `{why}`" for name, why in result["uncounted"].items()),
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """What results of a device have in common."""
    device = DEVICES[result["device"]]
    default = "TRL default is TRL 1.16 as it comes (gradient checkpointing on, reference online)."
    if device.trl_default_epochs:
        default += (
            f" It runs {span_in_words(str(device.trl_default_epochs))}; its later epochs do the same work and count as "
            "much as the first."
        )
    flops = "counted by torch, in runs of their own" if device.counts else "by formula"
    return [
        "Wall time runs from text rows in memory and a built model to a trained model: tokenization, adapters, a "
        "precomputed reference and training count, imports and building the model do not.",
        _gate(result["tolerances"]),
        default,
        *device.notes,
        f"fastdpo runs the reference in the first epoch only. FLOPs are {flops}; attention counts as full rectangles "
        "for both.",
        *([_mfu(result["peak"])] if "peak" in result else []),
    ]


def _mfu(peak: dict[str, Any]) -> str:
    return (
        "tokens/s: of both sequences of a pair, without padding. MFU: the FLOPs that are needed, the same for every "
        "row (prompt once, nothing recomputed, the causal half of attention, the reference in the first epoch), over "
        f"time and {peak['flops'] / 1e12:.3g} TFLOP/s: {peak['how']}."
    )


def _gate(tolerances: dict[str, Any]) -> str:
    absolute, relative = tolerances["loss_absolute"], tolerances["loss_relative"]
    loss = [f"{absolute:g}"] * bool(absolute) + [f"{100 * relative:g}%"] * bool(relative)
    return (
        f"First loss within {tolerances['first_loss']:g} of ln 2, every later loss within {' or '.join(loss)} and "
        f"gradient norm within {100 * tolerances['grad_norm_relative']:g}% of fastdpo's on the same rows in the same "
        f"order; without that no number is printed. {tolerances['why']}"
    )


def span_in_words(span: str) -> str:
    return "later epochs" if span == LATER else f"{span} epoch" + ("" if span == "1" else "s")


def _million(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def _giga(count: float) -> str:
    return f"{count / 1e9:.1f}"


# What no table is of -> the file with which it is known.
UNTABLED = {
    "a step in several processes on several GPUs over NCCL, against one: there is no command; one process, over NCCL "
    "and under FSDP2, is in `make gpu-tests`": "",
    "encoder-decoders, rows with images, embedding noise, samples and runs that go on: whether they are on a GPU what "
    "they are on a CPU (`make gpu-tests`)": "gpu-tests.json",
    "launch numbers against their neighbours (`make gpu-tune`)": "tune-cuda.json",
}
RENDER = {"parts": parts.render, "trace": trace.render, "memory": memory_table.render}


def generated(folder: Path = RESULTS) -> str:
    """A table for each file of results/, and what no file holds yet."""
    pieces = _steps(folder)
    pieces += [draw(load(file)) for benchmark, draw in RENDER.items() for file in in_order(benchmark, folder)]
    pieces += [text] if (text := memory_table.planned(folder)) else []
    pieces += [kernel_table.render(load(file)) for file in sorted(folder.glob("kernels-*.json"))]
    if missing := unmeasured(folder):
        pieces.append("\n".join(["### Not yet measured\n", *(f"- {text}" for text in missing)]) + "\n")
    pieces += [text] if (text := memory_table.predictions(folder)) else []
    for device in DEVICES.values():
        pieces += kernel_table.predictions(device, kernel_table.measured(kernels(device, folder)))
    pieces += [drawn for device in DEVICES.values() if (drawn := waiting_aims(device, folder))]
    return "\n".join(pieces)


def kernels(device: Device, folder: Path) -> list[dict[str, Any]]:
    """The results of a device, whose ops may lie in several files."""
    return [load(file) for file in sorted(folder.glob(f"kernels-{device.name}*.json"))]


def _steps(folder: Path) -> list[str]:
    """Each result with what is its own, then what those of a device have in common, once."""
    pieces = []
    found = [load(file) for file in in_order("step", folder)]
    for device in DEVICES.values():
        results = [result for result in found if result["device"] == device.name]
        pieces += map(_measured, results)
        if lines := dict.fromkeys(line for result in results for line in notes(result)):
            pieces.append(f"Of all steps on {device.title}:\n\n{_listed(lines)}\n")
    return pieces


def waiting_aims(device: Device, folder: Path) -> str:
    """The aims of steps that no file says of whether they are met; "" where there is none."""
    rows = []
    for aim in device.aims:
        files = {name: folder / file_name("step", device.name, aim.model, name) for name in aim.profiles}
        if waiting := [name for name, file in files.items() if not _judged(aim, file)]:
            rows.append([f"{aim.quantity}: {_setting(aim.model, waiting)}", str(aim)])
    if device.parts_aim is not None:
        for model in sorted({key[2] for key in PLANNED if key[:2] == ("parts", device.name)}):
            if not (folder / file_name("parts", device.name, model, "hh-rlhf")).exists():
                setting = _setting(model, ["hh-rlhf"])
                rows.append([f"a step / the sum of its parts: {setting}", f"<= {device.parts_aim}"])
    if device is CUDA and not known(folder / memory_table.PLAN):
        low, high = memory_table.PLAN_AIM
        rows.append(["peak memory as planned / as measured, in 16 settings (`make gpu-plan`)", f"{low} to {high}"])
    rows += memory_table.waiting_aims(folder) if device is CUDA else []
    if not rows:
        return ""
    gpu = next((f" on an {aim.gpu}" for aim in device.aims if aim.gpu), "")
    return f"Aims of a step{gpu} that wait for their measurement.\n\n{table(['', 'aim'], rows)}\n"


def _judged(aim: StepAim, file: Path) -> bool:
    """Whether a step's file has the number that the aim is for."""
    result = load(file) if file.exists() else {"ratios": []}
    return any(step_aim(result, ratio["name"]) is aim for ratio in result["ratios"])


def _setting(model: str, profiles: Iterable[str]) -> str:
    owners = ", ".join(f"{PROFILES[name].title}'s" for name in profiles)
    return f"{MODELS[model].title}, pairs as long as {owners}"


def unmeasured(folder: Path) -> list[str]:
    """A line for each planned file that is not there or without TRL's numbers, and for kernels without a number."""
    missing = [
        f"{_WHAT[key[0]]}: {_weights(*key[1:3])} on {DEVICES[key[1]].title}, {PROFILES[key[3]].pairs} (`{command}`)"
        for key, command in PLANNED.items()
        if not _measured_against_trl(folder / file_name(*key))
    ]
    found = (folder / memory_table.file_name(CUDA.name, memory_table.MODEL)).exists()
    untabled = [text for text, file in UNTABLED.items() if not file or not known(folder / file)]
    missing += ([] if found else [memory_table.unmeasured()]) + untabled
    for device in DEVICES.values():
        measured = kernel_table.measured(kernels(device, folder))
        missing += [text for ops, text in device.kernels.unmeasured.items() if not measured.issuperset(ops)]
    return missing


def _measured_against_trl(file: Path) -> bool:
    """Of a benchmark that others take no part in, whether it is there."""
    rows = load(file).get("configurations", {}) if file.exists() else {"TRL default": {"failed": "not run"}}
    return not any("failed" in rows[name] for name in ("TRL default", "TRL tuned") if name in rows)


def known(file: Path) -> bool:
    """Whether it is there and finished: all commands of a stage ended well, and time sufficed for every row."""
    record = load(file) if file.exists() else {"parts": [{"ok": False}]}
    late = any((row["reason"] or "").startswith("not run") for row in record.get("rows", []))
    return all(part["ok"] for part in record.get("parts", [])) and not late


def _weights(device: str, model: str) -> str:
    products = "with {} products" if MODELS[model].in_4_bits else "in {}"
    return f"{MODELS[model].title} {products.format(DEVICES[device].dtype)}"
