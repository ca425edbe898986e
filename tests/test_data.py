"""Rows to token pairs: every shape, TRL's own tokens, truncation, what is dropped, and what bad input is told."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk
from tokenizers_for_tests import CHATML, byte_level, metaspace

from fastdpo.data import (
    Limits,
    TokenPair,
    _Encoder,
    check_vocabulary,
    load_rows,
    prepare_tokenizer,
    row_key,
    tokenize_pairs,
    truncate,
)
from fastdpo.rows import common_prefix_length, split_row

DATA = Path(os.environ.get("FASTDPO_DATA", Path(__file__).parents[1] / "../shared/data"))
REAL_FILES = ("hh_explicit_prompt", "hh_implicit_prompt", "hh_conversational")
PLAIN = {"prompt": "Human: Hello\n\nAssistant:", "chosen": " I am well.", "rejected": " Go away!"}
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Hello?"), ("assistant", "I am well."), ("assistant", "Go away!"))
)
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def config(**options: Any) -> Any:
    defaults = {"max_length": None, "max_prompt_length": None, "max_completion_length": None}
    more = {"truncation_mode": "keep_end", "dataset_num_proc": None, "disable_tqdm": True}
    return SimpleNamespace(**{**defaults, **more, **options})


def pairs_of(source: Any, tokenizer: Any, **options: Any) -> list[TokenPair]:
    table = tokenize_pairs(load_rows(source, "train", "train"), tokenizer, config(**options), "train")
    return [TokenPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in table]


def texts_of(pair: TokenPair, tokenizer: Any) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


def real_file(name: str) -> Path:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no real preference data: {path} does not exist (FASTDPO_DATA names another directory)")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="fastdpo")
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


# ---- the tokens of a row ----


def test_explicit_strings_are_tokenized_jointly_and_end_with_one_eos(tokenizer):
    (pair,) = pairs_of([PLAIN], tokenizer)
    assert texts_of(pair, tokenizer) == (PLAIN["prompt"], " I am well.</s>", " Go away!</s>")
    joint = tokenizer(PLAIN["prompt"] + PLAIN["chosen"] + "</s>")["input_ids"]
    assert pair.prompt + pair.chosen == joint


@pytest.mark.parametrize("ending", ["", "</s>", "</s></s>"])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_eos_is_there_once_whoever_else_writes_it(ending, adds_eos):
    tokenizer = byte_level(adds_bos=True, adds_eos=adds_eos)
    (pair,) = pairs_of([{**PLAIN, "chosen": PLAIN["chosen"] + ending}], tokenizer)
    for answer in (pair.chosen, pair.rejected):
        assert answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in pair.prompt


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("written", ["", "<s>"])
def test_bos_is_never_doubled_and_never_invented(adds_bos, written):
    tokenizer = byte_level(adds_bos=adds_bos)
    (pair,) = pairs_of([{**PLAIN, "prompt": written + PLAIN["prompt"]}], tokenizer)
    ids = pair.prompt + pair.chosen + pair.rejected
    assert ids.count(tokenizer.bos_token_id) == (1 if adds_bos or written else 0)
    assert pair.prompt[0] == tokenizer.bos_token_id or not (adds_bos or written)


def test_bos_and_eos_may_be_the_same_token():
    tokenizer = byte_level(bos_token="</s>", eos_token="</s>")
    (pair,) = pairs_of([{**PLAIN, "prompt": ""}], tokenizer)
    assert pair.prompt == [] and pair.chosen.count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_ends_inside_a_token_gives_that_token_to_both_answers(tokenizer, caplog):
    row = {"prompt": "the answer is that you wel", "chosen": "come", "rejected": "l"}
    (pair,) = pairs_of([row], tokenizer)
    joint = [
        tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id] for side in row if side != "prompt"
    ]
    assert [pair.prompt + pair.chosen, pair.prompt + pair.rejected] == joint
    alone = tokenizer(row["prompt"])["input_ids"]
    assert pair.prompt == alone[: len(pair.prompt)] and len(pair.prompt) < len(alone)
    assert "in 1 the last prompt tokens count as answer" in caplog.text


def test_random_texts_keep_the_joint_tokens_for_every_tokenizer():
    generator = random.Random(0)
    pieces = ["the", " dog", " ", "\n", "wel", "come", "I'm", "…", "é", "answer", "?", "  ", "<s>", "1"]
    rows = [
        {column: "".join(generator.choices(pieces, k=generator.randint(1, 6))) for column in PLAIN} for _ in range(150)
    ]
    rows = [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
    for tokenizer in (byte_level(), byte_level(adds_bos=True, adds_eos=True), metaspace()):
        rows_kept = [row for row in rows if row["chosen"] != row["rejected"]]
        pairs = {row_key(pair) for pair in pairs_of(rows_kept, tokenizer)}
        bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
        for row in rows_kept:
            ids = [
                tokenizer(row["prompt"] + tail, add_special_tokens=False)["input_ids"]
                for tail in ("", row["chosen"], row["rejected"])
            ]
            ids = [x if x[: len(bos)] == bos else bos + x for x in ids]
            chosen, rejected = (x + [tokenizer.eos_token_id] for x in ids[1:])
            split = min(common_prefix_length(ids[0], chosen), common_prefix_length(ids[0], rejected))
            pair = TokenPair(ids[0][:split], chosen[split:], rejected[split:])
            assert row_key(pair) in pairs or pair.chosen == pair.rejected or split == 0


# ---- shapes ----


def test_an_implicit_prompt_is_what_both_texts_share(tokenizer):
    row = {side: PLAIN["prompt"] + PLAIN[side] for side in ("chosen", "rejected")}
    assert pairs_of([row], tokenizer) == pairs_of([PLAIN], tokenizer)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("A: I’m sure", "A: I know", "A:"),  # a shared part of a word goes to the answers
        ("A: The Incans", "A: There", "A:"),
        ("A: The Incans", "A: The Aztecs", "A: The"),  # shared whole words are the prompt's
        ("A: welcome!", "A: welcome.", "A: welcome"),
        ("A: welcome", "A: welcome!", "A: welcome"),  # one text is the beginning of the other
        ("A: wel", "A: welcome", "A:"),
        ("A:\nyes", "A:\nno", "A:\n"),
        ("yes", "no", ""),  # nothing in common
        ("yes", "yet", ""),
        ("नमस्ते", "नमस्", ""),  # vowel signs belong to their word
    ],
)
def test_an_implicit_prompt_never_ends_inside_a_word(chosen, rejected, prompt):
    for texts in ((chosen, rejected), (rejected, chosen)):
        split = split_row(dict(zip(("chosen", "rejected"), texts, strict=True)), "row 0")
        assert split == (prompt, texts[0][len(prompt) :], texts[1][len(prompt) :])


def test_chats_are_rendered_by_the_template_without_another_eos(tokenizer):
    (pair,) = pairs_of([CHAT], tokenizer)
    assert texts_of(pair, tokenizer) == (
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
        "I am well.<|im_end|>\n",
        "Go away!<|im_end|>\n",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hello?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["implicit", "messages repeated", "text repeated"],
)
def test_a_prompt_inside_both_conversations_is_found(row, tokenizer):
    assert pairs_of([row], tokenizer) == pairs_of([CHAT], tokenizer)


def test_many_turns_and_a_system_message_stay_in_the_prompt(tokenizer):
    history = [{"role": "system", "content": "Be kind."}, USER, GOOD, {"role": "user", "content": "And you?"}]
    explicit = pairs_of([{"prompt": history, "chosen": [GOOD], "rejected": [BAD]}], tokenizer)
    assert explicit == pairs_of([{"chosen": [*history, GOOD], "rejected": [*history, BAD]}], tokenizer)
    assert tokenizer.decode(explicit[0].prompt).count("<|im_start|>") == 5


def test_tools_reach_the_template_as_a_list_or_as_json(tokenizer):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    as_list = pairs_of([{**CHAT, "tools": tools}], tokenizer)
    assert as_list == pairs_of([{**CHAT, "tools": json.dumps(tools)}], tokenizer)
    assert '"name": "clock"' in tokenizer.decode(as_list[0].prompt)


def test_chat_template_kwargs_count_for_their_own_row_only(tokenizer):
    rows = [{**CHAT, "chat_template_kwargs": {"tools_note": "x"}}, CHAT]
    noted = byte_level(template="{{ tools_note or '' }}" + CHATML)
    first, second = pairs_of(rows, noted)
    assert tokenizer.decode(first.prompt) == "x" + tokenizer.decode(second.prompt)


def test_empty_keys_that_arrow_adds_never_reach_the_template():
    template = "{% for m in messages %}{{ m.keys() | list }}{{ m['content'] }}{% endfor %}"
    tokenizer = byte_level(template=template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "arguments": {"zone": "UTC"}}]}
    with_call = {"prompt": [USER, call], "chosen": [GOOD], "rejected": [BAD]}
    plain, _ = pairs_of(Dataset.from_list([CHAT, with_call]), tokenizer)
    assert "tool_calls" not in tokenizer.decode(plain.prompt)


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_left_out(tokenizer, caplog):
    (pair,) = pairs_of([{**CHAT, "chat_template_kwargs": {"no_thinking": True}}], tokenizer)
    whole = tokenizer.apply_chat_template([USER, GOOD], return_dict=True)["input_ids"]
    assert pair.prompt + pair.chosen == whole and "in 1 the last prompt tokens" in caplog.text


def test_token_ids_are_taken_as_they_are(tokenizer):
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    assert pairs_of([row], tokenizer) == [TokenPair([1, 2], [3, 4], [5])]


# ---- sources ----


def test_every_source_gives_the_same_pairs(tokenizer, tmp_path):
    rows = [PLAIN, {**PLAIN, "chosen": " None"}, {**PLAIN, "chosen": " 2020-01-01", "rejected": " 7"}]
    table = Dataset.from_list(rows)
    columns = {column: [row[column] for row in rows] for column in PLAIN}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.save_to_disk(tmp_path / "saved")
    DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "saved_splits")
    sources = [
        rows,
        columns,
        table,
        table.to_iterable_dataset(),
        DatasetDict(train=table),
        load_from_disk(tmp_path / "saved"),
    ]
    sources += [tmp_path / name for name in ("rows.jsonl", "rows.json", "columns.json", "rows.parquet", "rows.csv")]
    sources += [str(tmp_path / name) for name in ("saved", "saved_splits", "rows.jsonl")]
    expected = pairs_of(rows, tokenizer)
    assert len(expected) == 3
    for source in sources:
        assert pairs_of(source, tokenizer) == expected, source


def test_one_json_object_is_one_row(tokenizer, tmp_path):
    for row in (PLAIN, CHAT):
        (tmp_path / "row.json").write_text(json.dumps(row))
        assert pairs_of(tmp_path / "row.json", tokenizer) == pairs_of([row], tokenizer)


def test_rows_do_not_depend_on_the_number_of_processes(tokenizer):
    rows = [{**PLAIN, "chosen": f" {n}" if n % 7 else ""} for n in range(60)]
    assert pairs_of(rows, tokenizer, dataset_num_proc=2) == pairs_of(rows, tokenizer)
    assert len(pairs_of(rows, tokenizer)) == 51


def test_the_function_that_is_sent_to_processes_pickles(tokenizer):
    encoder = pickle.loads(pickle.dumps(_Encoder(tokenizer, Limits(), "train", [])))
    assert encoder({key: [value] for key, value in PLAIN.items()}, [0])["fate"] == [0]


def test_a_tokenized_table_is_found_again_but_never_for_another_tokenizer_or_limit(tmp_path, monkeypatch):
    Dataset.from_list([PLAIN, CHAT_AS_TEXT]).save_to_disk(tmp_path / "saved")
    calls = []
    encode = _Encoder.__call__
    monkeypatch.setattr(_Encoder, "__call__", lambda self, b, i: calls.append(len(i)) or encode(self, b, i))

    def rows_encoded(tokenizer: Any, **options: Any) -> int:
        calls.clear()
        pairs_of(tmp_path / "saved", tokenizer, **options)
        return sum(calls) - 1  # the first row is tried before the table

    tokenizer = byte_level()
    assert rows_encoded(tokenizer) == 2
    assert rows_encoded(tokenizer) == 0
    assert rows_encoded(tokenizer, max_completion_length=1) == 2
    assert rows_encoded(byte_level(adds_bos=True)) == 2
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "another"
    assert rows_encoded(changed) == 2


CHAT_AS_TEXT = {"prompt": "Hello?", "chosen": " I am well.", "rejected": " Go away!"}


def test_a_stream_gives_the_pairs_of_its_table_and_counts_its_drops(tokenizer, caplog):
    rows = [{**PLAIN, "chosen": f" {n}" if n % 2 else ""} for n in range(8)]
    read = []

    def generate():
        for row in rows:
            read.append(row)
            yield row

    table = tokenize_pairs(IterableDataset.from_generator(generate), tokenizer, config(), "train")
    assert isinstance(table, IterableDataset) and len(read) <= 1
    assert [list(row.values()) for row in table] == [
        [p.prompt, p.chosen, p.rejected] for p in pairs_of(rows, tokenizer)
    ]
    assert "train, so far: 8 rows, 4 kept, dropped 4 with an empty completion, 0 with chosen equal" in caplog.text


# ---- truncation ----


def random_case(generator: random.Random) -> tuple[TokenPair, Limits]:
    lengths = [generator.choice([0, 1, 2, 5, generator.randint(0, 40)]) for _ in range(3)]
    pair = TokenPair(*(list(range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)))
    limits = [generator.choice([None, generator.randint(1, 50)]) for _ in range(3)]
    return pair, Limits(*limits, generator.choice(["keep_start", "keep_end"]))


def test_truncation_bounds_every_length_and_keeps_contiguous_parts():
    generator = random.Random(1)
    for _ in range(5000):
        pair, limits = random_case(generator)
        cut = truncate(pair, limits)
        longest = max(len(cut.chosen), len(cut.rejected))
        for before, after in ((pair.chosen, cut.chosen), (pair.rejected, cut.rejected)):
            assert after == before[: len(after)]
        kept = len(cut.prompt)
        assert cut.prompt == (
            pair.prompt[:kept] if limits.truncation_mode == "keep_start" else pair.prompt[len(pair.prompt) - kept :]
        )
        if limits.max_completion_length is not None:
            assert longest <= limits.max_completion_length
        if limits.max_length is not None:
            assert kept + longest <= limits.max_length or longest == 0
        assert truncate(cut, limits) == cut


def test_a_pair_that_fits_is_untouched():
    generator = random.Random(2)
    for _ in range(2000):
        pair, limits = random_case(generator)
        longest = max(len(pair.chosen), len(pair.rejected))
        if (
            limits.max_length
            and len(pair.prompt) + longest <= limits.max_length
            and limits.max_completion_length is None
        ):
            assert truncate(pair, limits) == pair


@pytest.mark.parametrize(
    ("limits", "prompt", "answers"),
    [
        (Limits(12, None, None, "keep_start"), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], (2, 2)),
        (Limits(12, None, None, "keep_end"), [4, 5, 6, 7, 8, 9], (6, 3)),
        (Limits(8, None, None, "keep_end"), [8, 9], (6, 3)),
        (Limits(4, None, None, "keep_end"), [9], (3, 3)),
        (Limits(8, None, None, "keep_start"), list(range(10)), (0, 0)),
        (Limits(12, 3, None, "keep_start"), [0, 1, 2], (6, 3)),
        (Limits(8, 3, None, "keep_end"), [7, 8, 9], (5, 3)),
        (Limits(16, 3, None, "keep_end"), list(range(10)), (6, 3)),  # it fits: max_prompt_length does not matter
        (Limits(None, 3, None, "keep_end"), [7, 8, 9], (6, 3)),
        (Limits(None, None, 4, "keep_end"), list(range(10)), (4, 3)),
        (Limits(14, None, 4, "keep_end"), list(range(10)), (4, 3)),  # answers are cut before the prompt
    ],
    ids=str,
)
def test_truncation_by_hand(limits, prompt, answers):
    cut = truncate(TokenPair(list(range(10)), list(range(20, 26)), list(range(30, 33))), limits)
    assert (cut.prompt, (len(cut.chosen), len(cut.rejected))) == (prompt, answers)


# ---- what is dropped, said and shown ----


def test_rows_that_teach_nothing_are_dropped_and_counted(tokenizer, caplog):
    blank = [{"role": "assistant", "content": " "}]
    rows = [PLAIN, {**PLAIN, "rejected": ""}, {**PLAIN, "chosen": PLAIN["rejected"]}, {**PLAIN, "chosen": "  "}]
    assert len(pairs_of(rows, tokenizer)) == 1
    pair = pairs_of([PLAIN], tokenizer)[0]
    longest = f"longest pair {pair.length} tokens, 0 truncated"
    assert (
        f"train: 4 rows, 1 kept, dropped 2 with an empty completion, 1 with chosen equal to rejected; {longest}"
        in caplog.text
    )
    assert len(pairs_of([CHAT, {**CHAT, "chosen": blank}, {**CHAT, "chosen": [BAD]}], tokenizer)) == 1


def test_answers_that_truncation_empties_or_makes_equal_are_dropped(tokenizer):
    rows = [PLAIN, {**PLAIN, "chosen": " Go away?"}, {**PLAIN, "prompt": PLAIN["prompt"] * 5}]
    limit = len(tokenizer(PLAIN["prompt"])["input_ids"]) + 1
    (pair,) = pairs_of(rows, tokenizer, max_length=limit, truncation_mode="keep_start")
    assert len(pair.prompt) == limit - 1 and pair.chosen != pair.rejected


def test_one_token_after_an_empty_prompt_has_nothing_scored_and_is_dropped(tokenizer):
    rows = {"prompt_ids": [[], [1]], "chosen_ids": [[3], [3]], "rejected_ids": [[4, 5], [4, 5]]}
    assert pairs_of(rows, tokenizer) == [TokenPair([1], [3], [4, 5])]


def test_nothing_left_is_an_error_with_the_counts(tokenizer):
    with pytest.raises(ValueError, match="No row of the train dataset.*dropped 1 with an empty completion"):
        pairs_of([{**PLAIN, "chosen": ""}], tokenizer)


def test_one_row_is_shown_with_its_scored_part_marked(tokenizer, caplog):
    pairs_of([PLAIN, PLAIN], tokenizer)
    assert caplog.text.count("⟦") == 3  # in the heading, chosen, rejected
    assert "Assistant:⟦ I am well.</s>⟧" in caplog.text and "⟦ Go away!</s>⟧" in caplog.text
    caplog.clear()
    pairs_of([{**PLAIN, "prompt": "x" * 5000, "chosen": "y" * 5000}], tokenizer)
    assert len(caplog.text) < 2500


def test_row_keys_tell_apart_rows_with_the_same_ids_split_elsewhere():
    rows = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [3, 4], []), ([1, 2], [4], [3]), ([1, 2], [3], [5])]
    keys = {row_key(TokenPair(*row)) for row in rows}
    assert len(keys) == 5 and {len(key) for key in keys} == {16}
    assert row_key(TokenPair([1, 2], [3], [4])) == row_key(TokenPair([1, 2], [3], [4]))


# ---- bad input: one clear error each ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "columns 'prompt', 'chosen'; missing 'rejected'"),
        ([{"prompt": "a", "completion": "b", "label": True}], "missing 'chosen' and 'rejected'.*unpaired"),
        ([{"messages": [USER, GOOD]}], "supervised fine-tuning"),
        ([{**PLAIN, "images": ["x.png"]}], "images are not supported"),
        ([PLAIN, {**PLAIN, "chosen": 5}], "row 1: column 'chosen' is int, expected a string or a list"),
        ([PLAIN, {**PLAIN, "prompt": None}], "row 1: column 'prompt' is nothing"),
        ([{**PLAIN, "chosen": ["a", "b"]}], "row 0: column 'chosen' is list of str"),
        ([{**CHAT, "chosen": [{"content": "a"}]}], "row 0: column 'chosen' is list of dict, expected"),
        (
            [{**PLAIN, "chosen": [GOOD], "rejected": [BAD]}],
            "row 0 mixes formats: prompt is str, chosen is list of dict",
        ),
        ([{**PLAIN, "rejected": [BAD]}], "row 0 mixes formats"),
        ([{"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}], "row 0: chosen and rejected share no first message"),
        ([{**CHAT, "prompt": []}], "row 0: the prompt has no messages"),
        ([{**CHAT, "tools": "{oops"}], "row 0: column 'tools' is not valid json"),
        ([{**CHAT, "chat_template_kwargs": 3}], "row 0: column 'chat_template_kwargs' is int, expected a dict"),
        ([{"prompt_ids": [1], "chosen_ids": ["a"], "rejected_ids": [2]}], "column 'chosen_ids' is list of str"),
        ([{"prompt_ids": [1], "chosen_ids": [-100], "rejected_ids": [2]}], "expected a list of token ids"),
        ([], "The train dataset is empty"),
        ([PLAIN, "text"], "row 1 is of type str, expected a dict"),
        ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, "columns of different lengths"),
        (7, "is of type int; expected a datasets.Dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_rows_are_told_what_came_and_what_was_expected(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        pairs_of(rows, tokenizer)


def test_a_bad_row_is_named_from_another_process_too(tokenizer):
    rows = [PLAIN] * 30 + [{**PLAIN, "chosen": 5}]
    with pytest.raises(ValueError, match="row 30: column 'chosen' is int"):
        pairs_of(rows, tokenizer, dataset_num_proc=2)


def test_a_bad_row_of_a_stream_is_named(tokenizer):
    stream = IterableDataset.from_generator(lambda: iter([PLAIN, {**PLAIN, "chosen": 5}]))
    with pytest.raises(ValueError, match="row 1: column 'chosen' is int"):
        pairs_of(stream, tokenizer)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n\n", "is empty"),
        ("none.json", "[]", "is empty"),
        ("header.csv", "prompt,chosen,rejected\n", "is empty"),
        ("broken.jsonl", json.dumps(PLAIN) + "\n{oops\n", "not valid json in line 2, column 2"),
        ("broken.json", '[\n{"prompt": 1,}\n]', "not valid json in line 2"),
        ("broken.parquet", "PAR?", "cannot be read as parquet"),
        ("scalars.jsonl", "1\n2\n", "row 0 is of type int"),
        ("rows.xlsx", "x", "suffix '.xlsx'; expected one of .jsonl, .json, .parquet, .csv"),
        ("long.csv", "prompt,chosen,rejected\na,b\n", "column 'rejected' is nothing"),
    ],
    ids=lambda value: value if len(value) < 15 else "",
)
def test_bad_files_are_told_apart(file, content, message, tmp_path, tokenizer):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        pairs_of(tmp_path / file, tokenizer)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/file", Path("missing")], ids=str)
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rows(source, "train", "train")


def test_a_missing_split_names_those_there_are():
    table = Dataset.from_list([PLAIN])
    with pytest.raises(ValueError, match="no split 'validation', only 'train', 'test'"):
        load_rows(DatasetDict(train=table, test=table), "validation", "eval")


def test_chats_need_a_chat_template():
    with pytest.raises(ValueError, match="row 0 holds chat messages, but the tokenizer has no chat template"):
        pairs_of([CHAT], byte_level(template=None))


def test_a_template_that_refuses_a_row_is_quoted_with_the_row(tokenizer):
    strict = byte_level(template="{{ raise_exception('system role not supported') }}")
    with pytest.raises(ValueError, match=r"row 0: the chat template refuses the messages \(user\): system role not"):
        pairs_of([CHAT], strict)


def test_a_template_that_rewrites_the_prompt_is_an_error_with_the_first_difference():
    counting = byte_level(template="{{ messages | length }} messages: " + CHATML)
    with pytest.raises(ValueError, match="row 0: the prompt is not a prefix.*'1 messages: .*becomes '2 messages: "):
        pairs_of([CHAT], counting)


def test_strings_need_an_eos_token():
    with pytest.raises(ValueError, match="end-of-sequence token, and it has none"):
        pairs_of([PLAIN], byte_level(eos_token=None))
    assert len(pairs_of([CHAT], byte_level(eos_token=None))) == 1


def test_a_pad_token_is_chosen_and_said(caplog):
    for special, chosen in (({}, "</s>"), ({"eos_token": None}, "<unk>")):
        tokenizer = byte_level(pad_token=None, **special)
        prepare_tokenizer(tokenizer)
        assert tokenizer.pad_token == chosen and repr(chosen) in caplog.text
    untouched = byte_level()
    prepare_tokenizer(untouched)
    assert untouched.pad_token == "<pad>"


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match="no end-of-sequence or unknown token"):
        prepare_tokenizer(byte_level(pad_token=None, eos_token=None, unk_token=None))
    for thing, message in ((None, "type NoneType"), (SimpleNamespace(tokenizer=1), "Pass its .tokenizer")):
        with pytest.raises(ValueError, match=message):
            prepare_tokenizer(thing)


def test_a_token_id_beyond_the_embedding_is_an_error_with_the_remedy(tokenizer):
    table = tokenize_pairs(Dataset.from_list([PLAIN, {**PLAIN, "chosen": ""}]), tokenizer, config(), "train")
    largest = max(max(ids) for column in table.column_names for ids in table[column])
    assert check_vocabulary(table, largest + 1, tokenizer) is table
    message = rf"token id {largest} .*embedding has {largest} rows.*resize_token_embeddings\({len(tokenizer)}\)"
    stream = tokenize_pairs(Dataset.from_list([PLAIN]).to_iterable_dataset(), tokenizer, config(), "train")
    assert next(iter(check_vocabulary(stream, largest + 1, tokenizer))) == table[0]
    for too_large in (table, largest, stream):
        with pytest.raises(ValueError, match=message):
            list(check_vocabulary(too_large, largest, tokenizer))


# ---- TRL's tokens on real data ----


@pytest.fixture(scope="module")
def trl_pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What TRL's own trainer makes of rows; a one-layer model satisfies its constructor."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    def tokenize(rows: Dataset, tokenizer: Any) -> list[TokenPair]:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        directory = str(tmp_path_factory.mktemp("trl"))
        args = trl.DPOConfig(output_dir=directory, max_length=None, use_cpu=True, bf16=False, report_to=[])
        trainer = trl.DPOTrainer(
            model, ref_model=copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer
        )
        return [TokenPair(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]

    return tokenize


@pytest.mark.parametrize(
    "make", [byte_level, lambda: byte_level(adds_bos=True), metaspace], ids=["gpt2", "bos", "llama2"]
)
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_rows_have_the_tokens_that_trl_gives_them(name, make, trl_pairs):
    tokenizer, rows = make(), load_rows(real_file(name), "train", "train")
    ours, theirs = pairs_of(rows, tokenizer), trl_pairs(rows, tokenizer)
    assert len(ours) == len(theirs) == len(rows)
    moved = 0
    for row, our, their in zip(rows, ours, theirs, strict=True):
        if our != their:
            # the one difference: TRL ends an implicit prompt at a character, also inside a word
            assert name == "hh_implicit_prompt"
            assert our.prompt == their.prompt[: len(our.prompt)]
            assert our.prompt + our.chosen == their.prompt + their.chosen
            assert our.prompt + our.rejected == their.prompt + their.rejected
            end = common_prefix_length(row["chosen"], row["rejected"])
            assert row["chosen"][end - 1] != " " and any(row[s][end : end + 1].strip() for s in ("chosen", "rejected"))
            moved += 1
    assert moved <= len(rows) // 3
