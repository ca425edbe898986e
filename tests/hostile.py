"""Hypothesis strategies for what users and attackers feed a run: texts, messages, cells, rows and files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fastdpo import DPOConfig
from fastdpo.verdicts import CHOICES, VERDICTS

# Whitespace, invisible and right-to-left characters, halves of surrogate pairs, what templates and tokenizers read
ODD_TEXTS = ["", " ", "\n\t ", "\0", "</s>", "<s><pad>", "</s>" * 40, "<|im_end|>\n<|im_start|>system\n"]
ODD_TEXTS += ["\u202egnirts", "\u200b\u200d", "\ufeff", "e\u0301" * 30, "\U0001f468\u200d\U0001f469", "\U0010ffff"]
ODD_TEXTS += ["{{ messages }}{% for x in range(9) %}", "None", "nan", "🂡" * 100, "word " * 100, "a" * 1500]
ANY_TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(ODD_TEXTS),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=4), st.integers(0, 60)),
)
WORDS = st.sampled_from(["hello", "a good question", "thank you", "go away", "I do not know", "yes", "no", "well then"])
TEXT = WORDS | st.builds(str.__add__, WORDS, ANY_TEXT) | WORDS | ANY_TEXT
HALVES = st.text(st.characters(categories=["Cs", "Ll"]), max_size=3)  # lone surrogates, which are no text
NUMBERS = st.integers() | st.floats() | st.booleans() | st.just(10**400)
CELL = st.one_of(
    *(st.none(), NUMBERS, st.binary(max_size=4), TEXT, HALVES, st.lists(TEXT, max_size=2), st.just([[[]]])),
    st.dictionaries(WORDS, TEXT, max_size=2),
)


@st.composite
def a_message(draw: Any, odd: bool) -> Any:
    message: dict[str, Any] = {"role": draw(st.sampled_from(["user", "assistant", "system"])), "content": draw(TEXT)}
    if not odd:
        return message
    kind = draw(st.integers(0, 5))
    if kind == 0:
        message[draw(st.sampled_from(["role", "content", "name", "tool_calls"]))] = draw(CELL)
    elif kind == 1:
        del message[draw(st.sampled_from(["role", "content"]))]
    elif kind == 2:
        message["content"] = [{"type": draw(WORDS), "text": draw(TEXT)}]
    elif kind == 3:
        message["tool_calls"] = [{"function": {"name": "f", "arguments": draw(CELL)}}]
        message["content"] = draw(st.none() | TEXT)
    elif kind == 4:
        return draw(CELL)
    return message


def conversations(odd: bool) -> SearchStrategy[list]:
    return st.lists(a_message(odd), min_size=0 if odd else 1, max_size=3)


def parts(chat: bool, odd: bool) -> SearchStrategy[Any]:
    """A prompt or an answer."""
    usual = conversations(odd) if chat else TEXT
    if chat and not odd:
        usual = usual.map(
            lambda messages: [{**message, "role": "assistant"} for message in messages[:1]] + messages[1:]
        )
    return usual | CELL | conversations(True) if odd else usual


EXTRA = st.dictionaries(
    st.sampled_from(
        ["ref_chosen_logps", "reference_rejected_logps", "margin", "score_chosen", "weight", "id", "", "fate"]
    ),
    NUMBERS | st.sampled_from([float("nan"), float("inf"), None, "0.5", [1.0]]),
    max_size=2,
)
OPTION_CELLS = {"tools": CELL | st.just("[{"), "chat_template_kwargs": CELL | st.just('{"tokenize": true}')}


@st.composite
def a_row(draw: Any, chat: bool, prompted: bool, odd: bool) -> dict[Any, Any]:
    names = ["prompt", "chosen", "rejected"] if prompted else ["chosen", "rejected"]
    row = {name: draw(parts(chat, odd)) for name in names}
    if not prompted and not odd:
        shared = draw(parts(chat, False))
        row = {name: shared + value for name, value in row.items()}
    if draw(st.integers(0, 9)) == 0:
        row["rejected"] = row["chosen"]
    if odd and draw(st.integers(0, 3)) == 0:
        del row[draw(st.sampled_from(names))]
    if odd and draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(OPTION_CELLS)))
        row[name] = draw(OPTION_CELLS[name])
    return row


@st.composite
def tables(draw: Any, odd: bool | None = None) -> list[dict]:
    """Rows of one shape, all of them as they should be, or some of them odd."""
    chat, prompted, more = draw(st.booleans()), draw(st.booleans()), draw(EXTRA)
    rows = draw(st.lists(a_row(chat, prompted, False), min_size=1, max_size=4))
    if draw(st.integers(0, 2)) == 0 if odd is None else odd:
        rows.insert(draw(st.integers(0, len(rows))), draw(a_row(chat, prompted, True)))
    return [{**row, **more} for row in rows]


# One line, or the rest of a file, that is no row
LINES = [
    "",
    "null",
    "3",
    "[]",
    "[1, 2]",
    "{}",
    "NaN",
    "1e999",
    '"text"',
    "{'chosen': 1}",
    '{"chosen": "a", "chosen": 1}',
]
LINES += ["9" * 5000, '{"chosen": %s, "rejected": 1}' % ("9" * 5000), "[" * 5000, '{"chosen":' * 5000, "\x1a", "//"]
LINES += ['{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', '{"chosen": "a", "rejected": "b", "prompt": NaN}']
LINES += [
    '{"chosen": "a\tb", "rejected": "b", "prompt": ""}',
    "\ufeff{}",
    '{"": 1}',
    "\u2028",
    "a,b,c,d,e,f",
    '"',
    '"",""',
]


@st.composite
def files(draw: Any) -> tuple[str, bytes]:
    """A suffix, and what is in the file: jsonl, json or csv of good rows, then broken, or not, in a place or two."""
    names = ("prompt", "chosen", "rejected")
    rows = [{name: draw(TEXT) for name in names} for _ in range(draw(st.integers(1, 4)))]
    kind = draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    if kind == ".csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])))
        writer.writeheader()
        writer.writerows(rows)
        lines = file.getvalue().split("\n")
    elif kind == ".json" and draw(st.booleans()):
        lines = json.dumps(rows, indent=draw(st.sampled_from([None, 1]))).split("\n")
    else:
        lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    broken = draw(st.integers(0, 3))
    if broken == 1:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(LINES)))
    encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "latin-1", "utf-16"]))
    content = draw(st.sampled_from(["\n", "\n", "\r\n"])).join(lines).encode(encoding, "replace")
    if broken == 2:
        content = content[: draw(st.integers(0, len(content)))]
    if broken == 3:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(min_size=1, max_size=6)) + content[place + draw(st.integers(0, 3)) :]
    return draw(st.sampled_from([kind] * 5 + [".jsonl", ".json", ".csv", ".parquet", ".txt", ".JSONL"])), content


IDS = st.one_of(
    st.lists(st.integers(0, 499), max_size=8),
    st.lists(st.sampled_from([0, 1, 2, 499]) | st.integers(0, 499), min_size=1, max_size=600),
)
ODD_IDS = st.lists(
    st.sampled_from(
        [-1, -100, 0, 7, 499, 500, 2**31 - 1, 2**31, 2**63, 10**30, 1.5, 3.0, float("nan"), True, "3", None, [1]]
    ),
    max_size=3,
)


@st.composite
def token_rows(draw: Any) -> list[dict]:
    """Rows that come as token ids."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: draw(IDS) for name in names} for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        draw(st.sampled_from(rows))[draw(st.sampled_from(names))] = draw(ODD_IDS | CELL)
    return rows


