"""What the memory benchmark found, as tables and as a picture; and what its lengths mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import machine_in_words, table, versions_in_words
from benchmarks.models import MODELS, quantised
from benchmarks.workload import PROFILES, PairLengths

RESULTS = Path(__file__).parent / "results"
GiB = 2**30
CONTEXT = int(0.6 * GiB)  # of a card, CUDA's context and kernels, outside of torch's allocator
MODEL = "llama-3.1-8b"
SHORT = 16  # tokens of a prompt
PROMPTS = {
    "short": f"prompts of {SHORT} tokens",
    "ultrafeedback": "prompts 0.42 times as long as a response, as UltraFeedback's",
}
AIMS = {8: 1500, 12: 10_000, 16: 20_000, 24: 40_000}  # GiB -> tokens of each response; MODEL, short prompts
# GiB -> tokens of one sequence, as Unsloth publishes them for Llama-3.1-8B: QLoRA of rank 32, one sequence a batch
UNSLOTH = {8: 2972, 12: 21_848, 16: 40_724, 24: 78_475}


def pair(prompt: str, response: int) -> PairLengths:
    """A pair of two responses of that many tokens; `prompt` is of PROMPTS."""
    ratio = PROFILES["ultrafeedback"].prompt_to_response
    return PairLengths(SHORT if prompt == "short" else max(1, round(ratio * response)), response, response)


def aims(model: str, prompt: str, gib: int) -> list[int]:
    return [AIMS[gib]] if model == MODEL and prompt == "short" and gib in AIMS else []


def file_name(device: str, model: str) -> str:
    return f"memory-{device}-{model}.json"


def plan_file(model: str) -> str:
    return f"plan-{model}.json"


def render(result: dict[str, Any]) -> str:
    """A table for each kind of prompt, the picture, and what the numbers are."""
    model = MODELS[quantised(result["model"])].title
    pieces = [_heading(result, model), *(_table(result, prompt) for prompt in result["prompts"])]
    stem = Path(file_name(result["device"], result["model"]) if result["measured"] else plan_file(result["model"])).stem
    pieces.append(f"![tokens of the longest pair against memory](results/{stem}.png)")
    return "\n\n".join([*pieces, "\n".join(f"- {note}" for note in _notes(result))]) + "\n"


def _heading(result: dict[str, Any], model: str) -> str:
    if not result["measured"]:
        return f"**Predicted by `fastdpo plan`, not measured: the longest pair that trains, {model}**"
    where = f"{machine_in_words(result['machine'])}. {versions_in_words(result)}."
    return f"### The longest pair that trains, by memory: {model}\n\n{where}"


def _table(result: dict[str, Any], prompt: str) -> str:
    names = list(result["contenders"])
    measured = [f"{name}, measured" for name in names]
    header = [PROMPTS[prompt], "aim", "predicted", *measured, *(["of it allocated"] if names else [])]
    rows = [_row(result, prompt, gib, names) for gib in result["gibs"]]
    return table([*header, "Unsloth, published, one sequence"], rows)


def _row(result: dict[str, Any], prompt: str, gib: int, names: list[str]) -> list[str]:
    aim = aims(result["model"], prompt, gib)
    expected = result["predicted"].get(prompt, {}).get(str(gib))
    cells = {name: result["contenders"][name]["longest"][prompt][str(gib)] for name in names}
    found = [_found(cell, aim if name == "fastdpo" else []) for name, cell in cells.items()]
    peak = [_gib(cells["fastdpo"]["peak_allocated"])] if names else []
    single = UNSLOTH.get(gib) if result["model"] == MODEL and prompt == "short" else None
    return [
        f"{gib} GiB",
        f"2 x {aim[0]}" if aim else "",
        "" if expected is None else f"2 x {expected}" if expected else "none",
        *found,
        *peak,
        f"{single}" if single else "",
    ]


def _found(cell: dict[str, Any], aim: list[int]) -> str:
    low, high = cell["response"], cell["too_long"]
    if not low and not high:
        return "not tried"
    text = "none" if cell["settled"] else f"less than 2 x {high}"
    if low:
        text = f"2 x {low}" + ("" if cell["settled"] else f" to {high}" if high else " or more")
    if not aim:
        return text
    return f"{text}, met" if low >= aim[0] else f"{text}, missed" if high and high <= aim[0] else text


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GiB:.2f} GiB"


def _notes(result: dict[str, Any]) -> list[str]:
    single = ", ".join(f"{tokens:,}" for tokens in UNSLOTH.values())
    notes = [
        f"Response tokens of a pair that a step of AdamW takes through: NF4 with double quantisation, LoRA "
        f"r={result['lora_rank']} on all linear modules, bf16, one pair a micro-batch, both responses of a pair of the "
        f"same length. fastdpo with gradient checkpointing and activation offloading. A card is its size less "
        f"{result['context'] / GiB:.1f} GiB for CUDA's context.",
        "Predicted: as planned for an H200 cut down to the card's memory, 5% of it left to torch's allocator.",
        f"Unsloth's numbers are published ones, of its documentation, and were not measured here: {single} tokens of "
        "one sequence at rank 32 on 8, 12, 16 and 24 GB. A pair is two sequences that share their prompt.",
    ]
    if not result["measured"]:
        return notes
    if result["simulated"]:
        notes.append("Nothing of this is memory: a batch of more tokens than was given counted as out of it.")
    notes.append(
        "TRL: its DPOTrainer with the same quantised model and adapters of PEFT, gradient checkpointing on, as it "
        "comes, its adapters in bf16; `offloading` with its activation_offloading. Peaks are of the longest pair of "
        f"fastdpo that trained; a length is found within {100 * result['resolution']:g}%, and where time ran out both "
        "ends are given."
    )
    return notes + [
        f"{name} ended early: `{row['failed']}`" for name, row in result["contenders"].items() if row["failed"]
    ]


def unmeasured() -> str:
    """The line for a measurement that is not there."""
    return (
        f"the longest pair that trains with 8, 12, 16 and 24 GiB, beside TRL 1.16's: "
        f"{MODELS[quantised(MODEL)].title} with bfloat16 products on a GPU (`make gpu-memory`)"
    )


def waiting_aims(folder: Path) -> list[list[str]]:
    """(quantity, aim) of each card, where no file says whether it is met."""
    if (folder / file_name("cuda", MODEL)).exists():
        return []
    title = MODELS[quantised(MODEL)].title
    return [
        [f"response tokens of the longest pair on {gib} GiB, prompts of {SHORT} tokens: {title}", f">= 2 x {aim}"]
        for gib, aim in AIMS.items()
    ]


def predictions(folder: Path) -> str:
    """The plan's, where nothing is measured; "" where they were not written down."""
    file = folder / plan_file(MODEL)
    if (folder / file_name("cuda", MODEL)).exists() or not file.exists():
        return ""
    return render(json.loads(file.read_text()))


