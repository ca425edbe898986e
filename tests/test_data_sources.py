"""Where rows come from, and what bad input is told: one clear error each."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk
from tokenizers_for_tests import BAD, CHAT, CHATML, GOOD, PLAIN, USER, byte_level, config, pairs_of

from fastdpo.data import check_vocabulary, load_rows, prepare_tokenizer, tokenize_pairs


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="fastdpo")
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


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


def test_a_directory_of_files_is_read_and_one_without_is_refused(tokenizer, tmp_path):
    for name in ("full", "hollow"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "train.jsonl").write_text(json.dumps(PLAIN) + "\n")
    assert pairs_of(tmp_path / "full", tokenizer) == pairs_of([PLAIN], tokenizer)
    with pytest.raises(ValueError, match="a directory that neither save_to_disk made nor load_dataset can read"):
        load_rows(tmp_path / "hollow", "train", "train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "columns 'prompt', 'chosen'; missing 'rejected'"),
        ([{"prompt": "a", "completion": "b", "label": True}], "unpaired rows .prompt, completion, label.*pair them"),
        ([{"messages": [USER, GOOD]}], "supervised fine-tuning"),
        ([{**PLAIN, "images": ["x.png"]}], "rows with images need a vision-language model"),
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
        ([{"prompt_ids": [1], "chosen_ids": [2**40], "rejected_ids": [2]}], "expected a list of token ids"),
        ([{"prompt_ids": [1], "chosen_ids": [3, -1], "rejected_ids": [2]}], r"\(>= 0\): item 1 is -1\."),
        ([{"prompt_ids": [2**63 - 1], "chosen_ids": [3], "rejected_ids": [2]}], "item 0 is 9223372036854775807"),
        ([{**CHAT, "chosen": [GOOD, {"content": "a"}]}], "message 1 is one without 'role', with the keys 'content'"),
        ([{**CHAT, "chosen": [{"from": "gpt", "value": "a"}]}], "rename 'from' to 'role' and 'value' to 'content'"),
        ([{**CHAT, "chosen": [{"role": 5, "content": "a"}]}], "message 0 is one whose role is int"),
        ([{**CHAT, "chosen": [{**GOOD, "content": 5}]}], "column 'chosen', message 0: the content is int, expected"),
        ([{**PLAIN, "chosen": "\ud83d"}], "cannot be made a table: .*surrogates not allowed"),
        ([], "The train dataset is empty"),
        ([PLAIN, "text"], "row 1 is of type str, expected a dict"),
        ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, "columns of different lengths"),
        (7, "is of type int; expected a datasets.Dataset"),
        (pd.DataFrame([PLAIN]), r"is of type DataFrame; .* Give datasets.Dataset.from_pandas\(table, preserve_index"),
        (pa.table({"chosen": ["a"]}), r"is of type Table; .* Give datasets.Dataset\(table\)"),
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


def test_later_rows_of_a_stream_may_have_columns_that_nothing_reads_but_no_others(tokenizer):
    def pairs(**more):
        return pairs_of(IterableDataset.from_generator(lambda: iter([PLAIN, {**PLAIN, **more}])), tokenizer)

    first, second = pairs(source="the web", label=True)
    assert first == second
    with pytest.raises(ValueError, match="the stream has the column 'tools' there"):
        pairs(tools=[])


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
        ("wide.csv", 'prompt,chosen,rejected\n"q\n",a,b\nq2,c,d,e\n', "ends in line 4 has 4 fields, and the header 3"),
        ("twice.csv", "prompt,chosen,rejected,chosen\nq,a,b,c\n", "has the column 'chosen' more than once"),
        ("twice.jsonl", json.dumps(PLAIN) + '\n{"chosen": "a", "chosen": "b"}', "line 2: .* the key 'chosen' more"),
        ("digits.jsonl", '{"prompt": ' + "1" * 5000 + "}", "in line 1: .*; give it as a string or not at all$"),
    ],
    ids=lambda value: value if len(value) < 15 else "",
)
def test_bad_files_are_told_apart(file, content, message, tmp_path, tokenizer):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        pairs_of(tmp_path / file, tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("é".encode("utf-16"), "line 1 is not UTF-8: save the file as UTF-8"),
        ("x\n\u2028é".encode() + "\né".encode("latin-1"), "line 3 is not UTF-8"),
        (gzip.compress(b"{}"), r"compressed \(gzip\): unpack it"),
    ],
    ids=["utf-16", "latin-1", "gzip"],
)
def test_a_file_that_is_not_utf_8_is_told_by_its_line(content, suffix, message, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(path, "train", "train")


def test_a_parquet_file_without_rows_is_called_empty(tmp_path):
    pq.write_table(pa.table(dict.fromkeys(PLAIN, pa.array([], pa.string()))), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet is empty: it has no rows"):
        load_rows(tmp_path / "none.parquet", "train", "train")


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