KINDS: list[tuple[pa.DataType, list]] = [
    (pa.string(), ["yes", "no", None]),
    (pa.large_string(), ["yes", "no"]),
    (pa.string_view(), ["yes", "no"]),
    (pa.dictionary(pa.int8(), pa.string()), ["yes", "no"]),
    (pa.binary(), [b"yes", b"\xff"]),
    (pa.int64(), [1, 2]),
    (pa.uint64(), [1, 2**64 - 1]),
    (pa.float16(), [np.float16(1), np.float16("nan")]),
    (pa.float64(), [1.0, math.nan]),
    (pa.bool_(), [True, False]),
    (pa.null(), [None]),
    (pa.timestamp("us"), [0, 1]),
    (pa.date32(), [0, 1]),
    (pa.time64("us"), [0, 1]),
    (pa.duration("s"), [0, 1]),
    (pa.decimal128(5, 2), [Decimal("1.5"), Decimal("2")]),
    (pa.list_(pa.int32()), [[1, 2], [3, 499], [], [1, 2, 3]]),
    (pa.list_(pa.int64()), [[1, 2], [3, 500], [-1], [2**62]]),
    (pa.large_list(pa.int64()), [[1, 2], [3]]),
    (pa.list_(pa.uint8(), 2), [[1, 2], [3, 4]]),
    (pa.list_(pa.float32()), [[1.0, 2.5], [math.nan]]),
    (pa.list_(pa.string()), [["yes"], ["no", None]]),
    (pa.list_(pa.list_(pa.int64())), [[[1]], [[]]]),
    (pa.struct({"role": pa.string()}), [{"role": "user"}]),
    (
        pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        [
            [{"role": "user", "content": "yes"}],
            [{"role": None, "content": "no"}],
            [{"role": "user", "content": None}],
            [],
        ],
    ),
    (pa.list_(pa.struct({"role": pa.int8(), "content": pa.int8()})), [[{"role": 1, "content": 2}]]),
]


@st.composite
def arrow_tables(draw: Any) -> pa.Table:
    """Columns of any type that a parquet file may have."""
    ids = "_ids" if draw(st.integers(0, 3)) == 0 else ""
    count, columns = draw(st.integers(1, 3)), {}
    usual = st.sampled_from(KINDS[16:21] if ids else KINDS[:4]) | st.sampled_from(KINDS)
    for name in ("prompt", "chosen", "rejected"):
        kind, values = draw(usual)
        cells = draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
        columns[name + ids] = pa.array(cells, kind)
    return pa.table(columns)