COLOURS = {"fastdpo": "#0b6e4f", "TRL": "#c1440e", "TRL, offloading": "#e0a458"}


def draw(result: dict[str, Any], file: Path) -> None:
    """Tokens of the longest pair, its prompt once, against memory: a panel for each kind of prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(result["prompts"]), 4.4), layout="constrained")
    axes = figure.subplots(1, len(result["prompts"]), squeeze=False, sharey=True)[0]
    for axis, prompt in zip(axes, result["prompts"], strict=True):
        _panel(axis, result, prompt)
    axes[0].set_ylabel("tokens of the longest pair, its prompt once")
    what = "measured" if result["measured"] else "predicted by fastdpo's plan, nothing measured"
    figure.suptitle(f"{MODELS[quantised(result['model'])].title}, LoRA r={result['lora_rank']}, one pair: {what}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90, metadata={"Software": None})


def _panel(axis: Any, result: dict[str, Any], prompt: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    def line(lengths: dict[int, int], **style: Any) -> None:
        points = {gib: pair(prompt, length).tokens for gib, length in lengths.items() if length}
        axis.plot(list(points), list(points.values()), **style)

    for name, row in result["contenders"].items():
        found = {int(gib): cell["response"] for gib, cell in row["longest"][prompt].items()}
        line(found, marker="o", label=name, color=COLOURS.get(name))
    expected = {int(gib): length for gib, length in result["predicted"].get(prompt, {}).items()}
    if expected:
        line(expected, marker="s", linestyle="--", color="#555555", label="fastdpo, predicted")
    if wanted := {gib: aim[0] for gib in result["gibs"] if (aim := aims(result["model"], prompt, gib))}:
        line(wanted, linestyle="", marker="_", markersize=16, color="#0b6e4f", label="aim")
        single = {gib: tokens for gib, tokens in UNSLOTH.items() if gib in wanted}
        style = {"linestyle": ":", "marker": "x", "color": "#888888"}
        axis.plot(list(single), list(single.values()), label="Unsloth, published, one sequence", **style)
    axis.set_title(PROMPTS[prompt], fontsize=10)
    axis.set_xlabel("memory of the card, GiB")
    axis.set_xticks(result["gibs"])
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
