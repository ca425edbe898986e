"""Rows to token pairs: the tokens of every shape, truncation, what is dropped, said and shown."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import random
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from tokenizers_for_tests import (
    BAD,
    CHAT,
    CHATML,
    GOOD,
    PLAIN,
    TOKENIZERS,
    USER,
    byte_level,
    config,
    pairs_of,
)

from fastdpo.data import (
    TokenPair,
    row_key,
    tokenize_pairs,
    truncate,
)
from fastdpo.encoders import Limits, RowEncoder
from fastdpo.rows import split_row


def texts_of(pair: TokenPair, tokenizer: Any) -> tuple[str, str, str]:
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="fastdpo")
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


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


def expected_pair(row: dict[str, str], tokenizer: Any) -> TokenPair:
    """The rule in other words: one BOS if the tokenizer adds it, joint tokens, one EOS, split where the prompt ends."""
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    texts = [row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompt, chosen, rejected = (tokens if tokens[:1] == bos else bos + tokens for tokens in ids)
    chosen, rejected = (tokens + [tokenizer.eos_token_id] for tokens in (chosen, rejected))
    split = 0
    while split < len(prompt) and prompt[split] == chosen[split] == rejected[split]:
        split += 1
    return TokenPair(prompt[:split], chosen[split:], rejected[split:])


@pytest.mark.parametrize("make", TOKENIZERS, ids=["gpt2", "bos", "llama2"])
def test_random_texts_keep_their_joint_tokens(make):
    tokenizer, generator = make(), random.Random(0)
    pieces = ["the", " dog", " ", "\n", "wel", "come", "I'm", "…", "é", "answer", "?", "  ", "<s>", "1"]
    rows = [{key: "".join(generator.choices(pieces, k=generator.randint(1, 6))) for key in PLAIN} for _ in range(200)]
    rows = [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
    expected = [expected_pair(row, tokenizer) for row in rows]
    expected = [pair for pair in expected if pair.chosen != pair.rejected and (pair.prompt or len(pair.chosen) > 1)]
    assert pairs_of(rows, tokenizer) == expected and len(expected) > 100


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


def test_a_conversation_that_goes_on_where_the_other_ends_leaves_both_an_answer(tokenizer):
    (pair,) = pairs_of([{"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}], tokenizer)
    assert pair.prompt == pairs_of([CHAT], tokenizer)[0].prompt
    assert pair.rejected[: len(pair.chosen)] == pair.chosen and len(pair.rejected) > len(pair.chosen)


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
    template = "{% for m in messages %}{{ m }}{% endfor %}"
    tokenizer = byte_level(template=template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "zone": None}]}
    with_call = {"prompt": [USER, call], "chosen": [GOOD], "rejected": [BAD]}
    plain, called = (
        tokenizer.decode(pair.prompt) for pair in pairs_of(Dataset.from_list([CHAT, with_call]), tokenizer)
    )
    assert plain == str(USER)
    assert called == f"{USER}{{'role': 'assistant', 'tool_calls': [{{'name': 'clock'}}]}}"


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_left_out(tokenizer, caplog):
    (pair,) = pairs_of([{**CHAT, "chat_template_kwargs": {"no_thinking": True}}], tokenizer)
    whole = tokenizer.apply_chat_template([USER, GOOD], return_dict=True)["input_ids"]
    assert pair.prompt + pair.chosen == whole and "in 1 the last prompt tokens" in caplog.text


def test_token_ids_are_taken_as_they_are(tokenizer):
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    assert pairs_of([row], tokenizer) == [TokenPair([1, 2], [3, 4], [5])]


def test_rows_do_not_depend_on_the_number_of_processes(tokenizer):
    rows = [{**PLAIN, "chosen": f" {n}" if n % 7 else ""} for n in range(60)]
    assert pairs_of(rows, tokenizer, dataset_num_proc=2) == pairs_of(rows, tokenizer)
    assert len(pairs_of(rows, tokenizer)) == 51


def test_the_function_that_is_sent_to_processes_pickles(tokenizer):
    encoder = pickle.loads(pickle.dumps(RowEncoder(tokenizer, Limits(), "train", [])))
    assert encoder({key: [value] for key, value in PLAIN.items()}, [0])["fate"] == [0]


def test_a_tokenized_table_is_found_again_but_never_for_another_tokenizer_or_limit(tmp_path, monkeypatch):
    Dataset.from_list([PLAIN, PLAIN]).save_to_disk(tmp_path / "saved")
    calls = []
    encode = RowEncoder.__call__
    monkeypatch.setattr(RowEncoder, "__call__", lambda self, b, i: calls.append(len(i)) or encode(self, b, i))

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
        (Limits(7, None, None, "keep_end"), [9], (6, 3)),
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


@pytest.mark.parametrize("columns", [["ref_chosen_logps", "ref_rejected_logps"], ["reference_chosen_logps"]], ids=len)
def test_log_probs_of_a_reference_in_the_rows_are_said_not_to_be_used(columns, tokenizer, caplog):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", **dict.fromkeys(columns, -1.0)}])
    tokenize_pairs(rows, tokenizer, config(), "train")
    (line,) = [record.message for record in caplog.records if "not used" in record.message]
    assert all(column in line for column in columns) and "precompute_ref_log_probs=True" in line


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


def test_a_chat_prompt_that_is_not_how_the_answers_begin_is_refused(tokenizer):
    user, other = ({"role": "user", "content": text} for text in ("hello", "what is the answer?"))
    answer = {"role": "assistant", "content": "quite well"}
    row = {"prompt": [user], "chosen": [other, answer], "rejected": [other, answer | {"content": "no"}]}
    with pytest.raises(ValueError, match="the prompt is not how chosen and rejected begin"):
        pairs_of([row], tokenizer)