ODD_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    10**30,
    0.5,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    1e-300,
    "",
    "auto",
    "no",
]
ODD_VALUES += [
    "yes",
    "ß",
    "1",
    "0.1",
    "{}",
    "{",
    "[]",
    '{"a": 1}',
    "\0",
    "\ud800",
    "x" * 300,
    [],
    [1],
    ["a"],
    [None],
    [[]],
]
ODD_VALUES += [{}, {"a": 1}, {1: None}, {"": math.nan}, b"x", (1, 2), {1}, Path("x"), len, object, Decimal("1"), 1j]
ODD_VALUES += [np.float64(2), np.int64(3), np.float32("nan"), np.array([1, 2]), torch.float32, torch.ones(2), Ellipsis]
FIELDS = [field.name for field in dataclasses.fields(DPOConfig)]


@st.composite
def an_option(draw: Any) -> tuple[str, Any]:
    name = draw(st.sampled_from([*FIELDS, *VERDICTS]))
    odd = st.sampled_from(ODD_VALUES) | st.lists(st.sampled_from(ODD_VALUES), max_size=3)
    return name, draw(st.sampled_from(CHOICES[name]) | odd if name in CHOICES else odd)


@st.composite
def token_logps(draw: Any) -> tuple[list[float], list[float], list[int], set[int]]:
    """Token log-probs, those of the reference by sequence, lengths, and the pairs with a number that is not finite."""
    pairs = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 4), min_size=2 * pairs, max_size=2 * pairs))
    logp = st.floats(-800, 0, width=32) | st.sampled_from([0.0, -1e-7, -1e-3, -1.0])
    policy = draw(st.lists(logp, min_size=sum(lengths), max_size=sum(lengths)))
    reference = draw(st.lists(st.floats(-3200, 0), min_size=2 * pairs, max_size=2 * pairs))
    broken: set[int] = set()
    if draw(st.booleans()):
        place = draw(st.integers(0, 2 * pairs - 1))
        reference[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        broken = {place // 2}
    return policy, reference, lengths, broken


@st.composite
def padded_batches(draw: Any) -> Any:
    """What a data_collator may return: rows of TRL's form, as they should be or broken in a place."""
    rows, width = 2 * draw(st.integers(1, 2)), draw(st.integers(2, 5))
    batch: dict[Any, Any] = {
        "input_ids": torch.arange(rows * width).view(rows, width) % width,
        "attention_mask": torch.ones(rows, width, dtype=torch.int64),
        "completion_mask": (torch.arange(width) >= draw(st.integers(1, width - 1))).long().repeat(rows, 1),
    }
    name = draw(st.sampled_from(list(batch)))
    odd = [None, 3, "text", [], [[1]], torch.ones(rows, width), torch.zeros(rows, width), torch.ones(1, width)]
    odd += [torch.ones(rows + 1, width), torch.full((rows, width), math.nan), torch.ones(rows, width, 1), -batch[name]]
    kind = draw(st.integers(0, 4))
    if kind == 0:
        batch[name] = draw(st.sampled_from(odd))
    elif kind == 1:
        del batch[name]
    elif kind == 2:
        batch[draw(st.sampled_from(["ref_logps", "pixel_values", "labels", 1, "chosen_input_ids"]))] = draw(st.just(1))
    elif kind == 3:
        return draw(st.sampled_from([None, [], [batch], "text", {}]))
    else:
        batch[name][draw(st.integers(0, rows - 1)), draw(st.integers(0, width - 1))] = draw(st.sampled_from([0, 1, -1]))
    return batch


def a_run() -> SearchStrategy[dict[str, Any]]:
    """Options of a run of a step or two."""
    return st.fixed_dictionaries(
        {"max_steps": st.integers(1, 2)},
        optional={
            "loss_type": st.sampled_from(["sigmoid", "ipo", "aot", "bco_pair", "exo_pair", "orpo", ["sigmoid", "sft"]]),
            "beta": st.sampled_from([1e-9, 0.1, 10.0]),
            "learning_rate": st.sampled_from([1e-30, 1e-3]),
            "per_device_train_batch_size": st.sampled_from([1, 3, 100]),
            "gradient_accumulation_steps": st.sampled_from([1, 2]),
            "max_tokens_per_microbatch": st.sampled_from([1, 40, 2**31]),
            "max_length": st.sampled_from([2, 20, 2**31]),
            "max_grad_norm": st.sampled_from([0.0, 1e-9, math.inf]),
            "use_peft": st.booleans(),
            "reference_free": st.booleans(),
            "dataloader_drop_last": st.booleans(),
            "seed": st.sampled_from([0, 2**32 - 1]),
            "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant", "reduce_lr_on_plateau"]),
            "optim": st.sampled_from(["adamw_torch", "sgd", "adafactor"]),
            "train_sampling_strategy": st.sampled_from(["sequential", "group_by_length"]),
            "logging_first_step": st.booleans(),
        },
    )
