"""What the memory benchmark found, as tables and as a picture; and what its lengths mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import picture
from benchmarks.device import DEVICES
from benchmarks.markdown import machine_in_words, table, versions_in_words
from benchmarks.models import MODELS, quantised
from benchmarks.picture import Bar
from benchmarks.provenance import load
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


PLANNED_FOR = "H200"  # where no GPU says otherwise
# Fields of a contender's settings; the plan that predicts has both
IN_WORDS = {"gradient_checkpointing": "gradient checkpointing", "activation_offloading": "activation offloading"}
PLAN = "gpu-plan.json"  # the stage whose tests noted these figures
RATIO, MEASURED, PLAN_AIM = "planned / measured", "MiB measured", (0.9, 1.1)


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
    pieces.append(picture.markdown(f"results/{stem}", "tokens of the longest pair, by the memory of the card"))
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


def _conditions(result: dict[str, Any]) -> str:
    """Of every step that was taken, or planned."""
    ours = result["contenders"]["fastdpo"]["settings"] if result["measured"] else IN_WORDS
    saves = " and ".join(words for name, words in IN_WORDS.items() if ours.get(name))
    text = (
        f"Response tokens of a pair that a step of AdamW takes through: NF4 with double quantisation, LoRA "
        f"r={result['lora_rank']} on all linear modules, {_dtype(result)}, one pair a micro-batch, both responses of a "
        f"pair of the same length."
    )
    text += f" fastdpo with {saves}." if saves else ""
    if result.get("simulated"):
        return f"{text} Nothing of this is memory: a batch of more tokens than was given counted as out of it."
    return f"{text} A card is its size less {result['context'] / GiB:.1f} GiB for CUDA's context."


def _dtype(result: dict[str, Any]) -> str:
    return {"bfloat16": "bf16", "float32": "fp32"}[DEVICES[result["device"]].dtype]


def _notes(result: dict[str, Any]) -> list[str]:
    single = ", ".join(f"{tokens:,}" for tokens in UNSLOTH.values())
    notes = [_conditions(result)]
    if result["predicted"]:
        card = result.get("planned_for", PLANNED_FOR)
        notes.append(
            f"Predicted: as planned for {'a' if card[0] in 'BT' else 'an'} {card} cut down to the card's memory, 5% of "
            "it left to torch's allocator."
        )
    notes.append(
        f"Unsloth's numbers are published ones, of its documentation, and were not measured here: {single} tokens of "
        "one sequence at rank 32 on 8, 12, 16 and 24 GB. A pair is two sequences that share their prompt."
    )
    if not result["measured"]:
        return notes
    offloading = "; `offloading` with its activation_offloading" if "TRL, offloading" in result["contenders"] else ""
    notes.append(
        "TRL: its DPOTrainer with the same quantised model and adapters of PEFT, gradient checkpointing on, as it "
        f"comes, its adapters in {_dtype(result)}{offloading}. Peaks are of the longest pair of fastdpo that trained; "
        f"a length is found within {100 * result['resolution']:g}%, and where time ran out both ends are given."
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


def planned(folder: Path) -> str:
    """The memory plan beside what was measured, as its tests noted; "" where none has."""
    record: dict[str, Any] = load(folder / PLAN) if (folder / PLAN).exists() else {"parts": []}
    tests = [test for part in record["parts"] for test in part.get("tests", []) if RATIO in test["figures"]]
    if not tests:
        return ""
    rows = []
    for test in tests:
        setting = ", ".join(filter(None, re.sub(r".*\[|\]", "", test["test"]).split("-")))
        ratio, low, high = test["figures"][RATIO], *PLAN_AIM
        verdict = "met" if low <= ratio <= high else "missed"
        rows.append([setting, str(test["figures"][MEASURED]), f"{ratio:.3f}", f"{low} to {high}", verdict])
    return (
        "### Peak memory as planned and as measured on a GPU\n\n"
        f"{machine_in_words(record['machine'])}. {versions_in_words(record)}.\n\n"
        f"{table(['model, tokens, what trains', MEASURED, RATIO, 'aim', ''], rows)}\n"
    )


def predictions(folder: Path) -> str:
    """The plan's, where nothing is measured; "" where they were not written down."""
    return "\n".join(render(load(file)) for file in _predicted(folder))


def picture_of(result: dict[str, Any]) -> tuple[str, str, dict[str, list[Bar]]]:
    """Title, scale and bars of the longest responses, a group for each card; the plan's only where none is measured."""
    prompt = result["prompts"][0]
    what = "Measured" if result["measured"] else "Predicted by fastdpo plan, not measured"
    title = f"The longest pair that trains: {MODELS[quantised(result['model'])].title}, LoRA"
    scale = f"{what}. By the memory of the card, tokens of a pair's two responses end to end; {PROMPTS[prompt]}."
    return title, scale, {f"{gib} GiB": _bars(result, prompt, gib) for gib in result["gibs"]}


def _bars(result: dict[str, Any], prompt: str, gib: int) -> list[Bar]:
    bars = []
    for name, row in result["contenders"].items():
        cell = row["longest"][prompt][str(gib)]
        kind = "ours" if name == "fastdpo" else "theirs"
        bars.append(Bar(name, cell["response"], _with_commas(_found(cell, [])), kind, 2))
    if not result["measured"] and (expected := result["predicted"].get(prompt, {}).get(str(gib))) is not None:
        bars.append(Bar("fastdpo, predicted", expected, f"2 x {expected:,}" if expected else "none", "ours", 2))
    if result["model"] == MODEL and prompt == "short" and gib in UNSLOTH:
        bars.append(Bar("Unsloth, published", UNSLOTH[gib], f"{UNSLOTH[gib]:,}, one sequence", "quoted"))
    return bars


def _with_commas(text: str) -> str:
    return re.sub(r"\d{4,}", lambda number: f"{int(number[0]):,}", text)


def pictures(folder: Path) -> dict[Path, tuple[str, str, dict[str, list[Bar]]]]:
    """What is drawn beside a file: each measurement, and the plan's prediction where none is there."""
    files = sorted(folder.glob("memory-*.json")) + _predicted(folder)
    return {file: picture_of(load(file)) for file in files}


def _predicted(folder: Path) -> list[Path]:
    """The plan's file, where nothing is measured and it was written down."""
    file = folder / plan_file(MODEL)
    return [file] if file.exists() and not (folder / file_name("cuda", MODEL)).exists() else []
