"""Several training sets as one: their rows, their shares, and what does not go together."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from conftest import tiny_llama
from datasets import Dataset, IterableDataset
from tokenizers_for_tests import CHAT

import fastdpo
from fastdpo import cli
from fastdpo.mixture import hub_names


def trainer_of(source: Any, tokenizer: Any, quick: dict[str, Any], **options: Any) -> fastdpo.DPOTrainer:
    args = fastdpo.DPOConfig(**quick, **options)
    return fastdpo.DPOTrainer(tiny_llama(), args=args, train_dataset=source, processing_class=tokenizer)


def texts(trainer: fastdpo.DPOTrainer, tokenizer: Any) -> list[str]:
    assert trainer.train_dataset is not None
    return [tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) for row in trainer.train_dataset]


def test_without_weights_every_row_of_every_set_is_there_once(rows, tokenizer, quick, tmp_path) -> None:
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows[4:9])))
    mixed = trainer_of({"few": rows[:4], "more": str(tmp_path / "more.jsonl")}, tokenizer, quick)
    assert texts(mixed, tokenizer) == texts(trainer_of(rows[:9], tokenizer, quick), tokenizer)
    listed = trainer_of([Dataset.from_list(rows[:4]), str(tmp_path / "more.jsonl")], tokenizer, quick)
    assert texts(listed, tokenizer) == texts(mixed, tokenizer)


def test_strings_of_one_set_and_chats_of_another_train_together(rows, tokenizer, quick) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    both = trainer_of({"text": rows[:3], "chat": [CHAT] * 2}, tokenizer, quick)
    assert len(texts(both, tokenizer)) == 5
    assert both.train().global_step == 4


def test_weights_are_the_shares_of_an_epoch_which_ends_with_the_first_set_that_does(rows, tokenizer, quick) -> None:
    first = [{**rows[0], "prompt": f"first {n}"} for n in range(150)]
    second = [{**rows[0], "prompt": f"second {n}"} for n in range(400)]
    drawn = trainer_of([first, second], tokenizer, quick, train_dataset_weights=[3, 1], seed=1)
    seen = texts(drawn, tokenizer)
    kinds = ["first" in text for text in seen]
    assert sum(kinds) == 150 and abs(sum(kinds) / len(kinds) - 0.75) < 0.06
    assert len(set(seen)) == len(seen)  # no row twice
    again, other = (
        texts(trainer_of([first, second], tokenizer, quick, train_dataset_weights=[3, 1], seed=s), tokenizer)
        for s in (1, 2)
    )
    assert seen == again != other
    named = {"weak": second, "strong": first}
    by_name = trainer_of(named, tokenizer, quick, train_dataset_weights={"strong": 3, "weak": 1}, seed=1)
    kinds = ["first" in text for text in texts(by_name, tokenizer)]
    assert sum(kinds) == 150 and abs(sum(kinds) / len(kinds) - 0.75) < 0.06


def test_streams_are_drawn_by_weight_too(rows, tokenizer, quick) -> None:
    def stream(word: str) -> IterableDataset:
        return Dataset.from_list([{**rows[n % 24], "prompt": f"{word} {n}"} for n in range(60)]).to_iterable_dataset()

    drawn = trainer_of({"a": stream("first"), "b": stream("second")}, tokenizer, quick, train_dataset_weights=[4, 1])
    kinds = ["first" in text for text in texts(drawn, tokenizer)[:60]]
    assert abs(sum(kinds) / len(kinds) - 0.8) < 0.12
    assert drawn.train().global_step == 4


@pytest.mark.parametrize(
    ("make", "weights", "words"),
    [
        (lambda rows: [rows, rows], [1.0], r"train_dataset_weights=\[1.0\], and the datasets of train_dataset are 2"),
        (lambda rows: rows, [1.0], "the datasets of train_dataset are 1: give a weight to each of several"),
        (lambda rows: [rows, rows], [1.0, 0.0], r"train_dataset_weights must be above 0, got \[1.0, 0.0\]"),
        (lambda rows: {"a": rows, "b": rows}, {"a": 1.0, "c": 1.0}, "weights names a, c, .* train_dataset are a, b"),
        (lambda rows: [rows, rows], {"0": 1.0, "1": 0.0}, "train_dataset_weights must be above 0"),
        (lambda rows: {}, None, "The train dataset is empty"),
        (lambda rows: [rows, Dataset.from_list(rows).to_iterable_dataset()], None, "mixes streams and tables"),
        (lambda rows: {"promt": ["a"], "chosn": ["b"]}, None, "train dataset has the columns 'promt', 'chosn'"),
        (lambda rows: {"good": rows, "bad": [{"text": "x"}]}, None, "train_bad dataset has the columns 'text'"),
    ],
    ids=[
        "too few weights",
        "one set",
        "weight 0",
        "other names",
        "weight 0 by name",
        "none",
        "streams and tables",
        "a misspelt column",
        "a bad set",
    ],
)
def test_what_does_not_go_together_is_refused(make, weights, words, rows, tokenizer, quick) -> None:
    with pytest.raises(ValueError, match=words):
        trainer_of(make(rows), tokenizer, quick, train_dataset_weights=weights)


def test_names_that_are_no_files_here_are_the_hubs(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    assert hub_names(["me/pairs", str(tmp_path / "a.jsonl")]) == ("me/pairs",)
    assert hub_names([{"chosen": "a"}]) == () == hub_names(None)


def test_the_shell_takes_several_sets_and_names_those_to_evaluate_on(
    rows, tokenizer, tmp_path, quick, monkeypatch, caplog
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, part in (("a", rows[:8]), ("b", rows[8:16]), ("c", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (tmp_path / "run.yaml").write_text(
        f"train_dataset: [{tmp_path}/a.jsonl, {tmp_path}/b.jsonl]\ntrain_dataset_weights: [1, 3]\n"
        f"eval_dataset: {{kept: {tmp_path}/c.jsonl}}\nmax_steps: 2\noutput_dir: {tmp_path}/out\nreport_to: none\n"
    )
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--model", str(tmp_path / "model"), "--disable_tqdm"]
    trained = {}
    monkeypatch.setattr("fastdpo.messages.show_messages", lambda config=None: None)
    train = fastdpo.train
    monkeypatch.setattr("fastdpo.train", lambda *a, **k: trained.setdefault("out", train(*a, **k)))
    with caplog.at_level(logging.INFO, "fastdpo"):
        assert cli.main(words) == 0
    assert "0 (8 pairs, 0.25 of the rows), 1 (8 pairs, 0.75 of the rows)" in caplog.text
    assert "eval_kept_loss" in trained["out"].metrics
    assert cli.main([*words, "--eval_dataset", f"new={tmp_path}/c.jsonl", f"{tmp_path}/a.jsonl"]) == 0


def test_two_evaluation_sets_of_one_name_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--model", "m", "--train_dataset", "t", "--eval_dataset", "x/a.jsonl", "y/a.jsonl"])
    assert "two sets called 'a': give names, as in other=y/a.jsonl" in capsys.readouterr().err
